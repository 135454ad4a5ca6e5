"""Descriptions of a data set in words: one line for `train`, a page for `handgrad data`."""

from typing import TYPE_CHECKING

from .dataset import Dataset
from .scaling import columns, lost_in_float32

if TYPE_CHECKING:
    from .tables import Table

_SHOWN = 20  # the most classes or columns that are listed


def _times(shape: tuple[int, ...]) -> str:
    return " × ".join(str(n) for n in shape)


def inputs(data: Dataset) -> str:
    """The inputs in words, such as "8 × 8 grey pixels" or "30 columns"."""
    if data.image_shape is None:
        return f"{data.features} column{'s' * (data.features > 1)}"
    channels, *size = data.image_shape
    kind = {1: "grey", 3: "RGB"}.get(channels, f"{channels}-channel")
    return f"{_times(tuple(size))} {kind} pixels"


def scale(data: Dataset) -> str:
    """The formula that reads a stored number: "x / 255" or "(x - mean) / std of each column"."""
    x = "x" if data.mean is None else "(x - mean) / std of each column"
    if data.scale != 1:
        inverse = 1 / data.scale
        whole = abs(inverse - round(inverse)) < 1e-9 * abs(inverse)
        x = f"{x} / {round(inverse)}" if whole and abs(inverse) >= 1 else f"{x} · {data.scale:.6g}"
    return f"{x} {'+' if data.shift > 0 else '-'} {abs(data.shift):.6g}" if data.shift else x


def stored_range(data: Dataset) -> tuple[float, float]:
    """(smallest, largest) input, as the file stored them."""
    x = data.inputs
    if data.mean is not None and data.std is not None:
        mean, std = data.mean.to(x.device), data.std.to(x.device)
        x = x * std + mean
    low, high = float(x.min()), float(x.max())
    # Standardised numbers are rounded to float32, so an original 0 comes back as a tiny number.
    nothing = 1e-6 * max(abs(low), abs(high))
    return (0.0 if abs(low) < nothing else low), (0.0 if abs(high) < nothing else high)


def targets(data: Dataset) -> str:
    """The targets in words: "10 classes of 139 to 146 samples", or a regression's outputs."""
    if data.is_classification:
        counts = data.class_counts().tolist()
        least, most = min(counts), max(counts)
        each = f"{least:,}" if least == most else f"{least:,} to {most:,}"
        return f"{len(counts)} class{'es' * (len(counts) != 1)} of {each} samples"
    outputs = data.targets[0].numel()
    low, high = float(data.targets.min()), float(data.targets.max())
    return f"regression, {outputs} output{'s' * (outputs > 1)} from {low:.6g} to {high:.6g}"


def describe(train: Dataset, test: Dataset | None = None) -> str:
    """One line about a data set.

    It names samples, inputs, dtype, range, how inputs are read, classes, and test samples.
    """
    low, high = stored_range(train)
    parts = [
        f"{train.name}: {len(train):,} samples of {inputs(train)}",
        f"{train.stored} {low:.6g} to {high:.6g} read as {scale(train)}",
        targets(train),
    ]
    if test is not None:
        parts.append(f"{len(test):,} test samples")
    return "; ".join(parts)


def page(train: Dataset, test: Dataset, table: "Table | None" = None) -> list[str]:
    """A page about a data set, one string for each line.

    It shows the inputs, how they are read, the split, the classes with their balance, and columns
    that are constant or that float32 cannot resolve. table: of the data, whose columns are shown
    as in the file.
    """
    said = [
        f"data       {train.name}",
        f"samples    {len(train):,} for training, {len(test):,} for testing",
    ]
    if table is None:
        low, high = stored_range(train)
        said.append(f"inputs     {inputs(train)}, {train.stored} {low:.6g} to {high:.6g}")
        said.append(f"read as    {scale(train)}")
    else:
        said += _table(table, train)
    if train.levels is not None:
        said.append(f"levels     black is {train.levels[0]:g}, white is {train.levels[1]:g}")
    said.append(f"targets    {targets(train if table is None else table.in_own_units(train))}")
    if train.is_classification:
        said += _classes(train, test)
    if table is None:
        said += _odd_columns(train)
    return [*said, f"hash       {train.fingerprint().hash} (training data)"]


def _table(table: "Table", train: Dataset) -> list[str]:
    lines = table.described(train.inputs)
    more = [f"and {len(lines) - _SHOWN} columns more"] if len(lines) > _SHOWN else []
    return [
        f"inputs     {len(lines)} columns as {train.features} features",
        *(f"           {line}" for line in (*lines[:_SHOWN], *more)),
    ]


def _classes(train: Dataset, test: Dataset) -> list[str]:
    counts, tested = train.class_counts().tolist(), test.class_counts().tolist()
    present = [n for n in counts if n]
    ratio = max(present) / min(present)
    empty = [name for name, n in zip(train.classes, counts) if not n]
    said = [f"balance    the largest class is {ratio:.2f} times the smallest"]
    if empty:
        said.append(f"           without training samples: {', '.join(empty[:_SHOWN])}")
    width = max(len(name) for name in train.classes[:_SHOWN])
    said.append(f"           {'class':<{max(width, 5)}} {'train':>9} {'share':>7} {'test':>9}")
    for name, n, m in list(zip(train.classes, counts, tested))[:_SHOWN]:
        said.append(f"           {name:<{max(width, 5)}} {n:>9,} {n / len(train):>7.2%} {m:>9,}")
    if len(counts) > _SHOWN:
        said.append(f"           and {len(counts) - _SHOWN} classes more")
    return said


def _odd_columns(train: Dataset) -> list[str]:
    found = columns(train)
    constant = (found.low == found.high).nonzero().flatten().tolist()
    said = ["missing    none: numbers that are not finite are refused"]
    what = "columns" if train.image_shape is None else "pixels"
    said.append(f"constant   {len(constant)} of {train.features} {what}{_listed(train, constant)}")
    if lost := lost_in_float32(train):
        said.append(f"rounded    change less than float32 resolves:{_listed(train, lost)}")
    return said


def _listed(train: Dataset, numbers: list[int]) -> str:
    if not numbers or train.image_shape is not None:
        return ""
    names = [train.columns[i] if train.columns else str(i) for i in numbers[:_SHOWN]]
    return f" ({', '.join(names)}{', …' * (len(numbers) > _SHOWN)})"
