"""The common part of commands: devices, precisions, data and network of a run's settings."""

import contextlib
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from .. import data, modules, recipes, scoring, spreading
from ..data import frames, guards, tables, units
from ..data.describe import describe, targets
from ..engines.stepwise import Diverged
from ..runs import Facts, Settings
from ..runs.disk import CheckpointError
from .options import Values
from .terminal import say


class Arithmetic(NamedTuple):
    """The meaning of a --precision."""

    weights: torch.dtype  # of weights and their update, and of evaluations
    products: str  # torch's name for the precision of float32 products
    training: str  # the argument `precision` of `Trainer`


PRECISIONS = {
    "fp32": Arithmetic(torch.float32, "highest", "fp32"),
    "tf32x3": Arithmetic(torch.float32, "high", "fp32"),
    "tf32": Arithmetic(torch.float32, "medium", "fp32"),
    "bf16": Arithmetic(torch.float32, "highest", "bf16"),
    "fp16": Arithmetic(torch.float32, "highest", "fp16"),
    "fp64": Arithmetic(torch.float64, "highest", "fp32"),
}


class Data(NamedTuple):
    """The data of a run, prepared for its recipe, with the facts that its folder stores."""

    train: data.Dataset
    test: data.Dataset
    facts: Facts
    validation: data.Dataset | None = None
    said: str = ""  # one line about the data


class Read(NamedTuple):
    """The data as read, before a recipe or units of the targets change them."""

    train: data.Dataset
    test: data.Dataset
    validation: data.Dataset | None = None
    table: tables.Table | None = None


def pick_device(name: str) -> torch.device:
    """The device of a name. "auto" is the GPU if there is one. ValueError if it does not exist."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return spreading.existing(name)


def pick_devices(name: str, count: int | None) -> list[str] | None:
    """Names of the devices that train networks side by side, or None for one device.

    name: of --device. count: of --devices. A CPU is one device, and its name is repeated.
    """
    if count is None:
        return None
    device = pick_device(name)
    if device.index is not None:
        raise ValueError(f"--devices {count}: --device {name} is one device; give one of the two")
    if device.type == "cpu":
        return ["cpu"] * count
    there = torch.cuda.device_count()
    if count > there:
        raise ValueError(f"--devices {count}: this machine has {there} CUDA devices; give fewer")
    return [f"cuda:{i}" for i in range(count)]


def pick_precision(name: str) -> Arithmetic:
    """The meaning of a --precision. It also sets torch's precision of float32 products."""
    if name not in PRECISIONS:
        raise ValueError(f"unknown precision {name!r}; known: {', '.join(PRECISIONS)}")
    torch.set_float32_matmul_precision(PRECISIONS[name].products)
    return PRECISIONS[name]


def absolute(source: str) -> str:
    """A data set as a run stores it: a name, or absolute paths."""
    if source in data.NAMES:
        return source
    parts = [source] if Path(source).exists() else source.split(",")
    return ",".join(str(Path(part).absolute()) for part in parts)


def files_of(run: Path, settings: Settings) -> list[Path]:
    """The files of a run folder and of its data, which no other output may replace."""
    return [*map(Path, settings.dataset.split(",")), Path(settings.dataset), *run.iterdir()]


def located(settings: Settings) -> Settings:
    """The settings with absolute paths, so that they find their data from any folder."""
    folder = settings.data_dir
    return dataclasses.replace(
        settings,
        dataset=absolute(settings.dataset),
        data_dir=None if folder is None else str(Path(folder).absolute()),
    )


def load(values: Values) -> Read:
    """The data that a command's options name. The decisions about them are printed on stderr."""
    read = _read(settings_of(values, recipes.PLAIN))
    say_notes(read.train)
    return read


def settings_of(values: Values, recipe: recipes.Recipe) -> Settings:
    """The settings of a command that writes no run."""
    return Settings(
        values["dataset"] or "digits",
        recipe,
        "",
        data_dir=values["data_dir"],
        image=values["image"],
        task=values["task"],
        standardize=values["standardize"] or "auto",
        target=values["target"],
        drop=values["drop"],
        decimal=values["decimal"],
        validation=values.get("validation"),
        class_weight=values.get("class_weight"),
    )


def for_sweep(values: Values, recipe: recipes.Recipe) -> tuple[Data, recipes.Recipe]:
    """(data, recipe) of a sweep, as `suited` prepares them for a run."""
    settings = settings_of(values, recipe)
    found = suited(settings, load_run(settings), values["loss"] is not None)
    say_notes(found.train)
    return found, settings.recipe


def _read(settings: Settings) -> Read:
    """The data of a run, before its recipe changes them."""
    facts, path = settings.data, Path(settings.dataset)
    if frames.format_of(path) and (path.exists() or settings.target):
        if settings.image is not None:
            raise ValueError(f"{path}: --image is for images, but this is a table")
        if settings.target is None:
            raise ValueError(f"{path}: is a table; say which column to predict with --target")
        if settings.standardize == "no":
            raise ValueError(
                f"{path}: the columns of a table are always standardised, got --standardize no; "
                "leave it out"
            )
        choice = tables.Choice(
            names_of(settings.target),
            names_of(settings.drop or ""),
            settings.task or "auto",
            settings.validation or 0.0,
            settings.decimal,
        )
        return Read(*tables.load(path, choice, None if facts is None else facts.table))
    for name in ("target", "drop", "decimal"):
        if getattr(settings, name) is not None:
            other = path.is_file() and path.suffix.lower() not in data.files.READERS
            way = "; unpack it, or name it as one of these" if other else ""
            raise ValueError(f"--{name} is for tables, {frames.known()}, not {path}{way}")
    raw = data.load(
        settings.dataset,
        settings.data_dir,
        image=settings.image,
        task=settings.task,
        standardize=settings.standardize if facts is None else facts.reading,
        verbose=False,
    )
    return Read(*raw)


def names_of(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def say_notes(train: data.Dataset) -> None:
    """Print on stderr the decisions that were made when the data were read."""
    for note in train.notes:
        say(f"note: {note}", sys.stderr)


def load_run(settings: Settings) -> Data:
    """The data of a run, prepared for its recipe, and read as in its training."""
    read = _read(settings)
    train, test = settings.recipe.prepare(read.train, read.test)
    validation, share = read.validation, settings.validation or 0.0
    if share and read.table is None:
        train, validation = held_out(train, share, len(train) + len(test))
    seen, unseen = read.train.fingerprint(), read.test.fingerprint()
    facts = Facts(list(train.classes), train.reading, seen, unseen, read.table)
    if read.table is not None:
        said = about_table(read.table, train, test, validation)
        if read.table.mean:
            facts.units = units.Units(read.table.mean, read.table.std)
        return Data(train, test, facts, validation, said)
    said = describe(train, test)
    if validation is not None:
        said += f"; {len(validation):,} validation samples"
    return Data(train, test, facts, validation, said)


def held_out(train: data.Dataset, share: float, count: int) -> tuple[data.Dataset, data.Dataset]:
    """(train, validation) of training data. share: of all `count` samples, with the test data."""
    inner = share * count / len(train)
    if not inner < 1:
        most = len(train) / count
        raise ValueError(
            f"--validation {share:g}: leaves nothing to train on; it is a share of all rows, and "
            f"must be below {most:.2g}"
        )
    train, validation = data.split(train, inner)
    name = train.name.removesuffix(" (train)")
    return train._with(name=name), validation._with(name=f"{name} (validation)")


def about_table(
    table: tables.Table,
    train: data.Dataset,
    test: data.Dataset,
    validation: data.Dataset | None = None,
) -> str:
    """One line about a table: targets, features and rows."""
    features, columns = len(table.features), len(table.columns)
    parts = [
        f"{train.name}: {table.task} of {', '.join(table.targets)}",
        f"{columns} column{'s' * (columns > 1)} as {features} feature{'s' * (features > 1)}",
        f"{len(train):,} rows to train, {len(test):,} to test",
    ]
    if validation is not None:
        parts[-1] += f", {len(validation):,} to validate"
    if train.is_classification:
        parts.append(targets(train))
    return "; ".join(parts)


def suited(settings: Settings, found: Data, loss_chosen: bool) -> Data:
    """The data with targets in the units that this run learns.

    `settings.recipe` gets a loss that fits the targets. A stored run keeps its units.
    """
    table, stored = found.facts.table, settings.data
    default = recipes.LOSS_OF_NUMBERS if table is None else tables.TASKS[table.task].loss
    recipe = recipes.suited(settings.recipe, found.train, loss_chosen, default)
    recipe = settings.recipe = scoring.weighted(recipe, found.train, settings.class_weight)
    if stored is not None:
        found.facts.units = stored.units
    elif table is None and recipe.gives_values:
        found.facts.units = units.of(found.train, settings.standardize)
        if found.facts.units is not None:
            note = f"{found.train.name}: the targets are standardised by the training data"
            found = found._replace(train=found.train._with(notes=(*found.train.notes, note)))
    if table is not None:
        return found
    train, test = (units.learned(part, found.facts.units) for part in (found.train, found.test))
    validation = found.validation
    if validation is not None:
        validation = units.learned(validation, found.facts.units)
    return found._replace(train=train, test=test, validation=validation)


def moved(settings: Settings, values: Values) -> Settings:
    """The settings of a stored run, with the current place of its data from `values`.

    ValueError for another data set by name. Other paths are allowed, because the contents are
    compared later.
    """
    dataset = absolute(values.get("dataset") or settings.dataset)
    if dataset != settings.dataset and {dataset, settings.dataset} & {*data.NAMES}:
        raise ValueError(
            f"the data set {dataset} cannot be changed by --resume, which goes on with "
            f"{settings.dataset}; leave it out, or train into another --out"
        )
    data_dir = values["data_dir"]
    return dataclasses.replace(
        settings,
        dataset=dataset,
        data_dir=settings.data_dir if data_dir is None else str(data_dir.absolute()),
    )


def change_of_data(settings: Settings, found: Facts) -> str | None:
    """The difference between the data that a run has stored and those found now, or None."""
    for part in () if settings.data is None else ("train", "test"):
        before, now = getattr(settings.data, part), getattr(found, part)
        if (before.shape, before.dtype) != (now.shape, now.dtype):
            return (
                f"{settings.dataset}: the {part} data have changed since the run began: "
                f"{before.shape} of {before.dtype} then, {now.shape} of {now.dtype} now"
            )
        if before != now:
            return (
                f"{settings.dataset}: the {part} data have changed since the run began: the same "
                f"shape {now.shape}, but other values"
            )
    return None


def build(settings: Settings, train: data.Dataset, device: torch.device) -> torch.nn.Module:
    """The network of a run with its initial weights. ValueError if memory cannot hold it."""
    recipe, dtype = settings.recipe, pick_precision(settings.precision).weights
    spreading.check_dtype(device, dtype)
    refuse_too_large(recipe.network(train), dtype=dtype)
    return recipe.model(train, settings.seed, device, dtype)


def refuse_too_large(network: dict, copies: int = 1, dtype: torch.dtype = torch.float32) -> None:
    """ValueError if this machine's memory cannot hold `copies` of the weights of a `config()`."""
    try:
        count = sum(p.numel() for p in modules.build(network, "meta", dtype).parameters())
    except (RuntimeError, OverflowError):  # more elements than torch can count
        count = 2**63
    needed = count * copies * dtype.itemsize
    memory = guards.memory()
    if needed > memory:
        raise ValueError(
            f"{count * copies:.2g} parameters need {needed / 1e9:,.0f} GB, but this machine has "
            f"{memory / 1e9:,.0f} GB; choose smaller layers with --hidden"
        )


@contextlib.contextmanager
def settings_from(path: Path) -> Iterator[None]:
    """A context in which an unexpected error is blamed on a wrong value in this config.json."""
    try:
        yield
    except (ValueError, OSError, Diverged):
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise CheckpointError(f"{path}: not the settings of a run ({reason})") from None
