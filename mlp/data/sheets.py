"""Pictures of a data set, with matplotlib: a sheet of samples, and a bar for each class."""

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .dataset import Dataset, announce, needs_extra

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_EACH = 10  # samples of a class
_CLASSES, _COLUMNS = 20, 24
_SHOWN = 8  # the most characters that a note lists


def _figure(width: float, height: float) -> "Figure":
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise needs_extra("matplotlib", "drawing") from None
    return Figure(figsize=(width, height), layout="constrained")


def save(figure: "Figure", path: Path, name: str) -> None:
    """Write a figure in the format that the suffix of `name` says.

    A note on stderr says if the font lacks characters, which are then drawn as boxes.
    """
    with warnings.catch_warnings(record=True) as said:
        warnings.filterwarnings("always", r"Glyph \d+")
        figure.savefig(path, dpi=120, format=Path(name).suffix.removeprefix("."))
    lacks = set()
    for one in said:
        if found := re.match(r"Glyph (\d+)", str(one.message)):
            lacks.add(chr(int(found.group(1))))
        else:
            warnings.warn(one.message, stacklevel=2)
    if lacks:
        shown = "".join(sorted(lacks)[:_SHOWN])
        count = f"{len(lacks)} character{'s' * (len(lacks) > 1)}"
        announce([f"{name}: the font lacks {count}, such as {shown}"])


def picture(row: torch.Tensor, data: Dataset) -> torch.Tensor:
    """One stored input as matplotlib draws it, (H, W) or (H, W, 3), from black 0 to white 1.

    An image that has not 1 or 3 channels becomes the mean of its channels.
    """
    x = row.cpu().double()
    if data.mean is not None and data.std is not None:
        x = x * data.std.double() + data.mean.double()
    black, white = data.levels or (float(x.min()), float(x.max()))
    image = ((x - black) / ((white - black) or 1.0)).clamp(0, 1).view(data.image_shape or ())
    return image.permute(1, 2, 0) if len(image) == 3 else image.mean(0)


def samples(data: Dataset, path: Path) -> None:
    """Draw up to ten images of each of the first twenty classes, one row for each class."""
    if data.is_classification:
        targets = data.targets.cpu()
        groups = [
            (name, (targets == number).nonzero().flatten()[:_EACH].tolist())
            for number, name in enumerate(data.classes[:_CLASSES])
        ]
    else:
        first = list(range(min(len(data), 4 * _EACH)))
        groups = [("", first[i : i + _EACH]) for i in range(0, len(first), _EACH)]
    figure = _figure(9, 0.95 * len(groups) + 0.4)
    axes = figure.subplots(len(groups), _EACH, squeeze=False)
    for row, (name, chosen) in zip(axes, groups):
        for axis in row:
            axis.axis("off")
        for axis, sample in zip(row, chosen):
            axis.imshow(picture(data.inputs[sample], data).numpy(), cmap="gray", vmin=0, vmax=1)
        row[0].set_title(name, fontsize=9, loc="left", parse_math=False)
    save(figure, path, path.name)


def columns(data: Dataset, path: Path) -> None:
    """Draw a histogram of each of a table's first columns, of the numbers as read."""
    shown = min(data.features, _COLUMNS)
    across = min(6, shown)
    rows = -(-shown // across)
    figure = _figure(1.7 * across + 0.5, 1.35 * rows + 0.3)
    axes = figure.subplots(rows, across, squeeze=False)
    x = data.read(data.inputs[:, :shown]).cpu()
    for axis in axes.flat[shown:]:
        axis.axis("off")
    for i, axis in enumerate(axes.flat[:shown]):
        axis.hist(x[:, i].numpy(), bins=30)
        axis.set_title(data.columns[i] if data.columns else str(i), fontsize=8, parse_math=False)
        axis.tick_params(labelsize=6)
        axis.set_yticks([])
    save(figure, path, path.name)


def targets(train: Dataset, test: Dataset, path: Path) -> None:
    """Draw the count of samples of each class, or a histogram of a regression's targets."""
    if not train.is_classification:
        figure = _figure(6, 3.5)
        axis = figure.subplots()
        axis.hist(train.targets.flatten(1).cpu().numpy(), bins=40)
        axis.set(xlabel="target", ylabel="training samples")
        save(figure, path, path.name)
        return
    count = len(train.classes)
    figure = _figure(7, max(2.0, 0.28 * min(count, 60) + 0.9))
    axis = figure.subplots()
    left = torch.zeros(count, device="cpu")
    for part, data in (("train", train), ("test", test)):
        counts = data.class_counts().float()
        axis.barh(range(count), counts.numpy(), left=left.numpy(), label=part, height=0.8)
        left = left + counts
    if count <= 60:
        axis.set_yticks(range(count), train.classes)
        for label in axis.get_yticklabels():
            label.set_parse_math(False)
    axis.set(xlabel="samples")
    axis.set_ylim(count - 0.4, -0.6)
    axis.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside upper right", ncols=2, frameon=False)
    save(figure, path, path.name)


def write(train: Dataset, test: Dataset, folder: Path) -> list[Path]:
    """Write two pictures of the data into a folder, and return their paths.

    They are samples.png for images or columns.png for a table, and classes.png or targets.png.
    """
    first: Callable[[Dataset, Path], None] = columns if train.image_shape is None else samples
    name = "columns.png" if train.image_shape is None else "samples.png"
    second = "classes.png" if train.is_classification else "targets.png"
    first(train, folder / name)
    targets(train, test, folder / second)
    return [folder / name, folder / second]
