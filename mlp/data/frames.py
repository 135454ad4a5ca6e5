"""Files of tables as frames of pandas: their formats, packings, separators, and decimal points.

A format is a row of FORMATS, a packing a row of PACKINGS. Every command and function that reads a
table takes both from here. pandas reads the rows.

Digits are not always a number. A column of codes, such as the postal code 01234, stays texts. So
does a column of whole numbers that float64 cannot tell apart.
"""

import bz2
import csv
import datetime
import decimal
import gzip
import io
import lzma
import math
import re
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import numpy
import torch

from .dataset import DataError, MissingPackage, needs_extra
from .guards import check_regular, check_size

if TYPE_CHECKING:
    import pandas

_OTHER = {".": ",", ",": "."}  # decimal point -> the mark that may group thousands
DECIMALS = tuple(_OTHER)
_SEPARATORS = ",;\t|"
_PIECE = 1 << 18  # bytes that are read or scanned at once
_EXACT = 2.0**53  # float64 holds all whole numbers up to this one
_CODE = re.compile(rb"0[0-9]+[\s\"]*([,;\t|\r\n]|$)")
_HINT = re.compile(rb"(?:\xef\xbb\xbf)?\"?(sep=[ -~\t])\"?[\r\n]", re.IGNORECASE)


class How(NamedTuple):
    """How to read a file.

    texts: names of the columns whose values stay texts, or None to find columns of codes. decimal,
    note: see `read`.
    """

    texts: Sequence[str] | None
    decimal: str | None
    note: Callable[[str], Any]


class Format(NamedTuple):
    """A row of FORMATS.

    read: (path, contents, how) -> frame. is_text: True if the file is text, which has a decimal
    point and maybe no line of names. package: what pandas needs to read it, or "".
    """

    read: Callable[[Path, bytes, How], "pandas.DataFrame"]
    is_text: bool = True
    package: str = ""


def format_of(path: str | Path) -> Format | None:
    """The format of a table, from the suffix of its name, or None for another file."""
    path = Path(path)
    packed = path.suffix.lower() in PACKINGS
    return FORMATS.get((Path(path.stem) if packed else path).suffix.lower())


def known() -> str:
    """The suffixes of all tables, for a message."""
    return f"{', '.join(FORMATS)} (also packed, with {', '.join(PACKINGS)})"


def read(
    path: str | Path,
    texts: Sequence[str] | None = None,
    decimal: str | None = None,
    note: Callable[[str], Any] = lambda line: None,
) -> "pandas.DataFrame":
    """A CSV (comma, semicolon, tab or vertical bar), TSV or Parquet file as a frame.

    texts: names of columns whose values stay texts, even if this file has only numbers there. None
    finds columns of codes, such as 01234, which then stay texts. decimal: one of DECIMALS, the
    decimal point of a text file. The other one may then group thousands. None reads "." and, where
    semicolons separate columns, also ",". `note` is called with a line about a column whose numbers
    may mean something else. DataError, in one line, for a file that cannot be read.
    """
    try:
        import pandas  # noqa: F401
    except ImportError:
        raise needs_extra("pandas", "reading tables") from None
    path = Path(path)
    if not path.exists():
        raise DataError(f"{path}: there is no such file")
    check_regular(path)
    kind = format_of(path) or FORMATS[".csv"]
    if decimal is not None and not kind.is_text:
        raise DataError(f"{path}: --decimal is for text files; leave it out")
    try:
        with naming(path):
            frame = kind.read(path, _contents(path), How(texts, decimal, note))
    except DataError:
        raise
    except ImportError:
        raise needs_extra(kind.package, f"reading {path.suffix} files") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error}); save it as UTF-8") from None
    except Exception as error:  # pandas, pyarrow and codecs raise different classes
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"{path}: not a readable table ({reason})") from None
    if not len(frame):
        raise DataError(f"{path}: has a header but no rows")
    # A copy has one block of memory for each dtype, where pandas reads a block for each column.
    return frame.rename(columns=str).reset_index(drop=True).copy()


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """A context in which every DataError about a file's contents begins with its path."""
    try:
        yield
    except DataError as error:
        if isinstance(error, MissingPackage) or str(error).startswith(f"{path}:"):
            raise
        raise DataError(f"{path}: {error}") from None


@contextmanager
def _only_member(path: Path) -> Iterator[IO[bytes]]:
    """The one file of a .zip archive."""
    with zipfile.ZipFile(path) as archive:
        members = [m for m in archive.infolist() if not m.is_dir()]
        members = [m for m in members if not m.filename.startswith("__MACOSX/")]
        if len(members) != 1:
            raise DataError(
                f"{path}: holds {len(members)} files, but one table is expected; unpack it, and "
                "give one of them"
            )
        with archive.open(members[0]) as file:
            yield file


# The suffix of a packed file -> a function that opens it for reading.
PACKINGS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zip": _only_member,
}


def _contents(path: Path) -> bytes:
    """The bytes of a file, unpacked. DataError if they would not fit into memory."""
    size, unpack = path.stat().st_size, PACKINGS.get(path.suffix.lower())
    if unpack is None:
        check_size(size, None, str(path))
        return path.read_bytes()
    pieces, count = [], 0
    with unpack(path) as file:
        while piece := file.read(_PIECE):
            pieces.append(piece)
            count += len(piece)
            check_size(count, size, str(path))
    return b"".join(pieces)


def _of_parquet(path: Path, contents: bytes, how: How) -> "pandas.DataFrame":
    """The rows of a Parquet file.

    Decimals become floats, bytes become texts, and an index with a name becomes a column.
    """
    import pandas

    frame = pandas.read_parquet(io.BytesIO(contents))
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


def _header(contents: bytes, separator: str, strict: bool) -> list[str]:
    """The cells of a text file's first line that is not blank. A cell in quotes may have lines.

    [] if the file is blank. strict: [] also if something follows a quote within a cell, which
    tells a wrong separator.
    """
    with io.TextIOWrapper(io.BytesIO(contents), "utf-8-sig", newline="") as file:
        rows = csv.reader(file, delimiter=separator, skipinitialspace=True, strict=strict)
        try:
            return next((row for row in rows if any(cell.strip() for cell in row)), [])
        except csv.Error:
            return []


def _of_text(path: Path, contents: bytes, how: How) -> "pandas.DataFrame":
    """The rows of a text file. Names and texts are without blanks at their ends."""
    import pandas

    names, separator = _names(path, contents)
    texts = how.texts or ()
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
            plain = options if how.decimal is None else options | {"dtype": str}
            frame = _parsed(io.BytesIO(contents), **plain)
        except pandas.errors.ParserWarning:
            raise DataError(
                f"{path}: its rows have more values than the header's {len(names)} names; name "
                "every column"
            ) from None
    if how.decimal is not None:
        text = frame.apply(_plain_numbers, decimal=how.decimal).to_csv(index=False)
        frame = _parsed(io.StringIO(text), skip_blank_lines=False, dtype=options["dtype"])
    elif separator == ";":  # where it separates columns, a comma is often the decimal point
        frame = _with_commas(contents, frame, options, how.note)
    for name in frame.select_dtypes(exclude=["number", "bool"]).columns:
        texts_of = frame[name]
        stripped = texts_of.map(lambda text: text.strip() if isinstance(text, str) else text)
        if not stripped.equals(texts_of):  # without the blanks they may be numbers, or gaps
            again = io.StringIO(stripped.to_csv(index=False))
            kind = {name: str} if name in texts else None
            frame[name] = _parsed(again, skip_blank_lines=False, dtype=kind)[name]
    return _with_codes(contents, frame, options) if how.texts is None else frame


def _parsed(source: IO, **options: Any) -> "pandas.DataFrame":
    """`pandas.read_csv`, in which every float is the one nearest to its text.

    Before 3.1, pandas rounds some floats to a neighbour unless an option forbids it. Later versions
    never do, and warn of the option.
    """
    import pandas

    is_exact = tuple(map(int, pandas.__version__.split(".")[:2])) >= (3, 1)
    return pandas.read_csv(source, **options, float_precision=None if is_exact else "round_trip")


def _names(path: Path, contents: bytes) -> tuple[list[str], str]:
    """(names of the columns, separator) of a text file. DataError for names that cannot be used."""
    if hint := _HINT.match(contents):
        raise DataError(
            f"{path}: its first line {hint[1].decode()!r} is for Excel; remove the line"
        )
    for strict in (True, False):
        found = [(_header(contents, one, strict), one) for one in _SEPARATORS]
        header, separator = max(found, key=lambda row: len(row[0]))
        if len(header) > 1:
            break
    names = [name.strip() or f"Unnamed: {i}" for i, name in enumerate(header)]
    if not names or any("\0" in name for name in names):
        # before 3.11, Python's csv refuses a zero byte, so there are no names
        binary = names or b"\0" in contents
        raise DataError(f"{path}: {'holds bytes that are no text' if binary else 'is empty'}")
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(f"{path}: the header names {listed(repeated)} more than once")
    return names, separator


def _with_codes(
    contents: bytes, frame: "pandas.DataFrame", options: dict[str, Any]
) -> "pandas.DataFrame":
    """The frame, with columns of codes as texts, see `codes`."""
    padded = _has_padded_cells(contents)
    doubtful = [name for name, series in frame.items() if _may_be_codes(series, padded)]
    if not doubtful:
        return frame
    again = _parsed(io.BytesIO(contents), **options | {"dtype": str, "usecols": doubtful})
    for name in doubtful:
        texts = again[name].str.strip()
        known = texts[frame[name].notna()]
        if codes(known):
            frame[name] = texts.where(frame[name].notna())
        elif frame[name].dtype.kind == "O":  # whole numbers of any size
            frame[name] = frame[name].astype(float)
    return frame


def codes(texts: "pandas.Series") -> str:
    """The reason why texts of digits are names of something, such as postal codes, else "".

    Numbers would not hold them. Either some have leading zeros, as 01234 has, or float64 cannot
    tell all of them apart.
    """
    if not len(texts) or not texts.str.fullmatch("[+-]?[0-9]+").all():
        return ""
    padded = texts[texts.str.match("0[0-9]")]
    if len(padded) and texts.str.fullmatch("[0-9]+").all():
        return f"has numbers with leading zeros, such as {padded.iloc[0]}"
    if texts.nunique() > texts.astype(float).nunique():
        return f"has numbers that are too long for float64, such as {max(texts, key=len)}"
    return ""


def _has_padded_cells(contents: bytes) -> bool:
    """True if a cell of a text file may hold only digits, of which the first is a 0.

    It is a scan for three bytes: one that may stand before a cell, a 0, and another digit.
    """
    starts = numpy.zeros(256, dtype=bool)
    starts[list(b'\r\n "' + _SEPARATORS.encode())] = True
    every = numpy.frombuffer(contents, numpy.uint8)
    for start in range(0, len(every), _PIECE):
        piece = every[start : start + _PIECE + 2]
        is_digit = piece[2:] - ord("0") < 10  # bytes below "0" become large
        found = numpy.flatnonzero((piece[1:-1] == ord("0")) & is_digit & starts[piece[:-2]])
        if any(_CODE.match(contents, start + 1 + int(at)) for at in found):
            return True
    return False


def _may_be_codes(series: "pandas.Series", padded: bool) -> bool:
    """True for a column of whole numbers, if the file is `padded` or some are long.

    padded: see `_has_padded_cells`. float64 does not hold all whole numbers from _EXACT on.
    """
    if series.dtype.kind == "O":  # whole numbers of any size, or texts
        return len(series.dropna()) > 0 and all(type(value) is int for value in series.dropna())
    if series.dtype.kind not in "iuf":
        return False
    values = series.to_numpy()
    is_long = bool((numpy.abs(values.astype(float)) >= _EXACT).any())
    if series.dtype.kind == "f" and (padded or is_long):
        return bool(((values == numpy.round(values)) | numpy.isnan(values)).all())
    return padded or is_long


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
                f"column {texts.name!r}: {odd.iloc[0]!r} in row {row_number(odd, 0)} is no "
                f"number with the decimal point {decimal!r} of --decimal; leave --decimal out, or "
                "write all numbers alike"
            )
        return texts
    return texts.str.replace(_OTHER[decimal], "").str.replace(decimal, ".")


def _with_commas(
    contents: bytes, frame: "pandas.DataFrame", options: dict[str, Any], note: Callable[[str], Any]
) -> "pandas.DataFrame":
    """The frame, with columns that are numbers if "," is the decimal point as numbers.

    `note` is called for a column such as 1,234, where the mark may also group thousands. If some
    columns have decimal commas, it is also called for a column such as 1.234.
    """
    import pandas

    other = _parsed(io.BytesIO(contents), decimal=",", **options)
    commas = [
        name
        for name in other.select_dtypes("number").columns
        if frame[name].dtype.kind not in "biuf"
    ]
    texts = frame[commas]
    frame[commas] = other[commas]
    points = [name for name in frame.select_dtypes("float").columns if name not in commas]
    if commas and points:
        kinds = {"dtype": str, "usecols": points}
        again = _parsed(io.BytesIO(contents), **options | kinds)
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


# A text file is read by _of_text, whatever its suffix says about the separator.
FORMATS = {
    ".csv": Format(_of_text),
    ".tsv": Format(_of_text),
    ".parquet": Format(_of_parquet, is_text=False, package="pyarrow"),
}


def listed(names: Iterable[Any], most: int = 8) -> str:
    names = [str(name) for name in names]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def matrix(frame: "pandas.DataFrame") -> numpy.ndarray:
    """(rows, columns) float64 of columns of numbers, see `as_numbers`. It may be read-only."""
    if not all(isinstance(d, numpy.dtype) and d.kind in "biuf" for d in frame.dtypes):
        columns = [as_numbers(name, series) for name, series in frame.items()]
        return numpy.stack(columns, axis=1)
    values = frame.to_numpy(float)  # much faster for many columns
    if len(odd := numpy.flatnonzero(numpy.isinf(values).any(0))):
        as_numbers(frame.columns[odd[0]], frame.iloc[:, odd[0]])  # raises
    return values


def as_numbers(name: str, series: "pandas.Series") -> numpy.ndarray:
    """float64 values, with NaN for gaps. DataError, with the row, for texts and infinities."""
    import pandas

    numbers = pandas.to_numeric(series, errors="coerce").to_numpy(float, na_value=math.nan)
    bad = numpy.flatnonzero(numpy.isnan(numbers) & series.notna().to_numpy())
    if len(bad):
        row = int(bad[0])
        raise DataError(
            f"column {name!r} must hold numbers, or true and false, but row "
            f"{row_number(series, row)} has {series.iloc[row]!r}"
        )
    if numpy.isinf(numbers).any():
        row = int(numpy.flatnonzero(numpy.isinf(numbers))[0])
        raise DataError(
            f"column {name!r}: row {row_number(series, row)} is {numbers[row]}; it must be finite"
        )
    if series.dtype.kind == "O":  # to_numeric rounds texts to a neighbour before pandas 3.1
        values = series.to_numpy(object)
        is_text = ~numpy.isnan(numbers) & [isinstance(value, str) for value in values]
        numbers = numbers.copy()
        numbers[is_text] = values[is_text].astype(float)
    return numbers


def row_number(series: "pandas.Series", at: int) -> int:
    """The number of a row in its file, from 1. Rows keep it as their index if a file is split."""
    return int(series.index[at]) + 1


def numbers(path: str | Path) -> tuple[torch.Tensor, list[str]]:
    """(rows, columns) float64 of all columns of a file in their order, gaps as NaN, and their
    names. DataError for texts, or where the first line of a text file is a row of numbers.
    """
    frame = read(path, ())
    names = list(frame.columns)
    counted = [[str(i) for i in range(start, start + len(names))] for start in (0, 1)]
    is_text = (format_of(path) or FORMATS[".csv"]).is_text
    if is_text and names not in counted and all(_is_number(name) for name in names):
        raise DataError(
            f"{path}: the first line holds numbers ({listed(names)}), where names of columns are "
            "expected; write a line of names above it"
        )
    with naming(Path(path)):
        return torch.tensor(matrix(frame), device="cpu"), names


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
