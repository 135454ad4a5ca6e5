"""Samples as tensors on one device.

Pixels stay uint8 and are scaled where they are read. Batches are rows picked by index, so there is
no DataLoader.

A stored number x is read as `x · scale + shift`. `Reading` holds what a trained network's input
went through, so that `predict` can treat new inputs the same way.
"""

import copy
import hashlib
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

_PRIME = 1_000_003  # separates the seeds of one run's epochs from those of the next run
_SEEDS = 2**63  # what a generator takes
_SHOWN = 5  # columns that an error lists
_PIECE = 2**16  # numbers of a large tensor that are worked on at a time
# Labels are numbers of classes. More classes than this, and than there are samples, are ids.
_MANY_CLASSES = 1000


class DataError(ValueError):
    """A data set that cannot be found, read or used, in one line."""


def needs_extra(package: str, what: str, extra: str = "train") -> DataError:
    """The error for a missing optional package: says which extra to install."""
    return DataError(f"{what} needs {package}: install the extra, pip install 'handgrad[{extra}]'")


def announce(notes: Sequence[str]) -> None:
    """Prints what was decided about the data on stderr, one line each.

    Names in it come from files, so control characters are escaped.
    """
    for note in notes:
        line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in note)
        print(f"note: {line}", file=sys.stderr)


@dataclass(frozen=True)
class Fingerprint:
    """What tells whether two data sets are the same: shape and dtype of the inputs, a hash of
    inputs, targets and class names.
    """

    shape: list[int]
    dtype: str
    hash: str


@dataclass(frozen=True)
class Reading:
    """How a network's training read its inputs; plain data, stored with the run.

    A stored number becomes `((x - mean) / std) · scale + shift`; without mean and std, which have
    one number for each feature, `x · scale + shift`. image_shape: (C, H, W) or None. levels: the
    stored values of black and of white, None where they are not known. stored: the dtype of the
    training inputs before any standardisation.
    """

    scale: float = 1.0
    shift: float = 0.0
    image_shape: tuple[int, ...] | None = None
    levels: tuple[float, float] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    stored: str = "float32"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.scale) and math.isfinite(self.shift)):
            raise DataError(f"scale and shift must be finite, got {self.scale} and {self.shift}")
        if self.image_shape is not None and min(self.image_shape) < 1:
            raise DataError(f"image_shape must be positive, got {self.image_shape}")
        if self.levels is not None and not self.levels[0] < self.levels[1] < math.inf:
            raise DataError(f"levels must be black below white, got {self.levels}")
        mean, std = self.mean or (), self.std or ()
        if len(mean) != len(std) or not all(
            math.isfinite(m) and 0 < s < math.inf for m, s in zip(mean, std)
        ):
            raise DataError("mean and std must be finite, as many and std above 0")

    def check_same(self, other: "Reading", name: str) -> None:
        """DataError if other data, called `name`, would be read in another way than these were."""
        for what in ("image_shape", "levels", "scale", "shift"):
            ours, theirs = getattr(self, what), getattr(other, what)
            if ours != theirs:
                raise DataError(
                    f"{name}: is read with {what} {theirs}, but the network was trained with "
                    f"{ours}: the data have changed"
                )

    def numbers(self, raw: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Inputs (N, features) as they lie in a file, as the numbers that the network takes."""
        raw = raw.double()
        if self.mean is not None:
            if raw.shape[-1] != len(self.mean):
                raise DataError(
                    f"inputs must have {len(self.mean)} features, as in training, got "
                    f"{raw.shape[-1]}"
                )
            mean, std = (
                torch.tensor(values, dtype=torch.float64, device=raw.device)
                for values in (self.mean, self.std)
            )
            raw = (raw - mean) / std
        return (raw * self.scale + self.shift).to(dtype)


@dataclass
class Dataset:
    """Inputs (N, features) and targets, on one device.

    An input is read as `inputs · scale + shift`.

    targets: (N,) int64 labels in [0, len(classes)), or floating point, (N, outputs). image_shape:
    (C, H, W) if the features are an image's. levels: the stored values of black and white, if the
    inputs are pixels. columns: names of the features. mean, std: what `standardized` subtracted and
    divided by, one number a feature. stored: the dtype in the file. notes: what was decided when
    the data were read. ignored: a label that stands for none, a loss's ignore_index. DataError for
    lengths that differ, no data, labels out of range, numbers that are not finite.
    """

    inputs: torch.Tensor
    targets: torch.Tensor
    classes: tuple[str, ...] = ()
    image_shape: tuple[int, ...] | None = None
    scale: float = 1.0
    shift: float = 0.0
    name: str = "data"
    levels: tuple[float, float] | None = None
    columns: tuple[str, ...] = ()
    mean: torch.Tensor | None = None
    std: torch.Tensor | None = None
    stored: str = ""
    notes: tuple[str, ...] = ()
    ignored: int | None = None
    _buffers: dict = field(default_factory=dict, repr=False)
    _origin: Fingerprint | None = field(default=None, repr=False)  # before a standardisation

    def __post_init__(self) -> None:
        if len(self.inputs) != len(self.targets):
            raise DataError(
                f"{self.name}: {len(self.inputs)} inputs but {len(self.targets)} targets"
            )
        if len(self.inputs) == 0:
            raise DataError(f"{self.name}: empty: it has no samples")
        self.stored = self.stored or str(self.inputs.dtype).removeprefix("torch.")
        self.inputs = self.inputs.reshape(len(self.inputs), -1).contiguous()
        _check_finite(self, "inputs", self.columns)
        if self.targets.is_floating_point():
            _check_finite(self, "targets")
        else:
            self._check_labels()

    def _check_labels(self) -> None:
        self.targets = self.targets.long()
        counted = self.targets if self.ignored is None else self._counted()
        largest = int(counted.max())
        if not self.classes:
            if largest >= max(_MANY_CLASSES, len(self)):
                raise DataError(
                    f"{self.name}: label {largest} would make {largest + 1:,} classes of "
                    f"{len(self):,} samples: labels are numbers of classes from 0; are these ids, "
                    "or targets of a regression (then give floating point)?"
                )
            self.classes = tuple(str(c) for c in range(largest + 1))
        bad = (self.targets < 0) | (self.targets >= len(self.classes))
        bad = (bad if self.ignored is None else bad & (self.targets != self.ignored)).nonzero()
        if len(bad):
            i = int(bad[0, 0])
            raise DataError(
                f"{self.name}: label {int(self.targets[tuple(bad[0])])} of sample {i} is not one "
                f"of the {len(self.classes)} classes, 0 to {len(self.classes) - 1}"
            )

    def _counted(self) -> torch.Tensor:
        """The labels that are not ignored."""
        counted = self.targets[self.targets != self.ignored]
        if not len(counted):
            raise DataError(
                f"{self.name}: every label is {self.ignored}, which the loss ignores: there is "
                "nothing to learn"
            )
        return counted

    @classmethod
    def of(
        cls,
        inputs: Any,
        targets: Any = None,
        *,
        like: "Dataset | None" = None,
        name: str = "data",
        ignored: int | None = None,
    ) -> "Dataset":
        """A data set from what is in memory: numbers stay as they are.

        inputs: a Dataset (returned as it is), a pair (inputs, targets), a TensorDataset, another
        map-style dataset of torch, or a DataLoader, whose order and batches are not used; or, with
        targets beside them, tensors, numpy arrays, frames of pandas, lists or sparse matrices.
        Image arrays keep their axes: (N, H, W), (N, C, H, W) or (N, H, W, C). Whole numbers are
        labels, as in torch: they are numbers of classes from 0 and are not mapped. Words are
        classes, mapped in sorted order, or in that of `like`: give the training data there for
        test data. ignored: a label that stands for none. DataError in one line.
        """
        from .arrays import in_memory

        if isinstance(inputs, cls):
            return inputs
        return in_memory(inputs, targets, like, name, ignored)

    def __len__(self) -> int:
        return len(self.inputs)

    @property
    def features(self) -> int:
        """Numbers in one input."""
        return self.inputs.shape[1]

    @property
    def is_classification(self) -> bool:
        """Whether the targets are labels."""
        return not self.targets.is_floating_point()

    def class_counts(self) -> torch.Tensor:
        """(classes,) int64 on the CPU: how many samples each class has."""
        labels = self.targets if self.ignored is None else self._counted()
        return torch.bincount(labels.flatten().cpu(), minlength=len(self.classes))

    @property
    def reading(self) -> Reading:
        """How these inputs are read, to be stored with a network trained on them."""
        mean, std = (None if t is None else tuple(t.tolist()) for t in (self.mean, self.std))
        return Reading(
            self.scale, self.shift, self.image_shape, self.levels, mean, std, self.stored
        )

    def _with(self, **changes: Any) -> "Dataset":
        """A copy with other fields, which are known to be good: nothing is checked again."""
        other = copy.copy(self)
        other._buffers = {}
        for field_name, value in changes.items():
            setattr(other, field_name, value)
        return other

    def to(self, device: torch.device | str) -> "Dataset":
        """The same data set on another device."""
        return self._with(inputs=self.inputs.to(device), targets=self.targets.to(device))

    def take(self, count: int) -> "Dataset":
        """The first `count` samples."""
        return self.rows(slice(count))

    def rows(self, chosen: torch.Tensor | slice, name: str | None = None) -> "Dataset":
        """The samples at these indices, or in this slice."""
        inputs, targets = self.inputs[chosen], self.targets[chosen]
        if len(inputs) == 0:
            raise DataError(f"{self.name}: empty: none of its {len(self)} samples was chosen")
        origin = self._origin
        if origin is not None:
            picked = torch.arange(len(self))[chosen.cpu() if torch.is_tensor(chosen) else chosen]
            shape = [len(picked), *origin.shape[1:]]
            origin = Fingerprint(shape, origin.dtype, _digest(picked, origin.hash))
        return self._with(inputs=inputs, targets=targets, name=name or self.name, _origin=origin)

    def normalized(self, mean: float, std: float) -> "Dataset":
        """Read as (x - mean) / std, with x as it was read before. Nothing is copied."""
        return self._with(scale=self.scale / std, shift=(self.shift - mean) / std)

    def standardized(self, by: "Dataset | Reading | None" = None) -> "Dataset":
        """Every feature with mean 0 and standard deviation 1, stored as float32.

        by: the training data, or their reading, if these are test data: their mean and deviation
        are used. Without it, they are measured here. A feature that never changes becomes 0.
        """
        if self.mean is not None:
            raise DataError(f"{self.name}: is standardised already")
        on = self.inputs.device
        if by is None:
            found = moments(self.inputs)
            constant = found.low == found.high
            # A mean is rounded: a constant column must become exactly 0.
            mean = torch.where(constant, found.low, found.mean)
            std = found.std.masked_fill(constant, 1.0)
        else:
            reading = by.reading if isinstance(by, Dataset) else by
            if reading.mean is None or len(reading.mean) != self.features:
                raise DataError(
                    f"{self.name}: has {self.features} features, but the data to standardise by "
                    f"{'are not standardised' if reading.mean is None else len(reading.mean)}"
                )
            mean, std = (
                torch.tensor(values, dtype=torch.float64, device=on)
                for values in (reading.mean, reading.std)
            )
        inputs = torch.empty(self.inputs.shape, device=on)
        for piece, rows in zip(_pieces(inputs), _pieces(self.inputs)):
            piece.copy_(rows.double().sub(mean).div_(std))
        return self._with(
            inputs=inputs,
            scale=1.0,
            shift=0.0,
            mean=mean.cpu(),
            std=std.cpu(),
            _origin=self.fingerprint(),
        )

    def narrowed(self) -> "Dataset":
        """Inputs wider than float32 as float32: what is left to do when nothing is standardised."""
        if self.inputs.dtype == torch.uint8 or self.inputs.dtype == torch.float32:
            return self
        narrow = self._with(inputs=self.inputs.float())
        if not bool(narrow.inputs.isfinite().all()):
            raise DataError(
                f"{self.name}: numbers up to {float(self.inputs.abs().max()):.3g} are too large "
                "for float32: standardise them"
            )
        return narrow

    def fingerprint(self) -> Fingerprint:
        """Of the contents, equal for equal data on whatever device. Standardised data have the
        fingerprint of what they were made from.
        """
        if self._origin is not None:
            return self._origin
        said = [str((tuple(t.shape), t.dtype)) for t in (self.inputs, self.targets)]
        digest = _digest(self.targets, _digest(self.inputs, *said, *self.classes))
        dtype = str(self.inputs.dtype).removeprefix("torch.")
        return Fingerprint(list(self.inputs.shape), dtype, digest)

    def read(
        self,
        raw: torch.Tensor,
        dtype: torch.dtype = torch.float32,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Rows of `inputs` as numbers: raw · scale + shift in `dtype`."""
        x = torch.mul(
            raw if raw.dtype == torch.uint8 and dtype == torch.float32 else raw.to(dtype),
            self.scale,
            out=out,
        )
        if self.shift:
            x = x.add_(self.shift)
        return x.to(dtype)

    def batch(
        self, indices: torch.Tensor, dtype: torch.dtype = torch.float32
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs (rows, features) and targets of these samples.

        They lie in buffers that the next batch overwrites.
        """
        rows = len(indices)
        key = (rows, dtype)
        if key not in self._buffers:
            while len(self._buffers) > 1:
                self._buffers.pop(next(iter(self._buffers)))
            with torch.inference_mode(False):  # training uses them again
                self._buffers[key] = (
                    self.inputs.new_empty(rows, self.features),
                    self.inputs.new_empty(rows, self.features, dtype=dtype),
                    self.targets.new_empty(rows, *self.targets.shape[1:]),
                )
        raw, x, y = self._buffers[key]
        torch.index_select(self.inputs, 0, indices, out=raw)
        torch.index_select(self.targets, 0, indices, out=y)
        return self.read(raw, dtype, x), y

    def chunks(
        self, size: int, dtype: torch.dtype = torch.float32
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(inputs, targets) of consecutive pieces of at most `size` samples, in order.

        For evaluation.
        """
        for start in range(0, len(self), size):
            yield (
                self.read(self.inputs[start : start + size], dtype),
                self.targets[start : start + size],
            )


class Moments(NamedTuple):
    """Of each column, (features,) float64: smallest, largest, mean and standard deviation."""

    low: torch.Tensor
    high: torch.Tensor
    mean: torch.Tensor
    std: torch.Tensor


def moments(inputs: torch.Tensor) -> Moments:
    """Measured in float64, in pieces: a copy of all inputs would take eight times their bytes."""
    low, high = inputs.amin(0).double(), inputs.amax(0).double()
    zero = torch.zeros_like(inputs[0], dtype=torch.float64)
    mean = sum((piece.double().sum(0) for piece in _pieces(inputs)), zero) / len(inputs)
    # Squares of very large or small numbers would not be finite, or 0.
    size = torch.maximum(high - mean, mean - low)
    inverse = torch.where(size > 0, 1 / size, 0.0)
    squares = sum(
        (piece.double().sub(mean).mul_(inverse).square_().sum(0) for piece in _pieces(inputs)), zero
    )
    return Moments(low, high, mean, (squares / len(inputs)).sqrt() * size)


def _pieces(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Rows of a tensor in pieces that fit into a processor's cache."""
    return tensor.split(max(1, _PIECE // max(1, tensor[0].numel())))


def _digest(tensor: torch.Tensor, *said: str) -> str:
    """A hash of a tensor's bytes, after these words."""
    state = hashlib.blake2b(repr(said).encode(), digest_size=16)
    for piece in _pieces(tensor):
        state.update(piece.cpu().contiguous().view(torch.uint8).numpy().data)
    return state.hexdigest()


def _check_finite(data: Dataset, part: str, columns: tuple[str, ...] = ()) -> None:
    """DataError with row and column of the first number that is NaN or infinite."""
    values = getattr(data, part)
    # A sum is one pass without a temporary. It may overflow, so only then every number is asked.
    if not values.is_floating_point() or bool(values.sum().isfinite()):
        return
    bad = (~values.isfinite()).nonzero()
    if not len(bad):
        return
    row, *column = bad[0].tolist()
    where = f"row {row}"
    more = f", and {len(bad) - 1:,} more" if len(bad) > 1 else ""
    if column:
        odd = bad[:, 1].unique().tolist()
        names = [f"{i} ({columns[i]})" if columns else str(i) for i in (column[0], *odd[:_SHOWN])]
        where += f", column {names[0]}"
        if more and len(odd) > 1:
            more += f" in columns {', '.join(names[1:])}{', …' * (len(odd) > _SHOWN)}"
    raise DataError(
        f"{data.name}: {part} must be finite, got {float(values[tuple(bad[0])])} in {where}{more}"
        "; rows and columns count from 0: fill such values in or leave their rows out"
    )


def permutation(
    count: int, seed: int, epoch: int, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """The order of an epoch's samples.

    It is the same for the same count, seed, epoch and kind of device.
    """
    generator = torch.Generator(device).manual_seed((seed * _PRIME + epoch) % _SEEDS)
    return torch.randperm(count, generator=generator, device=device)


def split(data: Dataset, test_share: float = 0.2) -> tuple[Dataset, Dataset]:
    """A fixed random split into (train, test)."""
    if len(data) < 2:
        raise DataError(f"{data.name}: one sample cannot be split into training and test data")
    order = permutation(len(data), seed=0, epoch=0)
    count = max(1, round(len(data) * test_share))
    test, train = order[:count], order[count:]
    return data.rows(train, f"{data.name} (train)"), data.rows(test, f"{data.name} (test)")
