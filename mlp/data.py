"""Data sets as tensors on the device: pixels stay uint8 and are scaled where they are read. No
DataLoader.

`load("digits")`, `load("mnist")`, … or a path: .mat files, .npz, or a folder of images. Batches are
rows picked by index; `permutation` draws their order.
"""

import os
from dataclasses import replace
from pathlib import Path

import torch

from .dataset import DataError, Dataset, Reading, needs_extra, permutation, split

__all__ = [
    "NAMES",
    "DataError",
    "Dataset",
    "Reading",
    "load",
    "needs_extra",
    "permutation",
    "split",
]

TORCHVISION = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "kmnist": "KMNIST"}
NAMES = ("digits", *TORCHVISION)
_NPZ_KEYS = (
    ("x_train", "y_train", "x_test", "y_test"),
    ("train_data", "train_labels", "test_data", "test_labels"),
)
_MAT_KEYS = ("training_data", "training_label", "testing_data", "testing_label")


def default_dir() -> Path:
    """$HANDGRAD_DATA, else handgrad in the user's cache folder."""
    if os.environ.get("HANDGRAD_DATA"):
        return Path(os.environ["HANDGRAD_DATA"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "handgrad"


def load(source: str, data_dir=None) -> tuple[Dataset, Dataset]:
    """(train, test) of a data set by name (see NAMES) or by path: .npz, one or two .mat files with
    a comma, an image folder.

    torchvision downloads what is missing into `data_dir`; `digits` comes with scikit-learn.
    DataError in one line.
    """
    if source == "digits":
        return _digits()
    if source in TORCHVISION:
        return _torchvision(source, Path(data_dir) if data_dir else default_dir())
    paths = [Path(p) for p in source.split(",")]
    missing = [str(p) for p in paths if not p.exists()]
    if missing:
        raise DataError(
            f"unknown data set {source!r}: known are {', '.join(NAMES)}, or the path of an "
            "existing .mat or .npz "
            f"file or image folder (there is no {missing[0]})"
        )
    if paths[0].is_dir():
        return _image_folder(paths[0])
    readers = {".mat": _mat, ".npz": _npz}
    if paths[0].suffix not in readers:
        raise DataError(
            f"{source}: cannot read {paths[0].suffix or 'such'} files; known: .mat, .npz and "
            "folders of images"
        )
    return readers[paths[0].suffix](paths)


def _digits() -> tuple[Dataset, Dataset]:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise needs_extra("scikit-learn", "the data set digits") from None
    bunch = load_digits()
    pixels = (
        torch.from_numpy(bunch.images * 255 / 16).round().to(torch.uint8)
    )  # 0 to 16 there, as an image file here
    return split(
        Dataset(
            pixels,
            torch.from_numpy(bunch.target),
            image_shape=(1, 8, 8),
            scale=1 / 255,
            name="digits",
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
    for train in (True, False):
        try:
            part = kind(root, train=train)
        except (RuntimeError, ValueError, OSError, AssertionError) as error:
            if not str(error).startswith(
                "Dataset not found"
            ):  # torchvision's words where a file is missing
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
                raise DataError(
                    f"{name}: a file in {root / kind.__name__ / 'raw'} is damaged ({reason}); "
                    "remove it"
                ) from None
            part = _download(kind, root, train, name)
        parts.append(
            Dataset(
                part.data.unsqueeze(1),
                part.targets,
                tuple(part.classes),
                (1, *part.data.shape[1:]),
                1 / 255,
                name=f"{name} ({'train' if train else 'test'})",
            )
        )
    return tuple(parts)


def _download(kind, root: Path, train: bool, name: str):
    if not os.access(root, os.W_OK):
        raise DataError(f"{name}: cannot write the data folder {root}; choose another --data-dir")
    try:
        return kind(root, train=train, download=True)
    except (RuntimeError, ValueError, OSError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise DataError(
            f"{name}: cannot be downloaded into {root} ({reason}): is there no network? Then "
            "place its four "
            f"*-ubyte.gz files in {root / kind.__name__ / 'raw'} by hand, or train on digits, "
            "which is "
            "embedded"
        ) from None


def _from_arrays(x, y, name: str) -> Dataset:
    """Rows of numbers or images, and labels as a row or a column."""
    try:
        inputs, targets = torch.as_tensor(x), torch.as_tensor(y)
    except (TypeError, ValueError):
        raise DataError(f"{name}: inputs and labels must be arrays of numbers") from None
    if targets.dim() == 2 and 1 in targets.shape:
        targets = targets.flatten()
    if targets.dim() != 1 or inputs.dim() == 0 or len(inputs) != len(targets):
        raise DataError(
            f"{name}: inputs {tuple(inputs.shape)} need as many labels, got {tuple(targets.shape)}"
        )
    if targets.is_floating_point() and bool((targets != targets.round()).any()):
        raise DataError(
            f"{name}: labels must be whole numbers, got "
            f"{float(targets[targets != targets.round()][0])}"
        )
    features = inputs[0].numel() if len(inputs) else 0
    side = int(features**0.5)
    shape = (1, side, side) if side * side == features and side > 1 else None
    if inputs.dtype == torch.uint8:
        return Dataset(inputs, targets.long(), image_shape=shape, scale=1 / 255, name=name)
    return Dataset(inputs.float(), targets.long(), image_shape=shape, name=name)


def _pairs(arrays: dict, keys, name: str) -> tuple[Dataset, Dataset]:
    """(train, test) from arrays under keys (train inputs, train labels, test inputs, test labels);
    split where no test is.
    """
    train = _from_arrays(arrays[keys[0]], arrays[keys[1]], name)
    if keys[2] in arrays and keys[3] in arrays:
        test = _from_arrays(arrays[keys[2]], arrays[keys[3]], name)
        if test.features != train.features:
            raise DataError(
                f"{name}: training inputs have {train.features} features, test inputs "
                f"{test.features}"
            )
        classes = max(train.classes, test.classes, key=len)
        return replace(train, classes=classes), replace(test, classes=classes)
    return split(train)


def _mat(paths: list[Path]) -> tuple[Dataset, Dataset]:
    try:
        from scipy.io import loadmat
    except ImportError:
        raise needs_extra("scipy (with scikit-learn)", "reading .mat files") from None
    arrays = {}
    for path in paths:
        try:
            arrays.update({k: v for k, v in loadmat(path).items() if not k.startswith("__")})
        except NotImplementedError:
            raise DataError(f"{path}: a MATLAB 7.3 file; save it with -v7") from None
        except Exception as error:  # scipy raises many kinds for a damaged file
            raise DataError(
                f"{path}: not a readable .mat file ({type(error).__name__}: {error})"
            ) from None
    if not {*_MAT_KEYS[:2]} <= arrays.keys():
        raise DataError(
            f"{','.join(map(str, paths))}: needs the variables {' and '.join(_MAT_KEYS[:2])}, "
            f"found {', '.join(sorted(arrays)) or 'none'}"
        )
    return _pairs(arrays, _MAT_KEYS, paths[0].stem)


def _npz(paths: list[Path]) -> tuple[Dataset, Dataset]:
    import numpy

    try:
        with paths[0].open("rb") as file, numpy.load(file, allow_pickle=False) as archive:
            arrays = dict(archive)
    except Exception as error:  # zipfile, zlib and numpy each raise their own
        raise DataError(
            f"{paths[0]}: not a readable .npz file ({type(error).__name__}: {error})"
        ) from None
    for keys in _NPZ_KEYS:
        if {*keys[:2]} <= arrays.keys():
            return _pairs(arrays, keys, paths[0].stem)
    expected = " or ".join(f"{keys[0]} and {keys[1]}" for keys in _NPZ_KEYS)
    raise DataError(
        f"{paths[0]}: needs the arrays {expected}, found {', '.join(sorted(arrays)) or 'none'}"
    )


def _pixels(image, shape: tuple[int, int, int]) -> torch.Tensor:
    """A PIL image, resized if need be, as uint8 pixels (C, H, W) of `shape`, grey for one channel,
    else RGB.
    """
    import numpy

    channels, height, width = shape
    image = image.convert("L" if channels == 1 else "RGB")
    if image.size != (width, height):
        image = image.resize((width, height))
    pixels = torch.from_numpy(numpy.array(image, dtype=numpy.uint8))
    return pixels.unsqueeze(0) if channels == 1 else pixels.permute(2, 0, 1)


def open_image(path, shape: tuple[int, int, int]) -> tuple[torch.Tensor, str | None]:
    """The pixels of an image file as uint8 (C, H, W) of `shape`, and a note if it had another
    size.
    """
    image = _open_image(str(path))
    note = (
        None
        if image.size == (shape[2], shape[1])
        else f"resized from {image.width}×{image.height} to {shape[2]}×{shape[1]}"
    )
    return _pixels(image, shape), note


def _image_folder(root: Path) -> tuple[Dataset, Dataset]:
    """root/CLASS/image, or root/train/CLASS/image and root/test/CLASS/image; the first image's size
    and mode hold for all.
    """
    try:
        from torchvision.datasets import ImageFolder
    except ImportError:
        raise needs_extra("torchvision", "reading a folder of images") from None
    parts = (
        [root / "train", root / "test"]
        if (root / "train").is_dir() and (root / "test").is_dir()
        else [root]
    )
    sets, shape = [], None
    for part in parts:
        try:
            folder = ImageFolder(str(part), loader=_open_image)
        except FileNotFoundError as error:
            raise DataError(
                f"{part}: {str(error).splitlines()[0].rstrip('.')}; images go into one folder for "
                "each class"
            ) from None
        pixels = []
        for image, _ in folder:
            shape = shape or (
                1 if image.mode in ("1", "L", "I;16") else 3,
                image.height,
                image.width,
            )
            if image.size != (shape[2], shape[1]):
                raise DataError(
                    f"{part}: images must all be {shape[2]}×{shape[1]}, got "
                    f"{image.width}×{image.height}"
                )
            pixels.append(_pixels(image, shape))
        sets.append(
            Dataset(
                torch.stack(pixels),
                torch.tensor(folder.targets),
                tuple(folder.classes),
                shape,
                1 / 255,
                name=str(part),
            )
        )
    if len(sets) == 2 and sets[0].classes != sets[1].classes:
        raise DataError(
            f"{root}: train and test have the classes {sets[0].classes} and {sets[1].classes}"
        )
    return tuple(sets) if len(sets) == 2 else split(sets[0])


def _open_image(path: str):
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError:
        raise needs_extra("pillow (with torchvision)", "reading images") from None
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise DataError(f"{path}: not a readable image ({error})") from None
