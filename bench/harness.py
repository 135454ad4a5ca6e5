"""How a benchmark measures: providers take turns, and the median counts.

A provider is a function of no arguments that does the work once. Its result is compared with the
first provider's before anything is timed. A wrong provider gets no time.
"""

import os
import time
from collections.abc import Callable
from statistics import median

import torch

from .table import one_line

_ROUNDS = 15  # in each round every provider has a turn, so that a busy moment affects them all
_ROUND_SECONDS = 0.05


def available_cores() -> list[int]:
    """The numbers of the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))  # macOS and Windows do not tell it


def synchronize() -> None:
    """Waits until the GPU, if there is one, is idle."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _once(provider: Callable, calls: int) -> float:
    synchronize()
    started = time.perf_counter()
    for _ in range(calls):
        provider()
    synchronize()
    return (time.perf_counter() - started) / calls


def measure(providers: dict[str, Callable], rounds: int = _ROUNDS) -> dict[str, float]:
    """Median seconds a call of each provider, over rounds in which each has a turn."""
    calls = {}
    for name, provider in providers.items():
        _once(provider, 2)
        calls[name] = max(1, round(_ROUND_SECONDS / max(_once(provider, 1), 1e-6)))
    times = {name: [] for name in providers}
    for _ in range(rounds):
        for name, provider in providers.items():
            times[name].append(_once(provider, calls[name]))
    return {name: median(values) for name, values in times.items()}


def host_seconds(provider: Callable, rounds: int = _ROUNDS) -> float:
    """Median seconds until a call returns. The GPU is idle before, and nothing waits for it."""
    times = []
    for _ in range(rounds):
        synchronize()
        started = time.perf_counter()
        provider()
        times.append(time.perf_counter() - started)
    synchronize()
    return median(times)


def device_seconds(provider: Callable) -> float | None:
    """Seconds that the GPU is busy with one call, without gaps between kernels.

    None if the profiler saw no kernel. An earlier call compiles and captures.
    """
    provider()
    synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        provider()
        synchronize()
    on_gpu = [
        event
        for event in profile.key_averages()
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]
    return sum(event.self_device_time_total for event in on_gpu) / 1e6 or None


def errors(results: dict[str, list[torch.Tensor]]) -> dict[str, float]:
    """The largest error of each provider against the first, relative to a tensor's largest number.

    It is inf where results are missing or NaN.
    """
    first, found = next(iter(results.values()), []), {}
    for name, tensors in results.items():
        each = [
            float((t - f).abs().max() / f.abs().max().clamp_min(1e-30))
            for t, f in zip(tensors, first)
            if f.numel()
        ]
        finite = len(tensors) == len(first) and all(error == error for error in each)
        found[name] = max(each, default=0.0) if finite else float("inf")
    return found


def compare(
    providers: dict[str, Callable], tolerance: float, wrong: dict[str, str] | None = None
) -> dict[str, float | None]:
    """`measure` of the providers whose results, lists of tensors, agree with the first one's.

    The others have None. wrong: gets their names, each with the reason in one line.
    """
    results, wrong = {}, {} if wrong is None else wrong
    for name, provider in providers.items():
        try:
            results[name] = [t.float() for t in provider()]
        except Exception as error:  # such as a compiler's error; the others are still timed
            wrong[name] = one_line(error)
    for name, error in errors(results).items():
        if error > tolerance:
            wrong[name] = f"off by {error:.1e} of the largest number, at most {tolerance:.0e}"
    times = measure({name: provider for name, provider in providers.items() if name not in wrong})
    return {name: times.get(name) for name in providers}


def microseconds(times: dict[str, float | None], baseline: str) -> dict:
    """Columns of a row: µs of each provider, and how many times as fast as `baseline` the first
    is.
    """
    row = {f"{name} µs": None if t is None else t * 1e6 for name, t in times.items()}
    first = next(iter(times.values()))
    return {
        **row,
        f"{baseline} / {next(iter(times))}": times[baseline] / first
        if first and times[baseline]
        else None,
    }


def conclude(table, wrong: dict[str, str]) -> None:
    """Sets a table's headline, the ratios to eager, and a note of the providers without a time.

    The table has failed if one of these is ours.
    """
    ratios = [row["eager / handgrad"] for row in table.rows if row["eager / handgrad"]]
    table.headline = f"{min(ratios):.2f} to {max(ratios):.2f} of eager's speed" if ratios else ""
    table.note = (
        "Without a time: " + "; ".join(f"{name} ({why})" for name, why in wrong.items()) + "."
        if wrong
        else ""
    )
    table.failed = next(
        (f"{name}: {why}" for name, why in wrong.items() if name.startswith("handgrad")), ""
    )
