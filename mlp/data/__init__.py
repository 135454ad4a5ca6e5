"""Data sets by name or by path.

`load` takes a name, such as "digits" or "mnist", or a path. A path leads to .npz, .npy and .mat
files, or to a folder of images. The module `dataset` defines a data set. `arrays`, `files` and
`images` read one. `tables` makes one from a table, whose file `frames` reads.
"""

import importlib.util
import os
from pathlib import Path

import numpy
import torch

from . import files, images, scaling
from .arrays import from_arrays
from .dataset import (
    DataError,
    Dataset,
    MissingPackage,
    Reading,
    announce,
    needs_extra,
    permutation,
    split,
)
from .images import open_image
from .pixels import image_size

__all__ = [
    "NAMES",
    "STANDARDIZE",
    "DataError",
    "Dataset",
    "MissingPackage",
    "Reading",
    "from_arrays",
    "load",
    "needs_extra",
    "open_image",
    "permutation",
    "split",
]

TORCHVISION = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "kmnist": "KMNIST"}
NAMES = ("digits", *TORCHVISION)
STANDARDIZE = ("auto", "yes", "no")
_DIGITS = "datasets/data/digits.csv.gz"  # in scikit-learn's folder


def default_dir() -> Path:
    """The folder of downloaded data: $HANDGRAD_DATA, else handgrad in the user's cache folder."""
    if os.environ.get("HANDGRAD_DATA"):
        return Path(os.environ["HANDGRAD_DATA"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "handgrad"


def load(
    source: str,
    data_dir: str | Path | None = None,
    *,
    image: str | tuple[int, ...] | None = None,
    task: str | None = None,
    standardize: "str | Reading" = "no",
    verbose: bool = True,
) -> tuple[Dataset, Dataset]:
    """(train, test) of a data set by name (see NAMES) or by path.

    source: a name, .npz, .npy and .mat files with commas between several, or a folder of images.
    data_dir: the folder into which torchvision downloads missing files. `digits` comes with
    scikit-learn. image: the shape of an image in pixels, "28x28" or "3x32x32" (channels first), for
    flat rows. For a folder, all images are resized to it. task: "classification" or "regression",
    if the targets' type would decide otherwise. standardize: "yes", "no", "auto" (if a table's
    columns need it), or the `Reading` of a trained network, whose mean and deviation are used.
    verbose: print on stderr what was decided. It is also in `notes`. DataError, in one line, for
    data that cannot be found, read or used.
    """
    parts = _standardized(_named_or_read(str(source), data_dir, image, task), standardize)
    if verbose:
        announce(parts[0].notes)
    return parts


def _named_or_read(
    source: str,
    data_dir: str | Path | None,
    image: str | tuple[int, ...] | None,
    task: str | None,
) -> tuple[Dataset, Dataset]:
    if source in NAMES:
        parts = (
            _digits()
            if source == "digits"
            else _torchvision(source, Path(data_dir) if data_dir else default_dir())
        )
        shape = parts[0].image_shape
        if image is not None and shape and image_size(image) not in (shape, shape[1:]):
            raise DataError(
                f"{source}: its images are {shape}, but {image} was asked for; leave image out"
            )
        return _with_task(parts, task)
    names = [source] if source and Path(source).exists() else source.split(",")
    paths = [Path(name) for name in names]
    missing = [name for name in names if not name or not Path(name).exists()]
    if missing:
        gone = missing[0] or "path"
        raise DataError(
            f"unknown data set {source!r}: known are {', '.join(NAMES)}, or the path of an "
            f"existing {', '.join(files.READERS)} file or image folder (there is no {gone}); "
            "a table, such as .csv or .parquet, needs --target"
        )
    if paths[0].is_dir():
        if len(paths) > 1:
            raise DataError(
                f"{source}: a folder of images must be the only path, got {len(paths)} paths"
            )
        return _with_task(images.read_folder(paths[0], image), task)
    return files.read(paths, image, task)


def _with_task(parts: tuple[Dataset, Dataset], task: str | None) -> tuple[Dataset, Dataset]:
    """Data sets of labels, unchanged. DataError if a regression was asked for."""
    if task not in (None, "classification"):
        raise DataError(f"{parts[0].name}: has classes, but the task is {task!r}; leave task out")
    return parts


def _standardized(
    parts: tuple[Dataset, Dataset], standardize: "str | Reading"
) -> tuple[Dataset, Dataset]:
    """Both parts as float32, standardised by the training data's mean and deviation if wanted."""
    train, test = parts
    if isinstance(standardize, Reading):
        if standardize.mean is None:
            return _narrowed(train, test)
        return train.standardized(standardize), test.standardized(standardize)
    if standardize not in STANDARDIZE:
        raise DataError(f"unknown standardize {standardize!r}; known: {', '.join(STANDARDIZE)}")
    reason = "asked for" if standardize == "yes" else ""
    if standardize == "auto":
        reason = scaling.why_standardize(train)
    if not reason:
        return _narrowed(train, test)
    done = train.standardized()
    note = f"{train.name}: every column is standardised ({reason}), by the training data"
    return done._with(notes=(*done.notes, note)), test.standardized(done)


def _narrowed(train: Dataset, test: Dataset) -> tuple[Dataset, Dataset]:
    """Both parts as float32, with a note of the columns whose changes float32 cannot resolve."""
    lost = scaling.lost_in_float32(train) if train.inputs.dtype == torch.float64 else []
    notes = train.notes
    if lost:
        shown = ", ".join(train.columns[i] if train.columns else str(i) for i in lost[:5])
        notes += (f"{train.name}: columns {shown} change less than float32 resolves; standardise",)
    return train.narrowed()._with(notes=notes), test.narrowed()


def _digits() -> tuple[Dataset, Dataset]:
    found = importlib.util.find_spec("sklearn")
    if found is None or found.origin is None:
        raise needs_extra("scikit-learn", "the data set digits")
    # This is the file that sklearn's load_digits reads. Importing scikit-learn takes a second.
    table = numpy.loadtxt(Path(found.origin).parent / _DIGITS, delimiter=",")
    labels = table[:, -1].astype(int)
    # The file's pixels are 0 to 16. Here they are 0 to 255, as in an image file.
    pixels = torch.from_numpy(table[:, :-1] * 255 / 16).round().to(torch.uint8)
    return split(
        Dataset(
            pixels,
            torch.from_numpy(labels),
            image_shape=(1, 8, 8),
            scale=1 / 255,
            name="digits",
            levels=(0.0, 255.0),
        )
    )


def _torchvision(name: str, root: Path) -> tuple[Dataset, Dataset]:
    try:
        from torchvision import datasets
    except ImportError:
        raise needs_extra("torchvision", f"the data set {name}") from None
    kind = getattr(datasets, TORCHVISION[name])
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"{name}: cannot write the data folder {root}: {error.strerror}; choose another "
            "--data-dir"
        ) from None
    parts = []
    for training in (True, False):
        try:
            part = kind(root, train=training)
        except (RuntimeError, ValueError, OSError, AssertionError) as error:
            if not str(error).startswith(
                "Dataset not found"
            ):  # torchvision's message for a missing file
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
                raise DataError(
                    f"{name}: a file in {root / kind.__name__ / 'raw'} is damaged ({reason}); "
                    "remove it"
                ) from None
            part = _download(kind, root, training, name)
        parts.append(
            Dataset(
                part.data.unsqueeze(1),
                part.targets,
                tuple(part.classes),
                (1, *part.data.shape[1:]),
                1 / 255,
                name=f"{name} ({'train' if training else 'test'})",
                levels=(0.0, 255.0),
            )
        )
    train, test = parts
    return train, test


def _download(kind, root: Path, train: bool, name: str):
    if not os.access(root, os.W_OK):
        raise DataError(f"{name}: cannot write the data folder {root}; choose another --data-dir")
    try:
        return kind(root, train=train, download=True)
    except (RuntimeError, ValueError, OSError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise DataError(
            f"{name}: cannot be downloaded into {root} ({reason}); without a network, place its "
            f"four *-ubyte.gz files in {root / kind.__name__ / 'raw'} by hand, or train on digits, "
            "which is embedded"
        ) from None
