"""The command line on people's data: what it says, and that `evaluate` and `predict` read data as
`train` did.
"""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from mlp.runs import RunFolder

Image = pytest.importorskip("PIL.Image")
RNG = np.random.default_rng(0)
# Two classes of 4 × 4 pixels, one near a fifth of white, the other near four fifths.
LABELS = np.arange(60) % 2
SHARES = np.where(LABELS, 0.8, 0.2)[:, None, None] + RNG.uniform(-0.1, 0.1, (60, 4, 4))
QUICK = ("--hidden", "8", "--epochs", "15", "--device", "cpu", "--engine", "manual", "--out", "run")


@pytest.fixture(autouse=True)
def a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


HELD = {
    "uint8": (SHARES * 255).round().astype(np.uint8),
    "int64": (SHARES * 255).round().astype(np.int64),
    "bytes in float64": (SHARES * 255).round(),
    "float32 in [0, 1]": SHARES.astype(np.float32),
    "uint16": (SHARES * 65535).astype(np.uint16),
    "[-1, 1]": SHARES * 2 - 1,
}


@pytest.mark.parametrize("held", HELD)
def test_predict_reads_as_train_did(held, handgrad):
    """A PNG of grey 51 gets the class of a fifth of white, for every type of training pixels."""
    np.savez("data.npz", x_train=HELD[held], y_train=LABELS)
    status, out, err = handgrad("train", "data.npz", *QUICK)
    assert status == 0, err
    assert out.startswith("data (train): 48 samples of 4 × 4 grey pixels; ")
    assert all(line.startswith("note: ") for line in err.splitlines())
    Image.new("L", (4, 4), 51).save("dark.png")
    Image.new("I;16", (4, 4), 52428).save("light.png")
    status, out, err = handgrad("predict", "run", "dark.png", "light.png")
    assert (status, err) == (0, "")
    assert re.fullmatch(r"dark\.png: 0 \(\d+\.\d%\)\nlight\.png: 1 \(\d+\.\d%\)\n", out)
    accuracy = json.loads(Path("run/metrics.jsonl").read_text().splitlines()[-1])["test_accuracy"]
    assert accuracy == 1


def test_images_of_unknown_levels_are_not_predicted(handgrad):
    np.savez("data.npz", x_train=(SHARES - 0.5) * 6, y_train=LABELS)
    status, _, err = handgrad("train", "data.npz", *QUICK)
    assert status == 0 and "which values are black and white is not known" in err
    Image.new("L", (4, 4), 51).save("dark.png")
    status, out, err = handgrad("predict", "run", "dark.png")
    assert (status, out) == (2, "") and "values of black and white are not known" in err


def rows_of_a_table():
    x = RNG.normal(size=(60, 3)) * [1e-3, 1.0, 500.0]
    x[:, 0] += LABELS * 4e-3
    return x


def test_a_table_is_standardised(handgrad):
    """A table is standardised by default, with a note. `evaluate` uses the stored mean and
    deviation.
    """
    np.savez("t.npz", X=rows_of_a_table(), y=LABELS)
    status, out, err = handgrad("train", "t.npz", *QUICK)
    assert status == 0 and re.match(r"note: t \(train\): every column is standardised \(their", err)
    assert "read as (x - mean) / std of each column" in out
    reading = RunFolder("run").settings.data.reading
    assert len(reading.mean) == 3 and reading.std[2] > 100
    status, out, _ = handgrad("evaluate", "run")
    accuracy = json.loads(Path("run/metrics.jsonl").read_text().splitlines()[-1])["test_accuracy"]
    assert status == 0 and accuracy > 0.9 and f"accuracy {accuracy:.2%}" in out
    changed = rows_of_a_table()
    np.savez("t.npz", X=changed + 1e9, y=LABELS)
    status, out, err = handgrad("evaluate", "run")
    assert status == 0 and "have changed since the run began" in err
    assert f"accuracy {accuracy:.2%}" not in out, "the table was standardised again"


def test_standardize_is_an_option(handgrad):
    np.savez("t.npz", X=rows_of_a_table(), y=LABELS)
    status, out, err = handgrad("train", "t.npz", *QUICK, "--lr", "1e-6", "--standardize", "no")
    assert status == 0 and "read as x;" in out and "standardised" not in err
    settings = RunFolder("run").settings
    assert settings.standardize == "no" and settings.data.reading.mean is None
    status, _, err = handgrad("train", "t.npz", *QUICK, "--force", "--standardize", "perhaps")
    assert status == 2 and "unknown standardize 'perhaps'; known: auto, yes, no" in err
    status, out, _ = handgrad("train", "digits", *QUICK[:-2], "--standardize", "yes")
    assert status == 0 and "read as (x - mean) / std of each column" in out
    Image.new("L", (8, 8), 51).save("new.png")
    assert handgrad("predict", "runs/digits", "new.png")[0] == 0


def test_the_shape_of_an_image_is_an_option(handgrad):
    np.savez("flat.npz", X=RNG.integers(0, 256, (60, 75), dtype=np.uint8), y=LABELS)
    status, out, _ = handgrad("train", "flat.npz", *QUICK, "--image", "3x5x5")
    assert status == 0 and "48 samples of 5 × 5 RGB pixels" in out
    assert RunFolder("run").settings.data.reading.image_shape == (3, 5, 5)
    assert handgrad("evaluate", "run")[0] == 0
    Image.new("RGB", (5, 5)).save("new.png")
    assert handgrad("predict", "run", "new.png")[0] == 0
    status, _, err = handgrad("data", "flat.npz", "--image", "5x5x5")
    assert status == 2 and "rows have 75 numbers, but an image 5x5x5 has 125" in err


def test_data_command(handgrad):
    status, out, err = handgrad("data")
    assert (status, err) == (0, "")
    for line in (
        r"data       digits \(train\)",
        r"samples    1,438 for training, 359 for testing",
        r"inputs     8 × 8 grey pixels, uint8 0 to 255",
        r"read as    x / 255",
        r"levels     black is 0, white is 255",
        r"targets    10 classes of \d+ to \d+ samples",
        r"balance    the largest class is 1\.\d\d times the smallest",
        r"constant   \d of 64 pixels",
    ):
        assert re.search(f"^{line}$", out, re.M), line
    assert len(re.findall(r"^ +\d +1\d\d +\d+\.\d\d% +\d\d$", out, re.M)) == 10
    np.savez("t.npz", X=rows_of_a_table() * [1, 0, 1], y=LABELS)
    status, out, err = handgrad("data", "t.npz")
    assert status == 0 and "constant   1 of 3 columns (1)" in out
    assert err.startswith("note: t (train): every column is standardised")
    status, out, err = handgrad("data", "nothing.npz")
    assert (status, out) == (2, "") and "there is no nothing.npz" in err


KINDS = {
    "grey": ((60, 4, 4), LABELS, ["samples.png", "classes.png"]),
    "colour": ((60, 3, 4, 4), LABELS, ["samples.png", "classes.png"]),
    "two channels": ((60, 2, 5, 5), LABELS, ["samples.png", "classes.png"]),
    "table": ((60, 40), np.array(["a$b$", "c"])[LABELS], ["columns.png", "classes.png"]),
    "one column": ((60, 1), LABELS, ["columns.png", "classes.png"]),
    "regression": ((60, 3), RNG.normal(size=(60, 2)), ["columns.png", "targets.png"]),
    "images of a regression": ((60, 4, 4), RNG.normal(size=60), ["samples.png", "targets.png"]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_of_data(kind, handgrad):
    pytest.importorskip("matplotlib")
    shape, targets, names = KINDS[kind]
    np.savez("d.npz", X=RNG.random(shape), y=targets)
    status, out, err = handgrad("data", "d.npz", "--plots")
    assert status == 0, err
    assert out.splitlines()[-2:] == names
    for name in names:
        with Image.open(name) as image:
            assert image.format == "PNG" and image.getcolors(10**6) is not None
            assert len(image.getcolors(10**6)) > 3, "the picture is empty"
    status, _, err = handgrad("data", "d.npz", "--plots", "--out", "nowhere")
    assert status == 2 and "--out nowhere: there is no such folder" in err
    status, _, err = handgrad("runs", "d.npz")
    assert status == 2 and "d.npz: is a file, not a folder" in err


def test_names_are_shown_escaped(handgrad):
    np.savez("d.npz", X=RNG.random((60, 4)), y=np.array(["a\x1b[2Jb", "c"])[LABELS])
    status, out, _ = handgrad("data", "d.npz")
    assert status == 0 and "\x1b" not in out and r"a\x1b[2Jb" in out


HOSTILE = {
    "std 0": {"mean": [0.0] * 3, "std": [0.0] * 3},
    "lengths": {"mean": [0.0] * 3, "std": [1.0] * 2},
    "levels": {"levels": [1.0, 1.0]},
    "scale": {"scale": float("inf")},
    "image": {"image_shape": [0, 4, 4]},
}


@pytest.mark.parametrize("case", HOSTILE)
def test_readings_that_are_refused(case, handgrad):
    np.savez("t.npz", X=rows_of_a_table(), y=LABELS)
    assert handgrad("train", "t.npz", *QUICK)[0] == 0
    config = json.loads(Path("run/config.json").read_text())
    config["data"]["reading"] |= HOSTILE[case]
    Path("run/config.json").write_text(json.dumps(config))
    status, out, err = handgrad("evaluate", "run")
    assert (status, out) == (2, "") and err.startswith("handgrad: run/config.json: data: reading: ")
