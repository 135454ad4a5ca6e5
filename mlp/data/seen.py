"""Facts about the data of a training, so that evaluate and predict read new samples alike."""

from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np
import torch

from ..schema import typed
from . import arrays
from .dataset import DataError, Dataset, Reading
from .given import Given, check_columns, take
from .pixels import other_units

_ANEW = "make a new Trainer (or Sweep) for other data"  # how to use what is refused
_FIRST = 1024  # samples, from which the size of all is estimated
_SHOWN = 5  # names of classes in an error


class Seen(NamedTuple):
    """Facts about the data of a training.

    reading: how inputs were read. is_labels: True if the targets were labels. words: the classes if
    the labels were words, else None. column: True if the targets were numbers (N,). shape: of a
    sample with more than one dimension, else None. columns: names of a frame's or table's columns.
    classes: names of the classes, () for numbers. kind: of the targets, see `Given`. size: the
    largest of the first inputs as read, without its sign, or 0 if not known.
    """

    reading: Reading
    is_labels: bool
    words: tuple[str, ...] | None
    column: bool
    shape: tuple[int, ...] | None
    columns: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    kind: str = "numbers"
    size: float = 0.0

    @classmethod
    def of(cls, given: Given) -> "Seen":
        """The facts about the data that `fit` was given."""
        data = given.data
        column = not data.is_classification and data.targets.dim() == 1
        return cls(
            data.reading,
            data.is_classification,
            given.words,
            column,
            given.shape,
            data.columns,
            data.classes,
            given.kind,
            _size(data),
        )

    def to_dict(self) -> dict[str, Any]:
        """The facts as plain data for a checkpoint. Tuples of the reading become lists."""
        reading = {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self.reading).items()
        }
        return {**self._asdict(), "reading": reading}

    @classmethod
    def of_dict(cls, facts: dict[str, Any]) -> "Seen":
        """From `to_dict`."""
        reading = typed(Reading, facts["reading"], "the state of seen: reading")
        named = {name: tuple(facts.get(name, ())) for name in ("columns", "classes")}
        return cls(**{**facts, "reading": reading, **named})

    @property
    def named(self) -> int | None:
        """The number of outputs that stand for a label, or None for all."""
        if self.words is not None:
            return len(self.words)
        return 2 if self.is_labels and self.kind == "bool" else None

    def spelled(self, labels: np.ndarray) -> np.ndarray:
        """Numbers of classes (N,) as the words, or the bytes, that the labels were."""
        words = np.array(self.words)
        return (np.char.encode(words, "utf-8") if self.kind == "bytes" else words)[labels]

    def like(self) -> Dataset | None:
        """A data set with the names of the classes, by which other labels are numbered, or None."""
        names = self.words or self.classes
        if not names or _counted(names):
            return None
        label = torch.zeros(1, dtype=torch.int64, device="cpu")
        return Dataset(torch.zeros(1, 1, device="cpu"), label, names)

    def take(self, given: Any, ignored: int | None = None) -> Dataset:
        """Test data, see `given.take`. Objects in memory are read as the training read its data.

        A Dataset says itself how it is read. ValueError as for `read`, and for labels whose classes
        have other names, or another order.
        """
        return self._taken(given, ignored, "test data").data

    def more(self, given: Any, ignored: int | None = None, either: bool = False) -> Given:
        """More training data, read as `take` reads test data.

        either: True if the loss takes labels as well as numbers. ValueError as for `take`, and for
        other columns, a Dataset that is read in another way, and numbers in place of labels.
        """
        taken = self._taken(given, ignored, "fit")
        data = taken.data
        check_columns(data.columns, self.columns, f"fit: {data.name}")
        if data.is_classification != self.is_labels and not either:
            kinds = ("numbers", "labels")
            raise DataError(
                f"fit: the targets of {data.name} are {kinds[data.is_classification]}, but the "
                f"network was trained on {kinds[self.is_labels]}; {_ANEW}"
            )
        return taken

    def joined(self, given: Given) -> "Seen":
        """These facts after a training on more data, which `more` has checked."""
        more = given.data.classes if self.is_labels else ()
        return self._replace(classes=max(self.classes, more, key=len))

    def _taken(self, given: Any, ignored: int | None, what: str) -> Given:
        """What `take` says. what: starts an error."""
        taken, reading = take(given, ignored, self.like()), self.reading
        data = taken.data
        self._check_classes(data, what)
        if taken.shape and self.shape and _sides(taken.shape) != _sides(self.shape):
            raise DataError(
                f"{what}: samples of {data.name} are {taken.shape}, but those of the training were "
                f"{self.shape}; bring the axes into one order"
            )
        if not (isinstance(given, Dataset) or self._is_plain):
            whole = not getattr(torch, data.stored, torch.float32).is_floating_point
            self._check_units(data.inputs, data.stored, whole, what)
            if reading.mean is not None:
                data = data.standardized(reading)
            data = data._with(scale=reading.scale, shift=reading.shift)
        self._check_bytes(data, what)
        self._check_reading(data.reading, data.name, what)
        return taken._replace(data=data)

    def _check_classes(self, data: Dataset, what: str) -> None:
        """ValueError for labels that number other classes than those of the training, or others.

        Labels in memory that are numbers always number the classes of the training.
        """
        names = self.classes or self.words or ()
        if not data.is_classification or data.classes == names or (self.is_labels and not names):
            return
        # Classes of a file may be named by numbers, such as 10 and 20. Labels 0 and 1 are others.
        if _counted(data.classes) and (_counted(names) or not any(map(str.isdecimal, names))):
            return
        was = f"the classes {_listed(names)}" if names else "numbers"
        raise DataError(
            f"{what}: the classes of {data.name} are {_listed(data.classes)}, but the network was "
            f"trained on {was}; number them alike (`Dataset.of(…, like=…)`), or {_ANEW}"
        )

    def _check_reading(self, other: Reading, name: str, what: str) -> None:
        """ValueError for a Dataset that is read in another way than the training data.

        Test data that are standardised by their own mean would be measured wrongly, and no number
        would show it. Scale and shift may differ with the dtype and the levels of the pixels.
        """
        ours = self.reading
        alike = (other.stored, other.levels) == (ours.stored, ours.levels)
        for part in ("mean", "std", *(("scale", "shift") if alike else ())):
            if getattr(other, part) != getattr(ours, part):
                raise DataError(
                    f"{what}: {name} is read with another {part} than the earlier training data; "
                    f"read it as they were (`standardized(by=…)`, `normalized`), or {_ANEW}"
                )

    def _check_bytes(self, data: Dataset, what: str) -> None:
        """ValueError if only one of training and these data has bytes, and their units differ.

        Bytes of pixels are 0 to 255, but floating-point pixels are mostly 0 to 1.
        """
        had_bytes = self.reading.stored == "uint8" and self.reading.mean is None
        if not self.size or had_bytes == (data.inputs.dtype == torch.uint8):
            return
        read = data.read(data.inputs)
        if other_units(read, (0.0, self.size)):
            raise DataError(
                f"{what}: training inputs are {self.reading.stored} up to {self.size:.6g}, those "
                f"of {data.name} are {data.stored} up to {float(read.abs().max()):.6g}; store both "
                "alike"
            )

    @property
    def _is_plain(self) -> bool:
        """True if training changed no number."""
        return (self.reading.scale, self.reading.shift, self.reading.mean) == (1.0, 0.0, None)

    def _check_units(self, raw: torch.Tensor, dtype: str, whole: bool, what: str) -> None:
        """ValueError if these numbers (N, …) are not stored as those of the training were.

        dtype: their type, for the message. whole: True for a type of whole numbers.
        """
        stored = getattr(torch, self.reading.stored, None)
        way = f"give {self.reading.stored}, or a Dataset that says how to read them"
        if not self._is_plain and stored is not None and whole == stored.is_floating_point:
            raise ValueError(
                f"{what}: the network was trained on {self.reading.stored} inputs, which its data "
                f"set scales, got {dtype}; {way}"
            )
        if reason := other_units(raw, self.reading.levels):
            raise ValueError(f"{what}: {reason}; {way}")

    def read(self, x: Any, dtype: torch.dtype) -> Dataset:
        """Rows of an array or a frame, as the numbers that the network takes.

        ValueError if training scaled whole numbers and x is floating point, or the reverse. The
        values of black and white are then unknown. The same for pixels up to 1 where training had
        bytes, and the reverse.
        """
        raw, columns = arrays.numbers(x, "predict: x")
        if not len(raw):
            raise DataError("predict: x has no rows; give one at least")
        check_columns(columns, self.columns, "predict: x")
        self._check_units(raw, str(raw.dtype), not raw.is_floating_point(), "predict")
        if self._is_plain:
            self._check_bytes(rows(raw), "predict")
        return rows(self.reading.numbers(raw.reshape(len(raw), -1), dtype))


def _size(data: Dataset) -> float:
    """The largest of the first inputs as read, without its sign. It tells bytes from shares."""
    return float(data.read(data.inputs[:_FIRST].cpu(), torch.float64).abs().max())


def _counted(names: tuple[str, ...]) -> bool:
    """True for names that count from 0, as those of labels in memory."""
    return names == tuple(map(str, range(len(names))))


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(names if len(names) <= _SHOWN else (*names[:_SHOWN], "…"))


def _sides(shape: tuple[int, ...]) -> list[int]:
    """The lengths of a sample's axes, without those of length 1."""
    return [side for side in shape if side != 1]


def rows(inputs: torch.Tensor) -> Dataset:
    """Inputs as a data set, whose targets have no meaning."""
    return Dataset(inputs, inputs.new_zeros(len(inputs), dtype=torch.int64), name="x")
