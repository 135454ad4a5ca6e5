"""The parts of `python -m bench all` in order: compilation, self-check, tests, sanitizer, exchange,
soak, tables. Each is a command.
"""

import importlib.util
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from . import sanitizer

ROOT = Path(__file__).parents[1]
SOAK_EPOCHS = 300
_WORKERS = 16  # pytest's processes at most; they share one GPU, and each compiles its kernels
_KERNEL = 0.6  # a core's seconds for compiling a kernel
# part -> (pytest's arguments, kernels compiled into a cold cache, seconds of the rest). Each part
# fits ten minutes on 16 cores.
TESTS = {
    "tests-kernels": (("tests/kernels",), 1100, 150),
    "tests-mlp": (("tests/mlp",), 200, 200),
    "tests-databases": (("tests/databases",), 100, 150),
    "tests-rest": (
        ("tests", *(f"--ignore=tests/{name}" for name in ("kernels", "mlp", "databases"))),
        400,
        60,
    ),
}
# Seconds that a table needs on a GPU. They run in this order, the most important first.
TABLES = {
    "exchange": 10,
    "soak": 40,
    "train": 100,
    "adam": 15,
    "sweep": 10,
    "memory": 10,
    "linear": 30,
    "losses": 30,
    "trainer": 20,
    "mnist": 120,
    "recipes": 25,
    "launches": 20,
    "accuracy": 60,
    "search": 60,
    "cpu": 60,
}


@dataclass(frozen=True)
class Part:
    """A command that runs in a process of its own, or the `reason` why it cannot run here.

    seconds: its time on a GPU. quote: a function from all that the command printed to the summary's
    headline. It is None for a table, whose NAME.json has the headline.
    """

    name: str
    command: tuple[str, ...] = ()
    seconds: float = 60
    quote: Callable[[str], str] | None = None
    environment: dict = field(default_factory=dict)
    reason: str = ""


def last(pattern: str, log: str) -> str:
    """The last match of a pattern, or ""."""
    return (re.findall(pattern, log) or [""])[-1]


def _verdicts(log: str) -> str:
    """How many rows of the self-check's table passed, as a sentence."""
    found = re.findall(r"^\w+ +\w+ .* (ok|FAIL) ", log, re.M)
    return f"{found.count('ok')} of {len(found)} checks of kernels passed"


def _python(*arguments: str) -> tuple[str, ...]:
    return (sys.executable, *arguments)


def _info() -> Part:
    """`handgrad info --check`, or where typer is not installed, the self-check alone."""
    command = (
        _python("-m", "mlp", "info", "--check")
        if importlib.util.find_spec("typer")
        else _python("-m", "kernels.selfcheck")
    )
    return Part("info", command, 65, _verdicts)


def _compilation(on_gpu: bool) -> Part:
    """Compiles the self-check's kernels on all cores, about 225 with a cold cache."""
    if not on_gpu:
        return Part("compile", reason="needs a GPU")
    shared = partial(last, r"\d+ of \d+: .*")
    return Part("compile", _python("-m", "bench.compile"), 60 + _compiling(225), shared)


def _compiling(kernels: int) -> float:
    """Seconds that this machine needs to compile so many kernels."""
    return kernels * _KERNEL / min(_WORKERS, os.cpu_count() or 1)


def _tests() -> list[Part]:
    """The suite in parts, on the GPU if there is one. Tests without their packages do not stop the
    others.
    """
    if importlib.util.find_spec("pytest") is None:
        return [Part(name, reason="needs pytest") for name in TESTS]
    workers = (
        ("-n", str(min(_WORKERS, os.cpu_count() or 1))) if importlib.util.find_spec("xdist") else ()
    )
    options = ("-p", "no:cacheprovider", "--continue-on-collection-errors", *workers)
    count = partial(last, r"\d+ (?:passed|failed|errors?|skipped)\b.* in [^=]*\w")
    return [
        Part(name, _python("-m", "pytest", *chosen, *options), rest + _compiling(kernels), count)
        for name, (chosen, kernels, rest) in TESTS.items()
    ]


def _sanitizer(tool: str, on_gpu: bool) -> Part:
    path = sanitizer.find()
    if not on_gpu or path is None:
        return Part(tool, reason=f"{sanitizer.NAME} not found" if on_gpu else "needs a GPU")
    # torch tries driver calls to see whether they exist. Those failures are no errors of a kernel.
    options = ("--report-api-errors", "no") if tool == "memcheck" else ()
    command = (
        path,
        "--tool",
        tool,
        *options,
        "--error-exitcode",
        "9",
        *_python("-m", "bench.each_kernel"),
    )
    # With torch's cache, memory beyond a tensor may belong to another tensor, which hides an error.
    # Without it, each tensor has its own allocation.
    return Part(
        tool,
        command,
        35,
        partial(last, r"(?:ERROR|RACECHECK) SUMMARY: .*"),
        {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    )


def parts(out: Path) -> list[Part]:
    """All parts for this machine. Tables are written into `out`."""
    on_gpu = torch.cuda.is_available()
    options = {"soak": ("--epochs", str(SOAK_EPOCHS))} if on_gpu else {}
    tables = [
        Part(name, _python("-m", "bench", name, "--out", str(out), *options.get(name, ())), seconds)
        for name, seconds in TABLES.items()
    ]
    return [
        _compilation(on_gpu),
        _info(),
        *_tests(),
        _sanitizer("memcheck", on_gpu),
        _sanitizer("racecheck", on_gpu),
        *tables,
    ]
