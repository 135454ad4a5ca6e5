"""The data argument of `fit` as a data set.

`Given` also keeps what the object says about a loader's batches, a sample's shape, and labels that
are words.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler, TensorDataset

from .dataset import DataError, Dataset, has_float64
from .labels import plain

_WORDS = ("words", "bytes")  # kinds of labels that are names of classes


class Given(NamedTuple):
    """A data set and facts about the object that it was made from.

    shape: of a sample with more than one dimension, else None. words: the classes if the labels
    were words, else None. kind: of the targets as given, "bool", "bytes", "words" or "numbers".
    batch_size, drop_last: of a DataLoader, else None. note: one line that says how a DataLoader is
    used, else None.
    """

    data: Dataset
    shape: tuple[int, ...] | None = None
    words: tuple[str, ...] | None = None
    kind: str = "numbers"
    batch_size: int | None = None
    drop_last: bool | None = None
    note: str | None = None


def take(given: Any, ignored: int | None = None, like: Dataset | None = None) -> Given:
    """Take anything that `Dataset.of` takes.

    ignored: a label that stands for no class. like: the training data, if these are test data.
    DataError for data that cannot be used.
    """
    if isinstance(given, Dataset):
        return Given(given)
    if isinstance(given, DataLoader) and type(given.batch_sampler) not in (
        BatchSampler,
        type(None),
    ):
        raise DataError(
            f"data: the {type(given.batch_sampler).__name__} of this DataLoader cannot be used, "
            "because batches are drawn from all samples here; give the dataset itself"
        )
    data = Dataset.of(given, like=like, ignored=ignored)
    kind = _kind(_targets(given))
    words = data.classes if kind in _WORDS and data.is_classification else None
    taken = Given(data, _shape(given, data), words, kind)
    if not isinstance(given, DataLoader):
        return taken
    order = "in the trainer's own order"
    if isinstance(given.sampler, SequentialSampler):
        order += ", although the loader does not shuffle"
    note = f"the DataLoader's {len(data):,} samples are read once and batched {order}"
    return taken._replace(batch_size=given.batch_size, drop_last=given.drop_last, note=note)


def check_columns(columns: tuple[str, ...], trained: tuple[str, ...], what: str) -> None:
    """DataError if columns have other names, or another order, than those of the training data.

    () stands for data without names. So do numbers that count the columns.
    """
    counted = tuple(map(str, range(len(columns))))
    if len(columns) != len(trained) or columns == trained or counted in (columns, trained):
        return
    at = next(i for i, (one, other) in enumerate(zip(columns, trained)) if one != other)
    raise DataError(
        f"{what}: column {at} is {columns[at]!r}, but the network was trained on {trained[at]!r} "
        f"there; give the columns in the order {', '.join(trained)}"
    )


def _shape(given: Any, data: Dataset) -> tuple[int, ...] | None:
    """The shape of a sample if it has more than one dimension, else None."""
    if isinstance(given, (tuple, list)):
        rows = given[0]
    elif isinstance(given, TensorDataset):
        rows = given.tensors[0]
    elif isinstance(given, DataLoader):
        rows = given.collate_fn([given.dataset[0]])[0]
    else:
        rows = np.asarray(given[0][0])[None]
    shape = tuple(np.shape(rows)[1:])
    return shape if len(shape) > 1 and np.prod(shape) == data.features else None


def _targets(given: Any) -> Any:
    """The targets of anything that `take` takes, or the target of its first sample."""
    if isinstance(given, (tuple, list)):
        return given[1]
    if isinstance(given, TensorDataset):
        return given.tensors[1]
    return _targets(given.dataset) if isinstance(given, DataLoader) else given[0][1]


def _kind(targets: Any) -> str:
    """The kind of targets: "bool", "bytes", "words" or "numbers"."""
    if torch.is_tensor(targets):
        return "bool" if targets.dtype == torch.bool else "numbers"
    array = np.asarray(targets.to_numpy() if hasattr(targets, "to_numpy") else targets)
    if array.dtype.kind == "O":
        array = plain(targets, "labels")
    return {"b": "bool", "S": "bytes", "U": "words"}.get(array.dtype.kind, "numbers")


def fitted(data: Dataset, device: torch.device, dtype: torch.dtype, outputs: int | None) -> Dataset:
    """The data set on this device.

    The targets of a regression get the network's dtype. If the network has one output, they become
    a column (N, 1). outputs: of the network, or None if not known.
    """
    if not has_float64(device) and data.inputs.dtype == torch.float64:
        data = data.narrowed()  # a batch would be rounded to float32 as well
    if data.is_classification:
        return data.to(device)
    data = data._with(targets=data.targets.to(dtype)).to(device)
    targets = data.targets
    if targets.dim() == 1 and outputs == 1:
        targets = targets.unsqueeze(1)
    return replace(data, targets=targets, _buffers={})
