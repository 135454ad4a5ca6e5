"""A benchmark's table, as Markdown and JSON. It names the command, the machine and the versions."""

import datetime
import json
import platform
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from kernels.language import triton


def device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def machine() -> str:
    """Processor or GPU, and versions, in one line."""
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    else:
        facts = Path("/proc/cpuinfo")  # only Linux has it
        lines = (
            facts.read_text(encoding="utf-8", errors="replace").splitlines()
            if facts.exists()
            else []
        )
        model = [text.split(":")[1].strip() for text in lines if text.startswith("model name")]
        name = f"{model[0] if model else platform.machine()}, {torch.get_num_threads()} threads"
    return (
        f"{name}; torch {torch.__version__}, triton {triton.__version__}, Python "
        f"{platform.python_version()}"
    )


def one_line(error: BaseException | str) -> str:
    """An error as a table's cell: its class and the first line of its text, at most 160
    characters.
    """
    text = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
    first = next((line.strip() for line in text.splitlines() if line.strip()), "")
    return (first if len(first) <= 160 else first[:159] + "…").replace("|", "\\|")


@dataclass
class Table:
    """Rows of named values with a title, the command and the machine.

    not_run: why there are no rows, such as "needs a GPU". failed: a fault of ours in one line,
    which makes the exit status 1. headline: the figures to quote.
    """

    title: str
    command: str
    rows: list[dict] = field(default_factory=list)
    note: str = ""
    headline: str = ""
    not_run: str = ""
    failed: str = ""
    machine: str = field(default_factory=machine)
    date: str = field(default_factory=lambda: datetime.date.today().isoformat())

    def markdown(self) -> str:
        """The table as Markdown, with its command, machine and date below it."""
        columns = list(dict.fromkeys(key for row in self.rows for key in row))
        lines = [f"## {self.title}", ""]
        if columns:
            lines += [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
            lines += [
                f"| {' | '.join(figure(row.get(column)) for column in columns)} |"
                for row in self.rows
            ] + [""]
        for text in (
            self.failed and f"**Failed: {self.failed}**",
            self.not_run and f"Not run: {self.not_run}.",
            self.note,
        ):
            lines += [text, ""] if text else []
        return "\n".join([*lines, f"`{self.command}`, {self.date}: {self.machine}"])

    def write(self, folder: Path) -> None:
        """Writes NAME.md and NAME.json into `folder`. NAME comes from `python -m bench NAME …`."""
        folder.mkdir(parents=True, exist_ok=True)
        stem = self.command.split()[3]
        (folder / f"{stem}.md").write_text(self.markdown() + "\n", encoding="utf-8")
        text = json.dumps(asdict(self), indent=1) + "\n"
        (folder / f"{stem}.json").write_text(text, encoding="utf-8")


def figure(value) -> str:
    """A value as a cell: a dash for None, floats to about three digits."""
    if value is None:
        return "–"
    if not isinstance(value, float):
        return str(value)
    return (
        f"{value:.0f}"
        if abs(value) >= 100
        else f"{value:.1f}"
        if abs(value) >= 10
        else f"{value:.2f}"
    )
