"""Thousands of epochs by the epoch engine. Two networks from the same seed train in turn and must
be bitwise equal after every epoch.

The trainings run in a process of their own, which is killed and reported if it shows no sign of
life. It can also be started directly:

    python -m bench.bench_soak EPOCHS
"""

import json
import os
import sys
import time

import torch

import mlp
from mlp import engines

from .rivals import BATCH, SIZES
from .samples import mnist
from .table import Table, device
from .watchdog import watch

EPOCHS = 10_000
_PATIENCE = {"cuda": 30, "cpu": 120}  # seconds, enough for a few epochs or for compiling
_INTERPRETED_STEPS = 2  # steps of an epoch in the interpreter
_SIGN = 0.5  # seconds between signs of life, or longer if an epoch takes longer


def train(epochs: int) -> bool:
    """Trains two networks and prints progress as JSON. Returns True if they stayed equal."""
    on = device()
    data = mnist(on) if on.type == "cuda" else mnist(on).take(_INTERPRETED_STEPS * BATCH)
    models = [mlp.MLP(SIZES, activation="sigmoid", device=on) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    pair = [
        engines.ENGINES["epoch"](m, mlp.SoftmaxCrossEntropy(), mlp.SGD(m.parameters(), lr=0.1))
        for m in models
    ]
    steps, told, started = -(-len(data) // BATCH), 0.0, time.perf_counter()
    for epoch in range(1, epochs + 1):
        order = mlp.data.permutation(len(data), 0, epoch, on)
        first, second = (engine.epoch(data, order, BATCH) for engine in pair)
        equal = first == second and all(map(torch.equal, *(m.parameters() for m in models)))
        seconds = time.perf_counter() - started
        if seconds - told > _SIGN or epoch == epochs or not equal:
            told = seconds
            print(
                json.dumps(
                    {"epochs": epoch, "steps": epoch * steps, "seconds": seconds, "equal": equal}
                ),
                flush=True,
            )
        if not equal:
            return False
    return True


def run(epochs: int | None = None) -> Table:
    """Epochs trained, and whether both networks stayed equal.

    On a CPU it runs in the interpreter, and only if `epochs` is given.
    """
    command, on = "python -m bench soak" + (f" --epochs {epochs}" if epochs else ""), device()
    table = Table(
        f"Soak of the epoch engine, {'-'.join(map(str, SIZES))} sigmoid, batch {BATCH}, SGD",
        command,
    )
    if on.type != "cuda" and not epochs:
        table.not_run = "needs a GPU (--epochs N: N short epochs in the interpreter)"
        return table
    epochs = epochs or EPOCHS
    environment = (
        dict(os.environ)
        if on.type == "cuda"
        else {**os.environ, "TRITON_INTERPRET": "1", "PYTHONWARNINGS": "ignore"}
    )
    last, wrong = watch(
        [sys.executable, "-m", "bench.bench_soak", str(epochs)], _PATIENCE[on.type], environment
    )
    done, steps, seconds = last.get("epochs", 0), last.get("steps", 0), last.get("seconds")
    repeats = "bitwise equal" if last.get("equal") else "different" if last else None
    table.rows = [
        {
            "epochs": done,
            "of": epochs,
            "steps": steps,
            "seconds": seconds,
            "µs a step": seconds / (2 * steps) * 1e6 if seconds else None,
            "two runs": repeats,
        }
    ]
    if repeats == "different":
        table.failed = f"two runs from one seed differ after epoch {done} of {epochs}"
    elif wrong:
        table.failed = f"{wrong}, after epoch {done} of {epochs}"
    table.headline = f"{done} epochs twice, {repeats}"
    return table


if __name__ == "__main__":
    sys.exit(not train(int(sys.argv[1])))
