"""`sweep`: many networks at once."""

import contextlib
import dataclasses
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from .. import data, recipes, scoring
from ..data.units import Units
from ..runs import RunFolder
from ..runs.disk import write_text
from ..sweep import Sweep, spread
from . import options, setup, tables
from .options import Values, given
from .terminal import say

_TABLE = "sweep.jsonl"


def _rates(text: str, count: int) -> list[float]:
    """`count` learning rates of a number, or LOW:HIGH."""
    low, colon, high = text.partition(":")
    try:
        return spread(float(low), float(high) if colon else float(low), count)
    except ValueError as error:
        raise ValueError(
            f"--lr must be a number, or LOW:HIGH with 0 < LOW <= HIGH, got {text!r} ({error})"
        ) from None


@contextlib.contextmanager
def _folder(out: Path | None) -> Iterator[Path | None]:
    """--out, empty and for this process alone, before anything is trained."""
    if out is None:
        yield None
        return
    if out.is_dir() and any(not path.name.startswith(".") for path in out.iterdir()):
        raise FileExistsError(f"{out} is not empty; choose another --out")
    with RunFolder.writing(out):
        yield out


def sweep(values: Values) -> None:
    """Train many networks at once; prints a table, best first, and the accuracy of their mean."""
    replicas = values["replicas"]
    rates = _rates(values["lr"], replicas)
    numbers = {name: values[name] for name in ("momentum", "weight_decay")}
    changes = {**given(options.RECIPE, values), **numbers}
    recipe = recipes.changed(recipes.PLAIN, **changes)
    device = setup.pick_device(values["device"])
    train, test, units, recipe = setup.for_sweep(values, recipe)
    setup.refuse_too_large(recipe.network(train), replicas)
    job = Sweep.of(recipe, train, replicas, rates, seed=values["seed"], device=device)
    with _folder(values["out"]) as out:
        say(
            f"{train.name}: {len(train):,} samples; {replicas} networks "
            f"{recipe.describe(job.network(0).config())}; learning rate {values['lr']}; "
            f"{job.device}"
        )
        _train(job, recipe, train, test)
        _print(job, test, values["top"], units)
        if out is not None:
            rows = [json.dumps(dataclasses.asdict(row)) + "\n" for row in job.rows]
            job.save(out)
            write_text(out / _TABLE, "".join(rows))


def _train(job: Sweep, recipe: recipes.Recipe, train: data.Dataset, test: data.Dataset) -> None:
    """Train all networks, with a progress bar."""
    from tqdm import tqdm

    started = time.perf_counter()
    with tqdm(total=recipe.epochs, unit="epoch", leave=False, disable=None, file=sys.stderr) as bar:
        job.fit(
            train,
            recipe.epochs,
            recipe.batch_size,
            test,
            on_epoch=lambda epoch, losses: bar.update(),
        )
    seconds = time.perf_counter() - started
    say(f"trained {seconds:.1f} s, {job.replicas / seconds:.2f} networks a second")


def _print(job: Sweep, test: data.Dataset, top: int, units: Units | None) -> None:
    """The best networks, how many diverged, and what all others do together."""
    labels = test.is_classification
    quality = "test accuracy" if labels else "test loss"
    say(f"{'network':>7} {'seed':>5} {'lr':>9} {'loss':>9} {quality:>14}")
    for row in job.rows[:top]:
        result = f"{row.test_accuracy:.2%}" if labels else f"{row.test_loss:.4f}"
        say(
            f"{row.replica:>7} {row.seed:>5} {row.lr:>9.4g} {row.train_loss:>9.4f} {result:>14}"
            + (
                ""
                if labels
                else scoring.line(tables.quality(job.network(row.replica), job.loss, test, units))
            )
            + ("  diverged" if row.diverged else "")
        )
    diverged = sum(row.diverged for row in job.rows)
    if labels:
        together = job.ensemble_accuracy(test)
        share = "none is left" if math.isnan(together) else f"test accuracy {together:.2%}"
        others = f", without the {diverged} that diverged" if diverged else ""
        say(f"mean of all networks' probabilities{others}: {share}")
