"""Errors of Trainer are one line, and the weights stay those of the last good epoch."""

import copy
import math

import pytest
import torch

import mlp
from mlp import MLP, Diverged, Trainer
from tests.mlp.test_trainer import make, tensors


@pytest.mark.parametrize("engine", ["auto", "autograd"])
def test_diverged(engine, device):
    """The error is one line with epoch, step and rate. Weights and history are those of the last
    good epoch.
    """
    x, y = tensors()
    trainer = make(device, lambda p: mlp.SGD(p, lr=0.1, momentum=0.9), engine=engine)
    trainer.fit(tensors(), 2, 32)
    good = copy.deepcopy(trainer.model.state_dict())
    x[40:] *= 5e37  # data must be finite, but products of these numbers are not
    message = (
        r"the loss is (nan|inf) at step \d of epoch 3 with learning rate 0.1; .* end of epoch 2"
    )
    with pytest.raises(Diverged, match=message) as error:
        trainer.fit((x, y), 5, 32)
    assert "\n" not in str(error.value)
    for name, p in trainer.model.state_dict().items():
        assert torch.equal(p, good[name])
    assert len(trainer.history) == 2
    rows = trainer.fit(tensors(), 4, 32)
    assert all(math.isfinite(row["train_loss"]) for row in rows), "training must be able to go on"


def test_data_that_do_not_fit_the_network(device):
    x, y = tensors()
    numbers = torch.zeros(70, 2)
    for data, evaluate, batch, message in (
        ((x[:, :5], y), None, 32, "fit: the network takes 6 features, but data has 5"),
        ((x, y), (x[:, :5], y), 32, "fit: the network takes 6 features, but data has 5"),
        ((x, y + 1), None, 32, "fit: the network has 3 outputs, but data has 4 classes"),
        ((x, numbers), None, 32, r"\(\d+, 3\).*\(\d+, 2\)"),
        ((x, y), None, 0, "batch_size must be a whole number, at least 1, got 0"),
        ((x[:0], y[:0]), None, 32, "data: empty"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            make(device, engine="autograd").fit(data, 1, batch, evaluate)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="reduction mean or sum, got none"):
        make(device, loss=mlp.SoftmaxCrossEntropy(reduction="none"))


def test_scheduler_of_the_wrong_kind(device):
    x, y = torch.randn(8, 6, device=device), torch.zeros(8, dtype=torch.int64, device=device)
    with pytest.raises(
        TypeError,
        match="scheduler must be a torch scheduler, or a function of the optimizer, got 3",
    ):
        make(device, engine="autograd").fit((x, y), 1, scheduler=3)


def test_the_state_of_another_network(device):
    """Such a state is refused, and nothing changes."""
    other = Trainer(MLP((6, 9, 3)).to(device), verbose=False)
    before = copy.deepcopy(other.model.state_dict())
    with pytest.raises(
        ValueError, match=r"another network: it has .*\(8, 6\).*, but .*\(9, 6\).* is needed"
    ):
        other.load_state_dict(make(device).state_dict())
    assert all(torch.equal(p, before[name]) for name, p in other.model.state_dict().items())


@pytest.mark.parametrize("name", ["epochs", "batch_size", "seed", "augment"])
def test_an_argument_that_is_no_integer(name):
    trainer = Trainer(MLP((6, 3)), verbose=False)
    with pytest.raises(ValueError, match=f"fit: {name} must be a whole number.*, got 1.5"):
        trainer.fit(tensors(), **{name: 1.5})


def test_rows_of_another_width_are_refused_by_name():
    trainer = Trainer(MLP((6, 3)), verbose=False)
    trainer.fit(tensors(), 1)
    x, y = tensors()
    takes = "the network takes 6 features, but"
    with pytest.raises(ValueError, match=f"predict: {takes} x has 5"):
        trainer.predict(x[:, :5])
    with pytest.raises(ValueError, match=f"predict: {takes} x has 1; give one row as x\\[None\\]"):
        trainer.predict(x[0])
    with pytest.raises(ValueError, match=f"evaluate: {takes} data has 5"):
        trainer.evaluate((x[:, :5], y))
