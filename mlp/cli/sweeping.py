"""`sweep`: trains many networks at once."""

import contextlib
import dataclasses
import itertools
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .. import progress, recipes, scoring
from ..data.dataset import require
from ..packs import Settings
from ..runs import RunFolder
from ..runs.disk import write_text
from ..sweep import Sweep, spread
from . import options, setup, tables
from .options import Values, given, number
from .terminal import say

_TABLE = "sweep.jsonl"
_LISTS = ("hidden", "activation", "optimizer", "momentum", "weight_decay", "batch_size")


def _rates(text: str, count: int) -> list[float]:
    """`count` learning rates from a text, a number or LOW:HIGH."""
    low, colon, high = text.partition(":")
    try:
        return spread(number(low), number(high) if colon else number(low), count)
    except ValueError:
        raise ValueError(
            f"--lr must be a number, or LOW:HIGH with 0 < LOW <= HIGH, got {text!r}"
        ) from None


@contextlib.contextmanager
def _folder(out: Path | None) -> Iterator[Path | None]:
    """A context with the folder --out, which must be empty, and which only this process writes."""
    if out is None:
        yield None
        return
    if out.is_dir() and any(not path.name.startswith(".") for path in out.iterdir()):
        raise FileExistsError(f"{out} is not empty; choose another --out")
    with RunFolder.writing(out):
        yield out


def sweep(values: Values) -> None:
    """Train many networks at once. Print a table, best first, and the accuracy of their mean."""
    require("sklearn", "scikit-learn", "measuring networks")
    replicas = values["replicas"]
    rates = _rates(values["lr"], replicas)
    given_lists = {name: values[name] for name in _LISTS if values[name] is not None}
    choices = [dict(zip(given_lists, one)) for one in itertools.product(*given_lists.values())]
    common = {**given(options.RECIPE, values), **choices[0]}
    recipe = recipes.changed(recipes.PLAIN, **common)
    places: dict[str, Any] = {
        "device": setup.pick_device(values["device"]),
        "devices": setup.pick_devices(values["device"], values["devices"]),
    }
    found, recipe = setup.for_sweep(values, recipe)
    every = [recipes.changed(recipe, **choice) for choice in choices]
    for one in every:
        setup.refuse_too_large(one.network(found.train), replicas)
    job: Sweep
    if len(every) == 1 and not _needs_settings(values):
        job = Sweep.of(recipe, found.train, replicas, rates, seed=values["seed"], **places)
    else:
        job = Sweep(
            [one for r in every for one in _settings(r, rates, values["seed"])],
            loss=recipe.make_loss(),
            **places,
        )
    with _folder(values["out"]) as out:
        _say(job, recipe, found, values, every)
        _train(job, recipe, found)
        _print(job, found, values["top"])
        if out is not None:
            rows = [json.dumps(dataclasses.asdict(row)) + "\n" for row in job.rows]
            job.save(out)
            write_text(out / _TABLE, "".join(rows))


def _needs_settings(values: Values) -> bool:
    """True if the options ask for more than replicas of one network can have."""
    names = ("schedule", "early_stopping", "class_weight")
    return any(values[name] is not None for name in names)


def _settings(recipe: recipes.Recipe, rates: list[float], seed: int) -> list[Settings]:
    """Settings of one network for each learning rate, with seeds that count on."""
    numbers = {name: v for name, v in recipe.optimizer_options.items() if name != "lr"}
    own = {name: numbers.pop(name, 0.0) for name in ("momentum", "weight_decay")}
    names = ["hidden", "activation", "output_activation", "bias", "init", "optimizer"]
    names += ["schedule", "warmup", "batch_size"]
    plain = Settings(**{name: getattr(recipe, name) for name in names}, **own, options=numbers)
    return [dataclasses.replace(plain, lr=rate, seed=seed + i) for i, rate in enumerate(rates)]


def _say(
    job: Sweep, recipe: recipes.Recipe, found: setup.Data, values: Values, every: list
) -> None:
    """Print one line about the networks and the data."""
    if len(every) == 1:
        network = recipe.network(found.train)
        what = f"{job.replicas} networks {recipe.describe(network)}"
    else:
        what = f"{job.replicas} networks of {len(every)} settings"
    train, shares = found.train, len(job.shares)
    where = f"{shares} devices" if shares > 1 else str(job.device)
    say(f"{train.name}: {len(train):,} samples; {what}; learning rate {values['lr']}; {where}")


def _train(job: Sweep, recipe: recipes.Recipe, found: setup.Data) -> None:
    """Train all networks, with a progress bar."""
    started, alone = time.perf_counter(), bool(job.settings)
    total = recipe.epochs * (job.replicas if alone else 1)
    with progress.bar(total, "epoch") as bar:
        job.fit(
            found.train,
            recipe.epochs,
            recipe.batch_size,
            found.test,
            on_epoch=lambda epoch, losses: bar.update(),
            validation=found.validation,
            early_stopping=recipe.early_stopping,
            on_progress=bar.update,
        )
    seconds = time.perf_counter() - started
    say(f"trained {seconds:.1f} s, {job.replicas / seconds:.2f} networks a second")


def _print(job: Sweep, found: setup.Data, top: int) -> None:
    """Print the best networks, the count of diverged ones, and the accuracy of all others' mean."""
    data = found.test if found.validation is None else found.validation
    name = "test" if found.validation is None else "validation"
    labels = data.is_classification
    quality = f"{name} accuracy" if labels else f"{name} loss"
    say(f"{'network':>7} {'seed':>5} {'lr':>9} {'loss':>9} {quality:>19}")
    varied = _varied(job)
    for row in job.rows[:top]:
        value = getattr(row, f"{name}_{'accuracy' if labels else 'loss'}")
        result = f"{value:.2%}" if labels else f"{value:.4f}"
        measured = tables.quality(job.network(row.replica), job.loss, data, found.facts.units)
        own = [f"{key} {_words(row.settings[key])}" for key in varied if key in row.settings]
        say(
            f"{row.replica:>7} {row.seed:>5} {row.lr:>9.4g} {row.train_loss:>9.4f} {result:>19}"
            + scoring.line(measured)
            + (f"  {', '.join(own)}" if own else "")
            + ("  diverged" if row.diverged else "")
        )
    diverged = sum(row.diverged for row in job.rows)
    if labels:
        together = job.ensemble_accuracy(data)
        share = "none is left" if math.isnan(together) else f"{name} accuracy {together:.2%}"
        others = f", without the {diverged} that diverged" if diverged else ""
        say(f"mean of all networks' probabilities{others}: {share}")


def _varied(job: Sweep) -> list[str]:
    """The names of settings that differ between networks."""
    names = {name for row in job.rows for name in row.settings} - {"lr", "seed"}
    return sorted(n for n in names if len({repr(r.settings.get(n)) for r in job.rows}) > 1)


def _words(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
