"""Arrays, frames, and torch's datasets and loaders become a data set with the same numbers."""

import numpy as np
import pytest
import torch
from torch.utils.data import (
    DataLoader,
    IterableDataset,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
)

from mlp import Dataset
from mlp.data import DataError

X = np.random.default_rng(0).normal(size=(20, 5)).astype(np.float32)
Y = np.arange(20) % 3
PAIR = TensorDataset(torch.from_numpy(X), torch.from_numpy(Y))


class Squares(torch.utils.data.Dataset):
    """A map-style data set that gives samples one by one."""

    def __len__(self):
        return 20

    def __getitem__(self, i):
        return torch.from_numpy(X[i]), int(Y[i])


class Frame:
    """A frame of another library than pandas."""

    columns, dtypes = list("abcde"), ["Float32"] * 5

    def to_numpy(self):
        return X


def frames():
    pandas = pytest.importorskip("pandas")
    return pandas.DataFrame(X, columns=list("abcde")), pandas.Series(Y)


SAME = {
    "pair of arrays": lambda: (X, Y),
    "list of both": lambda: [X, Y],
    "tensors": lambda: PAIR.tensors,
    "lists": lambda: (X.tolist(), Y.tolist()),
    "big-endian": lambda: (X.astype(">f4"), Y.astype(">i8")),
    "reversed": lambda: (X[::-1].copy()[::-1], Y[::-1].copy()[::-1]),
    "Fortran's order": lambda: (np.asfortranarray(X), Y),
    "a column of labels": lambda: (X, Y[:, None]),
    "unsigned labels": lambda: (X, Y.astype(np.uint64)),
    "frames": frames,
    "objects": lambda: (X.astype(object), Y.astype(object)),
    "TensorDataset": lambda: PAIR,
    "DataLoader": lambda: DataLoader(PAIR, 3),
    "shuffling DataLoader": lambda: DataLoader(PAIR, 7, shuffle=True, drop_last=True),
    "map-style": lambda: Squares(),
    "DataLoader of it": lambda: DataLoader(Squares(), 4),
    "Subset": lambda: Subset(PAIR, range(20)),
    "sparse": lambda: (pytest.importorskip("scipy.sparse").csr_matrix(X), Y),
    "sparse tensor": lambda: (torch.from_numpy(X).to_sparse(), Y),
    "another frame": lambda: (Frame(), Y),
    "masked nowhere": lambda: (np.ma.masked_array(X, False), Y),
    "needs grad": lambda: (torch.from_numpy(X).requires_grad_(), torch.from_numpy(Y)),
}


@pytest.mark.parametrize("kind", SAME)
def test_numbers_stay_as_they_are(kind):
    data = Dataset.of(SAME[kind]())
    assert data.targets.tolist() == Y.tolist() and data.classes == ("0", "1", "2")
    assert torch.equal(data.read(data.inputs), torch.from_numpy(X)) and data.scale == 1
    assert not data.inputs.requires_grad
    assert Dataset.of(data) is data


def test_words_are_classes_in_the_order_of_training():
    words = np.array(["cat", "ant", "bee"])[Y]
    train = Dataset.of(X, words, name="train")
    assert train.classes == ("ant", "bee", "cat") and train.targets[:3].tolist() == [2, 0, 1]
    test = Dataset.of(X[:2], ["cat", "bee"], like=train)
    assert test.classes == train.classes and test.targets.tolist() == [2, 1]
    with pytest.raises(DataError, match="label 'dog' of sample 1 is not one of"):
        Dataset.of(X[:2], ["cat", "dog"], like=train)
    pandas = pytest.importorskip("pandas")
    category = Dataset.of(X, pandas.Series(words, dtype="category"))
    assert torch.equal(category.targets, train.targets)


def test_large_unsigned_numbers():
    data = Dataset.of(np.array([[2**63 + 2**40], [1]], np.uint64), [0, 1])
    assert data.inputs.flatten().tolist() == [2.0**63 + 2.0**40, 1]


def test_targets_of_a_regression_stay():
    for targets in (X[:, :2].astype(np.float64), X[:, 0]):
        data = Dataset.of(X, targets)
        assert not data.is_classification and data.targets.dtype == torch.float32
        assert torch.equal(data.targets, torch.from_numpy(targets).float())


@pytest.mark.parametrize(
    "axes, shape",
    [((8, 6), (1, 8, 6)), ((3, 8, 6), (3, 8, 6)), ((16, 2, 2), (16, 2, 2)), ((4,), None)],
    ids=str,
)
def test_images_keep_their_axes(axes, shape):
    assert Dataset.of(np.zeros((20, *axes), np.float32), Y).image_shape == shape


def one_column(**columns):
    return pytest.importorskip("pandas").DataFrame({"a": [1.0] * 20, **columns})


class Endless(IterableDataset):
    def __iter__(self):
        return iter(())


BAD = {
    "channels last": (lambda: (np.zeros((20, 8, 9, 3)), Y), "channels last.*permute"),
    "words": (lambda: (np.array([["a"]] * 20), Y), "inputs: must be arrays of numbers, got <U1"),
    "complex": (lambda: (X.astype(complex), Y), "inputs: must be real numbers, got complex"),
    "records": (lambda: (np.zeros(20, [("a", "f4"), ("b", "i4")]), Y), "the fields a, b"),
    "a column of words": (lambda: (one_column(b=["x"] * 20), Y), "column b holds"),
    "missing": (
        lambda: (one_column(b=[*[1.0] * 19, None]), Y),
        r"inputs must be finite, got nan in row 19, column 1 \(b\)",
    ),
    "infinite": (
        lambda: (np.where(np.arange(100).reshape(20, 5) == 13, np.inf, X), Y),
        "inputs must be finite, got inf in row 2, column 3",
    ),
    "masked": (
        lambda: (np.ma.masked_array(X, np.arange(100).reshape(20, 5) % 50 == 13), Y),
        "got nan in row 2, column 3, and 1 more; rows",
    ),
    "in many columns": (
        lambda: (np.where(np.arange(100).reshape(20, 5) > 92, np.nan, X), Y),
        "got nan in row 18, column 3, and 6 more in columns 0, 1, 2, 3, 4; rows",
    ),
    "no columns": (lambda: (X[:, :0], Y), r"inputs \(20, 0\) have no numbers in a sample"),
    "a target that is not finite": (
        lambda: (X, np.where(Y == 2, np.nan, 1.5)),
        "targets must be finite, got nan in row 2, and 5 more",
    ),
    "one-hot": (lambda: (X, np.eye(3, dtype=int)[Y]), r"labels must be \(N,\), got \(20, 3\)"),
    "an id": (lambda: (X, Y * 1_000_000), "label 2000000 would make 2,000,001 classes of 20"),
    "a huge id": (lambda: (X, Y * 10**9), "label 2000000000 would make 2,000,000,001 classes"),
    "negative": (lambda: (X, -Y), "label -1 of sample 1 is not one of"),
    "lengths": (lambda: (X, Y[:5]), r"inputs \(20, 5\) need as many labels, got \(5,\)"),
    "a number": (lambda: (X, 3), r"inputs \(20, 5\) need as many labels, got \(\)"),
    "three": (lambda: (X, X, Y), "got tuple of 3"),
    "alone": (lambda: X, "got ndarray"),
    "three tensors": (lambda: TensorDataset(*PAIR.tensors, PAIR.tensors[0]), r"got list of 3|of 3"),
    "weighted draws": (
        lambda: DataLoader(PAIR, 3, sampler=WeightedRandomSampler([1.0] * 20, 20)),
        "WeightedRandomSampler of this DataLoader cannot be used.*give the dataset itself",
    ),
    "endless": (Endless, "an iterable dataset has no known end"),
    "too sparse": (
        lambda: (pytest.importorskip("scipy.sparse").coo_array((10**6, 10**6)), Y),
        r"sparse array of shape \(1000000, 1000000\) would take 7451 GiB",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_one_clear_line(kind):
    make, message = BAD[kind]
    with pytest.raises(DataError, match=message) as error:
        Dataset.of(make())
    assert "\n" not in str(error.value)


def test_fingerprint():
    """Equal contents have equal fingerprints. Another number, label, shape, dtype or class name
    gives another.
    """
    data = Dataset.of(X, Y)
    print_ = data.fingerprint()
    assert print_ == Dataset.of(X.copy(), torch.from_numpy(Y)).fingerprint()
    assert (print_.shape, print_.dtype) == ([20, 5], "float32")
    changed = X.copy()
    changed[19, 4] += 1e-6
    others = [
        Dataset.of(changed, Y),
        Dataset.of(X, (Y + 1) % 3),
        Dataset.of(X.astype(np.float64), Y),
        Dataset.of(X.reshape(10, 10), Y[:10]),
        Dataset(data.inputs, data.targets, ("a", "b", "c")),
        data.take(19),
    ]
    hashes = [other.fingerprint().hash for other in others]
    assert len({*hashes, print_.hash}) == 7
    assert data.standardized().fingerprint() == print_, "it must be that of the original data"
    assert data.standardized().take(5).fingerprint() != print_
