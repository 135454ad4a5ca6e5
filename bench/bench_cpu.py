"""Training steps of the small reference network on a CPU by us, PyTorch, JAX, scikit-learn and
numpy, on one core and on all. Each has a process of its own, and they take turns.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

from .cpu_rivals import GROUPS, NETWORKS, STEPS
from .harness import available_cores
from .rivals import BATCH, SIZES
from .table import Table

_ROUNDS = 9
_PAUSE = 0.3  # seconds before a turn, until the last turn's threads sleep
_TOLERANCE = 1e-3  # how far losses of the first epoch may differ, relative
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
_RATIOS = (
    ("epoch", "eager"),
    ("epoch", "JAX scan"),
    ("scikit-learn", "epoch"),
    ("manual loop", "eager"),
    ("manual loop, numba", "eager"),
    ("epoch, Adam", "eager, fused Adam"),
    ("manual, Adam", "eager, fused Adam"),
    ("autograd", "eager"),
    (f"{NETWORKS} networks", "epoch, one thread"),
)
_OURS = ("epoch", "manual", "autograd")  # our names start with these


class _Rival:
    """A process that trains an epoch on command."""

    def __init__(self, name: str, cores: list[int]):
        def pin():
            os.sched_setaffinity(0, cores)

        threads = str(len(cores))
        environment = {**os.environ, **dict.fromkeys(_THREADS, threads), "JAX_PLATFORMS": "cpu"}
        environment["CUDA_VISIBLE_DEVICES"] = ""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "bench.cpu_rivals", name],
            cwd=Path(__file__).parent.parent,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            preexec_fn=pin if hasattr(os, "sched_setaffinity") else None,
        )
        self.name, self.seconds = name, []
        line = self.process.stdout.readline()
        self.ready = json.loads(line) if line else {"wrong": "the process ended"}

    def turn(self) -> None:
        """Trains two epochs. Only the second counts, because cores and caches are cold first."""
        time.sleep(_PAUSE)
        for _ in range(2):
            self.process.stdin.write("\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
            if not line:
                raise RuntimeError(f"the process of {self.name} ended within a turn")
        self.seconds.append(float(line))

    def end(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def run() -> Table:
    """µs a step, best and median, on one core and on all.

    A best ratio is of the best times. A median ratio is the median over rounds, because in a round
    the rivals take turns within seconds.
    """
    there = available_cores()
    made = Table(
        f"CPU: training steps of {'-'.join(map(str, SIZES))} sigmoid, batch {BATCH}",
        "python -m bench cpu",
        note=f"Each row has a process of its own and {_ROUNDS} turns: a pause, {STEPS} steps to "
        f"warm up, {STEPS} timed steps. `{NETWORKS} networks` is a step of all of them. A ratio's "
        "median is the median over rounds.",
    )
    rows = {name: {"": name} for group in GROUPS.values() for name in group}
    rows |= {ratio: {"": " / ".join(ratio)} for ratio in _RATIOS}
    for label, used in {"one core": there[-1:], f"{len(there)} cores": there}.items():
        times, wrong = _times(used)
        for what, statistic in (("best", min), ("median", median)):
            micros = {name: statistic(each) / STEPS * 1e6 for name, each in times.items()}
            for over, under in _RATIOS:
                if over in times and under in times:
                    pairs = zip(times[over], times[under])
                    ratios = {"best": [micros[over] / micros[under]]}
                    ratios["median"] = [seconds / other for seconds, other in pairs]
                    micros[over, under] = median(ratios[what])
            for name, value in micros.items():
                rows[name][f"{label}, {what} µs"] = value
        for name, reason in wrong.items():
            rows[name][f"{label}: why not"] = reason
            made.failed = made.failed or (f"{name}: {reason}" if name.startswith(_OURS) else "")
    made.rows = list(rows.values())
    if ("epoch", "eager") in micros:
        made.headline = f"epoch {micros['epoch', 'eager']:.2f} of eager on {label}"
    return made


def _times(cores: list[int]) -> tuple[dict[str, list[float]], dict[str, str]]:
    """({name: seconds of each turn}, {name: why it has no time}), of right and other rivals."""
    times, wrong = {}, {}
    for group in GROUPS.values():
        alive, first = [], None
        for name in group:
            rival = _Rival(name, cores)
            loss = rival.ready.get("loss")
            first = loss if first is None else first
            reason = rival.ready.get("missing") or rival.ready.get("wrong")
            if reason is None and loss is not None and abs(loss - first) > _TOLERANCE * first:
                reason = f"its loss is {loss:.5f}, that of {next(iter(group))} {first:.5f}"
            if reason is not None:
                wrong[name] = reason
                rival.end()
            else:
                alive.append(rival)
        for _ in range(_ROUNDS):
            for rival in alive:
                rival.turn()
        for rival in alive:
            rival.end()
            times[rival.name] = rival.seconds
    return times, wrong
