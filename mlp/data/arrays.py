"""Arrays as data sets: the axes of images, the values of black and white, the labels' classes.

`in_memory` takes arrays of a program. Like torch, it changes no number. `from_arrays` takes arrays
of a file. It decides the scale of pixels and the classes of labels, and adds a note on each
decision.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler, TensorDataset

from . import labels, pixels
from .dataset import DataError, Dataset, in_two

_LARGEST = 2**33  # bytes of a sparse array once it is dense
_GATHERED = 1024  # samples in one call of a dataset's collate function


def is_sparse(value: object) -> bool:
    """True if this is a sparse matrix or array of scipy."""
    return hasattr(value, "toarray") and hasattr(value, "nnz")


def dense(value: Any, what: str) -> Any:
    """A sparse matrix of scipy or torch as a dense one. Other values are returned unchanged.

    DataError, which starts with `what`, if the dense matrix takes more than 8 GiB.
    """
    scipy_like = is_sparse(value)
    if not scipy_like and not (torch.is_tensor(value) and value.layout != torch.strided):
        return value
    size = int(np.prod(value.shape, dtype=object)) * 8
    if size > _LARGEST:
        raise DataError(
            f"{what}: a sparse array of shape {tuple(value.shape)} would take "
            f"{size / 2**30:.0f} GiB with its zeros, more than {_LARGEST / 2**30:.0f}; leave "
            "columns out"
        )
    return value.toarray() if scipy_like else value.to_dense()


def _from_frame(frame: Any, what: str) -> tuple[Any, tuple[str, ...]]:
    """(numbers of a frame, with NaN for missing ones; names of its columns)."""
    names = tuple(str(column) for column in frame.columns)
    if not hasattr(frame, "iloc"):  # a frame of another library than pandas
        return frame.to_numpy(), names
    kinds = [getattr(dtype, "kind", None) for dtype in frame.dtypes]
    if bad := [n for n, kind in zip(names, kinds) if kind not in ("b", "i", "u", "f")]:
        raise DataError(
            f"{what}: column {bad[0]} holds {frame.dtypes.iloc[names.index(bad[0])]}, "
            "not numbers; encode it or leave it out"
        )
    return frame.to_numpy(dtype="float64", na_value=np.nan), names


def numbers(value: Any, what: str) -> tuple[torch.Tensor, tuple[str, ...]]:
    """(tensor of real numbers, names of its columns) of any object that holds an array.

    uint16, uint32 and uint64 become int64, bool becomes uint8. DataError, which starts with `what`,
    for anything else than real numbers.
    """
    columns: tuple[str, ...] = ()
    if hasattr(value, "columns") and hasattr(value, "dtypes"):
        value, columns = _from_frame(value, what)
    if isinstance(value, torch.utils.data.Dataset | DataLoader):
        raise DataError(
            f"{what}: needs an array of rows, got a {type(value).__name__}; give its inputs alone"
        )
    value = dense(value, what)
    if not torch.is_tensor(value):
        try:
            array = np.asanyarray(value)
        except (TypeError, ValueError) as error:
            if "inhomogeneous" in str(error):  # numpy has no class for it
                error = ValueError("its parts have different shapes; give the rows alone")
            raise DataError(f"{what}: is not an array ({error})") from None
        value = _tensor(array, what)
    if value.is_complex():
        raise DataError(
            f"{what}: must be real numbers, got complex ones; store real and imaginary parts as "
            "columns"
        )
    value = value.detach()
    if value.dtype == torch.bool:
        value = value.to(torch.uint8)
    elif value.dtype in (torch.uint16, torch.uint32, torch.uint64):
        value = value.to(torch.int64)
    return value, columns


def _tensor(array: np.ndarray, what: str) -> torch.Tensor:
    if isinstance(array, np.ma.MaskedArray):
        array = np.ma.filled(array.astype(np.float64), np.nan)  # masked numbers are missing
    if array.dtype == np.uint64 and array.size and array.max() >= 2**63:
        array = array.astype(np.float64)
    if array.dtype.names:
        raise DataError(
            f"{what}: must be an array of numbers, got records with the fields "
            f"{', '.join(array.dtype.names)}; store one array of numbers"
        )
    if array.dtype.kind == "O":
        try:
            array = array.astype(np.float64)
        except (TypeError, ValueError):
            raise DataError(f"{what}: must be arrays of numbers, got a list of objects") from None
    if array.dtype.kind == "c":
        return torch.empty(0, dtype=torch.complex64)
    if array.dtype.kind not in "biuf":
        raise DataError(f"{what}: must be arrays of numbers, got {array.dtype}")
    kind = np.float64 if array.dtype.kind == "f" and array.dtype.itemsize > 8 else array.dtype
    native = np.dtype(kind).newbyteorder("=")
    # torch accepts no negative strides, and warns about read-only memory.
    array = np.require(array, native, ["C_CONTIGUOUS", "WRITEABLE"])
    return torch.from_numpy(array)


def _gathered(
    dataset: torch.utils.data.Dataset, collate: Callable | None, name: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """(inputs, targets) of a map-style dataset of torch, in the order of its indices."""
    _refuse_random(dataset, name)
    batches = []
    for batch in DataLoader(dataset, batch_size=_GATHERED, collate_fn=collate):
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise DataError(
                f"{name}: a sample must be a pair (input, target), got "
                f"{type(batch).__name__}"
                + (f" of {len(batch)}" if isinstance(batch, (tuple, list, dict)) else "")
            )
        batches.append(batch)
    if not batches:
        raise DataError(f"{name}: empty: it has no samples")
    inputs, targets = (torch.cat([torch.as_tensor(p) for p in parts]) for parts in zip(*batches))
    return inputs, targets


def _refuse_random(dataset: Any, name: str) -> None:
    """DataError if two readings of the first sample differ. Every epoch would get one of them."""
    if not len(dataset):
        return
    first, again = (_leaves(dataset[0]) for _ in range(2))
    if any(not np.array_equal(a, b, equal_nan=True) for a, b in zip(first, again)):
        raise DataError(
            f"{name}: two readings of sample 0 differ, but the samples are read once, before "
            "training; leave out what is random, and shift images with augment="
        )


def _leaves(sample: Any) -> list[np.ndarray]:
    """The arrays of real numbers in a sample."""
    parts = sample if isinstance(sample, (tuple, list)) else [sample]
    arrays = [np.asarray(part) for part in parts if not isinstance(part, dict)]
    return [array for array in arrays if array.dtype.kind in "biuf"]


def _taken_apart(source: Any, name: str) -> tuple[Any, Any]:
    """(inputs, targets) of a pair, a TensorDataset, a map-style dataset or a DataLoader."""
    collate = None
    if isinstance(source, DataLoader):
        sampler, collate = source.sampler, source.collate_fn
        plain = isinstance(sampler, SequentialSampler) or (
            isinstance(sampler, RandomSampler)
            and not sampler.replacement
            and sampler.num_samples == len(sampler.data_source)
        )
        if not plain:
            raise DataError(
                f"{name}: the {type(sampler).__name__} of this DataLoader cannot be used, because "
                "batches are drawn from all samples here; give the dataset itself"
            )
        source = source.dataset
    if isinstance(source, TensorDataset) and len(source.tensors) == 2:
        return source.tensors
    if isinstance(source, torch.utils.data.Dataset):
        if not hasattr(source, "__getitem__") or not hasattr(source, "__len__"):
            raise DataError(f"{name}: an iterable dataset has no known end; give tensors")
        return _gathered(source, collate, name)
    if isinstance(source, (tuple, list)) and len(source) == 2:
        return source[0], source[1]
    raise DataError(
        f"{name}: needs a pair (inputs, targets), a TensorDataset, a DataLoader or an mlp.Dataset, "
        f"got {type(source).__name__}"
        + (f" of {len(source)}" if isinstance(source, (tuple, list)) else "")
    )


def in_memory(
    inputs: Any, targets: Any, like: Dataset | None, name: str, ignored: int | None = None
) -> Dataset:
    """See `Dataset.of`."""
    if targets is None:
        inputs, targets = _taken_apart(inputs, name)
    x, columns = numbers(inputs, f"{name}: inputs")
    y, classes = labels.in_memory(targets, name, like)
    _check_lengths(x, y, name)
    if x.dim() == 1:
        x = x[:, None]
    shape = {3: (1, *x.shape[1:]), 4: tuple(x.shape[1:])}.get(x.dim())
    if x.dim() == 4 and min(x.shape[1:3]) > 4 and x.shape[3] in (1, 3):
        raise DataError(
            f"{name}: inputs {tuple(x.shape)} have their channels last, but networks take them "
            "first; give x.permute(0, 3, 1, 2), or x.flatten(1) if they are no images"
        )
    stored = _dtype_name(x.dtype)
    if not x.is_floating_point() and x.dtype != torch.uint8:
        exact = x.to(torch.float32)
        x = exact if bool((exact.to(x.dtype) == x).all()) else x.double()
    return Dataset(x, y, classes, shape, name=name, columns=columns, stored=stored, ignored=ignored)


def _dtype_name(dtype: object) -> str:
    """The name of numpy's or torch's dtype, such as "float64", for either byte order."""
    return getattr(dtype, "name", None) or str(dtype).removeprefix("torch.")


def _check_lengths(x: torch.Tensor, y: torch.Tensor, name: str) -> None:
    if 0 in (x.dim(), y.dim()) or len(x) != len(y):
        raise DataError(
            f"{name}: inputs {tuple(x.shape)} need as many labels, got {tuple(y.shape)}"
        )
    if 0 in x.shape[1:]:
        raise DataError(f"{name}: inputs {tuple(x.shape)} have no numbers in a sample")


def from_arrays(
    x: Any,
    y: Any,
    x_test: Any = None,
    y_test: Any = None,
    *,
    name: str = "data",
    image: str | tuple[int, ...] | None = None,
    task: str | None = None,
    named_image: bool = False,
) -> tuple[Dataset, Dataset]:
    """(train, test) of arrays as files hold them.

    Without test arrays, a fifth of the samples is held out. x: (N, features), (N, H, W),
    (N, C, H, W) or (N, H, W, C), real numbers. y: labels of any kind, (N,), (N, 1) or one-hot, or
    floating-point targets (N, outputs). image: the shape of an image, "28x28" or "3x32x32"
    (channels first), for flat rows and for ambiguous axes. task: "classification" or "regression",
    if the targets' type would decide otherwise. named_image: the arrays' names say that rows are
    images. The data sets' `notes` say what was decided. DataError for arrays that cannot be used.
    """
    parts = [(x, y)] if x_test is None else [(x, y), (x_test, y_test)]
    read = [numbers(part, f"{name}: inputs") for part, _ in parts]
    inputs, columns = [tensor for tensor, _ in read], read[0][1]
    dtypes = [_dtype_name(getattr(p, "dtype", t.dtype)) for (p, _), t in zip(parts, inputs)]
    found = labels.read([part for _, part in parts], [t.shape for t in inputs], name, task)
    for tensor, target in zip(inputs, found.targets):
        _check_lengths(tensor, target, name)
        if len(tensor) == 0:
            raise DataError(f"{name}: empty: it has no samples")
    features = [tensor[0].numel() for tensor in inputs]
    if len(set(features)) > 1:
        raise DataError(
            f"{name}: training inputs have {features[0]} features, test inputs {features[1]}"
        )
    inputs, look = pixels.understood(inputs, dtypes, name, image, named_image)
    sets = [
        Dataset(
            tensor,
            target,
            found.classes,
            look.shape,
            look.scale,
            look.shift,
            name if len(inputs) == 1 else f"{name} ({part})",
            look.levels,
            columns,
            stored=dtypes[0],
            notes=(*look.notes, *found.notes) if part == "train" else (),
        )
        for tensor, target, part in zip(inputs, found.targets, ("train", "test"))
    ]
    return in_two(sets)
