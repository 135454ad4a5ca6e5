"""What `fit` is given, as a data set.

And what the object said besides: a loader's batches, the shape of a sample, labels that were words.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler, TensorDataset

from .dataset import DataError, Dataset


class Given(NamedTuple):
    """data: the data set. shape: of a sample with more than one dimension, as the object has it.

    words: the classes, where the labels were words. batch_size, drop_last: a DataLoader's, else
    None. note: a line for people on what becomes of a DataLoader.
    """

    data: Dataset
    shape: tuple[int, ...] | None = None
    words: tuple[str, ...] | None = None
    batch_size: int | None = None
    drop_last: bool | None = None
    note: str | None = None


def take(given: Any, ignored: int | None = None, like: Dataset | None = None) -> Given:
    """Anything that `Dataset.of` takes. ignored: a label that stands for none. like: the training
    data, for test data. DataError in one line.
    """
    if isinstance(given, Dataset):
        return Given(given)
    if isinstance(given, DataLoader) and type(given.batch_sampler) not in (
        BatchSampler,
        type(None),
    ):
        raise DataError(
            f"data: a DataLoader with a {type(given.batch_sampler).__name__} draws batches in a "
            "way that is not kept here: give the dataset itself"
        )
    data = Dataset.of(given, like=like, ignored=ignored)
    taken = Given(data, _shape(given, data), _words(given, data))
    if not isinstance(given, DataLoader):
        return taken
    order = "in the trainer's own order"
    if isinstance(given.sampler, SequentialSampler):
        order += ", although the loader does not shuffle"
    note = f"the DataLoader's {len(data):,} samples are read once and batched {order}"
    return taken._replace(batch_size=given.batch_size, drop_last=given.drop_last, note=note)


def _shape(given: Any, data: Dataset) -> tuple[int, ...] | None:
    """Of a sample, if it has more than one dimension."""
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


def _words(given: Any, data: Dataset) -> tuple[str, ...] | None:
    """The classes, if the labels of a pair are words."""
    if not isinstance(given, (tuple, list)) or torch.is_tensor(given[1]):
        return None
    labels = given[1].to_numpy() if hasattr(given[1], "to_numpy") else np.asarray(given[1])
    return data.classes if labels.dtype.kind in "USO" and data.is_classification else None


def fitted(data: Dataset, device: torch.device, dtype: torch.dtype, outputs: int | None) -> Dataset:
    """A data set on the device. Numbers to be met are of the network's dtype, and a column where it
    is known to have one output.
    """
    data = data.to(device)
    if data.is_classification:
        return data
    targets = data.targets.to(dtype)
    if targets.dim() == 1 and outputs == 1:
        targets = targets.unsqueeze(1)
    return replace(data, targets=targets, _buffers={})
