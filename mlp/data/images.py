"""Image files: single files, and folders with one folder for each class.

An image keeps the levels of its file. 8-bit pixels stay bytes, 16-bit and floating-point pixels
become float32. Transparent pixels are laid on white. The orientation that a camera wrote into the
file is applied. Palettes become their colours.
"""

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from .dataset import DataError, Dataset, Reading, constant, in_two, needs_extra
from .guards import check_regular, check_size
from .pixels import image_size, levels_of

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".pgm", ".ppm", ".tif", ".tiff", ".webp")
# The most pixels of one image. A file with more is hardly meant for a network, and may be a trap.
_MOST_PIXELS = 100_000_000
_BYTE, _SHORT = 255, 65535
_FLOAT_MODES, _SHORT_MODES = ("F",), ("I", "I;16", "I;16B", "I;16L", "I;16N")
_ALPHA_MODES = ("LA", "La", "PA", "RGBA", "RGBa")
# Formats whose files may hold many different pictures. Others may hold one in several sizes.
_ANIMATED = ("GIF", "TIFF", "PNG", "WEBP")
_HIDDEN = ("__macosx", "thumbs.db", "desktop.ini", "@eadir")
_SPELLINGS = {
    "train": ("train", "training", "trainset", "train_set"),
    "test": ("test", "testing", "testset", "test_set"),
    "val": ("val", "valid", "validation", "dev", "eval"),
}
_SPLITS = {name: kind for kind, names in _SPELLINGS.items() for name in names}
# A folder with the first file and one of the others is a run folder of handgrad.
_RUN = ("config.json", ("metrics.jsonl", "model.safetensors", "last.ckpt"))


class Picture(NamedTuple):
    """The pixels of an image file.

    pixels: (H, W) or (H, W, 3), uint8, uint16 or float32. white: the value of white, 255 or 65535,
    or None for floating point, because such a file does not tell its range.
    """

    pixels: np.ndarray
    white: int | None

    @property
    def is_grey(self) -> bool:
        """True if there is one channel."""
        return self.pixels.ndim == 2

    @property
    def size(self) -> tuple[int, int]:
        """(H, W), in pixels."""
        return self.pixels.shape[:2]


def _pillow() -> Any:
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise needs_extra("pillow (with torchvision)", "reading images") from None
    return Image, ImageOps


def decode(path: Path) -> Picture:
    """The picture in an image file, with all its levels.

    DataError, in one line, if the file is missing, is no image, is too large or holds several.
    """
    Image, ImageOps = _pillow()
    if not path.exists():
        raise DataError(f"{path}: no such file")
    check_regular(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of large images, refused below
            with Image.open(path) as image:
                width, height = image.size
                if width * height > _MOST_PIXELS:
                    raise DataError(_too_large(path, f"{width}×{height} pixels"))
                if image.format in _ANIMATED and getattr(image, "n_frames", 1) > 1:
                    raise DataError(
                        f"{path}: holds {image.n_frames} pictures; save the one that is intended"
                    )
                image.load()
                return _levels(ImageOps.exif_transpose(image), Image, path)
    except DataError:
        raise
    except Image.DecompressionBombError as error:
        raise DataError(_too_large(path, str(error).split(",")[0])) from None
    except Exception as error:  # Pillow's readers raise different classes for each format
        raise DataError(f"{path}: not a readable image ({error})") from None


def _too_large(path: Path, said: str) -> str:
    most = f"an image may have {_MOST_PIXELS:,} pixels"
    return f"{path}: is too large ({said}), {most}; make it smaller first"


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
                f"{path}: has pixels from {pixels.min()} to {pixels.max()}, so its values of black "
                f"and white are not known; save 16 bits (0 to {_SHORT}), or floats from 0 to 1"
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
    """The channel (H, W) resized to `size`, float32, which can hold levels beyond 255."""
    Image, _ = _pillow()
    image = Image.fromarray(channel.astype(np.float32))
    pixels = np.asarray(image.resize((size[1], size[0]), Image.Resampling.BICUBIC))
    return pixels.clip(channel.min(), channel.max())


def as_array(picture: Picture, shape: tuple[int, ...]) -> np.ndarray:
    """The picture as an array (C, H, W) of this shape, in the picture's own levels.

    Its colours become grey or RGB, and it is resized, if the shape asks for it.
    """
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
    """(values, note) of an image file, for a network whose training data have this reading.

    values: (C·H·W,) float64, as the training data would store them, for `Reading.numbers`. The
    image becomes grey or RGB and gets the size of the training images. Black and white of the file
    become those of the training data. note: says that the image was resized, or which values are
    taken for black and white, or None. DataError if black and white are not known.
    """
    path = Path(path)
    if reading.image_shape is None:
        raise DataError(f"{path}: the network was trained on rows of numbers, not on images")
    if reading.levels is None:
        raise DataError(
            f"{path}: the network was trained on images of {reading.stored} whose values of black "
            "and white are not known; train it on pixels from 0 to 1 or 0 to 255"
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
                f"{path}: has floats from {low:.6g} to {high:.6g}, but the network was trained on "
                f"{black:.6g} to {white:.6g}; rescale its pixels"
            )
        return values, "; ".join(notes) or None
    levels, said = levels_of([values], "float32")
    if levels is None:
        raise DataError(f"{path}: {said}; save pixels from 0 to 1 or 0 to 255")
    notes += [said] if said else []
    fraction = (values - levels[0]) / (levels[1] - levels[0])
    return black + (white - black) * fraction, "; ".join(notes) or None


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in _HIDDEN


def _is_run(folder: Path) -> bool:
    """True if this is a run folder, or a folder that holds only run folders."""
    if (folder / _RUN[0]).exists() and any((folder / name).exists() for name in _RUN[1]):
        return True
    inside = [path for path in folder.iterdir() if not _is_hidden(path.name)]
    return bool(inside) and all(path.is_dir() and _is_run(path) for path in inside)


class _Class(NamedTuple):
    """The contents of a class's folder.

    images: its image files, at any depth. direct: the count of images directly in it. others: names
    of its other files.
    """

    images: list[Path]
    direct: int
    others: list[str]


def _scan(folder: Path) -> _Class:
    images: list[Path] = []
    others: list[str] = []
    # A link to the folder itself, or to one that holds it, would add other classes' images.
    direct, seen = 0, {str(one) for one in Path(os.path.realpath(folder)).parents}
    for root, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:  # a link to a folder that was scanned before
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
    """The folders in `root` that may be classes or splits, by name."""
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
    """(folders of the training and test data, notes).

    The folders are {"train": folder, "test": folder}, or {"train": root} without a split.
    """
    folders = _folders(root)
    kinds = {name: _SPLITS.get(name.lower()) for name in folders}
    named = {name for name, kind in kinds.items() if kind is not None}
    nested = {name for name in named if not _scan(folders[name]).direct}
    if not named or ("train" not in kinds.values() and not nested):
        return {"train": root}, []
    if loose := sorted(named - nested):
        raise DataError(
            f"{root}: {loose[0]} holds images directly; put them into one folder for each class, "
            f"such as {Path(loose[0], 'cat', '1.png')}"
        )
    if strange := sorted(folders.keys() - named):
        raise DataError(
            f"{root}: has folders of splits ({', '.join(sorted(named))}) and others "
            f"({', '.join(strange)}); move one kind out"
        )
    found: dict[str, Path] = {}
    for name in sorted(named):
        kind = _SPLITS[name.lower()]
        if kind in found:
            raise DataError(
                f"{root}: {found[kind].name} and {name} are both {kind} data; move one out"
            )
        found[kind] = folders[name]
    if "train" not in found:
        raise DataError(
            f"{root}: has {', '.join(sorted(named))}, but no folder of training data; call it train"
        )
    notes = []
    if "test" not in found and "val" in found:
        found["test"] = found.pop("val")
    if left := found.pop("val", None):
        notes.append(f"{root}: {left.name} is not used, because {found['test'].name} is there")
    return {part: found[part] for part in ("train", "test") if part in found}, notes


def _classes(part: Path) -> tuple[dict[str, _Class], list[str]]:
    """(contents by class, notes) of a folder with one folder for each class."""
    folders = _folders(part)
    scanned = {name: _scan(folder) for name, folder in folders.items()}
    known = ", ".join(SUFFIXES)
    if not scanned:
        raise DataError(
            f"{part}: Couldn't find any class folder; put images into one folder for each class"
        )
    if empty := [name for name, found in scanned.items() if not found.images]:
        raise DataError(
            f"{part}: {empty[0]} holds no images ({known}); put images into one folder for each "
            "class"
        )
    if not any(found.direct for found in scanned.values()):
        raise DataError(
            f"{part}: its folders ({', '.join(scanned)}) hold only folders and no images; give one "
            f"of them, such as {part / next(iter(scanned))}"
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
    """(all pictures, the count of resized ones).

    size: (H, W) to which all are resized, or None. DataError if the pictures differ in size, or if
    all together do not fit into memory.
    """
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
                f"{path}: images must all be {width}×{height}, got {w}×{h}; give a size, such as "
                f"image {height}x{width}, and all are resized"
            )
        pictures.append(picture)
    return pictures, resized


def _common_white(pictures: Sequence[Picture], paths: Sequence[Path]) -> int | None:
    """The largest white of these pictures, or None if all are floating point.

    DataError if only some are floating point.
    """
    floats = [picture.white is None for picture in pictures]
    if all(floats):
        return None
    if any(floats):
        odd = floats.index(not floats[0])
        raise DataError(
            f"{paths[odd]}: floating-point and whole pixels have no common black and white, but "
            f"{paths[0]} is of the other kind; save all alike"
        )
    return max(picture.white or 0 for picture in pictures)


def _stacked(
    pictures: Sequence[Picture], paths: Sequence[Path], root: Path
) -> tuple[torch.Tensor, tuple[float, float], list[str]]:
    """(pixels (N, C, H, W), levels, notes) of pictures of one size.

    They become RGB unless all are grey.
    """
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
        notes.append(f"{root}: 8-bit and 16-bit images are mixed, so all are taken as 16-bit")
    levels, said = (0.0, float(white or 0)), ""
    if white is None:
        measured, said = levels_of([torch.from_numpy(pixels)], "float32")
        if measured is None:
            raise DataError(f"{root}: {said}; save pixels from 0 to 1 or 0 to 255")
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

    The folders of splits may have any name in _SPELLINGS, such as training or Test. Without test
    data, validation data take their place. Without both, a fifth of the samples is held out. Hidden
    files and run folders are left out. image: a size to which all images are resized. Without it,
    all must have the size of the first. DataError, in one line, for a folder that cannot be used.
    """
    asked = None if image is None else image_size(image)[-2:]
    parts, notes = _parts(root)
    found = {part: _classes(folder) for part, folder in parts.items()}
    names = {part: tuple(classes) for part, (classes, _) in found.items()}
    if names["train"] != names.get("test", names["train"]):
        raise DataError(
            f"{root}: train and test must have the same classes, got {names['train']} and "
            f"{names['test']}"
        )
    notes += [note for _, said in found.values() for note in said]
    if len(names["train"]) == 1:  # before the images are read
        raise constant(f"{root}: the class", names["train"][0])
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
            stored={_BYTE: "uint8", _SHORT: "uint16", None: "float32"}[
                _common_white(pictures, paths)
            ],
            notes=(*notes, *said),
        )
        for x, y, folder in zip(pixels.split([len(y) for y in targets]), targets, parts.values())
    ]
    return in_two(sets)
