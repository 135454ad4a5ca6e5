"""data: .npz, .mat and folders of images, and one line for every way that they can be wrong."""

import functools

import numpy as np
import pytest
import torch

from mlp import data
from mlp.data import DataError

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (20, 4, 4), dtype=np.uint8)
LABELS = np.arange(20) % 3


def write_images(folder, modes=("L",), sizes=((4, 4),), names=("ant", "bee", "cat"), count=4):
    image = pytest.importorskip("PIL.Image")
    for c, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            n = c * count + i
            mode, size = modes[n % len(modes)], sizes[n % len(sizes)]
            image.fromarray(np.full(size[::-1], 10 * c + i, np.uint8)).convert(mode).save(
                folder / name / f"{i}.png"
            )


def write_mat(path, **arrays):
    pytest.importorskip("scipy.io").savemat(path, arrays)
    return path


@pytest.mark.parametrize("keys", data._NPZ_KEYS, ids="-".join)
def test_npz(keys, tmp_path):
    """Both spellings of the keys; pixels stay uint8 and are read in [0, 1]; floats are read as they
    are.
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
    np.savez(path, **dict(zip(keys[:2], (IMAGES / 100.0, LABELS.astype(float)))))
    train, test = data.load(str(path))
    assert (len(train), len(test)) == (16, 4), "without a test set, a fifth is split off"
    assert (
        train.inputs.dtype == torch.float32
        and train.scale == 1
        and train.targets.dtype == torch.int64
    )
    together = torch.cat([train.inputs, test.inputs]).sort(0).values
    np.testing.assert_allclose(together, np.sort(IMAGES.reshape(20, 16) / 100.0, 0), rtol=1e-6)


@pytest.mark.parametrize("files", ["one", "two"])
def test_mat(files, tmp_path):
    """Rows of pixels and a column of labels, in one file or a pair."""
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
    tests = {"testing_data": IMAGES[:2].reshape(2, 16).astype(float), "testing_label": LABELS[:2]}
    train, test = data.load(str(write_mat(tmp_path / "tested.mat", **x, **y, **tests)))
    assert (
        (len(train), len(test)) == (20, 2)
        and test.classes == train.classes
        and test.inputs.dtype == torch.float32
    )


@pytest.mark.parametrize("mode, shape", [("L", (1, 4, 5)), ("RGB", (3, 4, 5))])
def test_image_folder(mode, shape, tmp_path):
    write_images(tmp_path / "flat", [mode], [(5, 4)])
    write_images(tmp_path / "parts" / "train", [mode], [(5, 4)])
    write_images(tmp_path / "parts" / "test", [mode], [(5, 4)], count=1)
    train, test = data.load(str(tmp_path / "flat"))
    assert (len(train), len(test)) == (10, 2) and train.image_shape == shape
    train, test = data.load(str(tmp_path / "parts"))
    assert (len(train), len(test)) == (12, 3) and train.classes == test.classes == (
        "ant",
        "bee",
        "cat",
    )
    assert (
        train.inputs.shape == (12, 20 * shape[0])
        and train.inputs.dtype == torch.uint8
        and train.scale == 1 / 255
    )
    assert train.inputs[:, 0].tolist() == [0, 1, 2, 3, 10, 11, 12, 13, 20, 21, 22, 23]
    assert train.targets.tolist() == [0] * 4 + [1] * 4 + [2] * 4


def test_colour_channels_stay_apart(tmp_path):
    image = pytest.importorskip("PIL.Image")
    for name in "ab":
        (tmp_path / name).mkdir()
        image.new("RGB", (2, 2), (10, 20, 30)).save(tmp_path / name / "0.png")
    assert data.load(str(tmp_path))[0].inputs[0].tolist() == [10] * 4 + [20] * 4 + [30] * 4


def npz(tmp_path, **arrays):
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


def images(tmp_path, spoil=None, **options):
    write_images(tmp_path / "d", **options)
    if spoil:
        spoil(tmp_path / "d")
    return tmp_path / "d"


BAD = {
    "npz wrong keys": (
        lambda t: npz(t, pixels=IMAGES),
        "needs the arrays x_train and y_train or train_data .*, found pixels",
    ),
    "npz truncated": (functools.partial(damaged, good_npz, 0.5), "f.npz: not a readable .npz file"),
    "npz other": (functools.partial(damaged, good_npz, 0), "f.npz: not a readable .npz file"),
    "lengths": (
        functools.partial(pair, IMAGES, LABELS[:5]),
        r"inputs \(20, 4, 4\) need as many labels, got \(5,\)",
    ),
    "one-hot labels": (
        functools.partial(pair, IMAGES, np.eye(20)),
        r"need as many labels, got \(20, 20\)",
    ),
    "a number": (
        functools.partial(pair, np.float32(1), LABELS),
        r"inputs \(\) need as many labels",
    ),
    "fractions": (
        functools.partial(pair, IMAGES, LABELS + 0.5),
        "labels must be whole numbers, got 0.5",
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
        lambda t: write_mat(t / "f.mat", images=IMAGES, labels=LABELS),
        "needs the variables training_data and training_label, found images, labels",
    ),
    "mat truncated": (functools.partial(damaged, good_mat, 0.5), "f.mat: not a readable .mat file"),
    "mat other": (functools.partial(damaged, good_mat, 0), "f.mat: not a readable .mat file"),
    "image sizes": (
        functools.partial(images, sizes=[(4, 4), (5, 4)]),
        "images must all be 4×4, got 5×4",
    ),
    "image damaged": (
        functools.partial(images, spoil=lambda d: (d / "bee/1.png").write_text("")),
        "bee/1.png: not a readable",
    ),
    "class without images": (
        functools.partial(images, spoil=lambda d: (d / "dog").mkdir()),
        "dog.*one folder for each class",
    ),
    "no classes": (lambda t: t, "Couldn't find any class folder.*one folder for each class"),
    "other file": (
        lambda t: good_npz(t).rename(t / "f.csv"),
        "f.csv: cannot read .csv files; known: .mat, .npz and folders",
    ),
    "missing": (lambda t: t / "none.npz", "there is no .*none.npz"),
}


@pytest.mark.parametrize("case", BAD)
def test_one_clear_line(case, tmp_path):
    make, message = BAD[case]
    source = str(make(tmp_path))
    with pytest.raises(DataError, match=message) as error:
        data.load(source)
    assert "\n" not in str(error.value)
