"""`sweep`: many networks at once."""

import dataclasses
import json
import sys
import time

from ..sweep import Sweep, spread
from .options import Values
from .setup import load, pick_device
from .terminal import say


def _rates(text: str, count: int) -> list[float]:
    """`count` learning rates of a number, or LOW:HIGH."""
    low, colon, high = text.partition(":")
    try:
        return spread(float(low), float(high) if colon else float(low), count)
    except ValueError as error:
        raise ValueError(
            f"--lr must be a number, or LOW:HIGH with 0 < LOW <= HIGH, got {text!r} ({error})"
        ) from None


def sweep(values: Values) -> None:
    """Train many networks at once; prints a table, best first, and the accuracy of their mean."""
    from tqdm import tqdm

    replicas, epochs, seed, out = (values[k] for k in ("replicas", "epochs", "seed", "out"))
    train_set, test_set = load(values)
    if out is not None and out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out} is not empty; choose another --out")
    sizes = (train_set.features, *values["hidden"], len(train_set.classes))
    job = Sweep(
        sizes,
        replicas,
        _rates(values["lr"], replicas),
        values["momentum"] or 0.0,
        range(seed, seed + replicas),
        activation=values["activation"],
        optimizer=values["optimizer"],
        device=pick_device(values["device"]),
    )
    started = time.perf_counter()
    with tqdm(total=epochs, unit="epoch", leave=False, disable=None, file=sys.stderr) as bar:
        rows = job.fit(
            train_set,
            epochs,
            values["batch_size"],
            test_set,
            on_epoch=lambda epoch, losses: bar.update(),
        )
    seconds = time.perf_counter() - started
    say(
        f"{replicas} networks {' → '.join(map(str, sizes))} on {job.device}: {seconds:.1f} s, "
        f"{replicas / seconds:.2f} a second"
    )
    say(f"{'network':>7} {'seed':>5} {'lr':>9} {'loss':>9} {'test accuracy':>14}")
    for row in rows[: values["top"]]:
        say(
            f"{row.replica:>7} {row.seed:>5} {row.lr:>9.4g} {row.train_loss:>9.4f} "
            f"{row.test_accuracy:>14.2%}"
        )
    say(f"mean of all networks' probabilities: test accuracy {job.ensemble_accuracy(test_set):.2%}")
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "sweep.jsonl").write_text(
            "".join(json.dumps(dataclasses.asdict(row)) + "\n" for row in rows)
        )
        job.save(out)
