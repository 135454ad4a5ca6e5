"""Many networks at once: epochs a second of mlp.Sweep, which trains copies of the reference network
together.
"""

import time
from functools import partial

import torch

import mlp
from kernels import cpu

from . import harness
from .rivals import BATCH, SIZES
from .samples import mnist
from .table import Table, device

NETWORKS = {"cpu": (1, 4, 16), "cuda": (1, 8, 132)}
STEPS = {"cpu": 20, "cuda": 1875}
ROUNDS = 5
DIFFERENT, DIFFERENT_STEPS = 64, 300
_TOLERANCE = 1e-4  # the first network's loss may differ so much from its loss alone


def different() -> list[dict]:
    """Settings of 64 different networks of depth 1 to 3 and width 16 to 512."""
    widths = (16, 32, 64, 128, 256, 512)
    shapes = [(n,) * depth for depth in (1, 2, 3) for n in widths]
    return [
        {"hidden": shapes[i % len(shapes)], "seed": i, "lr": 0.01 * (1 + i // len(shapes))}
        for i in range(DIFFERENT)
    ]


def _together() -> str:
    """A sentence with the time of 64 different networks together and the sum of their times alone,
    on a CPU.
    """
    data = mnist(torch.device("cpu")).take(DIFFERENT_STEPS * BATCH)
    every, threads, alone = different(), torch.get_num_threads(), 0.0
    with cpu.many():  # uses compiled epochs, even for few steps
        mlp.Sweep(every[:1], device="cpu").fit(data, 1)
        torch.set_num_threads(1)
        try:
            for one in every:
                started = time.perf_counter()
                mlp.Sweep([one], device="cpu").fit(data, 1)
                alone += time.perf_counter() - started
        finally:
            torch.set_num_threads(threads)
        started = time.perf_counter()
        mlp.Sweep(every, device="cpu").fit(data, 1)
        seconds = time.perf_counter() - started
    return (
        f"{DIFFERENT} different networks (depth 1 to 3, width 16 to 512) together take "
        f"{seconds:.2f} s with {threads} threads, {seconds * threads / alone:.2f} times the "
        f"{alone:.2f} s of each alone on one thread, divided by {threads}"
    )


def run() -> Table:
    """For each number of networks: the time of an epoch, epochs a second, and the ratio to one
    network's time.
    """
    on = device()
    data = mnist(on).take(STEPS[on.type] * BATCH)
    table = Table(
        f"Sweep, {'-'.join(map(str, SIZES))} sigmoid, batch {BATCH}, SGD, {data.name}",
        "python -m bench sweep",
    )
    sweeps = {
        count: mlp.Sweep(SIZES, count, lr=0.1, activation="sigmoid", device=on)
        for count in NETWORKS[on.type]
    }
    losses = {
        count: {row.replica: row.train_loss for row in job.fit(data, 1, BATCH)}[0]
        for count, job in sweeps.items()
    }
    wrong = [count for count, loss in losses.items() if not abs(loss / losses[1] - 1) <= _TOLERANCE]
    good = {
        count: partial(job.fit, data, 1, BATCH)
        for count, job in sweeps.items()
        if count not in wrong
    }
    times = harness.measure(good, ROUNDS)
    for count in sweeps:
        row = {
            "networks": count,
            "ms an epoch of all": None,
            "networks × epochs a second": None,
            "of one network's time": None,
        }
        if count in times:
            row |= zip(
                list(row)[1:], (times[count] * 1e3, count / times[count], times[count] / times[1])
            )
        table.rows.append(row)
    table.note = (
        f"An epoch is {STEPS[on.type]} steps. The time includes drawing a permutation for each "
        "network."
    )
    if wrong:
        table.failed = "the first network's loss among " + ", ".join(
            f"{n} is {losses[n]:.6g}" for n in wrong
        )
        table.failed += f", alone {losses[1]:.6g}"
    if on.type == "cpu":
        table.note += f" {_together()}."
    most = max(times)
    table.headline = f"{most} networks in {times[most] / times[1]:.2f} times the time of one"
    return table
