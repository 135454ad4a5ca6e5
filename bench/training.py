"""Trainings of the reference network, ours and others'. They are checked to be the same training,
then timed.
"""

import time
from functools import partial

import torch

import mlp
from mlp import data as datasets
from mlp import engines

from . import harness
from .rivals import BATCH, SIZES, NotHereError, weights
from .samples import mnist
from .table import Table, device, figure, one_line

# Steps of a timed epoch. On a GPU steps are short, so all of MNIST's are timed.
STEPS = {"cpu": 50, "cuda": 1875}
ROUNDS = {"cpu": 9, "cuda": 5}
_CHECKED = 20  # steps whose losses are compared with the first provider's
_BUILDING = 60  # seconds after which no other provider is built, as compilers can take minutes
_PROFILED = 100  # steps under the profiler


class Ours:
    """An engine of mlp as a provider of trainings, see bench/rivals.py."""

    def __init__(self, start, optimizer, data, name):
        model = mlp.MLP(SIZES, activation="sigmoid", device=start[0].device)
        with torch.no_grad():
            for p, value in zip(model.parameters(), start):
                p.copy_(value)
        loss, optimizer = mlp.SoftmaxCrossEntropy(), optimizer(model.parameters())
        refused = engines.ENGINES[name].refuses(model, loss, optimizer, BATCH)
        if refused:
            raise NotHereError(refused.removeprefix(f"{name}: "))
        self.engine = engines.ENGINES[name](model, loss, optimizer)

    def epoch(self, data, order):
        """Trains on the samples of `order`."""
        self.engine.epoch(data, order, BATCH)

    def enqueue(self, data, order):
        """Trains, and leaves the results on the device."""
        if hasattr(self.engine, "result"):
            self.engine.result = lambda *results: None
            self.epoch(data, order)
            del self.engine.result
        else:
            with torch.set_grad_enabled(self.engine.name == "autograd"):
                for rows in order.split(BATCH):
                    self.engine.step(*data.batch(rows))

    def losses(self, data, order):
        """Trains, and returns every step's loss."""
        return [self.engine.epoch(data, rows, BATCH).loss for rows in order.split(BATCH)]


def ours(optimizer) -> dict:
    """{name: constructor} of every engine, with an optimizer of mlp."""
    return {name: partial(Ours, optimizer=optimizer, name=name) for name in engines.ENGINES}


def build(constructors: dict, data, order, tolerance: float) -> tuple[dict, dict, dict]:
    """({name: provider}, {name: error}, {name: why it cannot run here}).

    The providers train as the first one does. The others have an error or a reason.
    """
    providers, losses, wrong, missing, started = {}, {}, {}, {}, time.perf_counter()
    for name, make in constructors.items():
        if (spent := time.perf_counter() - started) > _BUILDING:
            missing[name] = f"not built, as building others took {spent:.0f} s"
            continue
        try:
            provider = make(start=weights(order.device), data=data)
            losses[name] = [torch.tensor(provider.losses(data, order[: _CHECKED * BATCH]))]
            provider.epoch(data, order)
            providers[name] = provider
        except NotHereError as reason:
            missing[name] = str(reason)
        except Exception as error:  # such as a compiler's error; the others are still timed
            wrong[name] = one_line(error)
    for name, error in harness.errors({name: losses[name] for name in providers}).items():
        if error > tolerance:
            del providers[name]
            wrong[name] = (
                f"losses differ from those of {next(iter(losses))} by {error:.1e} of the largest, "
                f"at most {tolerance:.0e}"
            )
    return providers, wrong, missing


def table(title: str, command: str, constructors: dict, tolerance: float, note: str) -> Table:
    """A row for each provider, with µs a step and the ratio to the first provider."""
    on = device()
    data = mnist(on)
    order = datasets.permutation(len(data), 0, 0, on)[: STEPS[on.type] * BATCH]
    providers, wrong, missing = build(constructors, data, order, tolerance)
    times = harness.measure(
        {name: partial(p.epoch, data, order) for name, p in providers.items()}, ROUNDS[on.type]
    )
    first, steps = next(iter(constructors)), STEPS[on.type]
    made = Table(
        f"{title}, {'-'.join(map(str, SIZES))} sigmoid, batch {BATCH}, {data.name}",
        command,
        note=note,
    )
    for name in constructors:
        row = {"engine": name, "µs a step": None, "host µs": None, "device busy µs": None}
        if name in times:
            row["µs a step"] = times[name] / steps * 1e6
            row |= _parts(providers[name], data, order) if on.type == "cuda" else {}
            row |= {
                "MNIST epoch, ms": times[name] / steps * 1e3 * len(data) / BATCH,
                f"of {first}": times[name] / times[first],
            }
        made.rows += (
            [] if name in missing else [row | ({"why not": wrong[name]} if name in wrong else {})]
        )
    if missing:
        made.note += (
            " Not run: " + "; ".join(f"{name} ({reason})" for name, reason in missing.items()) + "."
        )
    made.failed = "; ".join(
        f"engine {name}: {reason}" for name, reason in wrong.items() if name in engines.ENGINES
    )
    best = min((name for name in engines.ENGINES if name in times), key=times.get, default=None)
    if best:
        made.headline = (
            f"{best} {figure(times[best] / steps * 1e6)} µs a step, "
            f"{times[best] / times[first]:.3f} of {first}"
        )
    return made


def _parts(provider, data, order) -> dict:
    """The columns that need a GPU: µs that a step keeps the host and the device busy."""
    host = harness.host_seconds(partial(provider.enqueue, data, order), rounds=3) / (
        len(order) / BATCH
    )
    try:
        busy = harness.device_seconds(partial(provider.enqueue, data, order[: _PROFILED * BATCH]))
    except RuntimeError:  # not every machine gives the profiler its counters
        busy = None
    return {"host µs": host * 1e6, "device busy µs": busy and busy / _PROFILED * 1e6}
