"""Samples as tensors on one device.

Pixels stay uint8 and are scaled when a batch reads them. A batch is a set of rows chosen by index,
so no DataLoader is needed.

A stored number x is read as `x · scale + shift`. `Reading` records how a network's training read
its inputs, so that `predict` can read new inputs the same way.
"""

import copy
import hashlib
import importlib.util
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

_PRIME = 1_000_003  # keeps the seeds of a run's epochs apart from those of the next run
_SEEDS = 2**63  # a generator's seeds are below this
_SHOWN = 5  # the most columns that an error lists
_PIECE = 2**16  # a large tensor is processed in pieces of this many numbers
# If labels number more classes than this and more than the samples, they are probably ids.
_MANY_CLASSES = 1000


class DataError(ValueError):
    """A data set cannot be found, read or used. The message is one line."""


class MissingPackage(DataError):
    """An optional package is not installed. The message names the extra to install."""


def needs_extra(package: str, what: str, extra: str = "train") -> MissingPackage:
    """The error for a missing optional package. It names the extra to install."""
    return MissingPackage(
        f"{what} needs {package}: install the extra, pip install 'handgrad[{extra}]'"
    )


def require(module: str, package: str, what: str, extra: str = "train") -> None:
    """MissingPackage if a module that is needed at the end of some work is not installed.

    It is called before the work. package: that has the module. The module is not imported.
    """
    if importlib.util.find_spec(module) is None:
        raise needs_extra(package, what, extra)


def announce(notes: Sequence[str]) -> None:
    """Print notes about the data on stderr, one line each.

    Names in them come from files, so control characters are escaped.
    """
    for note in notes:
        line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in note)
        print(f"note: {line}", file=sys.stderr)


@dataclass(frozen=True)
class Fingerprint:
    """Facts that are equal for equal data sets.

    shape, dtype: of the inputs. hash: of inputs, targets and class names.
    """

    shape: list[int]
    dtype: str
    hash: str


@dataclass(frozen=True)
class Reading:
    """How a network's training read its inputs. It is plain data, stored with the run.

    A stored number x is read as `((x - mean) / std) · scale + shift`, or as `x · scale + shift` if
    mean and std are None. mean, std: one number for each feature. image_shape: (C, H, W) or None.
    levels: the stored values of (black, white), or None if not known. stored: the dtype of the
    training inputs before any standardisation. DataError for numbers that are not finite, a std of
    0, or levels that are not in order.
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
            raise DataError(
                f"mean and std must be finite, of one length, with std above 0; got {len(mean)} "
                f"and {len(std)} numbers"
            )

    def check_same(self, other: "Reading", name: str) -> None:
        """DataError if other data, called `name`, are read in another way than these."""
        for what in ("image_shape", "levels", "scale", "shift"):
            ours, theirs = getattr(self, what), getattr(other, what)
            if ours != theirs:
                raise DataError(
                    f"{name}: is read with {what} {theirs}, but the network was trained with "
                    f"{ours}; the data have changed"
                )

    def numbers(self, raw: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The network's inputs (N, features), in `dtype`, from numbers as a file stores them."""
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

    An input is read as `inputs · scale + shift`. Inputs are uint8 or floating point.

    targets: (N,) int64 labels in [0, len(classes)), or floating point, (N, outputs). classes: their
    names. image_shape: (C, H, W) if the features are the pixels of an image. levels: the stored
    values of (black, white), if the inputs are pixels. columns: names of the features. mean, std:
    (features,), the numbers by which `standardized` shifted and divided. stored: the dtype in the
    file. notes: the decisions that were made when the data were read. ignored: a label that stands
    for no class, as a loss's ignore_index. DataError for lengths that differ, no samples, labels
    out of range, and numbers that are not finite.
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
    _gaps: str = field(default="", repr=False)  # one line if most numbers of classes are not used

    def __post_init__(self) -> None:
        if len(self.inputs) != len(self.targets):
            raise DataError(
                f"{self.name}: {len(self.inputs)} inputs but {len(self.targets)} targets"
            )
        if len(self.inputs) == 0:
            raise DataError(f"{self.name}: empty: it has no samples")
        self.stored = self.stored or str(self.inputs.dtype).removeprefix("torch.")
        self.inputs = self.inputs.reshape(len(self.inputs), -1).contiguous()
        self.targets = self.targets.contiguous()
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
                    f"{len(self):,} samples, because labels number the classes from 0; leave ids "
                    "out, or give targets of a regression as floating point"
                )
            self.classes = tuple(str(c) for c in range(largest + 1))
            self._gaps = _gaps(counted, len(self.classes))
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
                f"{self.name}: every label is {self.ignored}, which the loss ignores, so there is "
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
        """A data set from objects in memory. Numbers are not changed.

        Without targets, `inputs` is a Dataset (returned unchanged), a pair (inputs, targets), a
        TensorDataset, another map-style dataset of torch, or a DataLoader. The order and the
        batches of a DataLoader are not used. With targets, both are tensors, numpy arrays, frames
        of pandas, lists or sparse matrices. Inputs are (N,), (N, features), or images (N, H, W) or
        (N, C, H, W).

        Whole numbers as targets are labels, as in torch. They number the classes from 0. Bools
        (N, labels) are several labels a row, and become 0 and 1 as floating point. Words are class
        names. They are numbered in sorted order, or in that of `like`. like: the training
        data, if these are test data. ignored: a label that stands for no class. DataError, in one
        line, for data that cannot be used, also for images with their channels last.
        """
        from .arrays import in_memory

        if isinstance(inputs, cls):
            return inputs
        return in_memory(inputs, targets, like, name, ignored)

    def __len__(self) -> int:
        return len(self.inputs)

    @property
    def features(self) -> int:
        """The count of numbers in one input."""
        return self.inputs.shape[1]

    @property
    def is_classification(self) -> bool:
        """True if the targets are labels, False if they are floating point."""
        return not self.targets.is_floating_point()

    @property
    def outputs(self) -> int:
        """The number of outputs that a network for these targets needs.

        DataError if labels were given without classes, and most of their numbers have no sample.
        """
        if not self.is_classification:
            return self.targets.shape[1]
        if self._gaps:
            raise DataError(f"{self.name}: {self._gaps}")
        return len(self.classes)

    def class_counts(self) -> torch.Tensor:
        """(classes,) int64 on the CPU: the count of samples of each class."""
        labels = self.targets if self.ignored is None else self._counted()
        return torch.bincount(labels.flatten().cpu(), minlength=len(self.classes))

    @property
    def reading(self) -> Reading:
        """How these inputs are read. It is stored with a network that is trained on them."""
        mean, std = (None if t is None else tuple(t.tolist()) for t in (self.mean, self.std))
        return Reading(
            self.scale, self.shift, self.image_shape, self.levels, mean, std, self.stored
        )

    def _with(self, **changes: Any) -> "Dataset":
        """A copy with these fields changed. They are known to be valid, so nothing is checked."""
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
        """The samples at these indices (rows,), or in this slice. DataError if there are none."""
        inputs, targets = self.inputs[chosen], self.targets[chosen]
        if len(inputs) == 0:
            raise DataError(f"{self.name}: empty: none of its {len(self)} samples was chosen")
        origin = self._origin
        if origin is not None:
            every = torch.arange(len(self), device="cpu")
            picked = every[chosen.cpu() if torch.is_tensor(chosen) else chosen]
            shape = [len(picked), *origin.shape[1:]]
            origin = Fingerprint(shape, origin.dtype, _digest(picked, origin.hash))
        return self._with(inputs=inputs, targets=targets, name=name or self.name, _origin=origin)

    def normalized(self, mean: float, std: float) -> "Dataset":
        """The same data, read as (x - mean) / std, where x is the number read so far.

        The tensors are shared with this data set.
        """
        return self._with(scale=self.scale / std, shift=(self.shift - mean) / std)

    def standardized(self, by: "Dataset | Reading | None" = None) -> "Dataset":
        """The data with mean 0 and standard deviation 1 for every feature, stored as float32.

        A constant feature becomes 0. by: the standardised training data, or their reading, if these
        are test data. Their mean and deviation are used. Without `by`, both are measured here.
        DataError if the data are standardised already, or if `by` is not or has other features.
        """
        if self.mean is not None:
            raise DataError(f"{self.name}: is standardised already")
        on = self.inputs.device
        if not has_float64(on):
            return self.to("cpu").standardized(by).to(on)
        if by is None:
            mean, std = centre(moments(self.inputs))
        else:
            reading = by.reading if isinstance(by, Dataset) else by
            if reading.mean is None or len(reading.mean) != self.features:
                held = "are not standardised"
                if reading.mean is not None:
                    held = f"have {len(reading.mean)}"
                raise DataError(
                    f"{self.name}: has {self.features} features, but the data to standardise by "
                    f"{held}"
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
        """The data with inputs wider than float32 stored as float32. DataError if they overflow."""
        if self.inputs.dtype == torch.uint8 or self.inputs.dtype == torch.float32:
            return self
        narrow = self._with(inputs=self.inputs.float())
        if not bool(narrow.inputs.isfinite().all()):
            raise DataError(
                f"{self.name}: numbers up to {float(self.inputs.abs().max()):.3g} are too large "
                "for float32; standardise them"
            )
        return narrow

    def fingerprint(self) -> Fingerprint:
        """The fingerprint of the contents. It is the same on every device.

        Standardised data have the fingerprint of the data that they were made from.
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
        """Rows of `inputs` as the network's numbers: raw · scale + shift, in `dtype`."""
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
        """Inputs (rows, features) and targets of the samples at these indices (rows,).

        They are in buffers that the next batch overwrites.
        """
        rows = len(indices)
        key = (rows, dtype)
        if key not in self._buffers:
            while len(self._buffers) > 1:
                self._buffers.pop(next(iter(self._buffers)))
            with torch.inference_mode(False):  # training may use them after an evaluation
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
        """(inputs, targets) of consecutive pieces of at most `size` samples, for evaluation."""
        for start in range(0, len(self), size):
            yield (
                self.read(self.inputs[start : start + size], dtype),
                self.targets[start : start + size],
            )


def _gaps(labels: torch.Tensor, count: int) -> str:
    """What is wrong with labels of so many classes if most classes have no sample, else ""."""
    found = labels.unique().tolist()
    if 2 * len(found) >= count or count < 3:
        return ""
    shown = ", ".join(map(str, found[:_SHOWN])) + ", …" * (len(found) > _SHOWN)
    return (
        f"labels {shown} number the classes from 0, so {count - len(found)} of {count} classes "
        "have no sample; give them as words, or numpy.unique(labels, return_inverse=True)[1]"
    )


def has_float64(device: torch.device) -> bool:
    """False for Apple's GPU, on which torch makes no float64 tensor."""
    return device.type != "mps"


class Moments(NamedTuple):
    """(features,) float64 each: smallest, largest, mean and standard deviation of each column."""

    low: torch.Tensor
    high: torch.Tensor
    mean: torch.Tensor
    std: torch.Tensor


def moments(inputs: torch.Tensor) -> Moments:
    """The moments of each column of inputs (N, features), in float64.

    They are computed in pieces, because a float64 copy may take eight times the memory of inputs.
    """
    low, high = inputs.amin(0).double(), inputs.amax(0).double()
    zero = torch.zeros_like(inputs[0], dtype=torch.float64)
    mean = sum((piece.double().sum(0) for piece in _pieces(inputs)), zero) / len(inputs)
    # Squares of very large numbers would overflow, and those of very small ones would become 0.
    size = torch.maximum(high - mean, mean - low)
    inverse = torch.where(size > 0, 1 / size, 0.0)
    squares = sum(
        (piece.double().sub(mean).mul_(inverse).square_().sum(0) for piece in _pieces(inputs)), zero
    )
    return Moments(low, high, mean, (squares / len(inputs)).sqrt() * size)


def centre(found: Moments) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean, std) that standardise columns with these moments. A constant column becomes 0."""
    # A mean is rounded, so a constant column would not become exactly 0.
    constant = (found.low == found.high) | (found.std == 0)
    return torch.where(constant, found.low, found.mean), found.std.masked_fill(constant, 1.0)


def _pieces(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The rows of a tensor in pieces that fit into a processor's cache."""
    return tensor.split(max(1, _PIECE // max(1, tensor[0].numel())))


def _digest(tensor: torch.Tensor, *said: str) -> str:
    """A hash of these words, followed by the tensor's bytes."""
    state = hashlib.blake2b(repr(said).encode(), digest_size=16)
    for piece in _pieces(tensor):
        state.update(piece.cpu().contiguous().view(torch.uint8).numpy().data)
    return state.hexdigest()


def _check_finite(data: Dataset, part: str, columns: tuple[str, ...] = ()) -> None:
    """DataError with row and column of the first number that is NaN or infinite."""
    values = getattr(data, part)
    # A sum is one pass without a temporary. It may overflow, so then each number is checked.
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
        "; rows and columns count from 0; fill such values in or leave their rows out"
    )


def permutation(
    count: int, seed: int, epoch: int, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """The order of an epoch's samples: a random permutation (count,), int64, on the device.

    It depends only on count, seed, epoch and the kind of device.
    """
    generator = torch.Generator(device).manual_seed((seed * _PRIME + epoch) % _SEEDS)
    return torch.randperm(count, generator=generator, device=device)


def constant(what: str, value: Any) -> DataError:
    """The error for targets that are all equal, of arrays, images and tables."""
    return DataError(f"{what} is {value} in every row: nothing to learn")


def in_two(sets: Sequence[Dataset]) -> tuple[Dataset, Dataset]:
    """(train, test) of two data sets, or of one that is split. DataError for equal targets."""
    data = sets[0]
    first = data.targets[:1]
    if bool((data.targets == first).all()):
        numbers = ", ".join(f"{value:g}" for value in first.flatten().tolist())
        only = data.classes[int(first)] if data.is_classification else numbers
        raise constant(f"{data.name}: the target", only)
    return (data, sets[1]) if len(sets) == 2 else split(data)


def split(data: Dataset, test_share: float = 0.2) -> tuple[Dataset, Dataset]:
    """(train, test) by a fixed random split. DataError for a single sample."""
    if len(data) < 2:
        raise DataError(f"{data.name}: one sample cannot be split into training and test data")
    order = permutation(len(data), seed=0, epoch=0)
    count = max(1, round(len(data) * test_share))
    test, train = order[:count], order[count:]
    return data.rows(train, f"{data.name} (train)"), data.rows(test, f"{data.name} (test)")
