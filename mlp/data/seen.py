"""Facts about the data of a training, so that evaluate and predict read new samples alike."""

from dataclasses import asdict
from typing import Any, NamedTuple

import torch

from ..runs.schema import typed
from . import arrays
from .dataset import DataError, Dataset, Reading
from .given import Given, check_columns, take
from .pixels import other_units


class Seen(NamedTuple):
    """Facts about the data of a training.

    reading: how inputs were read. is_labels: True if the targets were labels. words: the classes if
    the labels were words, else None. column: True if the targets were numbers (N,). shape: of a
    sample with more than one dimension, else None. columns: names of a frame's or table's columns.
    """

    reading: Reading
    is_labels: bool
    words: tuple[str, ...] | None
    column: bool
    shape: tuple[int, ...] | None
    columns: tuple[str, ...] = ()

    @classmethod
    def of(cls, given: Given) -> "Seen":
        """The facts about the data that `fit` was given."""
        data = given.data
        column = not data.is_classification and data.targets.dim() == 1
        return cls(
            data.reading, data.is_classification, given.words, column, given.shape, data.columns
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
        columns = tuple(facts.get("columns", ()))
        return cls(**{**facts, "reading": reading, "columns": columns})

    def like(self) -> Dataset | None:
        """A data set with the words as classes, by which test data are numbered, or None."""
        if self.words is None:
            return None
        return Dataset(torch.zeros(1, 1), torch.zeros(1, dtype=torch.int64), self.words)

    def take(self, given: Any, ignored: int | None = None) -> Dataset:
        """Test data, see `given.take`. Objects in memory are read as the training read its data.

        A Dataset says itself how it is read. ValueError as for `read`.
        """
        data, reading = take(given, ignored, self.like()).data, self.reading
        if isinstance(given, Dataset) or self._is_plain:
            return data
        whole = not getattr(torch, data.stored, torch.float32).is_floating_point
        self._check_units(data.inputs, data.stored, whole, "test data")
        if reading.mean is not None:
            data = data.standardized(reading)
        return data._with(scale=reading.scale, shift=reading.shift)

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
        return rows(self.reading.numbers(raw.reshape(len(raw), -1), dtype))


def rows(inputs: torch.Tensor) -> Dataset:
    """Inputs as a data set, whose targets have no meaning."""
    return Dataset(inputs, torch.zeros(len(inputs), dtype=torch.int64), name="x")
