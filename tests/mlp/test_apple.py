"""Apple's GPU, device mps: no machine of these tests has one, but its rules are known."""

import numpy as np
import pytest
import torch

import mlp
from mlp import spreading
from mlp.data import dataset
from mlp.engines import means
from mlp.loss import SoftmaxCrossEntropy
from tests.checks import assert_equal

MPS = torch.device("mps")


def test_a_device_that_is_not_here_is_one_line():
    if torch.backends.mps.is_available():
        pytest.skip("needs a machine without an Apple GPU")
    for call in (
        lambda: spreading.existing("mps"),
        lambda: mlp.MLPClassifier(device="mps").fit(np.zeros((4, 2)), [0, 1, 0, 1]),
    ):
        with pytest.raises(ValueError, match="mps was asked for, but torch cannot use it") as error:
            call()
        assert "\n" not in str(error.value)


def test_float64_is_refused_where_the_device_has_none():
    assert not dataset.has_float64(MPS) and dataset.has_float64(torch.device("cpu"))
    with pytest.raises(ValueError, match="device mps has no float64, which this precision needs"):
        spreading.check_dtype(MPS, torch.float64)
    spreading.check_dtype(MPS, torch.float32)
    spreading.check_dtype(torch.device("cpu"), torch.float64)


def test_without_float64_a_training_is_the_same(monkeypatch):
    """float64 arrays are rounded before they go to the device, where a batch would round them."""
    x, y = np.random.default_rng(0).normal(3, 2, (40, 4)), np.arange(40) % 3
    data = mlp.Dataset(torch.from_numpy(x), torch.from_numpy(y), scale=0.3, shift=0.1)
    numbers = torch.from_numpy(x[:, :1] * 1.1)

    def trained(given, loss):
        torch.manual_seed(0)
        trainer = mlp.Trainer(mlp.MLP([4, 5, 3 if loss != "mse" else 1]), loss=loss, verbose=False)
        trainer.fit(given, 2, 8)
        return [*trainer.model.parameters()], [row["train_loss"] for row in trainer.history]

    weighted = lambda: SoftmaxCrossEntropy(weight=[1.0, 2.0, 3.0], ignore_index=1)  # noqa: E731
    cases = [(data, "cross_entropy"), ((x, numbers), "mse"), (data, weighted())]
    expected = [trained(*case) for case in cases]
    for place in ("data.given", "data.dataset", "engines.means", "data.pixels"):
        monkeypatch.setattr(f"mlp.{place}.has_float64", lambda device: False)
    fitted = mlp.data.given.fitted(data, torch.device("cpu"), torch.float32, 3)
    assert fitted.inputs.dtype == torch.float32
    for case, (weights, losses) in zip(cases, expected):
        again, rows = trained(*case)
        assert_equal(again, weights)
        assert rows == losses
    assert means.weights(weighted(), torch.arange(3)).tolist() == [1, 0, 3]
