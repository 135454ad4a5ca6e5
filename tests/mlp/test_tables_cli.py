"""Tables and regressions as a user meets them: `train`, `evaluate`, `predict`, `sweep`. Bad files
get one line.
"""

import csv
import json

import numpy as np
import pytest
import torch

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
    assert said.startswith(f"R² {r2:.4f}  MAE ") and said.endswith(f"RMSE {rmse:.5g}")
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


def test_several_targets(handgrad):
    argv = ("price.csv", "--target", "price,cost", *QUICK, "--out", "run")
    assert handgrad("train", *argv)[0] == 0
    lines = handgrad("evaluate", "run")[1].splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["price", "cost"]


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
        ({"price": 1.0}, ("--target", "price"), "is 1.0 in every row"),
        ({"price": [None] + [1.0] * 99}, ("--target", "price"), "missing in 1 of 100 rows"),
        (
            {"name": [f"n{i}" for i in range(100)]},
            ("--target", "price"),
            "looks like a name or an id; leave it out with --drop name",
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
    assert "in every row" in err and "nothing to learn" in err


def test_units_are_undone():
    from mlp.data.units import Units

    units = Units((10.0, -5.0), (2.0, 0.5))
    targets = torch.tensor([[12.0, -5.5], [8.0, -4.0]])
    assert units.learned(targets).tolist() == [[1, -1], [-1, 2]]
    torch.testing.assert_close(units.own(units.learned(targets)), targets)
