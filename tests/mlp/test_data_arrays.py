"""How arrays are understood: which axes are an image's, which values are black and white, which
labels are classes.
"""

import dataclasses
import json

import numpy as np
import pytest
import torch

from mlp.data import DataError, Dataset, Reading, from_arrays
from mlp.schema import typed

RNG = np.random.default_rng(0)
LABELS = np.arange(20) % 3


def together(parts):
    """(all inputs as read, sorted by the first column; the training part)."""
    train, _ = parts
    rows = torch.cat([part.read(part.inputs) for part in parts])
    return rows[rows[:, 0].argsort()], train


def byte_images(*axes):
    """Pixels from 0 to 255. An image's first pixel is its number."""
    images = RNG.integers(0, 256, (20, *axes), dtype=np.uint8)
    images.reshape(20, -1)[:, 0] = np.arange(20)
    images.reshape(20, -1)[:, 1] = 255
    return images


SHAPES = {
    "as long as 28 squared": ((14, 56), (1, 14, 56)),
    "no square": ((20, 30), (1, 20, 30)),
    "one channel first": ((1, 8, 6), (1, 8, 6)),
    "one channel last": ((8, 6, 1), (1, 8, 6)),
    "colour first": ((3, 8, 6), (3, 8, 6)),
    "colour last": ((8, 6, 3), (3, 8, 6)),
    "grey with alpha last": ((8, 6, 2), (2, 8, 6)),
    "colour with alpha first": ((4, 8, 6), (4, 8, 6)),
    "colour, four rows": ((3, 4, 4), (3, 4, 4)),
}


@pytest.mark.parametrize("case", SHAPES)
def test_the_axes_are_the_images(case):
    axes, shape = SHAPES[case]
    images = byte_images(*axes)
    rows, train = together(from_arrays(images, LABELS))
    assert train.image_shape == shape and train.notes == ()
    moved = images if axes == shape or len(axes) == 2 else np.moveaxis(images, 3, 1)
    np.testing.assert_allclose(rows, moved.reshape(20, -1) / 255, rtol=1e-6)


@pytest.mark.parametrize(
    "axes, message",
    [
        ((3, 8, 3), "may have their channels first or last; .* image 3x8x3 or 3x3x8"),
        ((1, 8, 1), "may have their channels first or last"),
        ((3, 3, 3), "may have their channels first or last"),
        ((7, 9, 8), r"are no images of 1 to 4 channels; flatten them to \(N, 504\)"),
        ((2, 3, 4, 5), r"have 5 axes; flatten them to \(N, 120\)"),
        ((0, 4), "have no numbers in a sample"),
    ],
    ids=str,
)
def test_axes_that_are_refused(axes, message):
    with pytest.raises(DataError, match=message):
        from_arrays(np.zeros((20, *axes), np.uint8), LABELS)


def test_the_shape_that_was_asked_for():
    ambiguous = byte_images(3, 8, 3)
    for image, shape in (("3x8x3", (3, 8, 3)), ((3, 3, 8), (3, 3, 8))):
        rows, train = together(from_arrays(ambiguous, LABELS, image=image))
        assert train.image_shape == shape
        moved = ambiguous if shape == (3, 8, 3) else np.moveaxis(ambiguous, 3, 1)
        np.testing.assert_allclose(rows, moved.reshape(20, -1) / 255, rtol=1e-6)
    flat = byte_images(75)
    for image, shape in (("5x15", (1, 5, 15)), ("3×5×5", (3, 5, 5)), ("5x5", (3, 5, 5))):
        assert from_arrays(flat, LABELS, image=image)[0].image_shape == shape
    for image, message in (
        ("5x5x5", "rows have 75 numbers, but an image 5x5x5 has 125"),
        ("5", "HEIGHTxWIDTH or CHANNELSxHEIGHTxWIDTH.*got '5'"),
        ("axb", "got 'axb'"),
        ("0x75", "got '0x75'"),
    ):
        with pytest.raises(DataError, match=message):
            from_arrays(flat, LABELS, image=image)
    with pytest.raises(DataError, match=r"images are \(3, 8, 3\), but \(8, 4\) was asked for"):
        from_arrays(ambiguous, LABELS, image="8x4")


def test_a_table_is_no_image():
    """25 columns are no image, but rows of 784 pixels are one, with a note."""
    for table in (RNG.normal(size=(20, 25)), byte_images(25), RNG.normal(size=(20, 784))):
        assert from_arrays(table, LABELS)[0].image_shape is None
    train, _ = from_arrays(byte_images(784), LABELS, name="mine")
    assert train.image_shape == (1, 28, 28)
    assert train.notes == (
        "mine: rows of 784 pixels are taken for images of 1x28x28 (channels x height x width)",
    )
    train, _ = from_arrays(RNG.random((20, 3072)), LABELS)
    assert train.image_shape == (3, 32, 32) and train.levels == (0, 1) and len(train.notes) == 1
    train, _ = from_arrays(byte_images(25), LABELS, named_image=True)
    assert train.image_shape == (1, 5, 5) and "rows are taken for images of 5x5" in train.notes[0]


BYTES = byte_images(8, 8)
UNIT = (BYTES / 255).astype(np.float32)
# (array in the file, levels of black and white, dtype of the inputs, True if there is a note)
RANGES = {
    "uint8": (BYTES, (0, 255), torch.uint8, False),
    "int64": (BYTES.astype(np.int64), (0, 255), torch.uint8, True),
    "uint16": (BYTES.astype(np.uint16), (0, 255), torch.uint8, True),
    "big-endian int32": (BYTES.astype(">i4"), (0, 255), torch.uint8, True),
    "float64": (BYTES.astype(np.float64), (0, 255), torch.uint8, True),
    "float16": (BYTES.astype(np.float16), (0, 255), torch.uint8, True),
    "fractions of a byte": (BYTES * 0.99, (0, 255), torch.float32, True),
    "all 16 bits": (BYTES.astype(np.uint16) * 257, (0, 65535), torch.float32, False),
    "12 bits": (BYTES.astype(np.uint16) * 16, (0, 4095), torch.float32, True),
    "10 bits in int32": (BYTES.astype(np.int32) * 4, (0, 1023), torch.float32, True),
    "the digits of scikit-learn": (BYTES // 16.0, (0, 16), torch.uint8, True),
    "float32 in [0, 1]": (UNIT, (0, 1), torch.float32, False),
    "float64 in [0, 1]": (UNIT.astype(np.float64), (0, 1), torch.float32, False),
    "float16 in [0, 1]": (UNIT.astype(np.float16), (0, 1), torch.float32, False),
    "bool": (BYTES > 127, (0, 1), torch.uint8, False),
    "uint8 mask": ((BYTES > 127).astype(np.uint8), (0, 1), torch.uint8, True),
    "[-1, 1]": (UNIT * 2 - 1, (-1, 1), torch.float32, True),
    "int8": (BYTES.astype(np.int16) - 128, None, torch.float32, True),
    "signed bytes": ((BYTES.astype(np.int16) - 128).astype(np.int8), (-128, 127), None, True),
    "standardised": (UNIT * 4 - 0.5, None, torch.float32, True),
}


@pytest.mark.parametrize("flat", [False, True], ids=["images", "rows"])
@pytest.mark.parametrize("kind", RANGES)
def test_black_and_white(kind, flat):
    """However pixels are stored, black reads as 0 and white as 1. Where the levels are unknown, the
    numbers stay.
    """
    images, levels, dtype, noted = RANGES[kind]
    if flat:
        images = images.reshape(20, 64)
    train, test = from_arrays(images, LABELS, image="8x8")
    assert train.levels == levels and (dtype is None or train.inputs.dtype == dtype)
    assert bool(train.notes) == noted, train.notes
    assert train.stored == images.dtype.name
    rows = torch.cat([part.read(part.inputs).double() for part in (train, test)])
    wanted = images.reshape(20, 64).astype(np.float64)
    if levels is None:
        wanted = wanted if abs(wanted).max() <= 10 else wanted / abs(wanted).max()
    elif levels != (-1, 1):
        wanted = (wanted - levels[0]) / (levels[1] - levels[0])
    assert sorted(rows.sum(1).tolist()) == pytest.approx(sorted(wanted.sum(1)), rel=1e-3, abs=1e-2)
    assert (rows.min(), rows.max()) == pytest.approx((wanted.min(), wanted.max()), abs=1e-6)


def test_flat_pixels_without_a_shape():
    """Whole numbers up to 255 are pixels where a row has at least 64. A table keeps its numbers."""
    train, _ = from_arrays(BYTES.reshape(20, 64).astype(float), LABELS)
    assert (train.scale, train.levels, train.image_shape) == (1 / 255, (0, 255), None)
    assert "float64 0 to 255: white is taken for 255, read as 0 to 1" in train.notes[0]
    table = BYTES.reshape(20, 64)[:, :30]
    for numbers in (table, table.astype(float)):
        train, _ = from_arrays(numbers, LABELS)
        assert (train.scale, train.levels, train.notes) == (1, None, ())
        assert train.inputs.dtype == torch.float64, "a standardisation needs float64"


def test_training_and_test_data_are_read_alike():
    train, test = from_arrays(BYTES, LABELS, BYTES.astype(float), LABELS)
    assert train.reading == test.reading
    assert torch.equal(train.inputs, test.inputs)
    dark = BYTES // 200  # alone these would be a mask of 0 and 1
    train, test = from_arrays(BYTES, LABELS, dark, LABELS)
    assert test.levels == (0, 255) and test.inputs.max() == 1
    with pytest.raises(
        DataError, match="training inputs are uint8 0 to 255, test inputs float32 0 to 1; store"
    ):
        from_arrays(BYTES, LABELS, UNIT, LABELS)
    with pytest.raises(DataError, match="training images are 1x8x8, test images 1x4x16"):
        from_arrays(BYTES, LABELS, BYTES.reshape(20, 4, 16), LABELS)


def classes_of(labels, **options):
    train, test = from_arrays(np.arange(20.0)[:, None], labels, **options)
    order = torch.cat([train.inputs, test.inputs])[:, 0].argsort()
    return train.classes, torch.cat([train.targets, test.targets])[order].tolist(), train.notes


NAMED = "data: labels {} are 3 classes, named by these values"
KINDS = {
    "from 0": (LABELS, ("0", "1", "2"), None),
    "from 1": (LABELS + 1, ("1", "2", "3"), NAMED.format("1, 2, 3")),
    "gaps": (LABELS * 7, ("0", "7", "14"), NAMED.format("0, 7, 14")),
    "years": (LABELS + 1990, ("1990", "1991", "1992"), NAMED.format("1990, 1991, 1992")),
    "a million": (LABELS * 10**6, ("0", "1000000", "2000000"), NAMED.format("0, 1000000, 2000000")),
    "large": (
        LABELS.astype(np.uint64) + 2**63,
        tuple(str(2**63 + i) for i in range(3)),
        NAMED.format(", ".join(str(2**63 + i) for i in range(3))),
    ),
    "whole floats": (LABELS.astype(float), ("0", "1", "2"), None),
    "big-endian": (LABELS.astype(">i4"), ("0", "1", "2"), None),
    "big-endian floats": (LABELS.astype(">f8"), ("0", "1", "2"), None),
    "column": (LABELS[:, None], ("0", "1", "2"), None),
    "row": (LABELS[None], ("0", "1", "2"), None),
    "words": (np.array(["a", "b", "c"])[LABELS], ("a", "b", "c"), None),
    "bytes": (np.array([b"a", b"b", b"c"])[LABELS], ("a", "b", "c"), None),
    "words of numbers": (np.array(["2", "9", "10"])[LABELS], ("2", "9", "10"), None),
    "one-hot": (
        np.eye(3)[LABELS],
        ("0", "1", "2"),
        "data: labels are one-hot rows of 3; their column is taken",
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_labels(kind):
    labels, names, note = KINDS[kind]
    assert classes_of(labels) == (names, LABELS.tolist(), (note,) if note else ())


def test_two_classes():
    two = np.arange(20) % 2
    assert classes_of(two == 1) == (("False", "True"), two.tolist(), ())
    assert classes_of(two * 2 - 1)[:2] == (("-1", "1"), two.tolist())


@pytest.mark.parametrize("targets, said", [(np.full(20, 5), "5"), (np.full(20, 2.5), "2.5")])
def test_one_target(targets, said):
    """As in a table or a folder of images."""
    with pytest.raises(DataError, match=f"the target is {said} in every row: nothing to learn"):
        from_arrays(np.arange(20.0)[:, None], targets)


def test_training_and_test_labels_have_one_list_of_classes():
    x = np.arange(20.0)[:, None]
    train, test = from_arrays(x, LABELS + 5, x[:3], np.array([7, 5, 9]))
    assert train.classes == test.classes == ("5", "6", "7", "9")
    assert test.targets.tolist() == [2, 0, 3] and train.targets[:3].tolist() == [0, 1, 2]
    assert "the test data have classes that training lacks: 9" in train.notes[1]


def test_targets_of_a_regression():
    x = np.arange(20.0)[:, None]
    for targets, outputs in ((np.linspace(0, 1, 20), 1), (RNG.normal(size=(20, 3)), 3)):
        train, _ = from_arrays(x, targets)
        assert train.targets.shape == (16, outputs) and train.targets.dtype == torch.float32
        assert not train.is_classification and f"a regression with {outputs}" in train.notes[0]
    many = np.arange(200.0)
    train, _ = from_arrays(many[:, None], many * 3)
    assert not train.is_classification, "200 whole numbers in 200 samples are no classes"
    train, _ = from_arrays(x, LABELS, task="regression")
    assert train.targets.shape == (16, 1) and train.notes == ()
    with pytest.raises(DataError, match=r"whole numbers, got 0\.05"):
        from_arrays(x, np.linspace(0, 1, 20).round(2), task="classification")


BAD = {
    "ids": (np.arange(200), "200 different labels in 200 samples look like ids"),
    "large ids": (np.arange(200) * 10**9, "200 different labels in 200 samples look like ids"),
    "names": (np.array([f"n{i}" for i in range(200)]), "200 different labels in 200 samples"),
    "thousands": (np.arange(2002) // 2 % 1001, "1,001 different labels in 2,002 samples"),
    "negative": (LABELS - 1, "label -1 of sample 0 is not one of the 2 classes, 0 to 1"),
    "missing": (np.where(LABELS == 2, np.nan, 1.0), "training targets must be finite, got nan in"),
    "no word": (np.array(["a", None] * 10, object), "sample 1 has no value; leave its row out"),
    "words and numbers": (
        np.array(["a", 1] * 10, object),
        "all numbers or all words, got int, str",
    ),
    "records": (np.zeros(20, [("a", "f4")]), "must be numbers or words, got records"),
    "dates": (np.zeros(20, "M8[D]"), r"must be numbers or words, got datetime64\[D\]"),
    "cube": (np.zeros((20, 2, 2)), r"targets must be \(N,\) or \(N, outputs\)"),
    "none": (LABELS[:0], r"20 inputs need as many labels, got \(0,\)"),
    "no outputs": (np.zeros((20, 0)), r"20 inputs need as many labels, got \(20, 0\)"),
    "a number": (np.array(3), r"targets must be \(N,\) or \(N, outputs\), got \(\)"),
    "lengths": (LABELS[:5], r"inputs \(20, 1\) need as many labels, got \(5,\)"),
}


@pytest.mark.parametrize("kind", BAD)
def test_labels_that_are_refused(kind):
    labels, message = BAD[kind]
    rows = np.zeros((max(20, labels.shape[0] if labels.ndim else 0), 1))
    with pytest.raises(DataError, match=message) as error:
        from_arrays(rows, labels)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("part", ["training", "test"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_are_refused(part, value):
    good, bad = RNG.normal(size=(20, 5)), RNG.normal(size=(20, 5))
    bad[7, 3] = value
    pair = (bad, good) if part == "training" else (good, bad)
    name = {"training": "train", "test": "test"}[part]
    with pytest.raises(
        DataError, match=rf"d \({name}\): inputs must be finite, got {value} in row 7, column 3"
    ):
        from_arrays(pair[0], LABELS, pair[1], LABELS, name="d")


def test_mnist_in_wider_types_is_scaled():
    """MNIST's pixels as floats or wider integers, flat or not, are read as bytes are."""
    pixels = RNG.integers(0, 256, (40, 28, 28), dtype=np.uint8)
    labels = np.arange(40) % 10
    wanted, _ = from_arrays(pixels, labels)
    for dtype in (np.float32, np.float64, np.int64, np.uint16):
        for shape in ((40, 28, 28), (40, 784)):
            train, _ = from_arrays(pixels.astype(dtype).reshape(shape), labels)
            assert torch.equal(train.inputs, wanted.inputs) and train.image_shape == (1, 28, 28)
            assert train.scale == 1 / 255 and train.notes


def test_a_reading_survives_json():
    train, _ = from_arrays(BYTES, LABELS)
    table = Dataset(torch.randn(20, 3) * 9 + 5, torch.from_numpy(LABELS)).standardized()
    for data in (train, train.normalized(0.5, 0.25), table):
        stored = json.loads(json.dumps(dataclasses.asdict(data.reading)))
        assert typed(Reading, stored, "config.json") == data.reading


ROWS = np.random.default_rng(5).integers(0, 256, (60, 20)).astype(np.uint8)
ROW_LABELS = np.arange(60) % 3
FRACTIONS = ROWS.astype(np.float32) / 255
OTHER_UNITS = {
    "bytes and fractions": (ROWS, FRACTIONS),
    "fractions and bytes": (FRACTIONS, ROWS),
    "floats of bytes and fractions": (ROWS.astype(np.float32), FRACTIONS),
    "a mask and bytes": (ROWS // 200, ROWS),
    "bytes and standardised": (ROWS, (ROWS - 127.0) / 73.0),
}


@pytest.mark.parametrize("train, test", OTHER_UNITS.values(), ids=OTHER_UNITS)
def test_parts_in_other_units_are_refused(train, test):
    with pytest.raises(
        DataError, match=r"training inputs are .*, test inputs .*; store both alike"
    ):
        from_arrays(train, ROW_LABELS, test, ROW_LABELS)


def test_parts_of_tables_in_the_same_units_are_read():
    """A part of whole numbers beside fractions, and a small test part, are no other units."""
    ages = np.arange(120.0).reshape(60, 2) + 20
    for train, test in ((ages.astype(int), ages + 0.5), (ages, ages[:10] / 1000)):
        parts = from_arrays(train, ROW_LABELS, test, ROW_LABELS[: len(test)])
        assert torch.equal(parts[1].inputs, torch.from_numpy(test))
