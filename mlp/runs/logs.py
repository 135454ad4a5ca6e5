"""The numbers of each epoch for other programs, as a CSV file or as TensorBoard's events."""

import csv
import io
from pathlib import Path
from typing import Any

from ..data import needs_extra
from .disk import write_text

TABLE = "metrics.csv"
EVENTS = "tensorboard"  # a folder
EVENT_FILES = "events.out.tfevents.*"  # in it
Row = dict[str, Any]


class Csv:
    """metrics.csv: one line for each epoch, with the numbers of metrics.jsonl and the rate."""

    @staticmethod
    def load() -> None:
        """Does nothing, because Python itself writes CSV."""

    def __init__(self, folder: Path, history: list[Row]):
        self.path = folder / TABLE

    def write(self, history: list[Row], rate: float) -> None:
        """Add the latest epoch of a history."""
        rates = [*self._rates()[: len(history) - 1], rate]
        missing = len(history) - len(rates)  # epochs from before this file was begun
        rows = [{**row, "lr": lr} for row, lr in zip(history, [""] * missing + rates)]
        text = io.StringIO()
        table = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)))
        table.writeheader()
        table.writerows(rows)
        write_text(self.path, text.getvalue())

    def _rates(self) -> list[str]:
        """The learning rates of earlier epochs, from the file."""
        if not self.path.exists():
            return []
        with self.path.open(newline="", encoding="utf-8") as file:
            return [row.get("lr") or "" for row in csv.DictReader(file)]

    def close(self) -> None:
        """Does nothing, because no file is open."""


class TensorBoard:
    """Events in the folder tensorboard, with every number of an epoch under its name."""

    @staticmethod
    def load() -> Any:
        """The class that writes events. MissingPackage without its package."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise needs_extra("tensorboard", "writing TensorBoard's events", "watch") from None
        return SummaryWriter

    def __init__(self, folder: Path, history: list[Row]):
        place = folder / EVENTS
        if not history:
            for old in place.glob(EVENT_FILES):
                old.unlink()
        self.writer = self.load()(str(place), purge_step=len(history) + 1)

    def write(self, history: list[Row], rate: float) -> None:
        """Add the latest epoch of a history."""
        for name, value in {**history[-1], "lr": rate}.items():
            if name != "epoch" and isinstance(value, (int, float)):
                self.writer.add_scalar(name, value, history[-1]["epoch"])

    def close(self) -> None:
        """Write everything to the disk."""
        self.writer.close()


LOGS: dict[str, type[Csv] | type[TensorBoard]] = {
    "csv": Csv,
    "tensorboard": TensorBoard,
}


def known(names: str) -> list[str]:
    """The names of LOGS in a text such as "csv,tensorboard".

    ValueError for an unknown name. MissingPackage if a log's package is not installed.
    """
    found = [name.strip() for name in names.split(",") if name.strip()]
    for name in found:
        if name not in LOGS:
            raise ValueError(f"unknown log {name!r}; known: {', '.join(LOGS)}")
        LOGS[name].load()
    return found
