"""Standardised tables, and the description of a data set before training."""

import numpy as np
import pytest
import torch

from mlp import data
from mlp.data import DataError, Dataset
from mlp.data.describe import describe, page
from mlp.data.scaling import lost_in_float32, why_standardize

RNG = np.random.default_rng(0)
LABELS = torch.arange(40) % 2


def table(scales, shifts=0.0, **options):
    x = torch.from_numpy(RNG.normal(size=(40, len(scales)))) * torch.tensor(scales) + shifts
    return Dataset(x, LABELS, **options)


def test_standardized():
    """Each feature of the training data gets mean 0 and deviation 1. New rows use the same
    numbers.
    """
    train, test = table([1e-3, 1.0, 1e6], 5.0), table([1e-3, 1.0, 1e6], 5.0)
    done = train.standardized()
    mean, std = train.inputs.mean(0), train.inputs.std(0, unbiased=False)
    expected = (train.inputs - mean) / std
    assert done.inputs.dtype == torch.float32 and (done.scale, done.shift) == (1, 0)
    torch.testing.assert_close(done.inputs.double(), expected, rtol=1e-6, atol=1e-6)
    by = test.standardized(done)
    torch.testing.assert_close(by.inputs.double(), (test.inputs - mean) / std, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(test.standardized(done.reading).inputs, by.inputs)
    torch.testing.assert_close(done.reading.numbers(test.inputs), by.inputs)
    assert train.mean is None and train.inputs.dtype == torch.float64, "the original changed"


def test_standardized_before_it_is_rounded():
    """Times in seconds since 1970 that differ by minutes are equal in float32. Standardised before
    rounding, they differ.
    """
    seconds = 1.7e9 + 60 * torch.arange(40.0, dtype=torch.float64)
    train = Dataset(seconds[:, None], LABELS)
    assert train.inputs.float().unique().numel() < 25 and lost_in_float32(train) == [0]
    assert train.standardized().inputs.unique().numel() == 40


def test_a_note_names_columns_that_float32_loses(tmp_path):
    seconds = 1.7e9 + 60 * np.arange(40.0)
    np.savez(tmp_path / "t.npz", X=np.stack([seconds, np.arange(40.0)], 1), y=LABELS.numpy())
    note = "t (train): columns 0 change less than float32 resolves; standardise"
    assert data.load(str(tmp_path / "t.npz"))[0].notes == (note,)
    train, _ = data.load(str(tmp_path / "t.npz"), standardize="auto", verbose=False)
    assert train.inputs[:, 0].unique().numel() == len(train) and note not in train.notes


def test_standardized_constant_columns():
    """A constant column becomes 0, without a division by 0."""
    x = torch.randn(40, 3, dtype=torch.float64)
    x[:, 1] = 0.1
    train = Dataset(x, LABELS).standardized()
    assert train.inputs[:, 1].unique().tolist() == [0] and train.std[1] == 1
    test = Dataset(x[:5] + 1, LABELS[:5]).standardized(train)
    assert test.inputs[:, 1].tolist() == pytest.approx([1] * 5)


def test_standardized_pixels():
    """Standardised pixels keep their levels of black and white. An earlier normalisation has no
    effect.
    """
    pixels = torch.randint(0, 256, (40, 12), dtype=torch.uint8)
    train = Dataset(pixels, LABELS, image_shape=(1, 3, 4), scale=1 / 255, levels=(0.0, 255.0))
    done, again = train.standardized(), train.normalized(0.5, 0.5).standardized()
    assert torch.equal(done.inputs, again.inputs) and done.levels == (0, 255)
    torch.testing.assert_close(done.reading.numbers(pixels), done.inputs)
    torch.testing.assert_close(
        done.normalized(1.0, 2.0).read(done.inputs), (done.inputs - 1) / 2, rtol=1e-6, atol=1e-6
    )


def test_standardized_once():
    done = table([1.0, 2.0]).standardized()
    with pytest.raises(DataError, match="data: is standardised already"):
        done.standardized()
    with pytest.raises(DataError, match="has 3 features, but the data to standardise by have 2"):
        table([1.0] * 3).standardized(done)
    with pytest.raises(DataError, match="the data to standardise by are not standardised"):
        table([1.0] * 3).standardized(table([1.0] * 3))


WHY = {
    "alike": (table([1.0, 2.0, 5.0]), ""),
    "deviations": (table([1.0, 30.0]), "their deviations are"),
    "far from 0": (table([1.0, 1.0], torch.tensor([0.0, 100.0])), "their sizes are"),
    "all large": (table([100.0, 100.0]), "their sizes are at most"),
    "all small": (table([1e-3, 1e-3]), "their sizes are at most 0.00"),
    "constant column": (Dataset(torch.tensor([[1.0, 500.0], [2, 500]] * 20), LABELS), ""),
    "all constant": (Dataset(torch.full((40, 2), 500.0), LABELS), ""),
    "pixels": (table([1.0, 30.0], image_shape=(1, 1, 2)), ""),
    "flat pixels": (table([1.0, 30.0], levels=(0.0, 255.0)), ""),
    "read small": (table([300.0, 300.0], scale=1 / 255), ""),
}


@pytest.mark.parametrize("case", WHY)
def test_why_a_table_is_standardised(case):
    made, reason = WHY[case]
    found = why_standardize(made)
    assert found.startswith(reason) and bool(found) == bool(reason)


@pytest.fixture
def path(tmp_path):
    x = RNG.normal(size=(40, 3)) * [1e-3, 1.0, 1e6]
    np.savez(tmp_path / "t.npz", X=x, y=LABELS.numpy())
    return str(tmp_path / "t.npz")


def test_load_standardizes(path):
    raw, _ = data.load(path)
    assert raw.mean is None and raw.inputs.dtype == torch.float32
    for mode in ("yes", "auto"):
        train, test = data.load(path, standardize=mode, verbose=False)
        assert train.inputs.std(0, unbiased=False).tolist() == pytest.approx([1] * 3, rel=1e-5)
        assert (
            torch.equal(train.mean, test.mean) and "every column is standardised" in train.notes[0]
        )
        assert (train.fingerprint().hash != raw.fingerprint().hash) and train.stored == "float64"
    again, test_again = data.load(path, standardize=train.reading, verbose=False)
    assert torch.equal(again.inputs, train.inputs) and torch.equal(test_again.inputs, test.inputs)
    plain, _ = data.load(path, standardize=raw.reading)
    assert torch.equal(plain.inputs, raw.inputs)
    with pytest.raises(DataError, match="unknown standardize 'maybe'; known: auto, yes, no"):
        data.load(path, standardize="maybe")


def test_numbers_too_large_for_float32(tmp_path):
    np.savez(tmp_path / "t.npz", X=RNG.normal(size=(40, 2)) * 1e300, y=LABELS.numpy())
    with pytest.raises(DataError, match=r"numbers up to .*e\+300 are too large for float32"):
        data.load(str(tmp_path / "t.npz"))
    train, _ = data.load(str(tmp_path / "t.npz"), standardize="auto", verbose=False)
    assert train.inputs.abs().max() < 10


def test_breast_cancer(tmp_path):
    """A table whose columns have deviations from 0.002 to 570 is learnt, as it is standardised."""
    from mlp import recipes
    from mlp.trainer import Trainer

    table = pytest.importorskip("sklearn.datasets").load_breast_cancer()
    np.savez(tmp_path / "bc.npz", X=table.data, y=table.target)
    train, test = data.load(str(tmp_path / "bc.npz"), standardize="auto", verbose=False)
    recipe = recipes.get("default")
    trainer = Trainer(
        recipe.model(train), recipe.make_loss(), recipe.make_optimizer, "manual", verbose=False
    )
    rows = trainer.fit(train, 10, 32, evaluate=test)
    assert rows[-1]["test_accuracy"] > 0.9 and rows[-1]["train_accuracy"] > 0.97


def test_one_line():
    pixels = torch.arange(40, dtype=torch.uint8)[:, None].repeat(1, 12) * 6
    classes = ("a", "b")
    train = Dataset(pixels, LABELS, classes, (3, 2, 2), 1 / 255, name="d", levels=(0.0, 255.0))
    assert describe(train, train.take(5)) == (
        "d: 40 samples of 2 × 2 RGB pixels; uint8 0 to 234 read as x / 255; 2 classes of 20 "
        "samples; 5 test samples"
    )
    x = torch.tensor([[0.0, 5.0], [2.0, 5.0]])
    rows = Dataset(x, torch.tensor([[1.5], [-1.0]]), name="t", columns=("age", "const"))
    assert describe(rows) == (
        "t: 2 samples of 2 columns; float32 0 to 5 read as x; regression, 1 output from -1 to 1.5"
    )
    assert "read as (x - mean) / std of each column;" in describe(rows.standardized())
    assert "float32 0 to 5" in describe(rows.standardized())
    assert "read as x / 510 - 1;" in describe(train.normalized(1.0, 2.0).normalized(0.5, 1.0))
    assert page(rows, rows) == [
        "data       t",
        "samples    2 for training, 2 for testing",
        "inputs     2 columns, float32 0 to 5",
        "read as    x",
        "targets    regression, 1 output from -1 to 1.5",
        "missing    none: numbers that are not finite are refused",
        "constant   1 of 2 columns (const)",
        f"hash       {rows.fingerprint().hash} (training data)",
    ]


def test_classes_and_their_balance():
    labels = torch.tensor([0] * 6 + [1] * 3 + [3])
    train = Dataset(torch.randn(10, 2), labels, ("ant", "bee", "cat", "dog"))
    lines = page(train, train.take(7))
    at = lines.index("targets    4 classes of 0 to 6 samples")
    assert lines[at + 1 : at + 8] == [
        "balance    the largest class is 6.00 times the smallest",
        "           without training samples: cat",
        "           class     train   share      test",
        "           ant           6  60.00%         6",
        "           bee           3  30.00%         1",
        "           cat           0   0.00%         0",
        "           dog           1  10.00%         0",
    ]
    many = Dataset(torch.randn(100, 2), torch.arange(100) % 50)
    assert page(many, many)[-4] == "           and 30 classes more"
