"""How a benchmark measures: providers interleaved, medians, a table and JSON that name the machine and the versions.

A provider is a function of no arguments that does the work once. Before anything is timed its result is compared with
the first provider's: a provider that is wrong gets no time.
"""

import datetime
import json
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median

import torch
import triton

_ROUNDS = 15  # of every provider, one after the other, so that a busy moment hits them all
_ROUND_SECONDS = 0.05


def device() -> torch.device:
    """The GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def machine() -> str:
    """Processor or GPU, and the versions that matter, in one line."""
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = [text.split(":")[1].strip() for text in lines if text.startswith("model name")]
        name = f"{model[0] if model else platform.machine()}, {torch.get_num_threads()} threads"
    return f"{name}; torch {torch.__version__}, triton {triton.__version__}, Python {platform.python_version()}"


@dataclass
class Table:
    """Rows of named values with a title, what was run, and where."""

    title: str
    command: str
    rows: list[dict] = field(default_factory=list)
    note: str = ""
    machine: str = field(default_factory=machine)
    date: str = field(default_factory=lambda: datetime.date.today().isoformat())

    def markdown(self) -> str:
        """The table as Markdown, with its command, machine and date below it."""
        columns = list(dict.fromkeys(key for row in self.rows for key in row))
        lines = [f"## {self.title}", "", f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
        lines += [f"| {' | '.join(_text(row.get(column)) for column in columns)} |" for row in self.rows]
        return "\n".join([*lines, "", *([self.note, ""] if self.note else []), f"`{self.command}`, {self.date}: {self.machine}"])

    def write(self, folder: Path) -> None:
        """NAME.md and NAME.json in `folder`, NAME from the command."""
        folder.mkdir(parents=True, exist_ok=True)
        stem = self.command.split()[-1]
        (folder / f"{stem}.md").write_text(self.markdown() + "\n")
        (folder / f"{stem}.json").write_text(json.dumps(asdict(self), indent=1) + "\n")


def _text(value) -> str:
    if value is None:
        return "–"
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def _synchronize():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _once(provider: Callable, calls: int) -> float:
    _synchronize()
    started = time.perf_counter()
    for _ in range(calls):
        provider()
    _synchronize()
    return (time.perf_counter() - started) / calls


def measure(providers: dict[str, Callable], rounds: int = _ROUNDS) -> dict[str, float]:
    """Median seconds a call of each provider, over rounds in which every provider has its turn."""
    calls = {}
    for name, provider in providers.items():
        _once(provider, 2)
        calls[name] = max(1, round(_ROUND_SECONDS / max(_once(provider, 1), 1e-6)))
    times = {name: [] for name in providers}
    for _ in range(rounds):
        for name, provider in providers.items():
            times[name].append(_once(provider, calls[name]))
    return {name: median(values) for name, values in times.items()}


def agreeing(results: dict[str, list[torch.Tensor]], tolerance: float) -> list[str]:
    """The providers whose results lie within `tolerance` of the first one's, relative to each tensor's largest number."""
    first = next(iter(results.values()))
    agree = []
    for name, tensors in results.items():
        errors = [float((t - f).abs().max() / f.abs().max().clamp_min(1e-30)) for t, f in zip(tensors, first) if f.numel()]
        if len(tensors) == len(first) and max(errors, default=0.0) <= tolerance:
            agree.append(name)
    return agree


def compare(providers: dict[str, Callable], tolerance: float) -> dict[str, float | None]:
    """`measure` of those providers whose results (lists of tensors) agree with the first one's; None for the others."""
    good = agreeing({name: [t.float() for t in provider()] for name, provider in providers.items()}, tolerance)
    times = measure({name: providers[name] for name in good})
    return {name: times.get(name) for name in providers}


def microseconds(times: dict[str, float | None], baseline: str) -> dict:
    """Columns of a row: µs of each provider, and how many times the first is as fast as `baseline`."""
    row = {f"{name} µs": None if t is None else t * 1e6 for name, t in times.items()}
    first = next(iter(times.values()))
    return {**row, f"{baseline} / {next(iter(times))}": times[baseline] / first if first and times[baseline] else None}
