"""Seconds of training until MNIST's test accuracy is 97%, 98% and 98.4%.

`--recipe fast` with our engines is compared with the same network, rate and shifts in eager torch,
and with scikit-learn's MLPClassifier.

Only training is timed, without the tests between epochs. One epoch before the first seed is not
counted. "from a new process" is timed from the start of a process and includes imports, reading the
data, loading compiled code and the tests between epochs. The rivals train with fewer seeds, because
they take longer. `--seeds 2` gives every row as many seeds, and `--only ours,cold` makes these rows
alone.
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import nn

import mlp
from kernels import cpu
from mlp import data, recipes
from mlp.data.shifts import Shifts

from .samples import mnist
from .table import Table, device

LEVELS = (0.97, 0.98, 0.984)
Epochs = Iterator[tuple[float, float]]  # (seconds so far, test accuracy) after each epoch


def ours(recipe, train, test, seed: int) -> Epochs:
    """The recipe by the fastest engine."""
    seconds = 0.0
    for row in _fit(recipe, train, test, seed):
        seconds += row["seconds"]
        yield seconds, row["test_accuracy"]


def _fit(recipe, train, test, seed: int, on_epoch=None, epochs: int | None = None) -> list[dict]:
    """The rows of a training. epochs: how many, by default the recipe's."""
    model = recipe.model(train, seed, device())
    # "auto" would not compile anything for a single short training.
    engine = "epoch" if cpu.serves(next(model.parameters())) else "auto"
    trainer = mlp.Trainer(model, recipe.make_loss(), recipe.make_optimizer, engine, verbose=False)
    return trainer.fit(
        train,
        epochs or recipe.epochs,
        recipe.batch_size,
        test,
        seed,
        scheduler=recipe.scheduler(len(train)),
        augment=recipe.augment,
        on_epoch=on_epoch,
    )


def eager(recipe, train, test, seed: int) -> Epochs:
    """The recipe as a loop of eager torch over tensors, with the shifts."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 10)).to(device())
    optimizer = torch.optim.SGD(model.parameters(), **recipe.optimizer_options)
    scheduler, seconds = recipe.scheduler(len(train))(optimizer), 0.0
    shifts = Shifts(train, recipe.augment, seed)
    for epoch in range(1, recipe.epochs + 1):
        started = time.perf_counter()
        moved = shifts.epoch(epoch)
        for rows in data.permutation(len(train), seed, epoch, device()).split(recipe.batch_size):
            x, y = moved.batch(rows)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            scheduler.step()
        seconds += time.perf_counter() - started
        with torch.no_grad():
            right = sum(int((model(x).argmax(1) == y).sum()) for x, y in test.chunks(4096))
        yield seconds, right / len(test)


def sklearn(recipe, train, test, seed: int) -> Epochs:
    """The same network in scikit-learn, with its Adam and constant rate, without shifts."""
    from sklearn.neural_network import MLPClassifier

    model = MLPClassifier(recipe.hidden, batch_size=recipe.batch_size, random_state=seed)
    (x, y), (tx, ty) = (
        (part.read(part.inputs).cpu().numpy(), part.targets.cpu().numpy()) for part in (train, test)
    )
    seconds = 0.0
    for _ in range(recipe.epochs):
        started = time.perf_counter()
        model.partial_fit(x, y, classes=range(10))
        seconds += time.perf_counter() - started
        yield seconds, float(model.score(tx, ty))


def new_process(recipe, train, test, seed: int) -> Epochs:
    """`ours` in a process of its own, from that process's start."""
    code = "import sys; from bench import bench_mnist as b; b.child(int(sys.argv[1]))"
    started = time.time()
    command = [sys.executable, "-c", code, str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    for ended, accuracy in json.loads(done.stdout.splitlines()[-1]):
        yield ended - started, accuracy


def child(seed: int) -> None:
    """Prints when each epoch of the recipe ended with its test, and its accuracy."""
    recipe = recipes.get("fast")
    train, test = (part.to(device()) for part in recipe.prepare(*data.load("mnist")))
    found: list[tuple[float, float]] = []
    _fit(recipe, train, test, seed, lambda row: found.append((time.time(), row["test_accuracy"])))
    print(json.dumps(found))


class Row(NamedTuple):
    """A row of the table: its title, the function that trains, and the number of seeds."""

    title: str
    epochs: Callable[..., Epochs]
    seeds: int


ROWS = {
    "ours": Row("ours", ours, 10),
    "cold": Row("ours, from a new process", new_process, 10),
    "eager": Row("eager torch", eager, 5),
    "sklearn": Row("scikit-learn", sklearn, 3),
}


def run(seeds: int | None = None, only: Sequence[str] = ()) -> Table:
    """A row for each way, with median seconds to each accuracy, and the last accuracy.

    seeds: how many for each row. only: names of ROWS, or none for all.
    """
    table = Table("MNIST: seconds to an accuracy", "python -m bench mnist", note=__doc__ or "")
    if unknown := [name for name in only if name not in ROWS]:
        raise ValueError(f"unknown row {unknown[0]!r} of mnist; known: {', '.join(ROWS)}")
    if not mnist("cpu").name.startswith("mnist"):
        table.not_run = "needs MNIST in $HANDGRAD_DATA"
        return table
    recipe = recipes.get("fast")
    train, test = (part.to(device()) for part in recipe.prepare(*data.load("mnist")))
    _fit(recipe, train, test, 0, epochs=1)  # loads or compiles the engine's code
    for name, (title, epochs, usual) in ROWS.items():
        if only and name not in only:
            continue
        count = seeds or usual
        found = [list(epochs(recipe, train, test, seed)) for seed in range(count)]
        table.rows.append({"what": title, "seeds": count, **_reached(found)})
    first = table.rows[0]
    reached = {level: first[_column(level)] for level in LEVELS}
    table.headline = f"{first['what']}: " + ", ".join(
        f"{level:.1%} in {seconds:.1f} s" for level, seconds in reached.items() if seconds
    )
    return table


def _column(level: float) -> str:
    return f"s to {level:.1%}"


def _reached(found: list[list[tuple[float, float]]]) -> dict:
    """For each level, the median seconds of the seeds that reached it, and their number."""
    row: dict = {}
    for level in LEVELS:
        first = [next((s for s, a in one if a >= level), None) for one in found]
        reached = [s for s in first if s is not None]
        row[_column(level)] = statistics.median(reached) if reached else None
        row[f"seeds at {level:.1%}"] = f"{len(reached)}/{len(found)}"
    row["accuracy"] = f"{statistics.mean(one[-1][1] for one in found):.2%}"
    return row
