"""Tables and regressions on the command line: scores, `predict` of rows, pictures."""

import csv
import io
from pathlib import Path
from typing import Any

import numpy
import torch

from .. import data, metrics, scoring
from ..data import files, frames, tables
from ..data.seen import Seen
from ..data.units import Units
from ..runs import CONFIG, Facts, RunFolder, Settings, report
from ..runs.checkpoint import config_of
from ..runs.disk import CheckpointError, write_text
from ..trainer import Trainer
from . import setup
from .options import Values
from .terminal import check_file, complain, say


def own(found: torch.Tensor, units: Units | None) -> numpy.ndarray:
    """Outputs or targets (rows, targets) in the targets' own units, as a float64 array."""
    found = found.detach().cpu().double()
    return (found if units is None else units.own(found)).numpy()


def quality(
    model: torch.nn.Module, loss: Any, part: data.Dataset, units: Units | None
) -> dict[str, float]:
    """The measures of a network on samples, see `scoring.numbers`, `classes` and `several`."""
    if part.is_classification:
        found, labels = zip(*metrics.outputs(model, part))
        shares = loss.probabilities(torch.cat(found)).cpu().double().numpy()
        return scoring.classes(shares, torch.cat(labels).cpu().numpy())
    said, true, are_labels = _said(model, loss, part, units)
    if said.shape != true.shape:
        return {}  # several quantiles of one target
    return (scoring.several if are_labels else scoring.numbers)(said, true)


def _said(
    model: torch.nn.Module, loss: Any, part: data.Dataset, units: Units | None
) -> tuple[numpy.ndarray, numpy.ndarray, bool]:
    """(predictions, targets, True if they are labels), in the targets' own units.

    Predictions of labels are probabilities. Both are (rows, targets) float64.
    """
    found, true = zip(*metrics.outputs(model, part))
    outputs, targets = torch.cat(found), torch.cat(true)
    said, targets = loss.predict(outputs), targets.reshape(len(targets), -1)
    units = units if said is outputs else None
    return own(said, units), own(targets, units), said is not outputs


def epoch_quality(trainer: Trainer, found: setup.Data) -> dict[str, float]:
    """More measures for the line of an epoch: of a regression, and of a table's classes."""
    loss, said = trainer.loss, {}
    of_classes = found.facts.table is not None
    if of_classes or not found.test.is_classification:
        said = quality(trainer.model, loss, found.test, found.facts.units)
        said = {f"test_{key}": value for key, value in scoring.brief(said).items()}
    held = found.validation
    if held is not None and (of_classes or not held.is_classification):
        more = quality(trainer.model, loss, held, found.facts.units)
        said |= {f"validation_{key}": v for key, v in scoring.brief(more).items()}
    return said


def quality_lines(settings: Settings, trainer: Trainer, part: data.Dataset) -> list[str]:
    """The lines that `evaluate` prints after loss and accuracy."""
    facts = settings.data
    units = None if facts is None else facts.units
    found = quality(trainer.model, trainer.loss, part, units)
    lines = [scoring.line(found).strip()] if found else []
    if facts is None or facts.table is None or part.is_classification or len(found) == 0:
        return lines
    names = facts.table.targets
    if len(names) > 1:
        said, true, are_labels = _said(trainer.model, trainer.loss, part, units)
        measure = scoring.one_label if are_labels else scoring.numbers
        for i, name in enumerate(names):
            one = measure(said[:, i : i + 1], true[:, i : i + 1])
            lines.append(f"  {name:<20}{scoring.line(one)}")
    return lines


def draw(run: RunFolder, recipe: Any, part: data.Dataset, model: torch.nn.Module) -> list[Path]:
    """Draw predicted.png of a regression, and return the paths."""
    facts, loss = run.settings.data, recipe.make_loss()
    if part.is_classification or not recipe.reads_values or facts is None:
        return []
    outputs, true = zip(*metrics.outputs(model, part))
    said, targets = own(torch.cat(outputs), facts.units), own(torch.cat(true), facts.units)
    targets = targets.reshape(len(targets), -1)
    if loss.predict(outputs[0]).shape[1:] != targets.shape[1:]:
        return []
    count = targets.shape[1]
    names = facts.table.targets if facts.table else [f"target {i + 1}" for i in range(count)]
    path = run.path / "predicted.png"
    report.predicted(said, targets, names if count > 1 or facts.table else ["test samples"], path)
    return [path]


def predict(values: Values) -> None:
    """Write a CSV with the predictions for the rows of a file: class and probabilities, or values.

    Columns are found by their names in the training. For a run on arrays, they must be in the order
    of the training inputs.
    """
    run, (path, *more) = RunFolder(values["run"]), values["files"]
    settings, facts = run.settings, run.settings.data
    assert facts is not None
    named = facts.table is not None
    readers = () if named else tuple(files.READERS)
    if more or not (frames.format_of(path) or path.suffix.lower() in readers):
        raise ValueError(
            f"{run.path} was trained on {'a table' if named else 'rows of numbers'}: give it one "
            f"file, {', '.join((*readers, frames.known()))}, got "
            f"{', '.join(map(str, values['files']))}"
        )
    if values["out"] is not None:
        check_file(values["out"], [path, *setup.files_of(run.path, settings)])
    dtype = setup.pick_precision(settings.precision).weights
    model, note = run.network(setup.pick_device(values["device"]))
    if note:
        complain(f"note: {note}")
    features = (config_of(model) or {}).get("sizes", [0])[0]
    x = (_by_name if named else _by_order)(run, path, features).to(dtype)
    with torch.no_grad():
        outputs = model(x.to(next(model.parameters()).device))
    lines = _csv(*_answers(facts, settings.recipe.make_loss(), outputs))
    if values["out"] is None:
        for text in lines:
            say(text)
        return
    write_text(values["out"], "\n".join(lines) + "\n")
    complain(f"{len(lines) - 1:,} predictions written to {values['out']}")


def _by_name(run: RunFolder, path: Path, features: int) -> torch.Tensor:
    """The network's inputs, from the columns on which it was trained."""
    facts = run.settings.data
    assert facts is not None and facts.table is not None
    table = facts.table
    if features != len(table.features):
        raise CheckpointError(
            f"{run.path / CONFIG}: a table of {len(table.features)} features does not fit the "
            f"network, which takes {features}"
        )

    def note(line: str) -> None:
        complain(f"note: {path}: {line}")

    kind = frames.format_of(path)
    decimal = run.settings.decimal if kind is None or kind.is_text else None
    frame = frames.read(path, table.texts, decimal, note)
    dropped = setup.names_of(run.settings.drop or "")
    with frames.naming(path):
        return table.inputs(frame.drop(columns=list(dropped), errors="ignore"), note)


def _by_order(run: RunFolder, path: Path, features: int) -> torch.Tensor:
    """The inputs of a network that was trained on arrays, from a file's columns in order."""
    facts = run.settings.data
    assert facts is not None
    names: list[str] = []
    if frames.format_of(path):
        raw, names = frames.numbers(path)
    else:
        raw = files.inputs(path)
        raw = raw[None] if raw.dim() == 1 and len(raw) == features else raw
    raw = raw.reshape(len(raw), -1)
    if raw.shape[1] != features:
        listed = f" ({', '.join(names[:8])}{', …' if len(names) > 8 else ''})" if names else ""
        raise data.DataError(
            f"{path}: rows of {raw.shape[1]} numbers{listed}, but the network was trained on rows "
            f"of {features}; give the inputs alone, in the order of the training's"
        )
    if not (finite := raw.isfinite().all(1)).all():
        raise data.DataError(
            f"{path}: row {int((~finite).nonzero()[0]) + 1} has a number that is missing or not "
            "finite, which the training data did not have"
        )
    stored = getattr(torch, facts.reading.stored, torch.float32)
    if not stored.is_floating_point and bool((raw == raw.round()).all()):
        raw = raw.long()  # a CSV does not tell 3 from 3.0
    seen = Seen(facts.reading, is_labels=True, words=None, column=False, shape=None)
    with frames.naming(path):
        return seen.read(raw, torch.float64).inputs


def _answers(facts: Facts, loss: Any, outputs: torch.Tensor) -> tuple[list[str], list[list[Any]]]:
    """(header, rows) of the predictions in outputs."""
    table, count = facts.table, outputs.shape[1]
    classes = table is None or tables.TASKS[table.task].has_labels
    if classes and facts.classes:
        shares = loss.probabilities(outputs).cpu().double().numpy()
        target = "class" if table is None else table.targets[0]
        header = [target, *(f"p({name})" for name in facts.classes)]
        return header, [[facts.classes[row.argmax()], *map(_short, row)] for row in shares]
    said = loss.predict(outputs)
    every = ["target"] if said.shape[1] == 1 else [f"target {i + 1}" for i in range(count)]
    names = every if table is None else list(table.targets)
    if said is not outputs:
        shares = own(said, None)
        header = [*names, *(f"p({name})" for name in names)]
        return header, [[*(row > 0.5).astype(int), *map(_short, row)] for row in shares]
    found = own(said, facts.units)
    if found.shape[1] > len(names):  # quantiles of one target
        names = [f"{names[0]} {i + 1}" for i in range(found.shape[1])]
    return names, [list(map(_short, row)) for row in found]


def _short(value: float) -> str:
    return f"{value:.7g}"


def _csv(header: list[str], rows: list[list[Any]]) -> list[str]:
    """The lines of a CSV file."""
    lines = []
    for row in (header, *rows):
        text = io.StringIO()
        csv.writer(text, lineterminator="").writerow(row)
        lines.append(text.getvalue())
    return lines
