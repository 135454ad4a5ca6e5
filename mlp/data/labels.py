"""Targets: labels of any kind become numbers of classes, floating-point targets stay.

In memory, whole numbers are numbers of classes, as for torch. In a file they are only values. Each
value is then a class with this value as its name.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from .dataset import DataError, Dataset, moments
from .scaling import lost

TASKS = ("classification", "regression")
# More classes than this are refused as ids, unless each has 20 samples on average.
_MANY = 1000
_SAMPLES_EACH = 20
# Whole floating-point targets with more different values than this belong to a regression.
_FEW = 20


class Targets(NamedTuple):
    """Targets of training and test data, with the classes' names and notes on what was decided.

    targets: one tensor for each part, (N,) int64, or (N, outputs) floating point.
    """

    targets: list[torch.Tensor]
    classes: tuple[str, ...]
    notes: tuple[str, ...]


def plain(value: Any, what: str) -> np.ndarray:
    """Targets as an array of bools, numbers or words, in native byte order.

    DataError, which starts with `what`, for anything else.
    """
    if torch.is_tensor(value):
        value = value.detach().cpu()
        value = value.float() if value.dtype == torch.bfloat16 else value
        value = value.to_dense() if value.layout != torch.strided else value
    elif hasattr(value, "to_numpy"):
        value = value.to_numpy()
    elif hasattr(value, "toarray"):
        value = value.toarray()
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise DataError(f"{what}: is not an array ({error})") from None
    if array.dtype.names or array.dtype.kind not in "biufUSO":
        raise DataError(
            f"{what}: must be numbers or words, got "
            f"{'records' if array.dtype.names else array.dtype}"
        )
    if array.dtype.kind == "O":
        array = _of_objects(array, what)
    if array.dtype.kind == "S":
        array = np.char.decode(array, "utf-8", "replace")
    if array.dtype.kind == "U":
        array = np.char.strip(array)
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _of_objects(array: np.ndarray, what: str) -> np.ndarray:
    """Words or numbers from Python objects, or from the cells of a .mat file."""
    items = [
        item.reshape(-1)[0] if isinstance(item, np.ndarray) and item.size == 1 else item
        for item in array.reshape(-1)
    ]
    missing = [i for i, v in enumerate(items) if v is None or (isinstance(v, float) and v != v)]
    if missing:
        raise DataError(f"{what}: sample {missing[0]} has no value; leave its row out")
    if all(isinstance(item, str) for item in items):
        return np.array(items, dtype=np.str_).reshape(array.shape)
    if all(isinstance(item, (int, float, np.number, bool, np.bool_)) for item in items):
        return np.array(items).reshape(array.shape)
    kinds = sorted({type(item).__name__ for item in items})
    raise DataError(f"{what}: must be all numbers or all words, got {', '.join(kinds)}")


def in_memory(value: Any, name: str, like: Dataset | None) -> tuple[torch.Tensor, tuple[str, ...]]:
    """(targets, classes) from values in memory, as torch would take them.

    Words become numbers, in the order of the classes of `like` if given, else in sorted order.
    """
    known = like.classes if like is not None and like.is_classification else ()
    if torch.is_tensor(value) and value.layout == torch.strided:
        targets = value.detach()
    else:
        array = plain(value, f"{name}: labels")
        if array.dtype.kind == "U":
            return _numbered(array, known, name)
        if array.dtype == np.uint64:
            array = array.astype(np.int64)
        targets = torch.from_numpy(np.require(array, requirements=["C", "W"]))
        # numpy's default is float64, but that of a network is torch's default dtype.
        targets = targets.to(torch.get_default_dtype()) if targets.is_floating_point() else targets
    if targets.is_complex():
        raise DataError(f"{name}: labels: must be numbers or words, got {targets.dtype}")
    if not targets.is_floating_point() and targets.dim() == 2 and targets.shape[1] == 1:
        targets = targets.flatten()
    if targets.dtype == torch.bool and targets.dim() == 2:
        targets = targets.to(torch.get_default_dtype())
    if not targets.is_floating_point() and targets.dim() == 2:
        raise DataError(
            f"{name}: labels must be (N,), got {tuple(targets.shape)}; give argmax(1) of one-hot "
            "rows, or floating-point numbers for a regression or several labels a row"
        )
    return targets, () if targets.is_floating_point() else known


def _numbered(
    array: np.ndarray, known: tuple[str, ...], name: str
) -> tuple[torch.Tensor, tuple[str, ...]]:
    words = array.reshape(len(array), -1)
    if words.shape[1] != 1:
        raise DataError(f"{name}: labels must be one word a sample, got {array.shape}")
    classes = known or tuple(str(word) for word in np.unique(words))
    _check_count(len(classes), len(words), name)
    number = {word: i for i, word in enumerate(classes)}
    for i, word in enumerate(words[:, 0].tolist()):
        if word not in number:
            raise DataError(
                f"{name}: label {word!r} of sample {i} is not one of {classes}, the classes of the "
                "training; another network is needed to learn it"
            )
    labels = [number[word] for word in words[:, 0].tolist()]
    return torch.tensor(labels, dtype=torch.int64, device="cpu"), classes


def _check_count(classes: int, samples: int, name: str) -> None:
    """DataError for labels that are probably no classes: nearly one a sample, or thousands."""
    each = classes > _FEW and 2 * classes > samples
    if each or classes > max(_MANY, samples // _SAMPLES_EACH):
        raise DataError(
            f"{name}: {classes:,} different labels in {samples:,} samples look like ids or the "
            "targets of a regression, not like classes; store targets of a regression as "
            "fractions (floating point), or give task='regression'"
        )


def _rows(array: np.ndarray, samples: int, name: str) -> np.ndarray:
    """Targets with samples along the first axis, (N,) or (N, outputs). DataError for others."""
    if array.ndim == 2 and 1 in array.shape and array.size == samples:
        return array.reshape(-1)
    if array.ndim not in (1, 2):
        raise DataError(f"{name}: targets must be (N,) or (N, outputs), got {array.shape}")
    if array.size == 0 and (samples or array.ndim == 2):
        raise DataError(f"{name}: {samples} inputs need as many labels, got {array.shape}")
    if array.size == 0:
        raise DataError(f"{name}: empty: it has no samples")
    return array


def _is_one_hot(array: np.ndarray) -> bool:
    if array.ndim != 2 or array.shape[1] < 2 or array.dtype.kind == "U":
        return False
    return bool(((array == 0) | (array == 1)).all() and (array.sum(1) == 1).all())


def read(
    parts: Sequence[Any], shapes: Sequence[tuple[int, ...]], name: str, task: str | None = None
) -> Targets:
    """The targets of a file's training and test data. The two parts are understood together.

    shapes: of the inputs of each part. task: "classification", "regression", or None to decide by
    the targets' type. Then words, whole numbers and one-hot rows are labels, and fractions are
    targets of a regression. DataError, which starts with `name`, for targets that cannot be used.
    """
    if task is not None and task not in TASKS:
        raise DataError(f"{name}: unknown task {task!r}; known: {', '.join(TASKS)}")
    arrays = [
        _rows(plain(part, f"{name}: labels"), shape[0] if len(shape) else 0, name)
        for part, shape in zip(parts, shapes)
    ]
    if len({array.ndim for array in arrays}) > 1 or len({a.shape[1:] for a in arrays}) > 1:
        raise DataError(
            f"{name}: training targets are {arrays[0].shape}, test targets {arrays[1].shape}"
        )
    _check_finite(arrays, name)
    notes: tuple[str, ...] = ()
    if task != "regression" and all(_is_one_hot(array) for array in arrays):
        notes = (f"{name}: labels are one-hot rows of {arrays[0].shape[1]}; their column is taken",)
        width = arrays[0].shape[1]
        tensors = [torch.from_numpy(array.argmax(1)) for array in arrays]
        return Targets(tensors, tuple(map(str, range(width))), notes)
    if _is_regression(arrays, name, task):
        return _regression(arrays, name, task)
    if arrays[0].ndim != 1:
        raise DataError(
            f"{name}: inputs {tuple(shapes[0])} need as many labels, got {arrays[0].shape}; give "
            "one a sample, one-hot rows, or floating-point targets of a regression"
        )
    return _classes(arrays, name)


def _check_finite(arrays: Sequence[np.ndarray], name: str) -> None:
    for array, part in zip(arrays, ("training", "test")):
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            place = np.argwhere(~np.isfinite(array))[0].tolist()
            row, *column = place
            raise DataError(
                f"{name}: {part} targets must be finite, got {array[tuple(place)]} in row {row}"
                + (f", column {column[0]}" if column else "")
                + "; rows and columns count from 0; leave such rows out"
            )


def _is_regression(arrays: Sequence[np.ndarray], name: str, task: str | None) -> bool:
    if task is not None:
        words = any(array.dtype.kind == "U" for array in arrays)
        if task == "regression" and words:
            raise DataError(
                f"{name}: targets are words, but the task is 'regression'; leave task out"
            )
        return task == "regression"
    if not any(array.dtype.kind == "f" for array in arrays):
        return False
    together = np.concatenate(arrays)
    whole = together.ndim == 1 and bool((together == np.round(together)).all())
    return not whole or len(np.unique(together)) > max(_FEW, len(together) // _SAMPLES_EACH)


def _regression(arrays: Sequence[np.ndarray], name: str, task: str | None) -> Targets:
    values = [a.astype(np.float64).reshape(len(a), -1) for a in arrays]
    outputs = values[0].shape[1]
    note = (
        f"{name}: targets are {arrays[0].dtype}, {values[0].min():.6g} to {values[0].max():.6g}: "
        f"a regression with {outputs} output{'s' if outputs > 1 else ''}"
    )
    tensors = [torch.from_numpy(value) for value in values]
    # `units` subtracts the mean, which must come before a rounding that would hide the rest.
    if not lost(moments(tensors[0])).any():
        tensors = [tensor.float() for tensor in tensors]
    return Targets(tensors, (), (note,) if task is None else ())


def _classes(arrays: Sequence[np.ndarray], name: str) -> Targets:
    if len({array.dtype.kind == "U" for array in arrays}) > 1:
        raise DataError(
            f"{name}: training labels are {arrays[0].dtype}, test labels {arrays[1].dtype}"
        )
    together = np.concatenate(arrays)
    if together.dtype.kind == "f" and not (together == np.round(together)).all():
        bad = together[together != np.round(together)][0]
        raise DataError(f"{name}: labels must be whole numbers, got {bad}")
    values, numbers = np.unique(together, return_inverse=True)
    _check_count(len(values), len(together), name)
    if together.dtype.kind == "U" and all(word.isdecimal() for word in values):
        order = np.argsort([int(word) for word in values], kind="stable")
        numbers, values = np.argsort(order)[numbers], values[order]
    names = tuple(
        str(value) if together.dtype.kind in "Ub" else str(int(value)) for value in values
    )
    _check_negative(values, together, len(values), name)
    if len(set(names)) < len(names):
        raise DataError(f"{name}: labels {names} are too large to be distinguished")
    tensors = list(torch.from_numpy(numbers.reshape(-1)).split([len(a) for a in arrays]))
    return Targets(tensors, names, _notes(names, tensors, together.dtype.kind, name))


def _check_negative(values: np.ndarray, together: np.ndarray, count: int, name: str) -> None:
    """DataError for a negative label, because it often marks a missing one.

    -1 and 1 alone are two classes.
    """
    if values.dtype.kind in "if" and values[0] < 0 and values.tolist() != [-1, 1]:
        others = int((values >= 0).sum())
        i = int(np.argmax(together < 0))
        raise DataError(
            f"{name}: label {int(together[i])} of sample {i} is not one of the {others} classes, "
            f"0 to {int(values[-1])}; leave such rows out, or store the labels as words"
        )


def _notes(
    names: tuple[str, ...], tensors: Sequence[torch.Tensor], kind: str, name: str
) -> tuple[str, ...]:
    found = []
    if kind in "iuf" and names != tuple(map(str, range(len(names)))):
        shown = ", ".join(names if len(names) <= 5 else (*names[:3], "…", names[-1]))
        found.append(f"{name}: labels {shown} are {len(names)} classes, named by these values")
    if len(tensors) == 2:
        only = sorted(set(tensors[1].tolist()) - set(tensors[0].tolist()))
        if only:
            shown = ", ".join(names[i] for i in only[:5])
            found.append(f"{name}: the test data have classes that training lacks: {shown}")
    return tuple(found)
