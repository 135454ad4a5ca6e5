"""Pictures of a run, with matplotlib."""

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
