"""Decides which numbers are pixels, the shape of images, and the values of black and white.

The shape of an image comes from the array's axes. A network must read new images in the same way as
its training images. So the values of black and white are found once, from the type and the range of
the training data. They are stored with the network.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from .dataset import DataError, has_float64

# If flat rows of these lengths hold pixels, they are images of this shape, as in known data sets.
_WELL_KNOWN = {784: (1, 28, 28), 3072: (3, 32, 32)}
# Rows with fewer columns of small whole numbers are taken for a table.
_ROW_OF_PIXELS = 64
# Whole pixels go from 0 to a mask's 1, scikit-learn's digits' 16, or 8, 10, 12 or 16 bits.
_WHITES = (1, 16, 255, 1023, 4095, 65535)
_BYTE = 255
# In other types than uint8, bytes are recognised only if the largest is at least this.
_HALF_BYTE = 128
_SMALL = 10.0
# Training and test data whose mean sizes differ by this factor are probably in different units.
_TENFOLD = 10.0
_ENOUGH = 100  # numbers. The mean size of fewer tells nothing about the units.


class Layout(NamedTuple):
    """The image in an array.

    shape: (C, H, W). moved: True if the axes are (H, W, C) and must be moved. note: one line on
    what was decided, or "".
    """

    shape: tuple[int, ...]
    moved: bool = False
    note: str = ""


class Look(NamedTuple):
    """How inputs are understood, as fields of a Dataset."""

    shape: tuple[int, ...] | None
    levels: tuple[float, float] | None
    scale: float
    shift: float
    notes: tuple[str, ...]


def image_size(image: str | Sequence[int]) -> tuple[int, ...]:
    """(H, W) or (C, H, W) from "28x28", "3x32x32" or a sequence of numbers, in pixels.

    DataError for anything else.
    """
    try:
        parts = image.lower().replace("×", "x").split("x") if isinstance(image, str) else image
        size = tuple(int(part) for part in parts)
    except (TypeError, ValueError):
        size = ()
    if len(size) not in (2, 3) or min(size) < 1:
        raise DataError(
            f"the shape of an image is HEIGHTxWIDTH or CHANNELSxHEIGHTxWIDTH, such as 28x28, "
            f"got {image!r}"
        )
    return size


def layout(shape: Sequence[int], name: str, image: str | Sequence[int] | None = None) -> Layout:
    """The image in an array of shape (N, H, W), (N, C, H, W) or (N, H, W, C).

    image: its shape, if the caller gave one. DataError, which starts with `name`, if the axes do
    not tell it, or if it differs from `image`.
    """
    axes = tuple(int(n) for n in shape[1:])
    asked = None if image is None else image_size(image)
    if len(axes) == 2:
        if asked not in (None, axes, (1, *axes)):
            raise DataError(f"{name}: images are {axes[0]}×{axes[1]}, but {asked} was asked for")
        return Layout((1, *axes))
    first, last = (axes[0], *axes[1:]), (axes[2], *axes[:2])
    if asked is not None:
        fits = [Layout(s, s is last) for s in (first, last) if asked in (s, s[1:])]
        if not fits:
            raise DataError(f"{name}: images are {axes}, but {asked} was asked for")
        return fits[0]
    for channels in ((1, 3), (2, 4)):
        front, back = axes[0] in channels, axes[2] in channels
        if front and back:
            raise DataError(
                f"{name}: inputs {tuple(shape)} may have their channels first or last; say which, "
                f"by image {_times(first)} or {_times(last)} (channels x height x width)"
            )
        if front or back:
            return Layout(first) if front else Layout(last, True)
    raise DataError(
        f"{name}: inputs {tuple(shape)} are no images of 1 to 4 channels; flatten them to "
        f"(N, {math.prod(axes)}), or say what they are, by image {_times(first)} or {_times(last)} "
        "(channels x height x width)"
    )


def _times(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _flat_shape(
    features: int, name: str, image: str | Sequence[int] | None, named: bool, bytes_like: bool
) -> Layout | None:
    """The image in a flat row, from what was asked for, or from the row's length or name.

    None if the row is no image. named: the arrays' names say that rows are images. bytes_like: the
    numbers may be bytes of pixels.
    """
    if image is not None:
        size = image_size(image)
        shape = size if len(size) == 3 else (features // (size[0] * size[1]) or 1, *size)
        if math.prod(shape) != features:
            raise DataError(
                f"{name}: rows have {features} numbers, but an image {_times(size)} has "
                f"{math.prod(size)}"
            )
        return Layout(shape)
    if bytes_like and features in _WELL_KNOWN:
        shape = _WELL_KNOWN[features]
        return Layout(
            shape,
            note=f"{name}: rows of {features} pixels are taken for images of {_times(shape)} "
            "(channels x height x width)",
        )
    side = math.isqrt(features)
    if named and side > 1 and side * side == features:
        return Layout((1, side, side), note=f"{name}: rows are taken for images of {side}x{side}")
    return None


def _extent(tensors: Sequence[torch.Tensor]) -> tuple[float, float, bool]:
    """(smallest, largest, True if all are whole numbers) of these tensors."""
    low = min(float(t.min()) for t in tensors)
    high = max(float(t.max()) for t in tensors)
    whole = all(not t.is_floating_point() or bool((t == t.round()).all()) for t in tensors)
    return low, high, whole


def levels_of(
    tensors: Sequence[torch.Tensor], dtype: str
) -> tuple[tuple[float, float] | None, str]:
    """((black, white), a note) of pixels that a file stores as `dtype`.

    The values are None if they cannot be known. The note is "" if they are the usual ones.
    """
    low, high, whole = _extent(tensors)
    seen = f"{dtype} {low:.6g} to {high:.6g}"
    if not (math.isfinite(low) and math.isfinite(high)):
        return None, ""  # Dataset then raises an error with row and column
    if whole and low >= 0 and high <= _WHITES[-1]:
        usual = {"uint8": 255, "uint16": 65535, "bool": 1}.get(dtype)
        if high == 0:
            return (0.0, float(usual or 1)), ""
        white = next(white for white in _WHITES if white >= high)
        if dtype.startswith("float") and white == 1:
            return (0.0, 1.0), ""
        return (0.0, float(white)), "" if white == usual else f"{seen}: white is taken for {white}"
    if whole and dtype == "int8":
        return (-128.0, 127.0), f"{seen}: black is taken for -128 and white for 127"
    if low >= 0 and high <= 1:
        return (0.0, 1.0), ""
    if low >= -1 and high <= 1:
        return (-1.0, 1.0), f"{seen}: black is taken for -1 and white for 1"
    if low >= 0 and _HALF_BYTE <= high <= _BYTE:
        return (0.0, 255.0), f"{seen}: white is taken for 255"
    return None, f"{seen}: which values are black and white is not known"


def _reads(levels: tuple[float, float]) -> tuple[float, float]:
    """(scale, shift) that read black as 0 and white as 1.

    Levels within [-1, 1] are not changed.
    """
    black, white = levels
    if black >= -1 and white <= 1:
        return 1.0, 0.0
    return 1 / (white - black), -black / (white - black)


def _same_levels(
    tensors: Sequence[torch.Tensor], dtypes: Sequence[str], name: str
) -> tuple[tuple[float, float] | None, str]:
    """The levels of training and test data, as `levels_of`. DataError if the two differ."""
    if len(set(dtypes)) == 1:
        return levels_of(tensors, dtypes[0])
    each = [levels_of([tensor], dtype) for tensor, dtype in zip(tensors, dtypes)]
    if each[0][0] != each[1][0]:
        said = [
            f"{dtype} {float(t.min()):.6g} to {float(t.max()):.6g}"
            for t, dtype in zip(tensors, dtypes)
        ]
        raise DataError(
            f"{name}: training inputs are {said[0]}, test inputs {said[1]}; store both alike"
        )
    return each[0]


def check_units(tensors: Sequence[torch.Tensor], dtypes: Sequence[str], name: str) -> None:
    """DataError if training and test data are probably in different units.

    They are if only one part is within [-1, 1], or only one has a dtype of whole numbers, and the
    mean sizes differ by a factor of ten. So it is with bytes of pixels, and the same from 0 to 1.
    Test data of the same dtype of whole numbers may be dark images, so they are not refused.
    """
    if len(tensors) < 2 or min(t.numel() for t in tensors) < _ENOUGH:
        return
    ranges = [(float(t.min()), float(t.max())) for t in tensors]
    within = [_is_within_one(*found) for found in ranges]
    if len(set(within)) == 1 and len({t.is_floating_point() for t in tensors}) == 1:
        return
    if within[-1] and len(set(dtypes)) == 1 and not tensors[0].is_floating_point():
        return
    small, large = sorted(float(_exact(t).abs().mean()) for t in tensors)
    if small > 0 and _TENFOLD * small <= large:
        said = [f"{d} {low:.6g} to {high:.6g}" for d, (low, high) in zip(dtypes, ranges)]
        raise DataError(
            f"{name}: training inputs are {said[0]}, test inputs {said[1]}; store both alike"
        )


def _is_within_one(low: float, high: float) -> bool:
    """True if numbers from `low` to `high` are at most 1 in size."""
    return low >= -1 and high <= 1


def other_units(raw: torch.Tensor, levels: tuple[float, float] | None) -> str:
    """Why pixels (N, features) are probably not in the units of these levels, or "".

    Bytes do not fit levels of 0 and 1, and pixels up to 1 do not fit levels of bytes.
    """
    if levels is None or raw.numel() < _ENOUGH:
        return ""
    low, high = float(raw.min()), float(raw.max())
    small, large = sorted((max(abs(low), abs(high)), levels[1]))
    fits = _is_within_one(low, high) == _is_within_one(*levels)
    if fits or small == 0 or large < _TENFOLD * small:
        return ""
    return (
        f"its pixels are {low:.6g} to {high:.6g}, but black and white of the training are "
        f"{levels[0]:.6g} and {levels[1]:.6g}"
    )


def is_flat_pixels(tensors: Sequence[torch.Tensor], dtypes: Sequence[str]) -> bool:
    """True if flat rows may hold bytes of pixels: 64 or more whole numbers, from 0 up to 255."""
    if tensors[0].dim() != 2 or tensors[0].shape[1] < _ROW_OF_PIXELS:
        return False
    if set(dtypes) == {"uint8"}:
        return True
    low, high, whole = _extent(tensors)
    return whole and low >= 0 and _HALF_BYTE <= high <= _BYTE


def _in_unit(tensors: Sequence[torch.Tensor]) -> bool:
    low, high, _ = _extent(tensors)
    return low >= 0 and high <= 1


def understood(
    inputs: Sequence[torch.Tensor],
    dtypes: Sequence[str],
    name: str,
    image: str | Sequence[int] | None = None,
    named: bool = False,
) -> tuple[list[torch.Tensor], Look]:
    """(training and test inputs as a Dataset stores them, how they are understood).

    Images become (N, C, H, W). Pixels of whole numbers from 0 to 255 become uint8. The numbers of a
    table are not changed. dtypes: of the file's arrays. image, named: see `_flat_shape`. DataError,
    which starts with `name`, for inputs that cannot be used.
    """
    dims = inputs[0].dim()
    if dims > 4:
        raise DataError(
            f"{name}: inputs {tuple(inputs[0].shape)} have {dims} axes; flatten them to "
            f"(N, {inputs[0][0].numel()})"
        )
    check_units(inputs, dtypes, name)
    inputs = [t[:, None] if t.dim() == 1 else t for t in inputs]
    if len({t.dim() for t in inputs}) > 1:
        inputs = [t.flatten(1) for t in inputs]
    flat = inputs[0].dim() == 2
    bytes_like = flat and is_flat_pixels(inputs, dtypes)
    if flat:
        known = bytes_like or (inputs[0].shape[1] in _WELL_KNOWN and _in_unit(inputs))
        found = _flat_shape(inputs[0].shape[1], name, image, named, known)
    else:
        layouts = [layout(t.shape, name, image) for t in inputs]
        found = layouts[0]
        if layouts[-1].shape != found.shape:
            raise DataError(
                f"{name}: training images are {_times(found.shape)}, test images "
                f"{_times(layouts[-1].shape)}"
            )
        inputs = [t.permute(0, 3, 1, 2) if at.moved else t for t, at in zip(inputs, layouts)]
    notes = (found.note,) if found is not None and found.note else ()
    if found is None and not bytes_like:
        return [_as_table(t) for t in inputs], Look(None, None, 1.0, 0.0, notes)
    levels, said = _same_levels(inputs, dtypes, name)
    shape = None if found is None else found.shape
    return _as_pixels(inputs, Look(shape, levels, 1.0, 0.0, notes), said, name)


def _exact(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor if has_float64(tensor.device) else tensor.cpu()).double()


def _as_table(tensor: torch.Tensor) -> torch.Tensor:
    """A table as floating point with all its digits.

    A standardisation must subtract the mean before it rounds to float32.
    """
    return tensor if tensor.is_floating_point() else _exact(tensor)


def _as_pixels(
    inputs: Sequence[torch.Tensor], look: Look, said: str, name: str
) -> tuple[list[torch.Tensor], Look]:
    low, high, whole = _extent(inputs)
    if look.levels is None:
        scale = 1.0 if max(abs(low), abs(high)) <= _SMALL else 1 / max(abs(low), abs(high))
        how = "they are read as they are" if scale == 1 else f"they are read times {scale:.3g}"
        notes = (*look.notes, f"{name}: {said}; {how}, and no image file can be predicted")
        return [t.float() for t in inputs], look._replace(
            scale=scale, notes=notes if said else look.notes
        )
    scale, shift = _reads(look.levels)
    if said:
        how = "" if (scale, shift) == (1.0, 0.0) else ", read as 0 to 1"
        look = look._replace(notes=(*look.notes, f"{name}: {said}{how}"))
    kept = torch.uint8 if whole and low >= 0 and high <= _BYTE else torch.float32
    return [t.to(kept) for t in inputs], look._replace(scale=scale, shift=shift)
