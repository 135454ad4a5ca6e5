"""Image files: one by one, and folders with a folder for each class.

An image keeps the levels that its file has: 8-bit pixels stay bytes, 16-bit ones and floating-point
ones become float32. What is transparent is laid on white. The orientation that a camera wrote into
the file is applied, and palettes become the colours that they stand for.
"""

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from .dataset import DataError, Dataset, Reading, needs_extra, split
from .files import check_regular, check_size
from .pixels import image_size, levels_of

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".pgm", ".ppm", ".tif", ".tiff", ".webp")
# One image may have this many pixels; more is no picture for a network, or a trap.
_MOST_PIXELS = 100_000_000
_BYTE, _SHORT = 255, 65535
_FLOAT_MODES, _SHORT_MODES = ("F",), ("I", "I;16", "I;16B", "I;16L", "I;16N")
_ALPHA_MODES = ("LA", "La", "PA", "RGBA", "RGBa")
# Formats of which a file may hold many pictures that are not the same one in other sizes.
_ANIMATED = ("GIF", "TIFF", "PNG", "WEBP")
_HIDDEN = ("__macosx", "thumbs.db", "desktop.ini", "@eadir")
_SPELLINGS = {
    "train": ("train", "training", "trainset", "train_set"),
    "test": ("test", "testing", "testset", "test_set"),
    "val": ("val", "valid", "validation", "dev", "eval"),
}
_SPLITS = {name: kind for kind, names in _SPELLINGS.items() for name in names}
# A folder with the first file and one of the others is a run that was trained here.
_RUN = ("config.json", ("metrics.jsonl", "model.safetensors", "last.ckpt"))


class Picture(NamedTuple):
    """pixels: (H, W) or (H, W, 3); uint8, uint16 or float32. white: 255, 65535, or None for
    floating point, whose range the file does not tell.
    """

    pixels: np.ndarray
    white: int | None

    @property
    def is_grey(self) -> bool:
        """Whether there is one channel."""
        return self.pixels.ndim == 2

    @property
    def size(self) -> tuple[int, int]:
        """(H, W)."""
        return self.pixels.shape[:2]


def _pillow() -> Any:
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise needs_extra("pillow (with torchvision)", "reading images") from None
    return Image, ImageOps


def decode(path: Path) -> Picture:
    """An image file with all its levels; DataError in one line if it is none, or too large."""
    Image, ImageOps = _pillow()
    if not path.exists():
        raise DataError(f"{path}: no such file")
    check_regular(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large images: the check below refuses those
            with Image.open(path) as image:
                width, height = image.size
                if width * height > _MOST_PIXELS:
                    raise DataError(_too_large(path, f"{width}×{height} pixels"))
                if image.format in _ANIMATED and getattr(image, "n_frames", 1) > 1:
                    raise DataError(
                        f"{path}: holds {image.n_frames} pictures: save the one that is meant"
                    )
                image.load()
                return _levels(ImageOps.exif_transpose(image), Image, path)
    except DataError:
        raise
    except Image.DecompressionBombError as error:
        raise DataError(_too_large(path, str(error).split(",")[0])) from None
    except Exception as error:  # Pillow's readers of formats each raise their own
        raise DataError(f"{path}: not a readable image ({error})") from None


def _too_large(path: Path, said: str) -> str:
    return f"{path}: {said}; an image may have {_MOST_PIXELS:,}: make it smaller first"


def _levels(image: Any, Image: Any, path: Path) -> Picture:
    if image.mode in _FLOAT_MODES:
        pixels = np.array(image, dtype=np.float32)
        if not np.isfinite(pixels).all():
            raise DataError(f"{path}: has pixels that are not finite")
        return Picture(pixels, None)
    if image.mode in _SHORT_MODES:
        pixels = np.array(image).astype(np.int64)
        if pixels.min() < 0 or pixels.max() > _SHORT:
            raise DataError(
                f"{path}: pixels from {pixels.min()} to {pixels.max()}, of which black and white "
                f"are not known: save 16 bits (0 to {_SHORT}), or floats from 0 to 1"
            )
        transparent = image.info.get("transparency")
        if isinstance(transparent, int):
            pixels[pixels == transparent] = _SHORT
        return Picture(pixels.astype(np.uint16), _SHORT)
    was_palette = image.mode in ("P", "PA")
    if image.mode in _ALPHA_MODES or "transparency" in image.info:
        grey = image.mode in ("LA", "La", "L", "1")
        colours = image.convert("RGBA")
        white = Image.new("RGBA", colours.size, "white")
        image = Image.alpha_composite(white, colours).convert("L" if grey else "RGB")
    if image.mode == "1":
        image = image.convert("L")
    if image.mode != "L":
        pixels = np.array(image.convert("RGB"))
        if was_palette and (pixels == pixels[..., :1]).all():
            pixels = np.ascontiguousarray(pixels[..., 0])
        return Picture(pixels, _BYTE)
    return Picture(np.array(image), _BYTE)


def _resized(channel: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """(H, W) of `size`; floats, for levels beyond 255 must be kept."""
    Image, _ = _pillow()
    image = Image.fromarray(channel.astype(np.float32))
    pixels = np.asarray(image.resize((size[1], size[0]), Image.Resampling.BICUBIC))
    return pixels.clip(channel.min(), channel.max())


def as_array(picture: Picture, shape: tuple[int, ...]) -> np.ndarray:
    """(C, H, W) of this shape, in the picture's own levels: grey or RGB, resized if need be."""
    Image, _ = _pillow()
    pixels = picture.pixels
    if shape[0] not in (1, 3):
        raise DataError(f"an image file has 1 or 3 channels, but {shape[0]} are needed")
    if shape[0] == 1 and not picture.is_grey:
        pixels = np.asarray(Image.fromarray(pixels).convert("L"))
    channels = [pixels] * shape[0] if pixels.ndim == 2 else list(np.moveaxis(pixels, 2, 0))
    if picture.size != shape[1:]:
        channels = [_resized(channel, shape[1:]) for channel in channels]
        if picture.white is not None:
            channels = [channel.round().astype(picture.pixels.dtype) for channel in channels]
    return np.stack(channels)


def open_image(path: str | Path, reading: Reading) -> tuple[torch.Tensor, str | None]:
    """(one row of stored values, a note or None) of an image file, as the training data that
    `reading` tells of would have held it: for `Reading.numbers`.

    Grey or RGB and the size as in training, with a note if it was resized. Black and white of the
    file become those of the training data. DataError if these are not known.
    """
    path = Path(path)
    if reading.image_shape is None:
        raise DataError(f"{path}: the network was trained on rows of numbers, not on images")
    if reading.levels is None:
        raise DataError(
            f"{path}: the network was trained on images of {reading.stored} whose values of black "
            "and white are not known: train it on pixels from 0 to 1 or 0 to 255"
        )
    picture, notes = decode(path), []
    shape = reading.image_shape
    if picture.size != shape[1:]:
        height, width = picture.size
        notes.append(f"resized from {width}×{height} to {shape[2]}×{shape[1]}")
    values = torch.from_numpy(as_array(picture, shape).astype(np.float64)).flatten()
    black, white = reading.levels
    if picture.white is not None:
        return black + (white - black) * values / picture.white, "; ".join(notes) or None
    low, high = float(values.min()), float(values.max())
    if reading.stored.startswith("float"):
        if low < black or high > white:
            raise DataError(
                f"{path}: floats from {low:.6g} to {high:.6g}, but the network was trained on "
                f"{black:.6g} to {white:.6g}"
            )
        return values, "; ".join(notes) or None
    levels, said = levels_of([values], "float32")
    if levels is None:
        raise DataError(f"{path}: {said}: save pixels from 0 to 1 or 0 to 255")
    notes += [said] if said else []
    fraction = (values - levels[0]) / (levels[1] - levels[0])
    return black + (white - black) * fraction, "; ".join(notes) or None


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in _HIDDEN


def _is_run(folder: Path) -> bool:
    """Whether this is a run folder, or holds nothing but such."""
    if (folder / _RUN[0]).exists() and any((folder / name).exists() for name in _RUN[1]):
        return True
    inside = [path for path in folder.iterdir() if not _is_hidden(path.name)]
    return bool(inside) and all(path.is_dir() and _is_run(path) for path in inside)


class _Class(NamedTuple):
    """images of a folder, at any depth; those right in it; other files' names."""

    images: list[Path]
    direct: int
    others: list[str]


def _scan(folder: Path) -> _Class:
    images: list[Path] = []
    others: list[str] = []
    direct, seen = 0, set()
    for root, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:  # a link back to a folder above
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(
            name for name in folders if not _is_hidden(name) and not _is_run(Path(root, name))
        )
        for name in sorted(files):
            if _is_hidden(name):
                continue
            if Path(name).suffix.lower() in SUFFIXES:
                images.append(Path(root, name))
                direct += root == str(folder)
            else:
                others.append(name)
    return _Class(images, direct, others)


def _folders(root: Path) -> dict[str, Path]:
    """Name -> folder of what may be classes or splits in `root`."""
    try:
        inside = sorted(root.iterdir(), key=lambda path: path.name)
    except OSError as error:
        raise DataError(f"{root}: cannot be read ({error.strerror})") from None
    return {
        path.name: path
        for path in inside
        if path.is_dir() and not _is_hidden(path.name) and not _is_run(path)
    }


def _parts(root: Path) -> tuple[dict[str, Path], list[str]]:
    """({"train": folder, "test": folder} or {"train": root} where nothing is split, notes)."""
    folders = _folders(root)
    kinds = {name: _SPLITS.get(name.lower()) for name in folders}
    named = {name for name, kind in kinds.items() if kind is not None}
    nested = {name for name in named if not _scan(folders[name]).direct}
    if not named or ("train" not in kinds.values() and not nested):
        return {"train": root}, []
    if loose := sorted(named - nested):
        raise DataError(
            f"{root}: {loose[0]} holds images: they go into one folder for each class, such as "
            f"{Path(loose[0], 'cat', '1.png')}"
        )
    if strange := sorted(folders.keys() - named):
        raise DataError(
            f"{root}: has folders of splits ({', '.join(sorted(named))}) and others "
            f"({', '.join(strange)}): move one kind out"
        )
    found: dict[str, Path] = {}
    for name in sorted(named):
        kind = _SPLITS[name.lower()]
        if kind in found:
            raise DataError(f"{root}: {found[kind].name} and {name} both are {kind} data")
        found[kind] = folders[name]
    if "train" not in found:
        raise DataError(f"{root}: has {', '.join(sorted(named))}, but no folder of training data")
    notes = []
    if "test" not in found and "val" in found:
        found["test"] = found.pop("val")
    if left := found.pop("val", None):
        notes.append(f"{root}: {left.name} is not used, {found['test'].name} is the test data")
    return {part: found[part] for part in ("train", "test") if part in found}, notes


def _classes(part: Path) -> tuple[dict[str, _Class], list[str]]:
    """(class -> its images, notes) of a folder with a folder for each class."""
    folders = _folders(part)
    scanned = {name: _scan(folder) for name, folder in folders.items()}
    known = ", ".join(SUFFIXES)
    if not scanned:
        raise DataError(
            f"{part}: Couldn't find any class folder; images go into one folder for each class"
        )
    if empty := [name for name, found in scanned.items() if not found.images]:
        raise DataError(
            f"{part}: {empty[0]} holds no images ({known}); images go into one folder for each "
            "class"
        )
    if not any(found.direct for found in scanned.values()):
        raise DataError(
            f"{part}: its folders ({', '.join(scanned)}) hold only folders, and no images: give "
            f"one of them, such as {part / next(iter(scanned))}"
        )
    notes = []
    loose = [p.name for p in part.iterdir() if p.is_file() and not _is_hidden(p.name)]
    if others := [*loose, *(name for found in scanned.values() for name in found.others)]:
        shown = ", ".join(sorted(others)[:3])
        notes.append(f"{part}: {len(others)} files in it are not used, such as {shown}")
    return scanned, notes


def _decoded(
    paths: Sequence[Path], size: tuple[int, ...] | None, root: Path
) -> tuple[list[Picture], int]:
    """(all images, how many were resized), of one size; the whole must fit into memory."""
    pictures: list[Picture] = []
    resized = 0
    for path in paths:
        picture = decode(path)
        if size is not None and picture.size != size:
            channels = as_array(picture, (1 if picture.is_grey else 3, *size))
            pixels = channels[0] if picture.is_grey else np.moveaxis(channels, 0, 2)
            picture, resized = Picture(pixels, picture.white), resized + 1
        if not pictures:
            check_size(2 * picture.pixels.nbytes * len(paths), None, str(root))
        elif picture.size != pictures[0].size:
            (height, width), (h, w) = pictures[0].size, picture.size
            raise DataError(
                f"{path}: images must all be {width}×{height}, got {w}×{h}: give a size, such as "
                f"image {height}x{width}, and all are resized"
            )
        pictures.append(picture)
    return pictures, resized


def _common_white(pictures: Sequence[Picture], paths: Sequence[Path]) -> int | None:
    """The largest white of these pictures, None if all are floating point; DataError for both."""
    floats = [picture.white is None for picture in pictures]
    if all(floats):
        return None
    if any(floats):
        odd = floats.index(not floats[0])
        raise DataError(
            f"{paths[odd]}: floating-point and whole pixels have no common black and white, and "
            f"{paths[0]} is of the other kind"
        )
    return max(picture.white or 0 for picture in pictures)


def _stacked(
    pictures: Sequence[Picture], paths: Sequence[Path], root: Path
) -> tuple[torch.Tensor, tuple[float, float], list[str]]:
    """(pixels (N, C, H, W), levels, notes) of pictures of one size: grey if all are."""
    white, notes = _common_white(pictures, paths), []
    coloured = sum(not picture.is_grey for picture in pictures)
    if 0 < coloured < len(pictures):
        notes.append(
            f"{root}: {len(pictures) - coloured} of {len(pictures)} images are grey, and become RGB"
        )
    shape = (3 if coloured else 1, *pictures[0].size)
    pixels = np.empty((len(pictures), *shape), np.uint8 if white == _BYTE else np.float32)
    for row, picture in zip(pixels, pictures):
        row[...] = as_array(picture, shape)
        if white is not None and picture.white is not None and picture.white != white:
            row *= white // picture.white
    if white is not None and any(picture.white != white for picture in pictures):
        notes.append(f"{root}: 8-bit and 16-bit images are mixed: all are taken as 16-bit")
    levels, said = (0.0, float(white or 0)), ""
    if white is None:
        measured, said = levels_of([torch.from_numpy(pixels)], "float32")
        if measured is None:
            raise DataError(f"{root}: {said}: save pixels from 0 to 1 or 0 to 255")
        levels = measured
    return torch.from_numpy(pixels), levels, [*notes, *([f"{root}: {said}"] if said else [])]


def _labelled(
    found: Sequence[dict[str, _Class]],
) -> tuple[list[Path], list[torch.Tensor]]:
    """(all paths, labels of each part) of the classes of each part."""
    paths, targets = [], []
    for classes in found:
        counts = torch.tensor([len(images.images) for images in classes.values()])
        paths += [path for images in classes.values() for path in images.images]
        targets.append(torch.arange(len(counts)).repeat_interleave(counts))
    return paths, targets


def read_folder(root: Path, image: str | tuple[int, ...] | None = None) -> tuple[Dataset, Dataset]:
    """(train, test) of root/CLASS/image, or of root/train/CLASS/image and root/test/CLASS/image.

    Splits may be called train, training, test, testing, val, valid or validation, in capitals too.
    A fifth is held out where there are no test data. Hidden files, and runs trained in the folder,
    are left out. image: a size to which all are resized; else all must have the size of the first.
    """
    asked = None if image is None else image_size(image)[-2:]
    parts, notes = _parts(root)
    found = {part: _classes(folder) for part, folder in parts.items()}
    names = {part: tuple(classes) for part, (classes, _) in found.items()}
    if names["train"] != names.get("test", names["train"]):
        raise DataError(
            f"{root}: train and test have the classes {names['train']} and {names['test']}"
        )
    notes += [note for _, said in found.values() for note in said]
    paths, targets = _labelled([classes for classes, _ in found.values()])
    pictures, resized = _decoded(paths, asked, root)
    pixels, levels, said = _stacked(pictures, paths, root)
    if resized and asked is not None:
        notes.append(f"{root}: {resized} images are resized to {asked[1]}×{asked[0]}")
    sets = [
        Dataset(
            x,
            y,
            names["train"],
            tuple(pixels.shape[1:]),
            1.0 if levels[1] <= 1 else 1 / levels[1],
            name=str(folder),
            levels=levels,
            stored={_BYTE: "uint8", _SHORT: "uint16", None: "float32"}[pictures[0].white],
            notes=(*notes, *said),
        )
        for x, y, folder in zip(pixels.split([len(y) for y in targets]), targets, parts.values())
    ]
    return (sets[0], sets[1]) if len(sets) == 2 else split(sets[0])
