"""Comparisons of runs, for `runs`, `report` of several runs, and `train --seeds`."""

import math
import statistics
from pathlib import Path
from typing import Any, NamedTuple

from ..data.dataset import require
from ..runs import CONFIG, RunFolder, Settings, report
from ..runs.disk import CheckpointError
from ..stopping import kept_row
from .options import Values
from .terminal import check_folder, complain, say

FIGURE = "compare.png"


class Entry(NamedTuple):
    """A run with its settings and history."""

    path: Path
    settings: Settings
    history: list[dict[str, Any]]

    @property
    def row(self) -> dict[str, Any]:
        """The row of the epoch whose weights the run has: the last, or the best one."""
        recipe = self.settings.recipe
        return kept_row(self.history, recipe.early_stopping, recipe.epochs)

    @property
    def scores(self) -> tuple[str, str]:
        """(test loss, test accuracy) of the weights that the run has, as text, "-" if not known."""
        row = self.row if self.history else {}
        found = [(row.get("test_loss"), ".4f"), (row.get("test_accuracy"), ".2%")]
        loss, accuracy = ("-" if value is None else f"{value:{form}}" for value, form in found)
        return loss, accuracy


def read(path: Path) -> Entry:
    """The run in a folder. CheckpointError if it is no run folder, or damaged."""
    run = RunFolder(path)
    return Entry(path, run.settings, run.history)


def runs(values: Values) -> None:
    """List the runs below a folder."""
    folder = values["folder"] or Path("runs")
    check_folder(folder)
    found = []
    for config in sorted(folder.rglob(CONFIG)):
        try:
            found.append(read(config.parent))
        except CheckpointError as error:
            complain(f"note: {error}")
    if not found:
        raise ValueError(f"{folder}: holds no runs")
    for line in table(found):
        say(line)


def compare(paths: list[Path], out: Path | None) -> None:
    """Print one table, and draw one figure, of several runs.

    out: the folder of the figure. None takes the folder in which the first run lies.
    """
    require("matplotlib", "matplotlib", f"drawing {FIGURE}")
    folder = paths[0].absolute().parent if out is None else out
    check_folder(folder, "--out ")
    found = [read(path) for path in paths]
    for line in table(found):
        say(line)
    report.compare({str(e.path): e.history for e in found if e.history}, folder / FIGURE)
    say(folder / FIGURE)


def table(entries: list[Entry]) -> list[str]:
    """A table as text with aligned columns: a header, and a line for each run."""
    tests = ("test loss", "test accuracy")
    rows = [["run", "data", "network", "optimizer", "seed", "epochs", *tests, "seconds"]]
    for path, settings, history in entries:
        recipe = settings.recipe
        widths = ",".join(map(str, recipe.hidden)) or "none"
        numbers = "".join(f" {n} {v}" for n, v in recipe.optimizer_options.items())
        rows.append(
            [
                str(path),
                Path(settings.dataset).name,
                f"{settings.recipe_name}: {widths} {recipe.activation}",
                recipe.optimizer + numbers,
                str(settings.seed),
                str(len(history)),
                *Entry(path, settings, history).scores,
                f"{sum(row['seconds'] for row in history):.1f}",
            ]
        )
    sizes = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join(f"{cell:<{n}}" for cell, n in zip(row, sizes)).rstrip() for row in rows]


def spread(paths: list[Path]) -> str:
    """Mean and standard deviation of the scores of runs with different seeds, in one line."""
    last = [read(path).row for path in paths]
    said = []
    for key, unit in (("test_accuracy", ".2%"), ("test_loss", ".4f")):
        numbers = [row[key] for row in last if row.get(key) is not None]
        if len(numbers) == len(last):
            deviation = statistics.stdev(numbers) if len(numbers) > 1 else math.nan
            mean, name = statistics.mean(numbers), key.replace("_", " ")
            said.append(f"{name} {mean:{unit}} ± {deviation:{unit}}")
    return f"{len(last)} seeds: {', '.join(said)}"
