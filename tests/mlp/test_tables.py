"""Tables become features and targets, fitted on the training rows. Bad ones get one line."""

import datetime
import decimal
import gzip
import json
import math
import zipfile

import pytest
import torch

from mlp.data import DataError, frames, tables

pandas = pytest.importorskip("pandas")

ROWS = {
    "age": [20.0, 30.0, None, 50.0],
    "city": ["Rome", "Oslo", "Rome", None],
    "member": [True, False, True, True],
    "price": [1.5, 2.5, 3.5, 4.5],
}


@pytest.fixture
def frame():
    return pandas.DataFrame(ROWS)


def lines(table, frame):
    found = []
    return table.inputs(frame, found.append), found


def test_features(frame):
    table = tables.fit(frame, ["price"])
    assert table.task == "regression"
    assert table.features == ["age", "age missing", "city = Oslo", "city = Rome", "member"]
    x, notes = lines(table, frame)
    # The gap gets the median 30. Then 20, 30, 30, 50 have mean 32.5 and deviation sqrt(118.75).
    age = [(a - 32.5) / math.sqrt(118.75) for a in (20, 30, 30, 50)]
    torch.testing.assert_close(x[:, 0], torch.tensor(age))
    assert x[:, 1].tolist() == [0, 0, 1, 0]
    assert x[:, 2].tolist() == [0, 1, 0, 0] and x[:, 3].tolist() == [1, 0, 1, 0]
    assert x[:, 4].mean() == pytest.approx(0, abs=1e-6) and notes == []


def test_targets_come_back_in_their_units(frame):
    table = tables.fit(frame, ["price"])
    y = table.outputs(frame)
    assert y.shape == (4, 1) and float(y.mean()) == pytest.approx(0, abs=1e-6)
    torch.testing.assert_close(table.units(y)[:, 0], torch.tensor(ROWS["price"]))


@pytest.mark.parametrize(
    "values, task",
    [
        ([0, 1, 2] * 10, "classification"),
        ([1.0, 2.0] * 10, "classification"),
        (["a", "b"], "classification"),
        ([True, False], "classification"),
        ([210_000, 340_000, 515_000], "regression"),  # prices: each row has another value
        (list(range(21)) * 3, "regression"),
        ([0.5, 1.5], "regression"),
        ([1.0, 2.5, 1.0, 2.0], "regression"),
    ],
)
def test_the_targets_type_decides_the_task(values, task):
    assert tables.guess_task(pandas.DataFrame({"y": values}), ["y"]) == task


def test_json_holds_everything(frame):
    table = tables.fit(frame, ["price"])
    again = tables.Table.from_json(json.loads(json.dumps(table.to_json())))
    assert again == table


@pytest.mark.parametrize(
    "bad", [{}, {"columns": 3}, {"columns": [{}]}, [], None, {"columns": [], "targets": None}]
)
def test_other_json_is_refused(bad):
    with pytest.raises(DataError, match="not the description of a table"):
        tables.Table.from_json(bad)


def test_many_whole_numbers_are_quantities():
    frame = pandas.DataFrame({"x": range(50), "y": range(50)})
    assert tables.fit(frame, ["y"]).task == "regression"
    assert tables.fit(frame, ["y"], "classification").classes[:3] == ("0", "1", "2")


def test_classes_are_named_by_their_values(frame):
    frame["y"] = [10.0, 2.0, 2.0, 10.0]
    table = tables.fit(frame, ["y"])
    assert table.classes == ("2", "10") and table.outputs(frame).tolist() == [1, 0, 0, 1]


def test_several_targets(frame):
    frame["a"], frame["b"] = [0, 1, 1, 0], [1, 1, 0, 0]
    table = tables.fit(frame, ["a", "b"])
    assert table.task == "multilabel" and table.classes == ("a", "b")
    assert table.outputs(frame).tolist() == [[0, 1], [1, 1], [1, 0], [0, 0]]
    assert tables.fit(frame, ["a", "price"]).task == "regression"


def test_new_rows_are_read_as_training_read_them(frame):
    table = tables.fit(frame, ["price"])
    new = pandas.DataFrame(
        {"city": ["Paris", "Oslo"], "age": [32.5, None], "member": [True, None], "shoe": [1, 2]}
    )
    x, notes = lines(table, new)
    assert x[0, 0] == 0 and x[0, 2:4].tolist() == [0, 0] and x[1, 1] == 1
    assert "shoe" in notes[0] and len(notes) == 3
    assert any("Paris" in note for note in notes) and any("member" in note for note in notes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.drop(columns="age"), "lacks the column age, which the network was trained on"),
        (
            lambda f: f.assign(age=["x", 1, 2, 3]),
            "'age' must hold numbers, or true and false, but row 1",
        ),
        (lambda f: f.assign(age=[1, 2, math.inf, 3]), "'age': row 3 is inf"),
    ],
)
def test_new_rows_that_do_not_fit(frame, change, message):
    with pytest.raises(DataError, match=message):
        tables.fit(frame, ["price"]).inputs(change(frame))


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ({"y": [1.5, None, 2.5, 3.5]}, "target 'y' is missing in 1 of 4 rows, first in row 2"),
        ({"y": ["a"] * 4}, "target 'y' is 'a' in every row"),
        ({"z": [1, 2, 3, 4]}, "there is no column 'y'"),
        ({"y": [1, 2, 1, 2], "when": pandas.date_range("2026-01-01", periods=4)}, "--drop when"),
    ],
)
def test_tables_that_cannot_be_learned(frame, column, message):
    with pytest.raises(DataError, match=message):
        tables.fit(frame.assign(**column), ["y"])


def test_ids_are_refused():
    frame = pandas.DataFrame({"id": [f"n{i}" for i in range(101)], "y": [0, 1] * 50 + [0]})
    with pytest.raises(DataError, match="'id' has 101 different texts in 101 rows"):
        tables.fit(frame, ["y"])


def test_only_the_target(frame):
    with pytest.raises(DataError, match="no column is left"):
        tables.fit(frame[["price"]], ["price"])


def test_targets_are_named_once(frame):
    with pytest.raises(DataError, match="no target is given; name one of the columns age, city"):
        tables.fit(frame, [])
    with pytest.raises(DataError, match="the target 'price' is given twice"):
        tables.fit(frame, ["price", "price"])


def test_columns_of_one_value_are_left_out(tmp_path):
    """They teach nothing, and another value would later meet weights that were never trained."""
    rows = {"a": range(20), "one": 5, "word": "x", "gaps": None, "some": [1.0, None] * 10}
    frame = pandas.DataFrame({**rows, "y": [0.5, 1.5] * 10})
    frame.to_csv(tmp_path / "t.csv", index=False)
    parts = tables.load(tmp_path / "t.csv", tables.Choice(("y",)))
    assert parts.table.features == ["a", "some", "some missing"]
    said = "t.csv: left out, as all training rows have the same value, or none: one, word, gaps"
    assert parts.train.notes[-1] == said and parts.test.notes == ()
    with pytest.raises(DataError, match=r"no column is left to learn from .* the same value"):
        tables.fit(frame[["one", "word", "y"]], ["y"])


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
def test_files(frame, tmp_path, separator):
    frame.to_csv(tmp_path / "t.csv", index=False, sep=separator)
    pandas.testing.assert_frame_equal(tables.read(tmp_path / "t.csv"), frame)


@pytest.mark.parametrize("name", ["t.csv.gz", "t.TSV.BZ2", "t.csv.xz", "t.csv.zip"])
def test_packed_files(frame, tmp_path, name):
    separator = "\t" if "TSV" in name else ","
    frame.to_csv(tmp_path / name.lower(), index=False, sep=separator)
    (tmp_path / name.lower()).rename(tmp_path / name)
    pandas.testing.assert_frame_equal(tables.read(tmp_path / name), frame)
    assert frames.format_of(tmp_path / name) is not None


def test_packed_files_that_cannot_be_read(tmp_path):
    path = tmp_path / "t.csv.gz"
    for content, message in (
        (b"a,b\n1,2\n", "not a readable table"),
        (gzip.compress(b"a,b\n1,2\n" * 99)[:-9], "not a readable table"),
        (gzip.compress(b"1,2\n" * 2**17), r"\d\d\d bytes would grow to 524,288 when unpacked"),
    ):
        path.write_bytes(content)
        with pytest.raises(DataError, match=message), pytest.MonkeyPatch.context() as patch:
            patch.setattr("mlp.data.guards._HARMLESS", 2**18)
            tables.read(path)
    with zipfile.ZipFile(tmp_path / "t.csv.zip", "w") as archive:
        archive.writestr("a.csv", "a,b\n1,2\n")
        archive.writestr("__MACOSX/._a.csv", "x")  # as macOS packs one file
    assert len(tables.read(tmp_path / "t.csv.zip")) == 1
    with zipfile.ZipFile(tmp_path / "t.csv.zip", "a") as archive:
        archive.writestr("b.csv", "a,b\n1,2\n")
    with pytest.raises(DataError, match="holds 2 files, but one table is expected; unpack it"):
        tables.read(tmp_path / "t.csv.zip")


def test_parquet(frame, tmp_path):
    pytest.importorskip("pyarrow")
    frame.to_parquet(tmp_path / "t.parquet")
    assert tables.read(tmp_path / "t.parquet").equals(frame)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "t.csv: is empty"),
        (b"PK\x03\x04\0\0,\0", "holds bytes that are no text"),
        (b"a,b\n", "has a header but no rows"),
        (b"a,a\n1,2\n", "names a more than once"),
        (b"a,b\n1,2\n1,2,3\n", "not a readable table"),
        (b"\xff\xfe\x00a", "not UTF-8 text"),
    ],
)
def test_unreadable_files(tmp_path, content, message):
    path = tmp_path / "t.csv"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        tables.read(path)
    assert "\n" not in str(caught.value)


def test_decimal_commas(tmp_path):
    """Where semicolons separate columns, a comma is the decimal point of columns of numbers."""
    path = tmp_path / "t.csv"
    path.write_text("a;b;c\n0,5;1;x,y\n-1,25;2;z\n")
    frame = tables.read(path)
    assert frame["a"].tolist() == [0.5, -1.25] and frame["b"].tolist() == [1, 2]
    assert frame["c"].tolist() == ["x,y", "z"]


@pytest.mark.parametrize(
    ("cells", "decimal", "values", "note"),
    [
        (
            ["1,234", "5"],
            None,
            [1.234, 5],
            "1,234 is read as 1.234; if it is 1234, give --decimal .",
        ),
        (["1,234", "1,2"], None, [1.234, 1.2], None),  # no mark of thousands
        (["0,234", "-0,999"], None, [0.234, -0.999], None),
        (["1,234", ""], ".", [1234, math.nan], None),
        ([" 1,234.5 ", "-2e3"], ".", [1234.5, -2000], None),
        (["1.234.567,5", "+,5"], ",", [1234567.5, 0.5], None),
        (["1.234", "2"], ",", [1234, 2], None),
        (["1.234", "x"], ",", ["1.234", "x"], None),  # texts stay as they are
    ],
)
def test_marks_of_decimals_and_thousands(tmp_path, cells, decimal, values, note):
    path, said = write(tmp_path / "t.csv", "a;b", *(f"{cell};x" for cell in cells)), []
    frame = tables.read(path, (), decimal, said.append)
    assert frame["a"].tolist() == pytest.approx(values, nan_ok=True)
    assert said == ([] if note is None else [f"column 'a': {note}"])


@pytest.mark.parametrize("cell, decimal", [("1,23", "."), ("1.5", ","), ("1234,567", ".")])
def test_numbers_with_another_decimal_point(tmp_path, cell, decimal):
    """They are no numbers with this point. As texts, they would become categories."""
    path = write(tmp_path / "t.csv", "a;b", "2;x", f"{cell};x")
    with pytest.raises(DataError, match=f"'a': '{cell}' in row 2 is no number with the decimal"):
        tables.read(path, (), decimal)


def test_points_beside_decimal_commas(tmp_path):
    path, said = write(tmp_path / "t.csv", "a;b;c", "1.234;0,5;1.5", "2.000;1;2"), []
    frame = tables.read(path, (), None, said.append)
    assert frame["a"].tolist() == [1.234, 2] and frame["b"].tolist() == [0.5, 1]
    assert said == ["column 'a': 1.234 is read as 1.234; if it is 1234, give --decimal ,"]


def write(path, *lines):
    path.write_text("\n".join(lines) + "\n")
    return path


def test_blanks_at_the_ends_of_names_and_texts(tmp_path):
    path = write(tmp_path / "t.csv", "a , b", "1 , yes ", '2," no"', "3 ,NA ", '" 4 ",yes')
    frame = tables.read(path)
    assert frame["a"].tolist() == [1, 2, 3, 4]
    assert frame["b"].tolist()[:2] == ["yes", "no"] and frame["b"].isna().tolist()[2]
    assert frame["b"].iloc[3] == "yes"


def codes(count, *cells):
    """Lines of a table whose column a repeats these cells, and whose targets repeat 0 and 1."""
    return ["a,y", *(f"{cells[i % len(cells)]},{i % 2}" for i in range(count))]


@pytest.mark.parametrize(
    "cells, categories",
    [
        (["01234", "1234", "00000"], ("00000", "01234", "1234")),
        (['"007"', " 8", '"010 "', ""], ("007", "010", "8")),  # a gap does not make them floats
        (["10000000000000000", "10000000000000001"],) * 2,  # float64 takes them for one number
        ([f"{10**24 + i}" for i in range(3)],) * 2,
        (["01", "+2"], None),  # signs and fractions are of quantities
        (["00.5", "1"], None),
        (["1606435200123456789", "1606435201123456789"], None),  # float64 tells them apart
    ],
)
def test_digits_that_are_no_numbers(tmp_path, cells, categories):
    path = write(tmp_path / "t.csv", *codes(30, *cells))
    parts = tables.load(path, tables.Choice(("y",)))
    (column,) = parts.table.columns
    assert column.categories == tuple(categories or ())
    assert len(parts.train.notes) == (categories is not None)
    again = tables.load(path, tables.Choice(("y",)), parts.table)
    assert torch.equal(again.train.inputs, parts.train.inputs) and again.train.notes == ()


def test_codes_of_many_values(tmp_path):
    path = write(tmp_path / "t.csv", *codes(150, *(f"{i:05}" for i in range(150))))
    with pytest.raises(DataError, match=r"'a' has numbers with leading zeros, such as 00000; so"):
        tables.load(path, tables.Choice(("y",)))


@pytest.mark.parametrize("cells", [["00", "01", "2"], [f"{10**17 + i}" for i in range(3)]])
def test_targets_that_are_codes(tmp_path, cells):
    path = write(tmp_path / "t.csv", *codes(30, *cells))
    parts = tables.load(path, tables.Choice(("a",)))
    assert parts.table.classes == tuple(cells) and parts.table.texts == ["a"]
    assert parts.train.notes[0].endswith("so each of them becomes a class")
    again = tables.load(path, tables.Choice(("a",)), parts.table)
    assert torch.equal(again.test.targets, parts.test.targets)
    values = tables.load(path, tables.Choice(("a",), task="regression"))
    assert values.table.units(values.train.targets).max() == float(cells[2])
    assert values.train.notes == ()


def test_numbers_beside_a_column_of_codes(tmp_path):
    """Only the column with a leading zero is one of codes, and dates are none."""
    rows = [f"0{i % 3},{i},{i}.5,0{i % 9}/02/2026,{i % 2}" for i in range(60)]
    frame = tables.read(write(tmp_path / "t.csv", "zip,n,x,day,y", *rows))
    assert frame["zip"].tolist()[:3] == ["00", "01", "02"]
    assert [frame[name].dtype.kind for name in "nxy"] == ["i", "f", "i"]
    assert frame["n"].tolist() == list(range(60))


def test_long_numbers_of_parquet():
    """A file that says they are numbers is believed, but two that become one are refused."""
    frame = pandas.DataFrame({"a": [10**17, 10**17 + 1, 3, 4], "y": [0, 1, 0, 1]})
    with pytest.raises(DataError, match="'a' holds whole numbers that float64 cannot tell apart"):
        tables.fit(frame, ["y"])


@pytest.mark.parametrize(
    "cells, message",
    [
        (["5%", "10%"], "numbers that are written as texts, such as '5%'"),
        (["€5", "€1,000"], "numbers that are written as texts, such as '€5'"),
        (["1", "2", "none yet"], "numbers, but also 10 texts, such as 'none yet' in row 3"),
        (["low", "high", "3"], None),
    ],
)
def test_few_texts_that_may_be_numbers_are_noted(cells, message):
    """They are learned as categories, which a quantity is not."""
    notes, frame = [], pandas.DataFrame({"a": cells * (30 // len(cells)), "y": [0.5, 1.5] * 15})
    table = tables.fit(frame, ["y"], note=notes.append)
    assert table.columns[0].categories == tuple(sorted(cells))
    assert len(notes) == (message is not None) and all(message in note for note in notes)


@pytest.mark.parametrize("far, noted", [(1e300, True), (1e9, True), (1e6, False)])
def test_a_number_that_hides_the_others_is_noted(far, noted):
    values = (1 + torch.arange(99) / 100).tolist()
    frame, notes = pandas.DataFrame({"a": [*values, far], "y": [0.5, 1.5] * 50}), []
    tables.fit(frame, ["y"], note=notes.append)
    said = f"column 'a': most of its numbers become equal, as {far:g} is far from them"
    assert len(notes) == noted and all(note.startswith(said) for note in notes)


def test_an_index_without_a_name_is_left_out(tmp_path):
    """A file sorted by class would be learned from the numbers of its rows."""
    frame = pandas.DataFrame({"a": [0.5, 1.5, 2.0] * 10, "y": [0] * 15 + [1] * 15})
    frame.to_csv(tmp_path / "t.csv")
    parts = tables.load(tmp_path / "t.csv", tables.Choice(("y",)))
    assert parts.table.features == ["a"]
    assert parts.train.notes[0].startswith("t.csv: the column without a name counts the rows")
    frame.assign(id=range(1, 31)).to_csv(tmp_path / "u.csv", index=False)
    parts = tables.load(tmp_path / "u.csv", tables.Choice(("y",)))
    assert parts.table.features == ["a", "id"] and "--drop id" in parts.train.notes[0]


@pytest.mark.parametrize(
    "offset, size", [(0, 1e-13), (1.7e18, 2.0**20), (2.0**53, 2.0**12), (5, 1e-6)]
)
def test_small_and_far_numbers_are_standardised(offset, size):
    """Only a column of equal numbers is constant, however small its numbers are."""
    values = offset + size * torch.randint(0, 9, (40,), dtype=torch.float64)
    frame = pandas.DataFrame({"a": values.numpy(), "b": [offset] * 40, "y": [0.5, 1.0] * 20})
    table = tables.fit(frame, ["y"])
    assert table.features == ["a"]  # b is constant
    x = table.inputs(frame)
    expected = (values - offset) / size  # exact
    expected = (expected - expected.mean()) / expected.std(correction=0)
    torch.testing.assert_close(x[:, 0].double(), expected, rtol=1e-3, atol=1e-3)
    y = tables.fit(frame, ["a"], "regression").outputs(frame)
    torch.testing.assert_close(y[:, 0].double(), expected, rtol=1e-3, atol=1e-3)


def test_texts_stay_texts_where_a_file_has_only_numbers(tmp_path):
    train = write(
        tmp_path / "t.csv", "zip,y", *(f"{z},{i}.5" for i, z in enumerate(["01", "2", "N"]))
    )
    table = tables.fit(tables.read(train), ["y"])
    new = write(tmp_path / "n.csv", "zip", "01", '""', "2")
    x, notes = lines(table, tables.read(new, table.texts))
    assert x.tolist() == [[1, 0, 0], [0, 0, 0], [0, 1, 0]] and notes == []
    x, notes = lines(table, pandas.DataFrame({"zip": [2.0, None]}))
    assert x.tolist() == [[0, 1, 0], [0, 0, 0]] and notes == []


def test_truth_values_with_gaps_are_numbers():
    frame = pandas.DataFrame({"m": [True, None, False, True], "y": [0.5, 1, 2, 3]})
    assert tables.fit(frame, ["y"]).features == ["m", "m missing"]


@pytest.mark.parametrize(
    "texts, message",
    [
        (
            ["?", *map(str, range(40))],
            "'a' holds numbers, but also 3 texts, such as '\\?' in row 1;",
        ),
        ([f"{i},{i:03}" for i in range(41)], "numbers that are written as texts, such as '0,000'"),
        ([f"{i}%" for i in range(41)], "numbers that are written as texts, such as '0%'"),
        ([f"{i}" for i in range(41)], "numbers that are stored as texts, such as '0'"),
    ],
)
def test_numbers_among_texts_are_no_categories(texts, message):
    frame = pandas.DataFrame({"a": texts * 3, "y": range(123)})
    with pytest.raises(DataError, match=message):
        tables.fit(frame, ["y"])


def test_a_header_with_separators_in_quotes(tmp_path):
    path = write(tmp_path / "t.csv", '"a";"b,1,2"', "1;2")
    assert tables.read(path).columns.tolist() == ["a", "b,1,2"]
    frame = tables.read(write(path, "", " ", '"a\n1",b', "1,2"))
    assert frame.to_dict("list") == {"a\n1": [1], "b": [2]}
    assert tables.read(write(path, '"a" ,b', "1,2")).columns.tolist() == ["a", "b"]


@pytest.mark.parametrize(
    "values, message",
    [
        ([1.7e308, -1.7e308], "'a': numbers from -1.7e.308 to 1.7e.308 are too far apart"),
        ([2**63 + 1, 2**63 + 2], "cannot tell apart, such as 9223372036854775809 and"),
        ([[1, 2], [3]], "'a' holds values of type list"),
        ([pandas.Timestamp(0), pandas.Timestamp(1)], "'a' holds dates or times"),
    ],
)
def test_values_that_are_no_numbers_and_no_texts(values, message):
    kind = "uint64" if isinstance(values[0], int) else None
    frame = pandas.DataFrame({"a": pandas.Series(values * 20, dtype=kind), "y": [0.5, 1] * 20})
    with pytest.raises(DataError, match=message):
        tables.fit(frame, ["y"])
    if kind is None:
        with pytest.raises(DataError, match=message):
            tables.fit(frame, ["a"], "regression")


def test_numbers_too_large_for_float32(frame):
    table = tables.fit(frame.assign(age=[1e-30, 2e-30, 3e-30, 4e-30]), ["price"])
    with pytest.raises(
        DataError, match=r"'age': 50000000000.0 in row 2 is too far from the training rows'"
    ):
        table.inputs(frame.assign(age=[1e-30, 5e10, 5e10, 1]))


def test_a_categoricals_unused_categories_are_no_features():
    kind = pandas.CategoricalDtype(["a", "b", "never"])
    frame = pandas.DataFrame({"c": pandas.Series(["a", "b"] * 5, dtype=kind), "y": range(10)})
    assert tables.fit(frame, ["y"], "regression").features == ["c = a", "c = b"]


def test_rows_longer_than_the_header(tmp_path):
    """pandas would take the first value of each row for its name."""
    path = write(tmp_path / "t.csv", "a,b", *("1,2,3",) * 3)
    with pytest.raises(DataError, match="more values than the header's 2 names; name every column"):
        tables.read(path)
    frame = tables.read(write(path, "a,b", *("1,2,",) * 3))
    assert frame["a"].tolist() == [1] * 3 and frame["b"].tolist() == [2] * 3


def test_an_index_of_a_parquet_file(tmp_path, frame):
    pytest.importorskip("pyarrow")
    frame[frame.price > 2].assign(age=[1, 2, math.inf]).to_parquet(tmp_path / "t.parquet")
    with pytest.raises(DataError, match="row 3 is inf"):
        tables.fit(tables.read(tmp_path / "t.parquet"), ["price"])


def test_types_of_parquet_that_numpy_lacks(tmp_path):
    """A decimal is a number, a date is a date, and an index with a name is a column."""
    pytest.importorskip("pyarrow")
    days = [datetime.date(2026, 1, 1), datetime.date(2026, 1, 2)] * 10
    prices = [decimal.Decimal("1.50"), None] * 10
    frame = pandas.DataFrame({"price": prices, "day": days, "y": [0, 1] * 10})
    frame.index = pandas.Index(range(5, 25), name="number")
    frame.to_parquet(tmp_path / "t.parquet")
    read = tables.read(tmp_path / "t.parquet")
    assert read.price.tolist()[::2] == [1.5] * 10 and read.price.isna().sum() == 10
    assert read.number.tolist() == list(range(5, 25)) and list(read.index) == list(range(20))
    with pytest.raises(DataError, match="'day' holds dates or times"):
        tables.fit(read, ["y"])
    table = tables.fit(read.drop(columns="day"), ["y"])
    assert table.features == ["number", "price", "price missing"]


def test_other_encodings_say_the_way_out(tmp_path):
    path = tmp_path / "t.csv"
    path.write_bytes("a,b\n1,ö\n".encode("cp1252"))
    with pytest.raises(DataError, match="save it as UTF-8"):
        tables.read(path)


def test_a_column_of_texts_that_nearly_all_differ():
    frame = pandas.DataFrame(
        {"day": [f"2024-01-{i:02d}" for i in range(1, 31)], "y": [0.5, 1] * 15}
    )
    with pytest.raises(DataError, match="30 different texts in 30 rows, such as '2024-01-"):
        tables.fit(frame, ["y"])


def test_errors_name_the_row_of_the_file(tmp_path):
    path = tmp_path / "t.csv"
    rows = [f"{i},{i / 7}" for i in range(60)]
    rows[50] = "inf,0.5"
    path.write_text("\n".join(["a,y", *rows]))
    with pytest.raises(DataError, match=r"^\S+t.csv: column 'a': row 51 is inf"):
        tables.load(path, tables.Choice(targets=("y",)))


@pytest.mark.parametrize(
    "content, choice, message",
    [
        ("a,y\n1,1\n2,1\n3,1\n4,1\n5,1\n", {}, "the target 'y' is 1 in every row"),
        ("a,z\n1,1\n2,2\n3,3\n", {}, "there is no column 'y'"),
        ("\ufeffsep=;\r\na;y\r\n1;2\r\n", {}, "its first line 'sep=;' is for Excel; remove the"),
        ("a,y\n1,1\n2,\n3,3\n", {}, "the target 'y' is missing in 1 of 3 rows"),
        ("a,y\n1,1.5\n1,2.5\n1,3.5\n1,4\n1,5\n", {}, "no column is left to learn from"),
        ("a,y\n1,1.5\n2,2.5\n3,3.5\n", {"task": "other"}, "unknown task 'other'"),
        ("a,y\n1,1.5\n2,2.5\n3,3.5\n", {"validation": 0.9}, "the validation share must be"),
        ("a,y\n1.5,1\n2.5,2\n", {"decimal": ","}, "column 'a': '1.5' in row 1 is no number"),
    ],
)
def test_errors_name_the_file(tmp_path, content, choice, message):
    path = tmp_path / "t.csv"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(DataError) as error:
        tables.load(path, tables.Choice(targets=("y",), **choice))
    assert str(error.value).startswith(f"{path}: {message}")
    assert str(error.value).count(str(path)) == 1


@pytest.mark.parametrize("separator, decimal", [(",", None), (";", None), (";", ","), (",", ".")])
def test_floats_are_read_to_the_last_bit(tmp_path, separator, decimal):
    """Older versions of pandas round some floats to a neighbour, unless they are told not to."""
    torch.manual_seed(0)
    powers = torch.randint(-300, 300, (2000,)).double()
    numbers = torch.randn(2000, dtype=torch.float64) * 10.0**powers
    mark = "," if separator == ";" else "."
    rows = [f"{number!r}{separator}x".replace(".", mark) for number in numbers.tolist()]
    path = tmp_path / "t.csv"
    path.write_text("\n".join([f"a{separator}b", *rows]))
    frame = tables.read(path, (), decimal)
    assert frame["a"].tolist() == numbers.tolist()
    texts = pandas.Series(list(map(repr, numbers.tolist())), dtype=object)
    assert frames.as_numbers("a", texts).tolist() == numbers.tolist()
    texts[3] = None
    assert math.isnan(frames.as_numbers("a", texts)[3])
