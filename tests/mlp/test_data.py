"""Data sets by name: how rows are read, in which order, and the errors when a data set cannot be
had.
"""

import os
import urllib.error
from pathlib import Path

import pytest
import torch

from mlp import data
from mlp.data import DataError, Dataset, permutation
from tests.checks import assert_equal

NEEDS_MNIST = pytest.mark.skipif(
    not os.environ.get("HANDGRAD_DATA"), reason="HANDGRAD_DATA is unset: no MNIST here"
)


def one_line(error):
    text = str(error.value)
    return "\n" not in text and text


def pixels(rows=20):
    return Dataset(
        torch.randint(0, 256, (rows, 1, 2, 3), dtype=torch.uint8),
        torch.arange(rows) % 3,
        scale=1 / 255,
    )


def test_digits():
    train, test = data.load("digits")
    assert (len(train), len(test)) == (1438, 359)
    for part in (train, test):
        assert (
            part.features == 64
            and part.image_shape == (1, 8, 8)
            and part.inputs.dtype == torch.uint8
        )
        assert part.classes == tuple("0123456789") and part.targets.unique().tolist() == list(
            range(10)
        )
        x = part.read(part.inputs)
        assert x.dtype == torch.float32 and x.min() == 0 and x.max() == 1
    rows = {tuple(row) for row in torch.cat([train.inputs, test.inputs]).tolist()}
    assert len(rows) == 1797, "every image must be in one part only"
    assert_equal([p.inputs for p in data.load("digits")], [train.inputs, test.inputs])


@NEEDS_MNIST
def test_mnist():
    train, test = data.load("mnist")
    assert (len(train), len(test)) == (60_000, 10_000)
    assert (
        train.inputs.dtype == torch.uint8
        and train.features == 784
        and train.image_shape == (1, 28, 28)
    )
    assert train.targets[:5].tolist() == [5, 0, 4, 1, 9] and test.targets[:5].tolist() == [
        7,
        2,
        1,
        0,
        4,
    ]
    x = train.read(train.inputs[:1000])
    assert 0.12 < x.mean() < 0.14 and x.min() == 0 and x.max() == 1
    normal = train.normalized(0.1307, 0.3081)
    assert abs(normal.read(normal.inputs[:10_000]).std() - 1) < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["uint8", "float32", "float64"])
def test_batch_is_indexing(kind, dtype, device):
    """A batch is raw · scale + shift of its rows. Normalisations add up, and the stored rows stay
    unchanged.
    """
    raw = pixels().inputs if kind == "uint8" else torch.randn(20, 6, dtype=getattr(torch, kind))
    stored = (
        Dataset(raw, torch.arange(20) % 3, scale=0.5, shift=1.0)
        .normalized(0.2, 0.4)
        .normalized(-0.5, 2.0)
        .to(device)
    )
    expected = ((raw.double() * 0.5 + 1.0 - 0.2) / 0.4 + 0.5) / 2.0
    tolerance = 4 * torch.finfo(dtype).eps * expected.abs().max()
    for rows in ([3, 3, 0], [19, 1], [5, 6, 7], []):
        x, y = stored.batch(torch.tensor(rows, dtype=torch.int64, device=device), dtype)
        assert x.dtype == dtype and x.shape == (len(rows), 6) and y.dtype == torch.int64
        assert ((x.double().cpu() - expected[rows]).abs() <= tolerance).all()
        assert y.tolist() == [row % 3 for row in rows]
    chunks = list(stored.chunks(8, dtype))
    assert [len(x) for x, _ in chunks] == [8, 8, 4]
    assert_equal(torch.cat([x for x, _ in chunks]), stored.read(stored.inputs, dtype))
    assert_equal(torch.cat([y for _, y in chunks]), stored.targets)
    assert_equal(stored.inputs.cpu(), raw.reshape(20, 6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_batches_reuse_their_buffers(dtype):
    """All batches of a size use the same memory. Engines that repeat recorded calls need this."""
    for inputs in (pixels().inputs, torch.randn(20, 6), torch.randn(20, 6, dtype=torch.float64)):
        stored = Dataset(inputs, torch.randn(20, 2), shift=1.0)
        batches = [stored.batch(torch.arange(start, start + 4), dtype) for start in (0, 4, 8)]
        assert len({(x.data_ptr(), y.data_ptr()) for x, y in batches}) == 1


def test_permutation(device):
    draw = permutation(50, 1, 2, device)
    assert draw.device.type == device and draw.sort().values.tolist() == list(range(50))
    torch.manual_seed(99)
    assert_equal(permutation(50, 1, 2, device), draw)
    for seed, epoch in ((1, 3), (2, 2), (2, 1)):
        assert not torch.equal(permutation(50, seed, epoch, device), draw)


def test_data_sets_that_are_refused():
    x = torch.zeros(4, 3)
    for targets, classes, message in (
        (torch.zeros(3), (), "data: 4 inputs but 3 targets"),
        (
            torch.tensor([0, 1, 5, 1]),
            ("a", "b"),
            "label 5 of sample 2 is not one of the 2 classes, 0 to 1",
        ),
        (torch.tensor([0, 1, 0, -1]), (), "label -1 of sample 3 is not one of the 2 classes"),
    ):
        with pytest.raises(DataError, match=message):
            Dataset(x, targets, classes)
    with pytest.raises(DataError, match="data: empty: it has no samples"):
        Dataset(x[:0], torch.zeros(0, dtype=torch.int64))
    assert len(pixels().take(7)) == 7
    assert not Dataset(x, torch.randn(4, 2)).is_classification


def test_options_that_do_not_fit_a_named_data_set():
    """A shape or a task that does not fit is refused, never ignored."""
    assert data.load("digits", image="8x8")[0].image_shape == (1, 8, 8)
    with pytest.raises(DataError, match=r"digits: its images are \(1, 8, 8\), but 4x16 was asked"):
        data.load("digits", image="4x16")
    with pytest.raises(DataError, match=r"digits .*: has classes, but the task is 'regression'"):
        data.load("digits", task="regression")
    for source in ("", "digits,", ","):
        with pytest.raises(DataError, match="unknown data set"):
            data.load(source)


def test_unknown_name():
    with pytest.raises(
        DataError, match=f"unknown data set 'mnits': known are {', '.join(data.NAMES)}"
    ) as error:
        data.load("mnits")
    assert one_line(error)


@pytest.mark.parametrize(
    "fail",
    [urllib.error.URLError("down"), RuntimeError("Error downloading\ntrace"), OSError()],
    ids=repr,
)
@pytest.mark.parametrize("name", data.TORCHVISION)
def test_no_network(name, fail, tmp_path, monkeypatch):
    """Without a network, the error says where to put the files by hand, and that digits needs no
    download.
    """
    kind = getattr(pytest.importorskip("torchvision.datasets"), data.TORCHVISION[name])
    monkeypatch.setattr(kind, "download", lambda self: (_ for _ in ()).throw(fail))
    message = f"{name}: cannot be downloaded into.*{kind.__name__}/raw by hand, or train on digits"
    with pytest.raises(DataError, match=message) as error:
        data.load(name, tmp_path / "new")
    assert one_line(error)


def test_folder_that_cannot_be_written(tmp_path, monkeypatch):
    """A folder that cannot be written is named before anything is downloaded. os.access is
    replaced, because root may write everywhere.
    """
    pytest.importorskip("torchvision")
    (tmp_path / "file").write_text("")
    with pytest.raises(
        DataError,
        match=r"mnist: cannot write the data folder .*/file/sub: .*; choose another --data-dir",
    ):
        data.load("mnist", tmp_path / "file" / "sub")
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    with pytest.raises(DataError, match="mnist: cannot write the data folder"):
        data.load("mnist", tmp_path)


def test_default_folder(monkeypatch):
    monkeypatch.setenv("HANDGRAD_DATA", "/data")
    assert data.default_dir() == Path("/data")
    monkeypatch.delenv("HANDGRAD_DATA")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert data.default_dir() == Path("/cache/handgrad")


@pytest.mark.parametrize(
    "content", [b"", b"junk", bytes([0, 0, 8, 3] + [0, 0, 0, 9] * 3)], ids=["empty", "junk", "cut"]
)
def test_damaged_mnist_file(content, tmp_path):
    """An empty, foreign or cut file is refused in one line."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        (raw / f"{name}-ubyte").write_bytes(content)
    with pytest.raises(DataError, match=r"mnist: a file in .*MNIST/raw is damaged") as error:
        data.load("mnist", tmp_path)
    assert one_line(error)
