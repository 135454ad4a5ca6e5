"""`export`: a trained network for other programs, as an ONNX file or as plain torch weights."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from .. import export
from ..modules import ends
from ..runs import Facts, RunFolder, Settings
from ..runs.checkpoint import config_of
from .options import Values
from .setup import files_of
from .terminal import check_file, complain, say


def run(values: Values) -> None:
    """Write the network of a run folder as another program reads it."""
    path = values["file"]
    check_file(path)
    write = _format(path, values["format"]).write
    settings = RunFolder(values["run"]).settings
    check_file(path, files_of(values["run"], settings))
    model, note = RunFolder(values["run"]).network("cpu")
    if note:
        complain(f"note: {note}")
    say(f"{path}: {write(settings, model, path)}")


def pipeline(settings: Settings, model: torch.nn.Module) -> export.Pipeline:
    """A module from inputs, as the run's data stored them, to probabilities or values.

    Values are in the targets' own units. A table's inputs are its features, as from
    `Table.inputs`.
    """
    facts, loss = settings.data, settings.recipe.make_loss()
    if facts is None:
        raise ValueError("the run has no facts about its data; train it again to export it")
    reading = facts.reading
    mean: float | torch.Tensor = 0.0
    scale: float | torch.Tensor = reading.scale
    if reading.mean is not None and reading.std is not None:
        mean = torch.tensor(reading.mean, dtype=torch.float64)
        scale = reading.scale / torch.tensor(reading.std, dtype=torch.float64)
    head = loss.probabilities if facts.classes else _values(loss, facts)
    return export.Pipeline(model, scale, reading.shift, head, mean)


def _values(loss, facts: Facts) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function from outputs to values in the targets' own units."""

    def read(outputs: torch.Tensor) -> torch.Tensor:
        found = loss.predict(outputs)
        return found if facts.units is None else facts.units.own(found)

    return read


def _onnx(settings: Settings, model: torch.nn.Module, path: Path) -> str:
    made, facts = pipeline(settings, model), settings.data
    features, _ = ends(config_of(model) or {})
    stored = "float32" if facts is None or facts.table is not None else facts.reading.stored
    dtype = getattr(torch, stored)
    export.to_onnx(made, path, torch.zeros(1, features, dtype=dtype))
    says = "probabilities" if facts is not None and facts.classes else "values"
    rows = f"inputs (rows, {features}) {stored}"
    if facts is not None and facts.table is not None:
        rows += ", the features of its table,"
    return f"{rows} -> outputs: {says}"


def _torch(settings: Settings, model: torch.nn.Module, path: Path) -> str:
    export.to_torch(model, path)
    layers = ", ".join(type(layer).__name__ for layer in export.plain(model))
    says = f"the state_dict of nn.Sequential({layers})"
    if settings.data is None:
        return says
    return f"{says}; its inputs are {_read_as(settings.data)}, its outputs {_answers(settings)}"


def _read_as(facts: Facts) -> str:
    """A phrase: how the network's inputs follow from the numbers x that the data store."""
    reading = facts.reading
    x = "the features x of its table" if facts.table is not None else "x"
    if reading.mean is not None:
        x = f"({x} - mean) / std, with the data's mean and std of config.json"
    parts = [
        x,
        f" · {reading.scale:.9g}" if reading.scale != 1 else "",
        f" + {reading.shift:.9g}" if reading.shift else "",
    ]
    return "".join(parts)


def _answers(settings: Settings) -> str:
    """A phrase: what the network's outputs are."""
    facts = settings.data
    if facts is not None and facts.classes:
        return "logits"
    is_scaled = facts is not None and facts.units is not None
    return "targets less their mean, over their std, of config.json" if is_scaled else "values"


class Format(NamedTuple):
    """A row of FORMATS.

    write: writes such a file, and returns one line about its contents. suffixes: of its files.
    """

    write: Callable[[Settings, torch.nn.Module, Path], str]
    suffixes: tuple[str, ...]


FORMATS = {"onnx": Format(_onnx, (".onnx",)), "torch": Format(_torch, (".pt", ".pth"))}


def _format(path: Path, name: str | None) -> Format:
    """The format called `name`, else that of the path's suffix. ValueError if there is none."""
    if name is not None:
        if name not in FORMATS:
            raise ValueError(f"unknown format {name!r}; known: {', '.join(FORMATS)}")
        return FORMATS[name]
    for row in FORMATS.values():
        if path.suffix.lower() in row.suffixes:
            return row
    known = [f"{name} ({', '.join(row.suffixes)})" for name, row in FORMATS.items()]
    raise ValueError(
        f"{path}: its suffix {path.suffix!r} does not tell the format; give --format, which is one "
        f"of {', '.join(known)}"
    )
