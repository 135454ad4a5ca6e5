"""The time of an epoch of `Trainer.fit` by part: the steps, the test rows, the shifts, the rest.

"test rows" is the forward pass of the test rows after each epoch. "shifts" is the time to move the
training images, if the recipe moves them. "rest" is the trainer's own work: the order of the
samples, copies for a divergence, the history. The fastest of three trainings counts.
"""

import functools
import time
from unittest import mock

import torch

import mlp
from kernels import cpu
from mlp import data, recipes, schedule
from mlp.data.shifts import Shifts

from .samples import mnist
from .table import Table, device

ROUNDS = 3
# (data, recipe, engine, epochs of a training)
TRAININGS = (
    ("digits", "default", "manual", 10),
    ("digits", "default", "epoch", 20),
    ("mnist", "default", "manual", 1),
    ("mnist", "default", "epoch", 2),
    ("mnist", "fast", "epoch", 2),
)


@functools.cache
def loaded(name: str) -> tuple[mlp.Dataset, mlp.Dataset]:
    """(training data, test data) of this name, read once."""
    return data.load(name, verbose=False)


def spent(name: str, recipe: recipes.Recipe, engine: str, epochs: int) -> dict[str, float]:
    """{part: seconds of an epoch} of the fastest training. epochs: the length of a training."""
    train, test = (part.to(device()) for part in recipe.prepare(*loaded(name)))
    plan = schedule.Plan(epochs, -(-len(train) // recipe.batch_size))
    found, shift = [], Shifts.epoch
    for _ in range(ROUNDS + 1):  # the first loads code and does not count
        model = recipe.model(train, 0, device())
        parts = model, recipe.make_loss(), recipe.make_optimizer, engine
        trainer = mlp.Trainer(*parts, verbose=False)
        seconds = {"shifts": 0.0}

        def timed(self: Shifts, number: int, seconds: dict = seconds) -> mlp.Dataset:
            started = time.perf_counter()
            moved = shift(self, number)
            seconds["shifts"] += time.perf_counter() - started
            return moved

        with mock.patch.object(Shifts, "epoch", timed):
            started = time.perf_counter()
            trainer.fit(
                train,
                epochs,
                recipe.batch_size,
                test,
                scheduler=schedule.named(recipe.schedule, plan),
                augment=recipe.augment,
            )
            total = time.perf_counter() - started
        seconds |= {"steps": trainer.times["steps"], "test rows": trainer.times["evaluate"]}
        seconds["rest"] = total - sum(seconds.values())
        found.append({part: value / epochs for part, value in seconds.items()})
    return min(found[1:], key=lambda one: sum(one.values()))


def run() -> Table:
    """The milliseconds of an epoch, and the share of each part in percent."""
    table = Table("An epoch of the trainer, by part", "python -m bench trainer", note=__doc__ or "")
    compiled = device().type != "cpu" or cpu.serves(torch.empty(1))
    has_mnist = mnist("cpu").name.startswith("mnist")
    if not has_mnist:
        table.note += "\nWithout MNIST in $HANDGRAD_DATA, only digits are timed."
    if not compiled:
        table.note += "\nWithout numba, engine `epoch` is not timed."
    for name, recipe, engine, epochs in TRAININGS:
        if (name == "mnist" and not has_mnist) or (engine == "epoch" and not compiled):
            continue
        seconds = spent(name, recipes.get(recipe), engine, epochs)
        total = sum(seconds.values())
        row: dict = {"data": name, "recipe": recipe, "engine": engine, "ms an epoch": total * 1e3}
        shares = {part: seconds[part] / total for part in ("steps", "test rows", "shifts", "rest")}
        table.rows.append(row | {f"{part}, %": share * 100 for part, share in shares.items()})
    worst = max(table.rows, key=lambda row: row["rest, %"])
    table.headline = (
        f"the trainer's own work is at most {worst['rest, %']:.1f}% of an epoch "
        f"({worst['data']}, {worst['recipe']}, {worst['engine']})"
    )
    return table
