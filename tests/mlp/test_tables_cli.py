"""Tables and regressions as a user meets them: `train`, `evaluate`, `predict`, `sweep`. Bad files
get one line.
"""

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from mlp.runs import RunFolder

pandas = pytest.importorskip("pandas")
metrics = pytest.importorskip("sklearn.metrics")
QUICK = ("--hidden", "8", "--device", "cpu", "--engine", "manual")


@pytest.fixture(autouse=True)
def files(tmp_path, monkeypatch):
    """Writes price.csv, where price = 1000 + 50 a - 30 b, and kind.csv with three classes. Returns
    the frame of price.csv.
    """
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 100))
    city = np.where(rng.random(100) < 0.5, "Rome", "Oslo")
    frame = pandas.DataFrame({"a": a, "b": b, "city": city, "price": 1000 + 50 * a - 30 * b})
    frame["cost"] = 0.001 * frame.b
    frame.to_csv("price.csv", index=False)
    kind = np.array(["x", "y", "z"])[np.digitize(a, [-0.7, 0.7])]
    frame.drop(columns=["price", "cost"]).assign(kind=kind).to_csv("kind.csv", index=False)
    return frame


def test_a_regression_is_reported_in_its_units(handgrad, files):
    argv = ("price.csv", "--target", "price", "--drop", "cost", *QUICK)
    status, out, err = handgrad("train", *argv, "--validation", "0.1", "--out", "run", "--plots")
    assert status == 0, err
    first, *_, last = out.splitlines()[:-1]
    assert "regression of price; 3 columns as 4 features; 70 rows to train, 20 to test" in first
    assert "test R² 0.9" in last and "validation R² 0.9" in last
    said = handgrad("evaluate", "run")[1].splitlines()[1]
    assert handgrad("predict", "run", "price.csv", "--out", "p.csv")[:2] == (0, "")
    found = pandas.read_csv("p.csv").price.to_numpy()
    _, test, _ = tables_rows(100, 0.1)
    r2 = metrics.r2_score(files.price.to_numpy()[test], found[test])
    rmse = metrics.root_mean_squared_error(files.price.to_numpy()[test], found[test])
    # One more or less in the last digit that is printed: rounding may go the other way.
    shown = re.fullmatch(r"R² (0\.\d{4})  MAE [\d.]+  RMSE (\d\.\d{4})", said)
    assert [float(n) for n in shown.groups()] == pytest.approx([r2, rmse], abs=1.5e-4)
    with open("run/predicted.png", "rb") as file:
        assert file.read(4) == b"\x89PNG"


def tables_rows(count, validation):
    from mlp.data.tables import split_rows

    return split_rows(count, validation, None, "rows")


def test_classes_and_their_probabilities(handgrad):
    status, out, err = handgrad("train", "kind.csv", "--target", "kind", *QUICK, "--out", "run")
    assert status == 0, err
    assert "classification of kind; 3 columns as 4 features" in out.splitlines()[0]
    assert "F1 " in handgrad("evaluate", "run")[1].splitlines()[-1]
    pandas.DataFrame({"b": [0.0], "a": [3.0], "city": ["Paris"], "more": [1]}).to_csv("one.csv")
    status, out, err = handgrad("predict", "run", "one.csv")
    header, row = csv.reader(out.splitlines())
    assert (status, header) == (0, ["kind", "p(x)", "p(y)", "p(z)"]) and row[0] == "z"
    assert sum(map(float, row[1:])) == pytest.approx(1, abs=1e-5)
    assert "training never saw Paris" in err and "not used, as training did not have them" in err
    pandas.DataFrame({"a": [1.0]}).to_csv("less.csv", index=False)
    status, out, err = handgrad("predict", "run", "less.csv")
    assert (status, out) == (2, "") and "lacks the columns b, city" in err


def test_rows_of_a_run_on_arrays_are_read_by_order(handgrad, files):
    """The same rows in any file give the same answer; their columns have any names."""
    x = files[["a", "b"]].to_numpy() * [1, 100] + [5, 0]
    # pandas writes at most nine digits of a float32. They hold such a number exactly.
    x = (np.round(8 * x) / 8).astype(np.float32)
    y = np.array([0, 1])[(files.a > 0).astype(int)]
    np.savez("kind.npz", X=x, y=y)
    argv = ("kind.npz", "--epochs", "3", *QUICK, "--validation", "0.1", "--standardize", "yes")
    assert handgrad("train", *argv, "--out", "run")[0] == 0
    frame = pandas.DataFrame(x, columns=["p", "q"])
    frame.to_csv("rows.csv", index=False)
    frame.to_csv("rows.tsv", index=False, sep="\t")
    frame.to_parquet("rows.parquet")
    np.save("rows.npy", x)
    names = "rows.csv", "rows.tsv", "rows.parquet", "rows.npy", "kind.npz"
    said = [handgrad("predict", "run", name) for name in names]
    assert [one[0] for one in said] == [0] * 5 and len({one[1] for one in said}) == 1
    header, *rows = csv.reader(said[0][1].splitlines())
    assert header == ["class", "p(0)", "p(1)"] and len(rows) == 100
    run = RunFolder("run")
    model, _ = run.network(torch.device("cpu"))
    reading = run.settings.data.reading
    assert reading.mean is not None
    shares = torch.softmax(model(reading.numbers(torch.from_numpy(x))), 1).detach().numpy()
    np.testing.assert_allclose([float(row[2]) for row in rows], shares[:, 1], atol=1e-5)
    np.save("one.npy", x[3])
    frame[3:4].to_csv("one.csv", index=False)
    for name in ("one.npy", "one.csv"):
        assert handgrad("predict", "run", name)[1].splitlines()[1:] == said[0][1].splitlines()[4:5]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("p,q,r\n1,2,3\n", "rows of 3 numbers (p, q, r), but the network was trained on rows of 2"),
        ("p,q\n1,2\nx,4\n", "column 'p' must hold numbers, or true and false, but row 2"),
        ("p,q\n1,2\n3,\n", "row 2 has a number that is missing or not finite"),
        ("1.5,2.5\n3,4\n", "the first line holds numbers (1.5, 2.5), where names of columns"),
        ("p,q\n", "has a header but no rows"),
    ],
)
def test_rows_that_a_network_on_arrays_cannot_take(text, message, handgrad, files):
    x = files[["a", "b"]].to_numpy(np.float32)
    np.savez("price.npz", X=x, y=files[["price", "cost"]].to_numpy(np.float32))
    assert handgrad("train", "price.npz", "--epochs", "1", *QUICK, "--out", "run")[0] == 0
    with open("rows.csv", "w") as file:
        file.write(text)
    status, out, err = handgrad("predict", "run", "rows.csv")
    assert (status, out, err.count("\n")) == (2, "", 1) and message in err
    status, _, err = handgrad("predict", "run", "image.png")
    assert status == 2 and "was trained on rows of numbers: give it one file, .npz, .npy" in err
    pandas.DataFrame(x).to_csv("numbered.csv", index=False)  # names 0 and 1
    header, *rows = handgrad("predict", "run", "numbered.csv")[1].splitlines()
    assert header == "target 1,target 2" and len(rows) == 100


def test_balanced_weights_are_the_losses(handgrad):
    argv = ("kind.csv", "--target", "kind", *QUICK, "--epochs", "1", "--out", "run")
    assert handgrad("train", *argv, "--class-weight", "balanced")[0] == 0
    with open("run/config.json") as file:
        weight = json.load(file)["recipe"]["loss_options"]["weight"]
    kinds = pandas.read_csv("kind.csv").kind.to_numpy()
    from mlp.data.tables import split_rows

    train = kinds[split_rows(100, 0, kinds, "")[0]]
    from sklearn.utils.class_weight import compute_class_weight

    expected = compute_class_weight("balanced", classes=np.array(list("xyz")), y=train)
    assert weight == pytest.approx(expected.tolist())
    assert handgrad("evaluate", "run")[0] == 0


def test_a_table_is_described_as_in_its_file(handgrad, files):
    files.assign(a=[None] * 9 + [2.0, 4.0] * 45 + [None], c=1).to_csv("gaps.csv", index=False)
    status, out, err = handgrad("data", "gaps.csv", "--target", "price", "--drop", "cost")
    assert status == 0 and "left out, as all training rows have the same value, or none: c" in err
    train = files.iloc[tables_rows(100, 0)[0]]
    gaps = sum(i < 9 or i == 99 for i in train.index)
    low, high = train.price.min(), train.price.max()
    assert out.splitlines()[2:7] == [
        "inputs     3 columns as 5 features",
        out.splitlines()[3],
        f"           b     numbers, mean {train.b.mean():.5g}, deviation {train.b.std(ddof=0):.5g}",
        "           city  2 texts: Oslo, Rome",
        f"targets    regression, 1 output from {low:.6g} to {high:.6g}",
    ]
    assert out.splitlines()[3].startswith("           a     numbers, mean ")
    assert out.splitlines()[3].endswith(f", {gaps} gaps") and "missing" not in out


def test_several_targets(handgrad):
    argv = ("price.csv", "--target", "price,cost", *QUICK, "--out", "run")
    assert handgrad("train", *argv)[0] == 0
    lines = handgrad("evaluate", "run")[1].splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["price", "cost"]


def test_several_labels(handgrad, files):
    labels = {"high": (files.a > 0).astype(int), "low": (files.b < -0.5).astype(int)}
    files[["a", "b"]].assign(**labels).to_csv("labels.csv", index=False)
    argv = ("labels.csv", "--target", "high,low", *QUICK, "--epochs", "30", "--out", "run")
    assert handgrad("train", *argv)[0] == 0
    lines = handgrad("evaluate", "run")[1].splitlines()
    assert handgrad("predict", "run", "labels.csv", "--out", "p.csv")[0] == 0
    said = pandas.read_csv("p.csv").iloc[tables_rows(100, 0)[1]]
    assert [line.split()[0] for line in lines[2:]] == ["high", "low"]
    f1 = [metrics.f1_score(labels[n][said.index], said[n], zero_division=0) for n in labels]
    assert [line.split()[4] for line in lines[2:]] == [f"{one:.4f}" for one in f1]
    assert f"F1 {sum(f1) / 2:.4f}" in lines[1]


def test_inputs_are_not_written_over(handgrad, files):
    argv = ("--target", "price", "--drop", "cost", "--epochs", "1", *QUICK, "--out", "run")
    assert handgrad("train", "price.csv", *argv)[0] == 0
    files[["a", "b", "city", "cost"]].to_csv("new.csv", index=False)
    before = {
        path: path.read_bytes() for path in map(Path, ("price.csv", "new.csv", "run/last.ckpt"))
    }
    commands = [("predict", "run", "new.csv", "--out", f"./{path}") for path in before]
    commands += [
        ("export", "run", path, "--format", "torch") for path in ("price.csv", "run/last.ckpt")
    ]
    for command in commands:
        status, out, err = handgrad(*command)
        assert (status, out) == (2, "") and "would be written over" in err
    assert before == {path: path.read_bytes() for path in before}
    status, out, err = handgrad("predict", "run", "new.csv")
    assert status == 0 and err == "" and len(out.splitlines()) == 101  # no word on a dropped column
    assert handgrad("evaluate", "run")[2] == ""
    said = "--top 2 is for classes, but price.csv (test) has numbers; leave it out"
    assert handgrad("evaluate", "run", "--top", "2")[1:] == ("", f"handgrad: {said}\n")


def test_a_run_keeps_its_decimal_point(handgrad, files):
    """Numbers such as 1.234 are read alike by training, evaluation and prediction."""
    size = (1234 + 10 * files.a).round(2)
    german = [f"{n:,.2f}".translate(str.maketrans(",.", ".,")) for n in size]
    files[["a", "price"]].assign(size=size).to_csv("point.csv", index=False)
    files[["a", "price"]].assign(size=german).to_csv("comma.csv", index=False, sep=";", decimal=",")
    argv = ("--target", "price", "--epochs", "2", *QUICK)
    assert handgrad("train", "point.csv", *argv, "--out", "point")[0] == 0
    assert handgrad("train", "comma.csv", *argv, "--decimal", ",", "--out", "comma")[0] == 0
    for command in ("evaluate", "predict"):
        two = [
            handgrad(command, run, *([f"{run}.csv"] if command == "predict" else []))
            for run in ("point", "comma")
        ]
        found = [[word for word in out.split() if word[0].isdigit()] for _, out, _ in two]
        assert found[0] == found[1] and len(found[0]) > 2
    status, _, err = handgrad("train", "digits", "--decimal", ",")
    assert (
        status == 2
        and "--decimal is for tables, .csv, .tsv, .parquet (also packed, with .gz" in err
    )
    assert "--decimal must be . or ,, got 'x'" in handgrad("data", "comma.csv", "--decimal", "x")[2]


def test_a_place_that_cannot_be_written(handgrad):
    assert handgrad("train", "kind.csv", "--target", "kind", *QUICK, "--out", "run")[0] == 0
    for command in (("predict", "run", "kind.csv", "--out"), ("export", "run")):
        for place, message in (("run", "run: is a folder; name"), ("no/x.pt", "no folder no; mak")):
            more = ("--format", "torch") if command[0] == "export" else ()
            status, out, err = handgrad(*command, place, *more)
            assert (status, out) == (2, "") and message in err and err.count("\n") == 1, err


def test_large_targets_of_arrays_are_learned_in_units(handgrad, files):
    np.savez("price.npz", X=files[["a", "b"]].to_numpy(), y=files.price.to_numpy())
    status, out, err = handgrad("train", "price.npz", *QUICK, "--out", "run")
    assert status == 0 and "the targets are standardised by the training data" in err
    assert "test R² 0.9" in out.splitlines()[-2]
    status, again, err = handgrad("evaluate", "run")
    assert "R² 0.9" in again
    status, out, _ = handgrad("sweep", "price.npz", "--replicas", "2", "--epochs", "2")
    assert status == 0 and "R² " in out


def test_resumed_as_if_never_stopped(handgrad):
    argv = ("train", "price.csv", "--target", "price", *QUICK)
    assert handgrad(*argv, "--epochs", "2", "--out", "one")[0] == 0
    assert handgrad(*argv, "--epochs", "1", "--out", "two")[0] == 0
    status, _, err = handgrad(*argv, "--epochs", "2", "--out", "two", "--resume")
    assert status == 0, err
    one, two = (pandas.read_json(f"{run}/metrics.jsonl", lines=True) for run in ("one", "two"))
    assert one.test_r2.tolist() == two.test_r2.tolist()


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({}, (), "say which column to predict with --target"),
        ({}, ("--target", "prise"), "there is no column 'prise'"),
        ({}, ("--target", "price", "--drop", "x"), "there is no column 'x'"),
        ({}, ("--target", "price", "--drop", "price"), "is a target and cannot be dropped"),
        ({}, ("--target", "price", "--task", "ranking"), "unknown task 'ranking'"),
        ({}, ("--target", "price", "--validation", "0.9"), "validation share must be"),
        ({}, ("--target", "price", "--class-weight", "balanced"), "needs classes"),
        ({}, ("--target", "city", "--class-weight", "odd"), "unknown class weight 'odd'"),
        ({}, ("--target", ""), "no target is given; name one of the columns a, b, city"),
        ({}, ("--target", "price,price"), "the target 'price' is given twice"),
        ({}, ("--target", "price", "--label-smoothing", "0.1"), "label_smoothing 0.1 is for class"),
        ({}, ("--target", "price,cost", "--loss", "cross_entropy"), "is for classes, but the targ"),
        ({}, ("--target", "price", "--loss", "bce"), "bce needs targets from 0 for no to 1 for"),
        ({"price": 1.0}, ("--target", "price"), "is 1.0 in every row"),
        ({"price": [None] + [1.0] * 99}, ("--target", "price"), "missing in 1 of 100 rows"),
        (
            {"name": [f"n{i}" for i in range(100)]},
            ("--target", "price"),
            "a name or an id; leave it out with --drop name",
        ),
        (
            {"price": ["a"] * 99 + ["b"]},
            ("--target", "price"),
            "too few rows have b (1); leave out",
        ),
    ],
)
def test_bad_tables_get_one_line(change, options, message, handgrad, files, monkeypatch):
    monkeypatch.setattr("mlp.data.tables.MAX_CATEGORIES", 20)
    files.assign(**change).to_csv("bad.csv", index=False)
    status, out, err = handgrad("train", "bad.csv", *options, *QUICK)
    assert (status, out) == (2, "") and message in err and err.count("\n") == 1, err


def test_one_row(handgrad, files):
    files.head(1).to_csv("bad.csv", index=False)
    status, out, err = handgrad("train", "bad.csv", "--target", "price", *QUICK)
    assert (status, out) == (2, "") and err.count("\n") == 1
    assert "bad.csv: 1 row cannot be split; give 3 at least" in err


def test_units_are_undone():
    from mlp.data.units import Units

    units = Units((10.0, -5.0), (2.0, 0.5))
    targets = torch.tensor([[12.0, -5.5], [8.0, -4.0]])
    assert units.learned(targets).tolist() == [[1, -1], [-1, 2]]
    torch.testing.assert_close(units.own(units.learned(targets)), targets)
