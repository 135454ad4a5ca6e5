""".npz, .npy and .mat files. Each way that they can be wrong gives one clear line."""

import functools
import os
import zipfile

import numpy as np
import pytest
import torch

from mlp import data
from mlp.data import DataError, guards
from mlp.data.files import KEYS

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (20, 4, 4), dtype=np.uint8)
LABELS = np.arange(20) % 3


def write_mat(path, **arrays):
    pytest.importorskip("scipy.io").savemat(path, arrays)
    return path


@pytest.mark.parametrize("keys", KEYS, ids="-".join)
def test_npz(keys, tmp_path):
    """Every spelling of the keys is known. Pixels stay uint8 and are read in [0, 1]. Floats are
    read unchanged.
    """
    path = tmp_path / "images.npz"
    np.savez(path, **dict(zip(keys, (IMAGES, LABELS, IMAGES[:5], LABELS[:5].reshape(-1, 1)))))
    train, test = data.load(str(path))
    assert (
        (len(train), len(test)) == (20, 5)
        and train.image_shape == (1, 4, 4)
        and train.classes == ("0", "1", "2")
    )
    assert train.inputs.dtype == torch.uint8 and train.targets.tolist() == LABELS.tolist()
    np.testing.assert_allclose(train.read(train.inputs), IMAGES.reshape(20, 16) / 255, rtol=1e-6)
    np.savez(path, **dict(zip(keys[:2], (IMAGES / 255.0, LABELS.astype(float)))))
    train, test = data.load(str(path))
    assert (len(train), len(test)) == (16, 4), "without a test set, a fifth is split off"
    assert (
        train.inputs.dtype == torch.float32
        and train.scale == 1
        and train.targets.dtype == torch.int64
    )
    together = torch.cat([train.inputs, test.inputs]).sort(0).values
    np.testing.assert_allclose(together, np.sort(IMAGES.reshape(20, 16) / 255.0, 0), rtol=1e-6)


def test_capitals_make_no_difference(tmp_path):
    np.savez(tmp_path / "f.npz", X_Train=IMAGES, Y_TRAIN=LABELS)
    assert data.load(str(tmp_path / "f.npz"))[0].image_shape == (1, 4, 4)
    path = write_mat(tmp_path / "F.MAT", X=IMAGES.reshape(20, 16), y=LABELS)
    assert data.load(str(path))[0].features == 16


@pytest.mark.parametrize("count", [2, 4])
def test_npy(count, tmp_path):
    """.npy files stand for inputs and labels, then test inputs and labels, in the given order."""
    arrays = (IMAGES, LABELS, IMAGES[:5], LABELS[:5])[:count]
    for name, array in zip("abcd", arrays):
        np.save(tmp_path / f"{name}.npy", array)
    source = ",".join(str(tmp_path / f"{name}.npy") for name, _ in zip("abcd", arrays))
    train, test = data.load(source)
    assert (len(train), len(test)) == {2: (16, 4), 4: (20, 5)}[count]
    assert train.image_shape == (1, 4, 4)


def test_a_comma_in_a_name(tmp_path):
    np.savez(tmp_path / "a,b.npz", X=IMAGES, y=LABELS)
    assert len(data.load(str(tmp_path / "a,b.npz"))[0]) == 16


def test_a_note_names_unused_arrays(tmp_path, capsys):
    path = tmp_path / "f.npz"
    np.savez(path, x_train=IMAGES, y_train=LABELS, x_test=IMAGES, x_val=IMAGES)
    train, _ = data.load(str(path))
    assert train.notes == (
        "f: not used: x_test, x_val; a fifth of the training data is held out for testing",
    )
    assert capsys.readouterr().err == f"note: {train.notes[0]}\n"
    data.load(str(path), verbose=False)
    assert capsys.readouterr().err == ""


def test_mat_variables_of_all_kinds(tmp_path):
    """A .mat file may hold sparse numbers, words as characters, and words in cells."""
    sparse = pytest.importorskip("scipy.sparse")
    numbers = np.eye(20, 5)
    words = np.array(["ant", "bee", "wolf"])[LABELS]
    for labels in (words, np.array(words, dtype=object), np.array(words, dtype=object)[:, None]):
        path = write_mat(tmp_path / "f.mat", X=sparse.csc_matrix(numbers), y=labels)
        train, test = data.load(str(path))
        assert train.classes == ("ant", "bee", "wolf")
        rows = [*train.inputs.tolist(), *test.inputs.tolist()]
        assert sorted(rows) == sorted(numbers.tolist())


@pytest.mark.parametrize("files", ["one", "two"])
def test_mat(files, tmp_path):
    """Rows of pixels and a column of labels may lie in one .mat file or in two."""
    x, y = {"training_data": IMAGES.reshape(20, 16)}, {"training_label": LABELS.reshape(-1, 1)}
    source = f"{write_mat(tmp_path / 'data.mat', **x)},{write_mat(tmp_path / 'label.mat', **y)}"
    if files == "one":
        source = str(write_mat(tmp_path / "all.mat", **x, **y))
    train, test = data.load(source)
    assert (len(train), len(test)) == (16, 4) and train.features == 16
    both = (
        torch.cat([train.inputs, test.inputs]).tolist(),
        torch.cat([train.targets, test.targets]).tolist(),
    )
    assert sorted(zip(*both)) == sorted(zip(IMAGES.reshape(20, 16).tolist(), LABELS.tolist()))
    tests = {"testing_data": IMAGES[:2].reshape(2, 16), "testing_label": LABELS[:2]}
    train, test = data.load(str(write_mat(tmp_path / "tested.mat", **x, **y, **tests)))
    assert (len(train), len(test)) == (20, 2) and test.classes == train.classes
    assert test.inputs.tolist() == IMAGES[:2].reshape(2, 16).tolist()


def npz(tmp_path, **arrays):
    tmp_path.mkdir(exist_ok=True)
    np.savez(tmp_path / "f.npz", **arrays)
    return tmp_path / "f.npz"


def pair(x, y, tmp_path):
    return npz(tmp_path, x_train=x, y_train=y)


def damaged(make, keep, tmp_path):
    path = make(tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)] if keep else b"not that at all " * 20)
    return path


def good_npz(tmp_path):
    return pair(IMAGES, LABELS, tmp_path)


def good_mat(tmp_path):
    return write_mat(
        tmp_path / "f.mat", training_data=IMAGES.reshape(20, 16), training_label=LABELS
    )


def npy(tmp_path, array):
    np.save(tmp_path / "f.npy", array)
    return tmp_path / "f.npy"


def cells(*arrays):
    found = np.empty(len(arrays), object)
    found[:] = arrays
    return found


def bomb(tmp_path, shape):
    """A small archive of a large array of zeros."""
    with zipfile.ZipFile(tmp_path / "f.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, rows in (("x_train", shape), ("y_train", (shape[0],))):
            with archive.open(f"{name}.npy", "w") as file:
                header = {"descr": "|u1", "fortran_order": False, "shape": rows}
                np.lib.format.write_array_header_1_0(file, header)
                if name == "x_train":
                    file.write(bytes(shape[0]))
    return tmp_path / "f.npz"


def mat_bomb(tmp_path):
    """The same as a .mat file, whose variables are compressed one by one."""
    path = tmp_path / "f.mat"
    zeros = np.zeros((20, 1 << 17), np.uint8)
    pytest.importorskip("scipy.io").savemat(path, {"X": zeros, "y": LABELS}, do_compression=True)
    return path


def lying(tmp_path):
    """A .npy of 128 bytes whose header announces 8 terabytes."""
    with (tmp_path / "f.npy").open("wb") as file:
        header = {"descr": "<f8", "fortran_order": False, "shape": (10**12,)}
        np.lib.format.write_array_header_1_0(file, header)
    return f"{tmp_path / 'f.npy'},{tmp_path / 'f.npy'}"


def pipe(path):
    os.mkfifo(path)
    return path


def link(path, target):
    path.symlink_to(target)
    return path


BAD = {
    "npz wrong keys": (
        lambda t: npz(t, pixels=IMAGES),
        "needs arrays called x_train and y_train, train_data .*; found pixels",
    ),
    "npz truncated": (functools.partial(damaged, good_npz, 0.5), "f.npz: not a readable .npz file"),
    "npz other": (functools.partial(damaged, good_npz, 0), "f.npz: not a readable .npz file"),
    "lengths": (
        functools.partial(pair, IMAGES, LABELS[:5]),
        r"inputs \(20, 4, 4\) need as many labels, got \(5,\)",
    ),
    "whole numbers in columns": (
        functools.partial(pair, IMAGES, np.eye(20, dtype=int) * 3),
        r"need as many labels, got \(20, 20\); give one a sample, one-hot rows, or floating-point",
    ),
    "a number": (
        functools.partial(pair, np.float32(1), LABELS),
        r"inputs \(\) need as many labels",
    ),
    "negative label": (
        functools.partial(pair, IMAGES, LABELS - 1),
        "label -1 of sample 0 is not one of the 2 classes",
    ),
    "strings": (functools.partial(pair, np.array(["a"] * 20), LABELS), "must be arrays of numbers"),
    "empty": (functools.partial(pair, IMAGES[:0], LABELS[:0]), "empty: it has no samples"),
    "test features": (
        lambda t: npz(t, x_train=IMAGES, y_train=LABELS, x_test=IMAGES[:, :2], y_test=LABELS),
        "training inputs have 16 features, test inputs 8",
    ),
    "mat wrong keys": (
        lambda t: write_mat(t / "f.mat", pictures=IMAGES, labels=LABELS),
        "needs arrays called .*training_data and training_label, .*; found labels, pictures",
    ),
    "mat truncated": (functools.partial(damaged, good_mat, 0.5), "f.mat: not a readable .mat file"),
    "mat other": (functools.partial(damaged, good_mat, 0), "f.mat: not a readable .mat file"),
    "other file": (
        lambda t: good_npz(t).rename(t / "f.csv"),
        "f.csv: is a table; give --target, or use mlp.data.tables.load",
    ),
    "no suffix": (
        lambda t: good_npz(t).rename(t / "f"),
        "f: cannot read such files; known: .npz",
    ),
    "repeated": (
        lambda t: f"{good_npz(t)},{npz(t / 'more', y_train=LABELS)}",
        "y_train is in .*f.npz and in .*more/f.npz; leave one of them out",
    ),
    "repeated in .mat": (
        lambda t: f"{good_mat(t)},{write_mat(t / 'g.mat', training_label=LABELS)}",
        "training_label is in .*f.mat and in .*g.mat",
    ),
    "one array alone": (lambda t: npy(t, IMAGES), "needs arrays called .*; found f"),
    "folder and file": (
        lambda t: f"{t},{good_npz(t)}",
        "a folder of images must be the only path, got 2",
    ),
    "objects": (
        functools.partial(pair, IMAGES, np.array([None, "a"] * 10, object)),
        "f.npz: y_train.npy: holds Python objects",
    ),
    "struct": (
        lambda t: write_mat(t / "f.mat", X={"a": IMAGES, "b": 1}, y=LABELS),
        "X: is a struct with the fields a, b, not an array",
    ),
    "cell of arrays": (
        lambda t: write_mat(t / "f.mat", X=cells(IMAGES, LABELS), y=LABELS),
        "inputs: must be arrays of numbers, got a list of objects",
    ),
    "bomb": (
        lambda t: bomb(t, (1 << 22, 1)),
        r"f.npz: [\d,]+ bytes would grow to 4,194,\d+ when unpacked",
    ),
    "bomb in .mat": (
        lambda t: mat_bomb(t),
        r"f.mat: [\d,]+ bytes would grow to [\d,]+ when unpacked",
    ),
    "header that lies": (
        lambda t: lying(t),
        "header announces 8,000,000,000,000 bytes, but it has",
    ),
    "pipe": (lambda t: pipe(t / "f.npz"), "f.npz: is a pipe, not a file"),
    "device": (lambda t: link(t / "f.npy", "/dev/zero"), "f.npy: is a device, not a file"),
    "missing": (lambda t: t / "none.npz", "there is no .*none.npz"),
}


@pytest.mark.parametrize("case", BAD)
def test_one_clear_line(case, tmp_path, monkeypatch):
    monkeypatch.setattr(guards, "_HARMLESS", 2**20)  # so that small bombs suffice
    make, message = BAD[case]
    source = str(make(tmp_path))
    with pytest.raises(DataError, match=message) as error:
        data.load(source)
    assert "\n" not in str(error.value)
