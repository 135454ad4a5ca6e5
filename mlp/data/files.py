"""Files that hold arrays: .npz, .npy and .mat. One or several are read into one table of arrays.

Sizes are read from a file's directory and headers before anything is unpacked. So a file that would
not fit into memory is refused.
"""

import warnings
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from . import frames
from .arrays import from_arrays, numbers
from .dataset import DataError, Dataset, needs_extra
from .guards import check_regular, check_size

# Names of training inputs, training labels, test inputs and test labels, in any case of letters.
KEYS = (
    ("x_train", "y_train", "x_test", "y_test"),
    ("train_data", "train_labels", "test_data", "test_labels"),
    ("train_images", "train_labels", "test_images", "test_labels"),
    ("training_data", "training_label", "testing_data", "testing_label"),
    ("X", "y", "X_test", "y_test"),
    ("images", "labels", "test_images", "test_labels"),
    ("data", "target", "test_data", "test_target"),
    ("inputs", "targets", "test_inputs", "test_targets"),
)
# Suffixes of packed files that are not read. Tables may be packed, see `frames.PACKINGS`.
_PACKED = (*frames.PACKINGS, ".zst", ".7z", ".tar", ".tgz")
_HEADER = 10_000  # bytes, numpy's own limit for the header of an array


def _check_array_header(file: IO[bytes], size: int, what: str) -> None:
    """DataError if the header of a .npy announces Python objects, or more bytes than it has."""
    version = np.lib.format.read_magic(file)
    readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    if version not in readers:
        return  # numpy then reads it or raises an error
    shape, _, dtype = readers[version](file, max_header_size=_HEADER)
    if dtype.hasobject:
        raise DataError(f"{what}: holds Python objects; store numbers, or words as numpy strings")
    announced = int(np.prod(shape, dtype=object)) * dtype.itemsize
    if announced > size:
        raise DataError(
            f"{what}: is damaged, its header announces {announced:,} bytes, but it has {size:,}"
        )


def _npz(path: Path) -> dict[str, np.ndarray]:
    with zipfile.ZipFile(path) as archive:
        members = [m for m in archive.infolist() if m.filename.endswith(".npy")]
        names = [member.filename.removesuffix(".npy") for member in members]
        if twice := {name for name in names if names.count(name) > 1}:
            raise DataError(f"{path}: has the array {min(twice)} twice; leave one out")
        size = sum(member.file_size for member in members)
        check_size(size, sum(member.compress_size for member in members), str(path))
        for member in members:
            with archive.open(member) as file:
                _check_array_header(file, member.file_size, f"{path}: {member.filename}")
    with np.load(path, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in names}


def _npy(path: Path) -> dict[str, np.ndarray]:
    size = path.stat().st_size
    check_size(size, None, str(path))
    with path.open("rb") as file:
        _check_array_header(file, size, str(path))
    return {path.stem: np.load(path, allow_pickle=False)}


def _mat(path: Path) -> dict[str, Any]:
    try:
        from scipy.io import loadmat, whosmat
    except ImportError:
        raise needs_extra("scipy (with scikit-learn)", "reading .mat files") from None
    try:
        listed = whosmat(path)
        # A number of MATLAB takes at most 8 bytes. The size of sparse arrays and cells is unknown.
        size = sum(
            8 * int(np.prod(shape, dtype=object))
            for _, shape, kind in listed
            if kind not in ("sparse", "cell", "struct", "object", "opaque", "function")
        )
        names = [name for name, *_ in listed]
        if twice := {name for name in names if names.count(name) > 1}:
            raise DataError(f"{path}: has the variable {min(twice)} twice; leave one out")
        check_size(size, path.stat().st_size, str(path))
        with warnings.catch_warnings():
            # scipy 1.18 says that sparse variables will have another class. Both classes serve.
            warnings.simplefilter("ignore", DeprecationWarning)
            found = loadmat(path)
        return {name: v for name, v in found.items() if not name.startswith("__")}
    except NotImplementedError:
        raise DataError(f"{path}: is a MATLAB 7.3 file; save it with -v7") from None


READERS: dict[str, Callable[[Path], dict[str, Any]]] = {".npz": _npz, ".npy": _npy, ".mat": _mat}


def _contents(path: Path) -> dict[str, Any]:
    """The arrays of one file by name. DataError if the file is not readable."""
    suffix = path.suffix.lower()
    if suffix not in READERS:
        if frames.format_of(path):
            raise DataError(f"{path}: is a table; give --target, or use mlp.data.tables.load")
        way = "unpack it first; " if suffix in _PACKED else ""
        raise DataError(
            f"{path}: cannot read {path.suffix or 'such'} files; {way}known: "
            f"{', '.join(READERS)}, folders of images, and {frames.known()} with --target"
        )
    check_regular(path)
    try:
        return READERS[suffix](path)
    except (DataError, ImportError):
        raise
    except Exception as error:  # zipfile, zlib, numpy and scipy raise different classes
        raise DataError(
            f"{path}: not a readable {suffix} file ({type(error).__name__}: {error})"
        ) from None


def _merged(paths: Sequence[Path]) -> dict[str, Any]:
    """The arrays of all files by name. DataError if two files have an array of the same name."""
    merged: dict[str, Any] = {}
    origin: dict[str, Path] = {}
    for path in paths:
        for name, array in _contents(path).items():
            if name in merged:
                raise DataError(f"{name} is in {origin[name]} and in {path}; leave one of them out")
            merged[name], origin[name] = array, path
    return merged


def _chosen(arrays: dict[str, object], paths: Sequence[Path]) -> list[str | None]:
    """Names in `arrays` of training inputs, training labels, test inputs and test labels.

    The last two are None if there are no such arrays.
    """
    if len(paths) in (2, 4) and all(path.suffix.lower() == ".npy" for path in paths):
        return [*arrays, None, None][:4]
    exact = {name: name for name in arrays}
    folded = {name.lower(): name for name in arrays} | exact
    for keys in KEYS:
        found = [folded.get(key, folded.get(key.lower())) for key in keys]
        if None not in found[:2]:
            return found
    known = ", ".join(f"{pair[0]} and {pair[1]}" for pair in KEYS)
    raise DataError(
        f"{','.join(map(str, paths))}: needs arrays called {known}; found "
        f"{', '.join(sorted(arrays)) or 'none'}"
    )


def inputs(path: Path) -> torch.Tensor:
    """The array of inputs of one file: its only one, or the one with a name for inputs."""
    found = _contents(path)
    names = {name.lower() for keys in KEYS for name in (keys[0], keys[2])}
    known = [name for name in found if name.lower() in names] or list(found)
    if len(known) != 1:
        raise DataError(
            f"{path}: needs one array of inputs, such as X; found "
            f"{', '.join(sorted(found)) or 'none'}"
        )
    return numbers(found[known[0]], f"{path}: {known[0]}")[0]


def _check_kind(value: object, what: str) -> None:
    """DataError if a variable of a .mat file is no array of numbers or words."""
    fields = getattr(getattr(value, "dtype", None), "names", None)
    if fields:
        raise DataError(
            f"{what}: is a struct with the fields {', '.join(fields)}, not an array; save one array"
        )
    if type(value).__name__ in ("MatlabOpaque", "MatlabFunction", "MatlabObject"):
        raise DataError(f"{what}: is an object of MATLAB, not an array; save its numbers")


def read(
    paths: Sequence[Path],
    image: str | tuple[int, ...] | None = None,
    task: str | None = None,
) -> tuple[Dataset, Dataset]:
    """(train, test) of the arrays in these files.

    The arrays are found by their names, see KEYS. 2 or 4 .npy files are inputs, labels, test inputs
    and test labels, in this order. image, task: see `from_arrays`. DataError for files that cannot
    be read or used.
    """
    arrays = _merged(paths)
    where, name = ",".join(map(str, paths)), paths[0].stem
    keys = _chosen(arrays, paths)
    for key in keys:
        if key is not None:
            _check_kind(arrays[key], f"{where}: {key}")
    has_test = None not in keys[2:]
    used = [key for key in keys if key is not None][: None if has_test else 2]
    train, test = from_arrays(
        *(arrays[key] for key in used),
        name=name,
        image=image,
        task=task,
        named_image=any(word in used[0].lower() for word in ("image", "pixel")),
    )
    notes: tuple[str, ...] = ()
    if left := sorted(arrays.keys() - set(used)):
        held = "" if has_test else "; a fifth of the training data is held out for testing"
        notes = (f"{name}: not used: {', '.join(left)}{held}",)
    return train._with(notes=(*train.notes, *notes)), test
