"""Tables from CSV and Parquet files as features: columns of numbers and texts, with gaps.

A column of numbers is standardised. Its gaps are filled with the median, and a second feature marks
them. A column of texts becomes one feature for each of its values. A `Table` holds the numbers and
texts that were fitted on the training rows. It is stored with a run as JSON, and `evaluate` and
`predict` apply it again. pandas reads the files.
"""

import csv
import dataclasses
import datetime
import decimal
import io
import math
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy
import torch

from . import DataError, Dataset, files, needs_extra
from .dataset import centre, moments

if TYPE_CHECKING:
    import pandas

SUFFIXES = files.TABLES
TEST_SHARE = 0.2  # of the rows
MAX_CATEGORIES = 100  # of a text column. More are names or ids, from which nothing can be learned.
FEW_CATEGORIES = 20  # so many are learned from, even if most rows have a text of their own
MAX_INTEGER_CLASSES = 20  # of a whole-number target. More are quantities.
_NUMBER, _CATEGORY = "number", "category"
_OTHER = {".": ",", ",": "."}  # decimal point -> the mark that may group thousands
DECIMALS = tuple(_OTHER)
_LARGEST = float(numpy.finfo(numpy.float32).max)
_MOST = 0.5  # a column of texts is one of numbers if at least this share of them are numbers


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
        """The names of the columns of texts."""
        return [column.name for column in self.columns if _KINDS[column.kind].is_text]

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
                f"the table lacks the column{'s' * (len(missing) > 1)} {_listed(missing)}, which "
                f"the network was trained on; it has {_listed(frame.columns)}"
            )
        extra = [name for name in frame.columns if name not in wanted and name not in self.targets]
        if extra:
            note(f"not used, as training did not have them: {_listed(extra)}")
        parts = [_KINDS[c.kind].values(c, frame[c.name], note) for c in self.columns]
        for column, values in zip(self.columns, parts):
            if (far := abs(values) > _LARGEST).any():
                row = int(far.any(1).argmax())
                raise DataError(
                    f"column {column.name!r}: {frame[column.name].iloc[row]} in row "
                    f"{_row(frame[column.name], row)} is too far from the training rows' mean "
                    f"{column.mean:.3g} for float32; correct it"
                )
        return torch.from_numpy(numpy.concatenate(parts, axis=1).astype(numpy.float32))

    def outputs(self, frame: "pandas.DataFrame") -> torch.Tensor:
        """The targets of a frame: labels (rows,) int64, or (rows, targets) float32.

        DataError if a target is missing, or is no class of this table.
        """
        for name in self.targets:
            if name not in frame.columns:
                raise DataError(
                    f"the table has no column {name!r}; it has {_listed(frame.columns)}"
                )
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
    """A column of numbers or truth values."""

    is_text = False

    @staticmethod
    def fit(name: str, series: "pandas.Series") -> Column | None:
        values = _as_numbers(name, series)
        known = values[~numpy.isnan(values)]
        flag = len(known) < len(values)
        if not len(known) or (known.min() == known.max() and not flag):
            _refuse_merged(name, series)
            return None  # nothing can be learned from it
        fill = float(numpy.median(known))
        filled = numpy.where(numpy.isnan(values), fill, values)
        return Column(name, _NUMBER, *_mean_std(name, filled), fill=fill, flag=flag)

    @staticmethod
    def features(column: Column) -> list[str]:
        return [column.name, *([f"{column.name} missing"] if column.flag else [])]

    @staticmethod
    def values(column: Column, series: "pandas.Series", note: Callable) -> numpy.ndarray:
        values = _as_numbers(column.name, series)
        gaps = numpy.isnan(values)
        if gaps.any() and not column.flag:
            note(f"column {column.name!r}: {int(gaps.sum())} gaps are read as {column.fill:g}")
        scaled = (numpy.where(gaps, column.fill, values) - column.mean) / column.std
        return numpy.stack([scaled, gaps], axis=1) if column.flag else scaled[:, None]

    @staticmethod
    def described(column: Column, inputs: torch.Tensor) -> tuple[str, int]:
        gaps = int(inputs[:, 1].sum()) if column.flag else 0
        return f"numbers, mean {column.mean:.5g}, deviation {column.std:.5g}", gaps


class _Category:
    """A column of texts."""

    is_text = True

    @staticmethod
    def fit(name: str, series: "pandas.Series") -> Column | None:
        texts = _as_texts(series.dropna())
        counts = texts.value_counts()
        if len(counts) > FEW_CATEGORIES:
            _refuse_numbers(name, texts, f"leave the column out with --drop {name}")
        if len(counts) > MAX_CATEGORIES or len(counts) > max(FEW_CATEGORIES, len(texts) / 2):
            raise DataError(
                f"column {name!r} has {len(counts)} different texts in {len(texts)} rows, such as "
                f"{counts.index[0]!r}; it looks like a date, a name or an id; leave it out with "
                f"--drop {name}"
            )
        if not len(counts) or (len(counts) == 1 and len(texts) == len(series)):
            return None  # nothing can be learned from it
        return Column(name, _CATEGORY, categories=tuple(sorted(counts.index)))

    @staticmethod
    def features(column: Column) -> list[str]:
        return [f"{column.name} = {text}" for text in column.categories]

    @staticmethod
    def values(column: Column, series: "pandas.Series", note: Callable) -> numpy.ndarray:
        known = series.notna()
        texts = numpy.array(
            [_class_name(t) if k else None for t, k in zip(series, known)], dtype=object
        )
        unseen = sorted(set(texts[known.to_numpy()]) - set(column.categories))
        if unseen:
            note(
                f"column {column.name!r}: training never saw {_listed(unseen)}; read as none of it"
            )
        return numpy.stack([(texts == text).astype(float) for text in column.categories], axis=1)

    @staticmethod
    def described(column: Column, inputs: torch.Tensor) -> tuple[str, int]:
        shown = _listed(column.categories, 5)
        return f"{len(column.categories)} texts: {shown}", int((inputs.sum(1) == 0).sum())


_KINDS: dict[str, Any] = {_NUMBER: _Number, _CATEGORY: _Category}


def _as_texts(series: "pandas.Series") -> "pandas.Series":
    """The values of a column as texts. A categorical's unused categories are left out."""
    import pandas

    return pandas.Series([_class_name(value) for value in series], series.index, dtype=object)


def _refuse_numbers(name: str, texts: "pandas.Series", way: str) -> None:
    """DataError, which ends with `way`, if most of these texts are numbers.

    They hide a quantity behind a few odd texts, or behind marks such as those of thousands.
    """
    import pandas

    is_number = pandas.to_numeric(texts, errors="coerce").notna()
    if is_number.all():
        raise DataError(
            f"column {name!r} holds numbers that are stored as texts, such as {texts.iloc[0]!r}; "
            f"store them as numbers, or {way}"
        )
    if is_number.mean() >= _MOST:
        row = int(numpy.flatnonzero(~is_number.to_numpy())[0])
        raise DataError(
            f"column {name!r} holds numbers, but also {int((~is_number).sum())} texts, such as "
            f"{texts.iloc[row]!r} in row {_row(texts, row)}; make such a cell empty if its number "
            f"is missing, or {way}"
        )
    plain = texts.str.replace(r"[,%$€£\s]", "", regex=True)
    if pandas.to_numeric(plain, errors="coerce").notna().mean() >= _MOST:
        raise DataError(
            f"column {name!r} holds numbers that are written as texts, such as "
            f"{texts.iloc[0]!r}; write plain numbers, such as 1234.5, say which mark is the "
            f"decimal point with --decimal, or {way}"
        )


def _refuse_merged(name: str, series: "pandas.Series") -> None:
    """DataError if values differ, but float64 cannot tell them apart."""
    if series.nunique() > 1:
        raise DataError(
            f"column {name!r} holds whole numbers that float64 cannot tell apart, such as "
            f"{series.min()} and {series.max()}; leave it out with --drop {name}"
        )


def _mean_std(name: str, values: numpy.ndarray) -> tuple[float, float]:
    """(mean, standard deviation) of a column (rows,), see `dataset.centre`."""
    mean, std = centre(moments(torch.tensor(values, device="cpu")[:, None]))
    if not (mean.isfinite().all() and std.isfinite().all()):
        raise DataError(
            f"column {name!r}: numbers from {values.min():.3g} to {values.max():.3g} are too far "
            "apart for float64; divide them, or leave the column out"
        )
    return float(mean), float(std)


def _as_numbers(name: str, series: "pandas.Series") -> numpy.ndarray:
    """float64 values, with NaN for gaps. DataError, with the row, for texts and infinities."""
    import pandas

    if isinstance(series.dtype, numpy.dtype) and series.dtype.kind in "biuf":
        numbers, bad = series.to_numpy(float), numpy.flatnonzero([])  # much faster for many columns
    else:
        numbers = pandas.to_numeric(series, errors="coerce").to_numpy(float, na_value=math.nan)
        bad = numpy.flatnonzero(numpy.isnan(numbers) & series.notna().to_numpy())
    if len(bad):
        row = int(bad[0])
        raise DataError(
            f"column {name!r} must hold numbers, or true and false, but row {_row(series, row)} "
            f"has {series.iloc[row]!r}"
        )
    if numpy.isinf(numbers).any():
        row = int(numpy.flatnonzero(numpy.isinf(numbers))[0])
        raise DataError(
            f"column {name!r}: row {_row(series, row)} is {numbers[row]}; it must be finite"
        )
    return numbers


def _row(series: "pandas.Series", at: int) -> int:
    """The number of a row in its file, from 1. Rows keep it as their index if a file is split."""
    return int(series.index[at]) + 1


def _labels(table: Table, frame: "pandas.DataFrame") -> torch.Tensor:
    (name,) = table.targets
    texts = frame[name].map(_class_name)
    known = {text: i for i, text in enumerate(table.classes)}
    bad = [text for text in texts.unique() if text not in known]
    if bad:
        raise DataError(
            f"column {name!r}: {_listed(bad)} is no class of the training rows, which are "
            f"{_listed(table.classes)}"
        )
    return torch.tensor([known[text] for text in texts], dtype=torch.int64, device="cpu")


def _truths(table: Table, frame: "pandas.DataFrame") -> torch.Tensor:
    values = numpy.stack([_as_numbers(name, frame[name]) for name in table.targets], axis=1)
    if not numpy.isin(values, (0, 1)).all():
        raise DataError(f"the targets {_listed(table.targets)} of several labels must be 0 or 1")
    return torch.from_numpy(values.astype(numpy.float32))


def _quantities(table: Table, frame: "pandas.DataFrame") -> torch.Tensor:
    values = numpy.stack([_as_numbers(name, frame[name]) for name in table.targets], axis=1)
    scaled = (values - numpy.array(table.mean)) / numpy.array(table.std)
    return torch.from_numpy(scaled.astype(numpy.float32))


def _fit_classes(frame: "pandas.DataFrame", targets: Sequence[str]) -> dict[str, Any]:
    return {"classes": _classes(frame[targets[0]])}


def _fit_quantities(frame: "pandas.DataFrame", targets: Sequence[str]) -> dict[str, Any]:
    mean, std = zip(*(_mean_std(name, _as_numbers(name, frame[name])) for name in targets))
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


def _listed(names: Iterable[Any], most: int = 8) -> str:
    names = [str(name) for name in names]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _check_target(frame: "pandas.DataFrame", name: str) -> None:
    gaps = numpy.flatnonzero(frame[name].isna().to_numpy())
    if len(gaps):
        raise DataError(
            f"the target {name!r} is missing in {len(gaps)} of {len(frame)} rows, first in row "
            f"{int(gaps[0]) + 1}; remove those rows (words such as NA and None mean missing)"
        )


def read(
    path: str | Path,
    texts: Sequence[str] = (),
    decimal: str | None = None,
    note: Callable[[str], Any] = lambda line: None,
) -> "pandas.DataFrame":
    """A CSV (comma, semicolon, tab or vertical bar), TSV or Parquet file as a frame.

    texts: names of columns whose values stay texts, even if this file has only numbers there.
    decimal: one of DECIMALS, the decimal point of a text file. The other one may then group
    thousands. None reads "." and, where semicolons separate columns, also ",". `note` is called
    with a line about a column whose numbers may mean something else. DataError, in one line, for a
    file that cannot be read.
    """
    try:
        import pandas  # noqa: F401
    except ImportError:
        raise needs_extra("pandas", "reading tables") from None
    path = Path(path)
    if not path.exists():
        raise DataError(f"there is no file {str(path)!r}")
    try:
        is_parquet = path.suffix.lower() == ".parquet"
        if is_parquet and decimal is not None:
            raise DataError(f"{path}: --decimal is for text files, not Parquet; leave it out")
        frame = _of_parquet(path) if is_parquet else _parsed(path, texts, decimal, note)
    except DataError:
        raise
    except ImportError:
        raise needs_extra("pyarrow", "reading Parquet files") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error}); save it as UTF-8") from None
    except Exception as error:  # pandas, pyarrow and codecs raise different classes
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"{path}: not a readable table ({reason})") from None
    if not len(frame):
        raise DataError(f"{path}: has a header but no rows")
    return frame.rename(columns=str).reset_index(drop=True)


def _of_parquet(path: Path) -> "pandas.DataFrame":
    """The rows of a Parquet file.

    Decimals become floats, bytes become texts, and an index with a name becomes a column.
    """
    import pandas

    frame = pandas.read_parquet(path)
    if named := [name for name in frame.index.names if name is not None]:
        frame = frame.reset_index(level=named)
    for name, dtype in frame.dtypes.items():
        kinds = {type(value) for value in frame[name].dropna()} if dtype.kind == "O" else set()
        if kinds == {decimal.Decimal}:
            frame[name] = frame[name].map(float, na_action="ignore").astype(float)
        elif kinds == {datetime.date}:
            frame[name] = pandas.to_datetime(frame[name])
        elif kinds == {bytes}:
            frame[name] = frame[name].str.decode("utf-8", "replace")
    return frame


def _header(path: Path, separator: str, strict: bool) -> list[str]:
    """The cells of a text file's first line that is not blank. A cell in quotes may have lines.

    [] if the file is blank. strict: [] also if something follows a quote within a cell, which
    tells a wrong separator.
    """
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file, delimiter=separator, skipinitialspace=True, strict=strict)
        try:
            return next((row for row in rows if any(cell.strip() for cell in row)), [])
        except csv.Error:
            return []


def _parsed(
    path: Path, texts: Sequence[str], decimal: str | None, note: Callable[[str], Any]
) -> "pandas.DataFrame":
    """The rows of a text file. Names and texts are without blanks at their ends."""
    import pandas

    for strict in (True, False):
        found = [(_header(path, one, strict), one) for one in ",;\t|"]
        header, separator = max(found, key=lambda row: len(row[0]))
        if len(header) > 1:
            break
    names = [name.strip() or f"Unnamed: {i}" for i, name in enumerate(header)]
    if not names or any("\0" in name for name in names):
        raise DataError(f"{path}: {'holds bytes that are no text' if names else 'is empty'}")
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(f"{path}: the header names {_listed(repeated)} more than once")
    options: dict[str, Any] = {
        "sep": separator,
        "encoding": "utf-8-sig",
        "names": names,
        "header": 0,
        "index_col": False,  # else pandas takes the first value of a longer row for its name
        "dtype": dict.fromkeys(texts, str),
        "skipinitialspace": True,
        "low_memory": False,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error", pandas.errors.ParserWarning)
        try:
            frame = pandas.read_csv(
                path, **(options if decimal is None else options | {"dtype": str})
            )
        except pandas.errors.ParserWarning:
            raise DataError(
                f"{path}: its rows have more values than the header's {len(names)} names; name "
                "every column"
            ) from None
    if decimal is not None:
        text = frame.apply(_plain_numbers, decimal=decimal).to_csv(index=False)
        frame = pandas.read_csv(io.StringIO(text), skip_blank_lines=False, dtype=options["dtype"])
    elif separator == ";":  # where it separates columns, a comma is often the decimal point
        frame = _with_commas(path, frame, options, note)
    for name in frame.select_dtypes(exclude=["number", "bool"]).columns:
        texts_of = frame[name]
        stripped = texts_of.map(lambda text: text.strip() if isinstance(text, str) else text)
        if not stripped.equals(texts_of):  # without the blanks they may be numbers, or gaps
            again = io.StringIO(stripped.to_csv(index=False))
            kind = {name: str} if name in texts else None
            frame[name] = pandas.read_csv(again, skip_blank_lines=False, dtype=kind)[name]
    return frame


def _plain_numbers(texts: "pandas.Series", decimal: str) -> "pandas.Series":
    """Texts (rows,) with "." as decimal point and no marks between thousands.

    They stay unchanged unless all are numbers with this decimal point, "." or ",". The other one of
    the two may group thousands. DataError if all are numbers with the other decimal point.
    """
    import pandas

    point, group = re.escape(decimal), re.escape(_OTHER[decimal])
    whole = rf"(\d+|\d{{1,3}}({group}\d{{3}})+)"
    number = rf"\s*[+-]?({whole}({point}\d*)?|{point}\d+)([eE][+-]?\d+)?\s*"
    if not texts.dropna().str.fullmatch(number).all():
        known = texts.dropna()
        odd = known[known.str.contains(group)]
        plain = pandas.to_numeric(known.str.replace(_OTHER[decimal], "."), errors="coerce")
        if len(odd) and plain.notna().all():
            raise DataError(
                f"column {texts.name!r}: {odd.iloc[0]!r} in row {_row(odd, 0)} is no number with "
                f"the decimal point {decimal!r} of --decimal; leave --decimal out, or write all "
                "numbers alike"
            )
        return texts
    return texts.str.replace(_OTHER[decimal], "").str.replace(decimal, ".")


def _with_commas(
    path: Path, frame: "pandas.DataFrame", options: dict[str, Any], note: Callable[[str], Any]
) -> "pandas.DataFrame":
    """The frame, with columns that are numbers if "," is the decimal point as numbers.

    `note` is called for a column such as 1,234, where the mark may also group thousands. If some
    columns have decimal commas, it is also called for a column such as 1.234.
    """
    import pandas

    other = pandas.read_csv(path, decimal=",", **options)
    commas = [
        name
        for name in other.select_dtypes("number").columns
        if frame[name].dtype.kind not in "biuf"
    ]
    texts = frame[commas]
    frame[commas] = other[commas]
    points = [name for name in frame.select_dtypes("float").columns if name not in commas]
    if commas and points:
        again = pandas.read_csv(path, **options | {"dtype": str, "usecols": points})
        texts = pandas.concat([texts, again], axis=1)
    for name in texts.columns:
        mark = "," if name in commas else "."
        marked = texts[name].dropna().str.strip()
        marked = marked[marked.str.contains(mark, regex=False)]
        if (
            len(marked)
            and marked.str.fullmatch(rf"[+-]?[1-9]\d{{0,2}}{re.escape(mark)}\d{{3}}").all()
        ):
            number = float(marked.iloc[0].replace(",", "."))
            note(
                f"column {name!r}: {marked.iloc[0]} is read as {number:g}; if it is "
                f"{number * 1000:.0f}, give --decimal {_OTHER[mark]}"
            )
    return frame


def without_index(frame: "pandas.DataFrame") -> tuple["pandas.DataFrame", tuple[str, ...]]:
    """(the frame without an index that was written as a column without a name, notes).

    A column with a name that counts the rows stays, and a note says so.
    """
    notes: tuple[str, ...] = ()
    rows = numpy.arange(len(frame))
    for name in frame.columns:
        values = frame[name].to_numpy()
        counts = values.dtype.kind in "iu" and any(
            (values == rows + first).all() for first in (0, 1)
        )
        if counts and name.startswith("Unnamed: "):
            frame = frame.drop(columns=name)
            notes += ("the column without a name counts the rows, so it is left out",)
        elif counts:
            notes += (
                f"column {name!r} counts the rows; leave it out with --drop {name} if it is no "
                "quantity",
            )
    return frame, notes


def numbers(path: str | Path) -> tuple[torch.Tensor, list[str]]:
    """(rows, columns) float64 of all columns of a file in their order, gaps as NaN, and their
    names. DataError for texts, or where the first line of a text file is a row of numbers.
    """
    frame = read(path)
    names = list(frame.columns)
    counted = [[str(i) for i in range(start, start + len(names))] for start in (0, 1)]
    is_text = Path(path).suffix.lower() != ".parquet"
    if is_text and names not in counted and all(_is_number(name) for name in names):
        raise DataError(
            f"{path}: the first line holds numbers ({_listed(names)}), where names of columns are "
            "expected; write a line of names above it"
        )
    try:
        columns = [_as_numbers(name, frame[name]) for name in names]
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    return torch.from_numpy(numpy.stack(columns, axis=1)), names


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


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


def fit(frame: "pandas.DataFrame", targets: Sequence[str], task: str = "auto") -> Table:
    """Fit a Table on training rows.

    targets: names of the columns to predict. All others are features, except columns that have the
    same value in all rows. task: one of TASKS, or "auto" for that of `guess_task`. DataError, in
    one line, for columns that cannot be learned from.
    """
    task = checked_task(frame, targets, task)
    columns = _columns(frame, targets)
    return Table(columns, tuple(targets), task, **TASKS[task].fit(frame, targets))


def checked_task(frame: "pandas.DataFrame", targets: Sequence[str], task: str = "auto") -> str:
    """The task of these targets. DataError if one cannot be learned."""
    if not targets:
        raise DataError(f"no target is given; name one of the columns {_listed(frame.columns)}")
    if twice := [name for name in targets if targets.count(name) > 1]:
        raise DataError(f"the target {twice[0]!r} is given twice; name it once")
    _check_columns(frame, targets)
    for name in targets:
        _check_target(frame, name)
        _check_values(name, frame[name], "choose another --target")
        if frame[name].nunique() < 2:
            only = frame[name].iloc[0]
            only = repr(only) if isinstance(only, str) else only
            raise DataError(f"the target {name!r} is {only} in every row: nothing to learn")
    task = guess_task(frame, targets) if task == "auto" else task
    if task not in TASKS:
        raise DataError(f"unknown task {task!r}; known: auto, {', '.join(TASKS)}")
    if TASKS[task].has_labels and len(targets) > 1:
        raise DataError(
            f"a classification has one target, got {_listed(targets)}; several columns of 0 and 1 "
            "are task multilabel"
        )
    only = frame[targets[0]]
    if TASKS[task].has_labels and only.dtype.kind == "O" and only.nunique() > FEW_CATEGORIES:
        _refuse_numbers(targets[0], _as_texts(only), "choose another --target")
    return task


def _check_columns(frame: "pandas.DataFrame", names: Sequence[str]) -> None:
    for name in names:
        if name not in frame.columns:
            raise DataError(f"there is no column {name!r}; the table has {_listed(frame.columns)}")


def _columns(frame: "pandas.DataFrame", targets: Sequence[str]) -> tuple[Column, ...]:
    from pandas.api import types

    found = []
    for name in frame.columns:
        if name in targets:
            continue
        series = frame[name]
        _check_values(name, series, f"leave it out with --drop {name}")
        # pandas keeps truth values with gaps as objects
        is_number = types.is_numeric_dtype(series) or (
            series.dropna().map(lambda v: v is True or v is False).all()
        )
        kind = _NUMBER if is_number else _CATEGORY
        column = _KINDS[kind].fit(name, series)
        found += [] if column is None else [column]
    if not found:
        raise DataError(
            f"no column is left to learn from beside the target {_listed(targets)}: there is no "
            "other, or all rows have the same value"
        )
    return tuple(found)


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
    path, doubts = Path(path), list[str]()
    frame = read(path, () if table is None else table.texts, choice.decimal, doubts.append)
    _check_rows(len(frame), str(path))
    notes = tuple(doubts)
    if table is None:
        _check_columns(frame, (*choice.targets, *choice.drop))
        if twice := set(choice.targets) & set(choice.drop):
            raise DataError(f"{path}: {_listed(sorted(twice))} is a target and cannot be dropped")
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
        table = fit(train, targets, task)
        known = {*targets, *(column.name for column in table.columns)}
        if empty := [name for name in frame.columns if name not in known]:
            notes += (
                f"left out, as all training rows have the same value, or none: {_listed(empty)}",
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
        found += f"; too few rows have {_listed(rare)}"
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
