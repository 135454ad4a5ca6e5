"""Pictures of a run, with matplotlib.

They are curves, test images with predictions, the confusion matrix, and first-layer weights.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..data import needs_extra
from ..data.dataset import Dataset
from ..data.sheets import picture, save
from .disk import replacing

PICTURES = (
    "curves.png",
    "samples.png",
    "confusion.png",
    "weights.png",
    "predicted.png",
    "search.png",
    "report.html",
)  # of a run folder
_PARTS = ("train", "validation", "test")
_LOG_FROM = 100  # a loss that falls by more than this factor is drawn on a logarithmic scale


def _pyplot():
    try:
        import matplotlib
    except ImportError:
        raise needs_extra("matplotlib", "drawing") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(figure, path: Path) -> None:
    """Write a figure in the format of the path's suffix, completely or not at all, and close it."""
    with replacing(path) as part:
        save(figure, part, path.name)
    _pyplot().close(figure)


def _plain(name: str) -> str:
    """A class name on one line, in which matplotlib draws each $ as a dollar sign."""
    return "".join(c if c.isprintable() else " " for c in name).replace("$", r"\$")


def curves(history: list[dict], path: Path) -> None:
    """Loss and accuracy over the epochs, training and test, as a PNG."""
    pyplot = _pyplot()
    measured = [
        quantity
        for quantity in ("loss", "accuracy")
        if any(row.get(f"{part}_{quantity}") is not None for row in history for part in _PARTS)
    ]
    figure, axes = pyplot.subplots(
        1, len(measured), figsize=(4.5 * len(measured), 3.5), layout="constrained", squeeze=False
    )
    for axis, quantity in zip(axes.flat, measured):
        _curve(axis, history, quantity)
        axis.xaxis.set_major_locator(pyplot.MaxNLocator(integer=True, min_n_ticks=1))
    _save(figure, path)


def _curve(axis, history: list[dict], quantity: str) -> None:
    """One quantity over the epochs. A loss with a wide range gets a logarithmic scale."""
    epochs, drawn = [row["epoch"] for row in history], []
    for part in _PARTS:
        pairs = [(e, row.get(f"{part}_{quantity}")) for e, row in zip(epochs, history)]
        points = [(e, v) for e, v in pairs if v is not None and math.isfinite(v)]
        if points:
            axis.plot(*zip(*points), marker="o", markersize=3, label=part)
            drawn += [v for _, v in points]
    axis.set(xlabel="epoch", ylabel=quantity, xlim=(epochs[0] - 0.5, epochs[-1] + 0.5))
    if quantity == "loss" and drawn and max(drawn) > _LOG_FROM * min(drawn) > 0:
        axis.set_yscale("log")
    axis.grid(alpha=0.3)
    if axis.lines:
        axis.legend()


def samples(scores: torch.Tensor, data: Dataset, path: Path, count: int = 32) -> None:
    """The first test images as a grid, each with its predicted label.

    If the prediction is wrong, the title is red and also names the true label.
    """
    pyplot = _pyplot()
    shown = min(count, len(data))
    figure, axes = pyplot.subplots(
        -(-shown // 8), 8, figsize=(9, 1.35 * -(-shown // 8)), layout="constrained", squeeze=False
    )
    for axis in axes.flat:
        axis.axis("off")
    for axis, pixels, score, target in zip(
        axes.flat, data.inputs[:shown].cpu(), scores, data.targets.tolist()
    ):
        predicted = int(score.argmax())
        right = predicted == target
        axis.imshow(picture(pixels, data).numpy(), cmap="gray", vmin=0, vmax=1)
        title = data.classes[predicted]
        if not right:
            title = f"{title} (is {data.classes[target]})"
        axis.set_title(_plain(title), fontsize=8, color="black" if right else "red")
    _save(figure, path)


def confusion(matrix: list[list[int]], classes: Sequence[str], path: Path) -> None:
    """The confusion matrix with its counts. The colours show shares of each true class."""
    pyplot = _pyplot()
    classes = [_plain(name) for name in classes]
    side = max(4.0, 0.5 * len(classes))
    figure, axis = pyplot.subplots(figsize=(side, side), layout="constrained")
    shares = [[count / (sum(row) or 1) for count in row] for row in matrix]
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if len(classes) <= 20:
        for i, row in enumerate(matrix):
            for j, count in enumerate(row):
                if count:
                    axis.text(
                        j,
                        i,
                        count,
                        ha="center",
                        va="center",
                        fontsize=7,
                        color="white" if shares[i][j] > 0.5 else "black",
                    )
        axis.set_xticks(
            range(len(classes)), classes, rotation=90 if max(map(len, classes)) > 2 else 0
        )
        axis.set_yticks(range(len(classes)), classes)
    axis.set(xlabel="predicted", ylabel="true")
    _save(figure, path)


def predicted(values: Any, true: Any, names: Sequence[str], path: Path) -> None:
    """Predicted against true values of each target, both arrays (rows, targets).

    A line shows where they are equal.
    """
    pyplot = _pyplot()
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(4 * columns, 4 * rows), layout="constrained", squeeze=False
    )
    for axis in axes.flat[len(names) :]:
        axis.axis("off")
    for axis, name, x, y in zip(axes.flat, names, true.T, values.T):
        low, high = min(x.min(), y.min()), max(x.max(), y.max())
        axis.plot([low, high], [low, high], color="grey", linewidth=1, zorder=1)
        axis.scatter(x, y, s=8, alpha=0.6, zorder=2)
        axis.set(xlabel="true", ylabel="predicted", title=_plain(name), aspect="equal")
        axis.grid(alpha=0.3)
    _save(figure, path)


def scores_over(
    parameters: dict[str, Sequence[Any]],
    scores: Sequence[float],
    path: Path,
    name: str = "score",
    groups: Sequence[str] | None = None,
) -> None:
    """The score of each trial over each parameter.

    Numbers that span more than a factor of ten have a logarithmic scale. Other values are names.
    name: of the score. groups: of the trials, each with a colour of its own.
    """
    pyplot = _pyplot()
    columns = min(3, len(parameters))
    rows = -(-len(parameters) // columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(4 * columns, 3 * rows), layout="constrained", squeeze=False
    )
    for axis in axes.flat[len(parameters) :]:
        axis.axis("off")
    groups = groups or [""] * len(scores)
    for axis, (parameter, values) in zip(axes.flat, parameters.items()):
        shown = _places(axis, values)
        for group in dict.fromkeys(groups):
            chosen = [i for i, one in enumerate(groups) if one == group]
            points = [shown[i] for i in chosen], [scores[i] for i in chosen]
            axis.scatter(*points, s=14, alpha=0.7, label=_plain(group))
        axis.set(xlabel=_plain(parameter), ylabel=_plain(name))
        axis.grid(alpha=0.3)
    if len(set(groups)) > 1:
        axes.flat[0].legend(fontsize=8)
    _save(figure, path)


def _places(axis: Any, values: Sequence[Any]) -> list[Any]:
    """The places of these values on the x axis, which gets its scale and its labels."""
    if not all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values):
        try:
            known = sorted(set(values))
        except TypeError:  # values of several types
            known = sorted(set(values), key=str)
        axis.set_xticks(range(len(known)), [_plain(str(one)) for one in known], rotation=90)
        return [known.index(value) for value in values]
    low, high = min(values), max(values)
    if low > 0 and high > 10 * low:
        from matplotlib import ticker

        axis.set_xscale("log")
        parts = (1, 3) if high < 100 * low else (1,)  # more labels would overlap
        axis.xaxis.set_major_locator(ticker.LogLocator(subs=parts))
        axis.xaxis.set_major_formatter(ticker.FuncFormatter(lambda x, _: f"{x:g}"))
        axis.xaxis.set_minor_formatter(ticker.NullFormatter())
    return list(values)


def first_weights(
    weight: torch.Tensor, image_shape: tuple[int, ...] | None, path: Path, count: int = 64
) -> None:
    """The weights of the first layer as images, where red is positive and blue negative.

    weight: of units (N, C·H·W), or of filters (N, C, KH, KW). count: the most images.
    """
    pyplot = _pyplot()
    units, weight = len(weight), weight.detach().float().cpu()[:count]
    images = weight.mean(1) if weight.dim() == 4 else weight.view(-1, *(image_shape or ())).mean(1)
    columns = min(8, len(images))
    rows = -(-len(images) // columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(1.1 * columns, 1.1 * rows), layout="constrained", squeeze=False
    )
    for axis in axes.flat:
        axis.axis("off")
    for axis, image in zip(axes.flat, images):
        bound = float(image.abs().max()) or 1.0
        axis.imshow(image.numpy(), cmap="RdBu_r", vmin=-bound, vmax=bound)
    figure.suptitle(f"units 1 to {len(images)} of {units}, each on its own scale", fontsize=9)
    _save(figure, path)


def write_all(
    history: Any,
    model: Any,
    scores: torch.Tensor | None,
    measured: Any,
    data: Dataset,
    folder: Path,
    suffix: str = ".png",
) -> list[Path]:
    """Write every picture that suits the data, and return the paths.

    The files are curves, samples, confusion and weights, each with `suffix`.
    """
    jobs = {"curves.png": lambda path: curves(history, path)} if history else {}
    if measured is not None and scores is not None:
        jobs["confusion.png"] = lambda path: confusion(measured["confusion"], data.classes, path)
    if data.image_shape is not None:
        if scores is not None:
            jobs["samples.png"] = lambda path: samples(scores, data, path)
        jobs["weights.png"] = lambda path: first_weights(
            next(iter(model.parameters())), data.image_shape, path
        )
    paths = {name: (folder / name).with_suffix(suffix) for name in jobs}
    for name, job in jobs.items():
        job(paths[name])
    return list(paths.values())


def epoch_times(history: Sequence[dict[str, Any]], path: Path) -> None:
    """Seconds of each epoch as bars."""
    pyplot = _pyplot()
    figure, axis = pyplot.subplots(figsize=(9, 2.5), layout="constrained")
    axis.bar([row["epoch"] for row in history], [row["seconds"] for row in history])
    axis.set(xlabel="epoch", ylabel="seconds")
    axis.xaxis.set_major_locator(pyplot.MaxNLocator(integer=True, min_n_ticks=1))
    _save(figure, path)


def compare(histories: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Test loss and accuracy of several runs over their epochs. histories: by name of the run."""
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axis, key in zip(axes, ("test_loss", "test_accuracy")):
        for name, history in histories.items():
            points = [(row["epoch"], row[key]) for row in history if row.get(key) is not None]
            if points:
                axis.plot(*zip(*points), marker="o", markersize=3, label=_plain(name))
        axis.set(xlabel="epoch", ylabel=key.replace("_", " "))
        axis.xaxis.set_major_locator(pyplot.MaxNLocator(integer=True, min_n_ticks=1))
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=8)
    _save(figure, path)
