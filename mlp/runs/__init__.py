"""A run on disk: a folder that one process writes at a time. A kill leaves it readable.

config.json         the settings, written once at the start
last.ckpt           the state for resuming, after the latest epoch
previous.ckpt       the same after an earlier epoch, used if last.ckpt is damaged
model.safetensors   the weights
metrics.jsonl       one line for each epoch
times.json          seconds of loading, training and the rest, of the latest call
curves.png, …       pictures, see report.py
"""

import dataclasses
import io
import json
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..data.dataset import Fingerprint, Reading
from ..data.tables import Table
from ..data.units import Units
from ..recipes import Recipe
from ..schema import typed
from . import logs, report
from .checkpoint import WEIGHTS, config_of, load_file, network, save
from .disk import (
    CheckpointError,
    locked,
    move,
    read_zip,
    remove_leftovers,
    replacing,
    seal_zip,
    write_text,
)

if TYPE_CHECKING:
    from ..trainer import Trainer

TRIALS = "search.jsonl"  # of a search whose winner is this run
TIMES = "times.json"  # seconds of loading, training, and everything else
CONFIG, METRICS, LAST, PREVIOUS = "config.json", "metrics.jsonl", "last.ckpt", "previous.ckpt"
_TRAINED = (METRICS, WEIGHTS, LAST, PREVIOUS)  # the files that exist after an epoch
LARGEST_SEED = 2**63
_EVERY = 1.0  # seconds between two writes, because an epoch may be faster than a write


@dataclass
class Facts:
    """Facts about a run's training data that `predict` and `--resume` need."""

    classes: list[str]
    reading: Reading
    train: Fingerprint
    test: Fingerprint
    table: Table | None = None  # converts rows of a table to features and targets
    units: Units | None = None  # of a regression whose targets are standardised


@dataclass
class Settings:
    """The contents of config.json."""

    dataset: str  # a name, or absolute paths
    recipe: Recipe
    recipe_name: str
    data: Facts | None = None
    data_dir: str | None = None
    seed: int = 0
    device: str = "auto"
    engine: str = "auto"
    precision: str = "fp32"
    standardize: str = "auto"
    image: str | None = None  # the shape of an image, if the user gave one
    task: str | None = None  # "classification", "regression" or "multilabel", if the user chose
    target: str | None = None  # columns of a table to predict, with commas
    drop: str | None = None  # columns of a table to leave out, with commas
    decimal: str | None = None  # decimal point of a table in a text file, if the user gave one
    validation: float | None = None  # share of the rows held out in addition to the test rows
    class_weight: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    command: list[str] = field(default_factory=list)  # the command line
    git: str | None = None  # the commit of the folder in which it was typed


@dataclass
class _Epoch:
    """A line of metrics.jsonl."""

    epoch: int
    train_loss: float
    train_accuracy: float | None = None
    validation_loss: float | None = None
    validation_accuracy: float | None = None
    test_loss: float | None = None
    test_accuracy: float | None = None
    seconds: float = 0.0
    samples_per_second: float = 0.0


@dataclass
class _State:
    """The contents of last.ckpt."""

    trainer: dict[str, Any]
    network: dict[str, Any] | None  # the config() of the network
    epochs: int  # the number that was asked for


class RunFolder:
    """A run on disk. Its path is enough to read it. To write, use `writing`."""

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        self._pending: tuple[Any, int] | None = None
        self._written = -math.inf

    @classmethod
    @contextmanager
    def writing(cls, path: str | os.PathLike) -> Iterator["RunFolder"]:
        """A context with the folder, which only this process may write. It is made if missing.

        Temporary files of killed processes are removed. PermissionError if the folder cannot be
        written. BusyError while another process writes it.
        """
        run = cls(path)
        try:
            run.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise PermissionError(
                f"cannot write the run folder {run.path}: {error.strerror}"
            ) from None
        if not os.access(run.path, os.W_OK):
            raise PermissionError(f"cannot write the run folder {run.path}: permission denied")
        with locked(run.path):
            remove_leftovers(run.path)
            yield run

    @property
    def trained(self) -> bool:
        """True if an epoch was recorded."""
        return any((self.path / name).exists() for name in _TRAINED)

    def refuse_if_taken(self, force: bool = False) -> None:
        """FileExistsError if the folder holds a trained run, or a config.json that is no run's.

        A run that ended before its first epoch may be started again.
        """
        if force or (not self.trained and not (self.path / CONFIG).exists()):
            return
        if not self.trained:
            try:
                _ = self.settings
            except CheckpointError:
                raise FileExistsError(
                    f"{self.path} holds a {CONFIG} that is not a run's; choose another --out"
                ) from None
            return
        raise FileExistsError(
            f"{self.path} already holds a run; choose another --out, --resume it, or --force "
            "to replace it"
        )

    def begin(self, settings: Settings, force: bool = False) -> None:
        """Start a run: remove all files of the earlier one, and write config.json."""
        self.refuse_if_taken(force)
        if self.trained or (self.path / CONFIG).exists():
            known = (*_TRAINED, CONFIG, TIMES, TRIALS, logs.TABLE, *report.PICTURES)
            events = (self.path / logs.EVENTS).glob(logs.EVENT_FILES)
            for path in (*(self.path / name for name in known), *events):
                path.unlink(missing_ok=True)
        text = json.dumps(dataclasses.asdict(settings), indent=2)
        write_text(self.path / CONFIG, f"{text}\n")

    @property
    def settings(self) -> Settings:
        """The settings in config.json. CheckpointError if it is missing or no run's."""
        path = self.path / CONFIG
        if not path.is_file():
            raise CheckpointError(f"{self.path} is not a run folder: it has no {CONFIG}")
        settings = typed(Settings, _json(_text(path), path), str(path))
        if not 0 <= settings.seed <= LARGEST_SEED:
            raise CheckpointError(f"{path}: seed must be 0 to 2⁶³, got {settings.seed}")
        return settings

    @property
    def history(self) -> list[dict[str, Any]]:
        """The epochs in metrics.jsonl."""
        path = self.path / METRICS
        if not path.exists():
            return []
        return _history([_json(line, path) for line in _text(path).splitlines()], str(path))

    def record(self, trainer: "Trainer", epochs: int) -> None:
        """Write an epoch's line, the weights, and the state for resuming to the disk.

        If the last write is less than a second ago, the epoch is kept for `flush`.
        """
        self._pending = trainer, epochs
        if time.monotonic() - self._written >= _EVERY:
            self.flush()

    def flush(self) -> None:
        """Write the epoch that `record` has kept. last.ckpt is written first."""
        if self._pending is None:
            return
        (trainer, epochs), self._pending = self._pending, None
        state = _State(trainer.state_dict(), config_of(trainer.model), epochs)
        with replacing(self.path / LAST) as part:
            torch.save(dict(vars(state)), part)
            seal_zip(part)
            if (self.path / LAST).exists():
                move(self.path / LAST, self.path / PREVIOUS)
        save(trainer.model, self.path / WEIGHTS)
        self._write_history(trainer.history)
        self._written = time.monotonic()

    def _write_history(self, history: list[dict[str, Any]]) -> None:
        write_text(self.path / METRICS, "".join(json.dumps(row) + "\n" for row in history))

    def resume(self, trainer: "Trainer") -> tuple[int, str | None]:
        """As `restore`, and cut metrics.jsonl to the epochs of that state."""
        found = self.restore(trainer)
        self._write_history(trainer.history)
        return found

    def restore(self, trainer: "Trainer") -> tuple[int, str | None]:
        """Load the run's latest state into a trainer. Nothing is written.

        Returns (the number of epochs that was asked for, a note if an earlier checkpoint is used).
        CheckpointError if there is no usable checkpoint. Then the trainer is not changed.
        """
        state, path, note = self._state()
        groups = [dict(group) for group in trainer.optimizer.param_groups]
        try:
            trainer.load_state_dict(state.trainer)
            _check_optimizer(state.trainer["optimizer"], groups)
        except Exception as error:  # torch and we raise different errors for other networks' states
            raise CheckpointError(
                f"{path}: not the state of this run: {' '.join(str(error).split())}"
            ) from None
        return state.epochs, note

    def network(self, device: torch.device | str | None = None) -> tuple[torch.nn.Module, str]:
        """(the trained network on a device, a note about damage or "")."""
        path = self.path / WEIGHTS
        if not self.trained:
            unfinished = "; the run finished no epoch" if (self.path / CONFIG).exists() else ""
            raise CheckpointError(f"{path}: no such checkpoint{unfinished}")
        try:
            return load_file(path, device), ""
        except CheckpointError as error:
            if not (self.path / LAST).exists() and not (self.path / PREVIOUS).exists():
                raise
            try:
                state, source, _ = self._state()
                model = network(state.network, state.trainer["model"], str(source), device)
            except CheckpointError as second:
                raise CheckpointError(f"{error}; {second}") from None
            count = len(state.trainer["history"])
            return model, f"{error}; the weights are those of epoch {count} in {source}"

    def _state(self) -> tuple[_State, Path, str | None]:
        """(the latest checkpoint that is not damaged, its path, a note if it is not the last)."""
        errors = []
        for path in (self.path / LAST, self.path / PREVIOUS):
            if not path.exists():
                continue
            try:
                state = _read_state(path)
            except CheckpointError as error:
                errors.append(str(error))
                continue
            count = len(state.trainer["history"])
            note = f"{errors[0]}; going on after epoch {count}, from {path}" if errors else None
            return state, path, note
        if errors:
            raise CheckpointError("; ".join(errors))
        raise CheckpointError(f"{self.path} cannot be resumed: it has no {LAST}")


def load(path: str | os.PathLike, device: torch.device | str | None = None) -> torch.nn.Module:
    """The network in a file written by `save`, or in a run folder, as a module on `device`.

    CheckpointError if `path` is neither. If model.safetensors of a run folder is damaged, the
    weights that were kept for resuming are loaded, and a warning says so.
    """
    path = Path(path)
    if not path.is_dir():
        return load_file(path, device)
    model, note = RunFolder(path).network(device)
    if note:
        warnings.warn(note, stacklevel=2)
    return model


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise CheckpointError(f"{path}: not JSON (it is not UTF-8 text)") from None


def _json(text: str, path: Path) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON ({error})") from None


def _history(rows: list[Any], where: str) -> list[dict[str, Any]]:
    """Rows of metrics, one for each epoch from 1 on, checked. A row may hold unknown numbers."""
    known = {f.name for f in dataclasses.fields(_Epoch)}
    for i, row in enumerate(rows, 1):
        here = f"{where}: line {i}"
        row = typed(dict[str, int | float | str | None], row, here)
        epoch = typed(_Epoch, {name: v for name, v in row.items() if name in known}, here).epoch
        if epoch != i:
            raise CheckpointError(f"{here} must be that of epoch {i}, got {epoch}")
    return rows


def _check_optimizer(state: dict[str, Any], groups: list[dict[str, Any]]) -> None:
    """ValueError if the values in a state have other types or shapes than this optimizer needs.

    torch would load them and fail at the first step.
    """
    if not isinstance(state["param_groups"], list) or len(state["param_groups"]) != len(groups):
        raise ValueError(f"the optimizer has {len(groups)} groups of parameters")
    for ours, theirs in zip(groups, state["param_groups"]):
        for name in ours.keys() & theirs.keys() - {"params"}:
            if not _same_kind(ours[name], theirs[name]):
                raise ValueError(
                    f"the optimizer's {name} must be like {ours[name]}, got {theirs[name]!s:.60}"
                )
    parameters = [p for group in groups for p in group["params"]]
    for index, values in state["state"].items():
        for name, value in values.items():
            shape = getattr(value, "shape", None)
            if value is not None and shape not in (torch.Size(), parameters[index].shape):
                raise ValueError(
                    f"{name} of parameter {index} must have the shape "
                    f"{tuple(parameters[index].shape)}, got {value!s:.60}"
                )


def _same_kind(ours: Any, theirs: Any) -> bool:
    """True if a value has the type of the optimizer's own value."""
    if ours is None or isinstance(ours, bool):
        return theirs is None or isinstance(theirs, bool)
    if isinstance(ours, (tuple, list)):
        are_lists = isinstance(theirs, (tuple, list)) and len(theirs) == len(ours)
        return are_lists and all(map(_same_kind, ours, theirs))
    if isinstance(ours, (int, float, torch.Tensor)):
        is_scalar = isinstance(theirs, torch.Tensor) and theirs.dim() == 0
        return is_scalar or (isinstance(theirs, (int, float)) and not isinstance(theirs, bool))
    return type(ours) is type(theirs)


def _read_state(path: Path) -> _State:
    """The checkpoint in a file. CheckpointError if its contents or types are wrong."""
    content = read_zip(path)
    try:
        found = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # pickle and zip raise many classes
        raise CheckpointError(f"{path}: not readable ({type(error).__name__})") from None
    state = typed(_State, found, str(path))
    trainer = state.trainer
    kinds: dict[str, tuple[type, Callable[[Any], bool]]] = {
        "model": (dict, lambda m: all(isinstance(t, torch.Tensor) for t in m.values())),
        "optimizer": (dict, lambda o: {"state", "param_groups"} <= o.keys()),
        "history": (list, lambda h: True),
    }
    for name, (kind, is_right) in kinds.items():
        value = trainer.get(name)
        if not isinstance(value, kind) or not is_right(value):
            raise CheckpointError(f"{path}: {name} must be that of a Trainer's state_dict")
    _history(trainer["history"], f"{path}: history")
    return state
