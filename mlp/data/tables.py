"""Tables as features: columns of numbers and texts, with gaps. `frames` reads their files.

A column of numbers is standardised. Its gaps are filled with the median, and a second feature marks
them. A column of texts becomes one feature for each of its values. A `Table` holds the numbers and
texts that were fitted on the training rows. It is stored with a run as JSON, and `evaluate` and
`predict` apply it again.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy
import torch

from . import DataError, Dataset, needs_extra
from .dataset import centre, constant, moments
from .frames import codes, listed, matrix, naming, read, row_number

if TYPE_CHECKING:
    import pandas

TEST_SHARE = 0.2  # of the rows
MAX_CATEGORIES = 100  # of a text column. More are names or ids, from which nothing can be learned.
FEW_CATEGORIES = 20  # so many are learned from, even if most rows have a text of their own
MAX_INTEGER_CLASSES = 20  # of a whole-number target. More are quantities.
_NUMBER, _CATEGORY = "number", "category"
_EXACT = 2.0**53  # float64 holds all whole numbers up to this one
_LARGEST = float(numpy.finfo(numpy.float32).max)
_MOST = 0.5  # a column of texts is one of numbers if at least this share of them are numbers
_FEW_FAR = 20  # with so many far numbers at most, the farthest is beyond √(rows / 20) deviations
_LOOKED_AT = 1000  # rows, in which equal numbers are counted
_Note = Callable[[str], Any]  # is called with a line about a decision


@dataclass(frozen=True)
class Column:
    """One column of a table as features.

    kind "number" gives (value - mean) / std, with gaps filled with `fill`. `flag` adds a feature
    that is 1 in rows with a gap. kind "category" gives a feature for each text in `categories`. It
    is 1 in rows with this text, else 0.
    """

    name: str
    kind: str
    mean: float = 0.0
    std: float = 1.0
    fill: float = 0.0
    flag: bool = False
    categories: tuple[str, ...] = ()

    @property
    def features(self) -> list[str]:
        """The names of this column's features."""
        return _KINDS[self.kind].features(self)


@dataclass(frozen=True)
class Table:
    """The conversion of a table's rows to features and targets, fitted on the training rows.

    columns: in the order of the features. targets: names of the target columns. task: one of TASKS.
    classes: of a classification, or the target names of a multi-label one. mean, std: of each
    target of a regression. It is learned standardised, and predicted in its own units.
    """

    columns: tuple[Column, ...]
    targets: tuple[str, ...]
    task: str
    classes: tuple[str, ...] = ()
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        known = self.task in TASKS and all(c.kind in _KINDS for c in self.columns)
        numbers = [n for c in self.columns for n in (c.mean, c.std, c.fill)]
        if not known or not all(math.isfinite(n) for n in (*numbers, *self.mean, *self.std)):
            raise DataError("not the description of a table: unknown kinds or numbers not finite")

    @property
    def features(self) -> list[str]:
        """The names of all features, such as "age", "age missing", "city = Rome"."""
        return [name for column in self.columns for name in column.features]

    @property
    def texts(self) -> list[str]:
        """The names of the columns whose values stay texts, with a target of codes such as 01."""
        found = [column.name for column in self.columns if _KINDS[column.kind].is_text]
        has_codes = TASKS[self.task].has_labels and any(map(_is_code, self.classes))
        return [*found, *self.targets] if has_codes else found

    def inputs(
        self, frame: "pandas.DataFrame", note: Callable[[str], Any] = lambda line: None
    ) -> torch.Tensor:
        """Rows of a frame as features, (rows, features) float32.

        Columns that the table does not know, and texts that training never saw, are left out.
        `note` is called with one line about each. DataError if a column is missing, or holds values
        of another kind.
        """
        wanted = [column.name for column in self.columns]
        missing = [name for name in wanted if name not in frame.columns]
        if missing:
            raise DataError(
                f"the table lacks the column{'s' * (len(missing) > 1)} {listed(missing)}, which "
                f"the network was trained on; it has {listed(frame.columns)}"
            )
        extra = [name for name in frame.columns if name not in wanted and name not in self.targets]
        if extra:
            note(f"not used, as training did not have them: {listed(extra)}")
        found = numpy.empty((len(frame), len(self.features)), numpy.float32)
        places, at = {}, 0
        for column in self.columns:
            places[column.name] = slice(at, at := at + len(column.features))
        for kind, fitted in _KINDS.items():
            columns = [column for column in self.columns if column.kind == kind]
            for column, values in zip(columns, fitted.values(columns, frame, note)):
                found[:, places[column.name]] = values
        return torch.from_numpy(found)

    def outputs(self, frame: "pandas.DataFrame") -> torch.Tensor:
        """The targets of a frame: labels (rows,) int64, or (rows, targets) float32.

        DataError if a target is missing, or is no class of this table.
        """
        for name in self.targets:
            if name not in frame.columns:
                raise DataError(f"the table has no column {name!r}; it has {listed(frame.columns)}")
            _check_target(frame, name)
        return TASKS[self.task].outputs(self, frame)

    def units(self, outputs: torch.Tensor) -> torch.Tensor:
        """Outputs (rows, targets) of a regression, converted to the targets' own units."""
        mean, std = (torch.tensor(v, dtype=outputs.dtype) for v in (self.mean, self.std))
        return outputs.cpu() * std + mean

    def in_own_units(self, data: Dataset) -> Dataset:
        """The data set with the targets of a regression in their own units."""
        return data._with(targets=self.units(data.targets)) if self.mean else data

    def described(self, inputs: torch.Tensor) -> list[str]:
        """A line about each column: its name, its numbers or count of texts, and its gaps.

        inputs: (rows, features), the training rows as from `inputs`.
        """
        width, parts = max(len(column.name) for column in self.columns), inputs.cpu()
        lines, at = [], 0
        for column in self.columns:
            count = len(column.features)
            said, gaps = _KINDS[column.kind].described(column, parts[:, at : at + count])
            more = f", {gaps:,} gap{'s' * (gaps > 1)}" if gaps else ""
            lines.append(f"{column.name:<{width}}  {said}{more}")
            at += count
        return lines

    def dataset(self, frame: "pandas.DataFrame", name: str) -> Dataset:
        """A data set of the features and targets of these rows."""
        said: list[str] = []
        inputs, outputs = self.inputs(frame, said.append), self.outputs(frame)
        return Dataset(
            inputs,
            outputs,
            classes=() if outputs.is_floating_point() else self.classes,
            name=name,
            columns=tuple(self.features),
            notes=tuple(f"{name}: {line}" for line in said),
        )

    def to_json(self) -> dict[str, Any]:
        """The table as plain numbers, texts and lists."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Table":
        """The table from a `to_json`. DataError if the value is something else."""
        try:
            columns = tuple(
                Column(**{**column, "categories": tuple(column["categories"])})
                for column in value["columns"]
            )
            lists = {key: tuple(value[key]) for key in ("targets", "classes", "mean", "std")}
            return cls(columns, task=value["task"], **lists)
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(f"not the description of a table ({error})") from None


class _Number:
    """Columns of numbers or truth values."""

    is_text = False

    @staticmethod
    def fit(frame: "pandas.DataFrame", note: _Note) -> list[Column]:
        found = []
        values = matrix(frame)
        gaps = numpy.isnan(values)
        some, every = gaps.any(0), gaps.all(0)
        fills = numpy.zeros(values.shape[1])
        fills[~some] = numpy.median(values[:, ~some], axis=0)
        for i in numpy.flatnonzero(some & ~every).tolist():
            fills[i] = numpy.median(values[~gaps[:, i], i])
        filled = numpy.where(gaps, fills, values)
        varied = (filled != filled[:1]).any(0)
        for i in numpy.flatnonzero(~every & (abs(filled) >= _EXACT).any(0)).tolist():
            _refuse_merged(frame.iloc[:, i])
        # nothing can be learned from other columns
        kept = numpy.flatnonzero(~every & (some | varied)).tolist()
        mean, std = _mean_std(filled[:, kept], [frame.columns[i] for i in kept])
        for i, middle, width in zip(kept, mean, std):
            fill, flag = float(fills[i]), bool(some[i])
            found.append(Column(frame.columns[i], _NUMBER, middle, width, fill, flag))
            _note_far(found[-1], filled[:, i], note)
        return found

    @staticmethod
    def features(column: Column) -> list[str]:
        return [column.name, *([f"{column.name} missing"] if column.flag else [])]

    @staticmethod
    def values(
        columns: Sequence[Column], frame: "pandas.DataFrame", note: _Note
    ) -> list[numpy.ndarray]:
        values = matrix(frame[[column.name for column in columns]])
        gaps = numpy.isnan(values)
        for i in numpy.flatnonzero(gaps.any(0)).tolist():
            column, count = columns[i], int(gaps[:, i].sum())
            if not column.flag:
                note(f"column {column.name!r}: {count} gaps are read as {column.fill:g}")
        mean, std, fill = numpy.array([(c.mean, c.std, c.fill) for c in columns]).reshape(-1, 3).T
        scaled = (numpy.where(gaps, fill, values) - mean) / std
        if (far := abs(scaled) > _LARGEST).any():
            at, row = (int(place[0]) for place in far.T.nonzero())
            column, series = columns[at], frame[columns[at].name]
            raise DataError(
                f"column {column.name!r}: {series.iloc[row]} in row {row_number(series, row)} is "
                f"too far from the training rows' mean {column.mean:.3g} for float32; correct it"
            )
        return [
            numpy.stack([scaled[:, i], gaps[:, i]], 1) if c.flag else scaled[:, i, None]
            for i, c in enumerate(columns)
        ]

    @staticmethod
    def described(column: Column, inputs: torch.Tensor) -> tuple[str, int]:
        gaps = int(inputs[:, 1].sum()) if column.flag else 0
        return f"numbers, mean {column.mean:.5g}, deviation {column.std:.5g}", gaps


def _note_far(column: Column, values: numpy.ndarray, note: _Note) -> None:
    """Call `note` if a few far numbers make most others equal once they are standardised."""
    far = max(values.max() - column.mean, column.mean - values.min()) / column.std
    if far * far * _FEW_FAR < len(values):
        return
    first = values[:_LOOKED_AT]
    read = ((first - column.mean) / column.std).astype(numpy.float32)
    if 2 * len(numpy.unique(read)) < len(numpy.unique(first)):
        worst = values[abs(values - column.mean).argmax()]
        note(
            f"column {column.name!r}: most of its numbers become equal, as {worst:g} is far from "
            f"them; correct it, or leave the column out with --drop {column.name}"
        )


class _Category:
    """Columns of texts."""

    is_text = True

    @staticmethod
    def fit(frame: "pandas.DataFrame", note: _Note) -> list[Column]:
        fitted = (_categories(name, series, note) for name, series in frame.items())
        return [column for column in fitted if column is not None]

    @staticmethod
    def features(column: Column) -> list[str]:
        return [f"{column.name} = {text}" for text in column.categories]

    @staticmethod
    def values(
        columns: Sequence[Column], frame: "pandas.DataFrame", note: _Note
    ) -> list[numpy.ndarray]:
        return [_one_hot(column, frame[column.name], note) for column in columns]

    @staticmethod
    def described(column: Column, inputs: torch.Tensor) -> tuple[str, int]:
        shown = listed(column.categories, 5)
        return f"{len(column.categories)} texts: {shown}", int((inputs.sum(1) == 0).sum())


def _categories(name: str, series: "pandas.Series", note: _Note) -> Column | None:
    """A column of texts as features, or None if nothing can be learned from it."""
    texts = _as_texts(series.dropna())
    counts, code = texts.value_counts(), codes(texts)
    odd = None if code else _why_numbers(name, texts)
    if odd is not None and len(counts) > FEW_CATEGORIES:
        raise DataError(f"{odd.why}; {odd.way}, or leave the column out with --drop {name}")
    if len(counts) > MAX_CATEGORIES or len(counts) > max(FEW_CATEGORIES, len(texts) / 2):
        if code:
            raise DataError(
                f"column {name!r} {code}; so they are codes, {len(counts)} in {len(texts)} rows; "
                f"leave it out with --drop {name}, or write plain numbers if it is a quantity"
            )
        raise DataError(
            f"column {name!r} has {len(counts)} different texts in {len(texts)} rows, such as "
            f"{counts.index[0]!r}; it looks like a date, a name or an id; leave it out with "
            f"--drop {name}"
        )
    if not len(counts) or (len(counts) == 1 and len(texts) == len(series)):
        return None
    if odd is not None:
        note(f"{odd.why}; each of them becomes a category; if it is a quantity, {odd.way}")
    if code:
        note(f"column {name!r} {code}, so each of them becomes a category")
    return Column(name, _CATEGORY, categories=tuple(sorted(counts.index)))


def _one_hot(column: Column, series: "pandas.Series", note: _Note) -> numpy.ndarray:
    """(rows, categories): 1 where the row has this text. `note` is called for unknown texts."""
    known = series.notna().to_numpy()
    texts = numpy.array(
        [_class_name(t) if k else None for t, k in zip(series, known)], dtype=object
    )
    unseen = sorted(set(texts[known]) - set(column.categories))
    if unseen:
        note(f"column {column.name!r}: training never saw {listed(unseen)}; read as none of it")
    return numpy.stack([(texts == text).astype(float) for text in column.categories], axis=1)


_KINDS: dict[str, Any] = {_NUMBER: _Number, _CATEGORY: _Category}


def _as_texts(series: "pandas.Series") -> "pandas.Series":
    """The values of a column as texts. A categorical's unused categories are left out."""
    import pandas

    return pandas.Series([_class_name(value) for value in series], series.index, dtype=object)


class _Odd(NamedTuple):
    """Texts that are mostly numbers: what they are, and how to write them as numbers."""

    why: str
    way: str


def _why_numbers(name: str, texts: "pandas.Series") -> _Odd | None:
    """The reason if most of these texts are numbers, else None.

    They hide a quantity behind a few odd texts, or behind marks such as those of thousands.
    """
    import pandas

    if not len(texts):
        return None
    is_number = pandas.to_numeric(texts, errors="coerce").notna()
    if is_number.all():
        why = f"column {name!r} holds numbers that are stored as texts, such as {texts.iloc[0]!r}"
        return _Odd(why, "store them as numbers")
    if is_number.mean() >= _MOST:
        row = int(numpy.flatnonzero(~is_number.to_numpy())[0])
        return _Odd(
            f"column {name!r} holds numbers, but also {int((~is_number).sum())} texts, such as "
            f"{texts.iloc[row]!r} in row {row_number(texts, row)}",
            "make such a cell empty if its number is missing",
        )
    plain = texts.str.replace(r"[,%$€£\s]", "", regex=True)
    if pandas.to_numeric(plain, errors="coerce").notna().mean() < _MOST:
        return None
    return _Odd(
        f"column {name!r} holds numbers that are written as texts, such as {texts.iloc[0]!r}",
        "write plain numbers, such as 1234.5, or say which mark is the decimal point with "
        "--decimal",
    )


def _refuse_merged(series: "pandas.Series") -> None:
    """DataError if values differ, but float64 cannot tell all of them apart."""
    known = series.dropna()
    if known.nunique() > known.astype(float).nunique():
        raise DataError(
            f"column {series.name!r} holds whole numbers that float64 cannot tell apart, such as "
            f"{known.min()} and {known.max()}; leave it out with --drop {series.name}"
        )


def _is_code(text: str) -> bool:
    """True for a text that a column of numbers would give another name, such as 01."""
    try:
        return _class_name(float(text)) != text
    except (ValueError, OverflowError):
        return False


def _mean_std(
    values: numpy.ndarray, names: Sequence[str]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(means, standard deviations) of the columns (rows, columns), see `dataset.centre`."""
    mean, std = centre(moments(torch.tensor(values, device="cpu")))
    for name, column, one, other in zip(names, values.T, mean.isfinite(), std.isfinite()):
        if not (one and other):
            raise DataError(
                f"column {name!r}: numbers from {column.min():.3g} to {column.max():.3g} are too "
                "far apart for float64; divide them, or leave the column out"
            )
    return tuple(mean.tolist()), tuple(std.tolist())


def _labels(table: Table, frame: "pandas.DataFrame") -> torch.Tensor:
    (name,) = table.targets
    texts = frame[name].map(_class_name)
    known = {text: i for i, text in enumerate(table.classes)}
    bad = [text for text in texts.unique() if text not in known]
    if bad:
        raise DataError(
            f"column {name!r}: {listed(bad)} is no class of the training rows, which are "
            f"{listed(table.classes)}"
        )
    return torch.tensor([known[text] for text in texts], dtype=torch.int64, device="cpu")


def _truths(table: Table, frame: "pandas.DataFrame") -> torch.Tensor:
    values = matrix(frame[list(table.targets)])
    if not numpy.isin(values, (0, 1)).all():
        raise DataError(f"the targets {listed(table.targets)} of several labels must be 0 or 1")
    return torch.from_numpy(values.astype(numpy.float32))


def _quantities(table: Table, frame: "pandas.DataFrame") -> torch.Tensor:
    values = matrix(frame[list(table.targets)])
    scaled = (values - numpy.array(table.mean)) / numpy.array(table.std)
    return torch.from_numpy(scaled.astype(numpy.float32))


def _fit_classes(frame: "pandas.DataFrame", targets: Sequence[str]) -> dict[str, Any]:
    return {"classes": _classes(frame[targets[0]])}


def _fit_quantities(frame: "pandas.DataFrame", targets: Sequence[str]) -> dict[str, Any]:
    mean, std = _mean_std(matrix(frame[list(targets)]), targets)
    return {"mean": mean, "std": std}


def _fit_truths(frame: "pandas.DataFrame", targets: Sequence[str]) -> dict[str, Any]:
    return {"classes": tuple(targets)}


class Task(NamedTuple):
    """A row of TASKS.

    loss: unless the user chooses another. fit: (training rows, names of the targets) -> fields of a
    `Table`. outputs: (table, rows) -> targets as the network learns them. has_labels: True if the
    one target is a class.
    """

    loss: str
    fit: Callable[["pandas.DataFrame", Sequence[str]], dict[str, Any]]
    outputs: Callable[[Table, "pandas.DataFrame"], torch.Tensor]
    has_labels: bool = False


TASKS = {
    "classification": Task("cross_entropy", _fit_classes, _labels, has_labels=True),
    "regression": Task("mse", _fit_quantities, _quantities),
    "multilabel": Task("bce", _fit_truths, _truths),
}


def _class_name(value: Any) -> str:
    """A label as text. 1.0 becomes "1"."""
    whole = isinstance(value, (float, numpy.floating)) and float(value).is_integer()
    return str(int(value)) if whole else str(value)


def _check_target(frame: "pandas.DataFrame", name: str) -> None:
    gaps = numpy.flatnonzero(frame[name].isna().to_numpy())
    if len(gaps):
        raise DataError(
            f"the target {name!r} is missing in {len(gaps)} of {len(frame)} rows, first in row "
            f"{int(gaps[0]) + 1}; remove those rows (words such as NA and None mean missing)"
        )


def without_index(frame: "pandas.DataFrame") -> tuple["pandas.DataFrame", tuple[str, ...]]:
    """(the frame without an index that was written as a column without a name, notes).

    A column with a name that counts the rows stays, and a note says so.
    """
    notes: tuple[str, ...] = ()
    rows = numpy.arange(len(frame))
    whole = {name for name, dtype in frame.dtypes.items() if dtype.kind in "iu"}
    for name in [name for name in frame.columns if name in whole]:
        values = frame[name].to_numpy()
        counts = any((values == rows + first).all() for first in (0, 1))
        if counts and name.startswith("Unnamed: "):
            frame = frame.drop(columns=name)
            notes += ("the column without a name counts the rows, so it is left out",)
        elif counts:
            notes += (
                f"column {name!r} counts the rows; leave it out with --drop {name} if it is no "
                "quantity",
            )
    return frame, notes


def guess_task(frame: "pandas.DataFrame", targets: Sequence[str]) -> str:
    """The task that follows from the targets' types.

    Several targets are multi-label if all values are 0 or 1, else a regression. One target is a
    classification if it holds text or truth values. It also is one if it holds whole numbers of at
    most MAX_INTEGER_CLASSES values, each in two rows on average. Else it is a regression.
    """
    from pandas.api import types

    series = [frame[name] for name in targets]
    if len(series) > 1:
        binary = all(types.is_numeric_dtype(s) and s.dropna().isin((0, 1)).all() for s in series)
        return "multilabel" if binary else "regression"
    (only,) = series
    if not types.is_numeric_dtype(only) or types.is_bool_dtype(only):
        return "classification"
    whole = (only.dropna() % 1 == 0).all()
    kinds = only.nunique()
    few = kinds <= min(MAX_INTEGER_CLASSES, len(only) / 2)
    return "classification" if whole and few else "regression"


def fit(
    frame: "pandas.DataFrame",
    targets: Sequence[str],
    task: str = "auto",
    note: _Note = lambda line: None,
) -> Table:
    """Fit a Table on training rows.

    targets: names of the columns to predict. All others are features, except columns that have the
    same value in all rows. task: one of TASKS, or "auto" for that of `guess_task`. `note` is called
    with a line about a column whose texts may be numbers. DataError, in one line, for columns that
    cannot be learned from.
    """
    task = checked_task(frame, targets, task)
    columns = _columns(frame, targets, note)
    if TASKS[task].has_labels and (code := codes(_as_texts(frame[targets[0]]))):
        note(f"column {targets[0]!r} {code}, so each of them becomes a class")
    return Table(columns, tuple(targets), task, **TASKS[task].fit(frame, targets))


def checked_task(frame: "pandas.DataFrame", targets: Sequence[str], task: str = "auto") -> str:
    """The task of these targets. DataError if one cannot be learned."""
    if not targets:
        raise DataError(f"no target is given; name one of the columns {listed(frame.columns)}")
    if twice := [name for name in targets if targets.count(name) > 1]:
        raise DataError(f"the target {twice[0]!r} is given twice; name it once")
    _check_columns(frame, targets)
    for name in targets:
        _check_target(frame, name)
        _check_values(name, frame[name], "choose another --target")
        if frame[name].nunique() < 2:
            only = frame[name].iloc[0]
            raise constant(f"the target {name!r}", repr(only) if isinstance(only, str) else only)
    task = guess_task(frame, targets) if task == "auto" else task
    if task not in TASKS:
        raise DataError(f"unknown task {task!r}; known: auto, {', '.join(TASKS)}")
    if TASKS[task].has_labels and len(targets) > 1:
        raise DataError(
            f"a classification has one target, got {listed(targets)}; several columns of 0 and 1 "
            "are task multilabel"
        )
    only = frame[targets[0]]
    if TASKS[task].has_labels and only.dtype.kind == "O" and only.nunique() > FEW_CATEGORIES:
        texts = _as_texts(only)
        odd = None if codes(texts) else _why_numbers(targets[0], texts)
        if odd is not None:
            raise DataError(f"{odd.why}; {odd.way}, or choose another --target")
    return task


def _check_columns(frame: "pandas.DataFrame", names: Sequence[str]) -> None:
    for name in names:
        if name not in frame.columns:
            raise DataError(f"there is no column {name!r}; the table has {listed(frame.columns)}")


def _columns(frame: "pandas.DataFrame", targets: Sequence[str], note: _Note) -> tuple[Column, ...]:
    members: dict[str, list[str]] = {kind: [] for kind in _KINDS}
    for name, dtype in frame.dtypes.items():
        if name not in targets:
            members[_kind(name, frame, dtype)].append(name)
    found = {
        column.name: column
        for kind, names in members.items()
        for column in (_KINDS[kind].fit(frame[names], note) if names else ())
    }
    if not found:
        raise DataError(
            f"no column is left to learn from beside the target {listed(targets)}: there is no "
            "other, or all rows have the same value"
        )
    return tuple(found[name] for name in frame.columns if name in found)


def _kind(name: str, frame: "pandas.DataFrame", dtype: Any) -> str:
    """The kind of a column. DataError if its values are neither numbers nor texts."""
    from pandas.api import types

    if isinstance(dtype, numpy.dtype) and dtype.kind in "biuf":
        return _NUMBER
    series = frame[name]
    _check_values(name, series, f"leave it out with --drop {name}")
    # pandas keeps truth values with gaps as objects
    truths = series.dropna().map(lambda value: value is True or value is False)
    return _NUMBER if types.is_numeric_dtype(series) or truths.all() else _CATEGORY


def _check_values(name: str, series: "pandas.Series", way: str) -> None:
    """DataError, which ends with `way`, for dates, and for lists and other objects."""
    from pandas.api import types

    if types.is_datetime64_any_dtype(series) or types.is_timedelta64_dtype(series):
        raise DataError(f"column {name!r} holds dates or times; make numbers of them, or {way}")
    kinds = {type(value) for value in series.dropna()} if series.dtype.kind == "O" else set()
    if odd := [kind for kind in kinds if issubclass(kind, (list, dict, set, tuple, numpy.ndarray))]:
        raise DataError(
            f"column {name!r} holds values of type {odd[0].__name__}; make numbers or texts of "
            f"them, or {way}"
        )


def _classes(series: "pandas.Series") -> tuple[str, ...]:
    """The names of the classes, sorted. Numbers are sorted by value."""
    values = series.unique()
    try:
        values = sorted(values)
    except TypeError:  # texts and numbers in one column
        values = sorted(values, key=str)
    return tuple(dict.fromkeys(_class_name(value) for value in values))


class Choice(NamedTuple):
    """The targets to learn from a file, and the rows and columns that are held out.

    validation: the share of all rows that is held out in addition to the test rows, which are
    TEST_SHARE. decimal: see `read`.
    """

    targets: tuple[str, ...]
    drop: tuple[str, ...] = ()
    task: str = "auto"
    validation: float = 0.0
    decimal: str | None = None


class Parts(NamedTuple):
    """The rows of a file in parts, and the table that was fitted on the training rows."""

    train: Dataset
    test: Dataset
    validation: Dataset | None
    table: Table


def load(path: str | Path, choice: Choice, table: Table | None = None) -> Parts:
    """Read a file and split its rows at random.

    The split is the same each time, and classes keep their shares. table: of an earlier training.
    Without it, one is fitted on the training rows. DataError, in one line, for a file that cannot
    be read or used.
    """
    path = Path(path)
    with naming(path):
        return _load(path, choice, table)


def _load(path: Path, choice: Choice, table: Table | None) -> Parts:
    notes: list[str] = []
    frame = read(path, None if table is None else table.texts, choice.decimal, notes.append)
    _check_rows(len(frame), str(path))
    if table is None:
        _check_columns(frame, (*choice.targets, *choice.drop))
        if twice := set(choice.targets) & set(choice.drop):
            raise DataError(f"{path}: {listed(sorted(twice))} is a target and cannot be dropped")
        frame, counts = without_index(frame.drop(columns=list(choice.drop)))
        notes += counts
        task = checked_task(frame, choice.targets, choice.task)
    else:
        frame, task = frame.drop(columns=list(choice.drop), errors="ignore"), table.task
    targets = choice.targets if table is None else table.targets
    _check_columns(frame, targets)
    labels = frame[targets[0]].map(_class_name).to_numpy() if TASKS[task].has_labels else None
    rows = split_rows(len(frame), choice.validation, labels, str(path))
    train, test, held = (frame.iloc[chosen] for chosen in rows)
    if table is None:
        table = fit(train, targets, task, notes.append)
        known = {*targets, *(column.name for column in table.columns)}
        if empty := [name for name in frame.columns if name not in known]:
            notes.append(
                f"left out, as all training rows have the same value, or none: {listed(empty)}"
            )
            train, test, held = (part.drop(columns=empty) for part in (train, test, held))
    learned = table.dataset(train, f"{path.name} (train)")
    said = tuple(f"{path.name}: {note}" for note in notes)
    return Parts(
        learned._with(notes=(*said, *learned.notes)),
        table.dataset(test, f"{path.name} (test)"),
        table.dataset(held, f"{path.name} (validation)") if len(held) else None,
        table,
    )


def _why_not_split(labels: numpy.ndarray | None, error: ValueError) -> str:
    """The reason why the rows cannot be split so that each part has all classes; the way out."""
    if labels is None:
        return f"cannot be split: {error}"
    classes, counts = numpy.unique(labels, return_counts=True)
    rare = [f"{name} ({rows})" for name, rows in zip(classes, counts) if rows < 3]
    found = f"{len(classes)} classes in {len(labels)} rows"
    if rare:
        found += f"; too few rows have {listed(rare)}"
    return (
        f"cannot be split with all classes in each part: {found}; leave out rare classes, or use "
        "--task regression if the target is a quantity"
    )


def _check_rows(count: int, name: str) -> None:
    if count < 3:
        raise DataError(f"{name}: {count} row{'s' * (count > 1)} cannot be split; give 3 at least")


def split_rows(
    count: int, validation: float, labels: numpy.ndarray | None, name: str
) -> tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray]:
    """(training rows, test rows, validation rows) as indices, by scikit-learn.

    labels: the class of each row, or None. Each part gets the same shares of the classes.
    """
    try:
        from sklearn.model_selection import train_test_split
    except ImportError:
        raise needs_extra("scikit-learn", "splitting tables") from None
    if not 0 <= validation < 1 - TEST_SHARE:
        raise DataError(
            f"the validation share must be 0 to below {1 - TEST_SHARE:g}, got {validation:g}"
        )
    _check_rows(count, name)
    rows = numpy.arange(count)

    def part(rows: numpy.ndarray, share: float) -> tuple[numpy.ndarray, numpy.ndarray]:
        stratify = None if labels is None else labels[rows]
        try:
            left, out = train_test_split(rows, test_size=share, random_state=0, stratify=stratify)
        except ValueError as error:
            raise DataError(f"{name}: {_why_not_split(labels, error)}") from None
        return numpy.sort(left), numpy.sort(out)

    train, test = part(rows, TEST_SHARE)
    if not validation:
        return train, test, rows[:0]
    train, held = part(train, validation / (1 - TEST_SHARE))
    return train, test, held
