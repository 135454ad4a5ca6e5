"""Pictures of a run, with matplotlib: curves, test images with their predictions, confusion matrix,
first-layer weights.
"""

from pathlib import Path

from .data import needs_extra


def _pyplot():
    try:
        import matplotlib
    except ImportError:
        raise needs_extra("matplotlib", "drawing") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def curves(history: list[dict], path: Path) -> None:
    """Loss and accuracy over the epochs, training and test, as a PNG."""
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    epochs = [row["epoch"] for row in history]
    for axis, quantity in zip(axes, ("loss", "accuracy")):
        for part in ("train", "test"):
            values = [row.get(f"{part}_{quantity}") for row in history]
            if any(value is not None for value in values):
                axis.plot(epochs, values, marker="o", markersize=3, label=part)
        axis.set(xlabel="epoch", ylabel=quantity)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def samples(scores, data, path: Path, count: int = 32) -> None:
    """The first test images as a grid: predicted label, and the true one in red where they
    differ.
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
        axis.imshow(_picture(pixels, data.image_shape), cmap="gray")
        title = (
            data.classes[predicted]
            if right
            else f"{data.classes[predicted]} (is {data.classes[target]})"
        )
        axis.set_title(title, fontsize=8, color="black" if right else "red")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def confusion(matrix: list[list[int]], classes, path: Path) -> None:
    """The confusion matrix with its counts; colours are shares of each true class."""
    pyplot = _pyplot()
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
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def first_weights(weight, image_shape, path: Path, count: int = 64) -> None:
    """The weights of the first layer's units (N, C·H·W), or filters (N, C, KH, KW), as images: red
    positive, blue negative.
    """
    pyplot = _pyplot()
    units, weight = len(weight), weight.detach().float().cpu()[:count]
    images = weight.mean(1) if weight.dim() == 4 else weight.view(-1, *image_shape).mean(1)
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
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _picture(pixels, image_shape):
    """Flattened pixels as matplotlib wants them: (H, W), or (H, W, C) for colour."""
    image = pixels.view(image_shape).numpy()
    return image[0] if image_shape[0] == 1 else image.transpose(1, 2, 0)


def write_all(history, model, scores, measured, data, folder: Path) -> list[Path]:
    """Every picture that fits: curves.png, samples.png, confusion.png, weights.png; the paths
    written.
    """
    jobs = {"curves.png": lambda path: curves(history, path)} if history else {}
    if measured is not None:
        jobs["confusion.png"] = lambda path: confusion(measured["confusion"], data.classes, path)
    if data.image_shape is not None:
        if measured is not None:
            jobs["samples.png"] = lambda path: samples(scores, data, path)
        jobs["weights.png"] = lambda path: first_weights(
            next(iter(model.parameters())), data.image_shape, path
        )
    for name, job in jobs.items():
        job(folder / name)
    return [folder / name for name in jobs]
