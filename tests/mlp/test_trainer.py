"""trainer: fit, evaluate and resume on real digits and on tensors; what stops it, and what it leaves behind."""

import copy
import math
import time

import pytest
import torch
import torch.nn.functional as F

import mlp
from mlp import MLP, Diverged, MeanSquaredError, Net, Trainer, recipes
from mlp.optim import OPTIMIZERS
from mlp.trainer import line

KEYS = ["epoch", "train_loss", "train_accuracy", "test_loss", "test_accuracy", "seconds", "samples_per_second"]


def tensors(rows=70, seed=0):
    """A pair of tensors that three linear classes explain."""
    x = torch.randn(rows, 6, generator=torch.Generator().manual_seed(seed))
    return x, (x @ torch.eye(6)[:, :3]).argmax(1)


def make(device, optimizer=None, **options):
    torch.manual_seed(0)
    return Trainer(MLP((6, 8, 3)).to(device), optimizer=optimizer, verbose=False, **options)


def test_digits(device):
    """The default recipe: at least 96% of the test digits, in seconds."""
    recipe = recipes.get("default")
    train, test = recipe.prepare(*mlp.data.load("digits"))
    trainer = Trainer(recipe.model(train, device=device), recipe.make_loss(), recipe.make_optimizer, verbose=False)
    started = time.perf_counter()
    history = trainer.fit(train, recipe.epochs, recipe.batch_size, test)
    assert time.perf_counter() - started < 20
    assert history[-1]["test_accuracy"] >= 0.96
    assert [list(row) for row in history] == [KEYS] * recipe.epochs
    assert str(history).splitlines()[-1] == line(history[-1]) and line(history[0]).startswith("epoch   1  loss ")


def test_fit_counts_epochs_on(device):
    """`epochs` counts those already made; the history is of all; callbacks see every epoch and step."""
    trainer, rows, steps = make(device), [], []
    for epochs in (2, 2, 5, 0):
        trainer.fit(tensors(), epochs, 32, on_epoch=rows.append, on_step=lambda n=1: steps.append(n))
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4, 5] and rows == list(trainer.history)
    assert sum(steps) == 5 * 3
    assert "test_loss" not in rows[0] and 0 <= rows[-1]["train_accuracy"] <= 1


def test_order_is_the_seeds(device):
    losses = [[row["train_loss"] for row in make(device).fit(tensors(), 3, 32, seed=seed)] for seed in (1, 1, 2)]
    assert losses[0] == losses[1] != losses[2]


def test_drop_last(device):
    """The last, smaller batch is left out: six steps of 32 in three epochs of 70."""
    trainer, steps = make(device), []
    trainer.fit(tensors(), 3, 32, drop_last=True, on_step=lambda n=1: steps.append(n))
    assert sum(steps) == 6
    with pytest.raises(ValueError, match="drop_last leaves nothing of 70 samples in batches of 71"):
        trainer.fit(tensors(), 4, 71, drop_last=True)


def test_regression(device):
    """Floating-point targets: no accuracy, and the loss falls far below the targets' variance."""
    x = torch.randn(200, 6)
    y = torch.stack([x[:, 0] - x[:, 1], x[:, 2]], 1)
    torch.manual_seed(0)
    trainer = Trainer(MLP((6, 16, 2), "tanh").to(device), MeanSquaredError(), lambda p: mlp.Adam(p, lr=0.01), verbose=False)
    last = trainer.fit((x, y), 60, 20, evaluate=(x, y))[-1]
    assert last["train_accuracy"] is last["test_accuracy"] is None
    assert last["test_loss"] < 0.05 * y.var() and "accuracy" not in line(last)
    assert last["test_loss"] == pytest.approx(float(F.mse_loss(trainer.model(x.to(device)).detach().cpu(), y)), rel=1e-4)


@pytest.mark.parametrize("kind", [MLP, Net])
def test_evaluate(kind, device):
    """Means over all samples, whatever the pieces; the same for a sum of losses, taken per sample."""
    x, y = tensors(5000)
    model = kind((6, 8, 3), device=device)
    trainer = Trainer(model, engine="manual", verbose=False)
    with torch.no_grad():
        logits = (model.predict if kind is Net else model)(x.to(device)).cpu()
    result = trainer.evaluate((x, y))
    assert result["test_loss"] == pytest.approx(float(F.cross_entropy(logits, y)), rel=1e-5)
    assert result["test_accuracy"] == float((logits.argmax(1) == y).double().mean())
    summed = Trainer(model, mlp.SoftmaxCrossEntropy(reduction="sum"), engine="manual", verbose=False)
    assert summed.evaluate((x, y))["test_loss"] == pytest.approx(result["test_loss"], rel=1e-5)


def test_scheduler(device):
    """Stepped once an epoch, heard by whichever engine trains: the rate at the end, and a run that differs."""
    trainer, steady = make(device, lambda p: mlp.SGD(p, lr=0.1)), make(device, lambda p: mlp.SGD(p, lr=0.1))
    scheduler = torch.optim.lr_scheduler.StepLR(trainer.optimizer, step_size=1, gamma=0.5)
    history = trainer.fit(tensors(), 3, 32, scheduler=scheduler)
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(0.1 / 8)
    steady.fit(tensors(), 1, 32)
    for lr in (0.05, 0.025):
        steady.optimizer.param_groups[0]["lr"] = lr
        steady.fit(tensors(), len(steady.history) + 1, 32)
    assert [row["train_loss"] for row in history] == [row["train_loss"] for row in steady.history]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_resume_is_as_if_never_stopped(name, device):
    """Weights, optimizer state and losses, bit for bit, in a trainer that had trained something else before."""
    options = {"lr": 0.05, "momentum": 0.9} if name == "sgd" else {"lr": 0.05}
    straight, first, second = (make(device, lambda p: OPTIMIZERS[name](p, **options)) for _ in range(3))
    data = [t.to(device) for t in tensors()]
    straight.fit(data, 4, 32)
    first.fit(data, 2, 32)
    second.fit(data, 3, 32, seed=5)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    second.fit(data, 4, 32)
    for p, q in zip(straight.model.parameters(), second.model.parameters()):
        assert torch.equal(p, q)
    assert [row["train_loss"] for row in straight.history] == [row["train_loss"] for row in second.history]


@pytest.mark.parametrize("engine", ["auto", "autograd"])
def test_diverged(engine, device):
    """One line with epoch, step and rate; the weights and the history are those of the last good epoch."""
    x, y = tensors()
    trainer = make(device, lambda p: mlp.SGD(p, lr=0.1, momentum=0.9), engine=engine)
    trainer.fit(tensors(), 2, 32)
    good = copy.deepcopy(trainer.model.state_dict())
    x[40] = float("inf")
    with pytest.raises(Diverged, match=r"the loss is nan at step \d of epoch 3 with learning rate 0.1; .* end of epoch 2") as error:
        trainer.fit((x, y), 5, 32)
    assert "\n" not in str(error.value)
    for name, p in trainer.model.state_dict().items():
        assert torch.equal(p, good[name])
    assert len(trainer.history) == 2
    rows = trainer.fit(tensors(), 4, 32)
    assert all(math.isfinite(row["train_loss"]) for row in rows), "it must be able to go on from there"


def test_what_does_not_fit(device):
    x, y = tensors()
    numbers = torch.zeros(70, 2)
    for data, evaluate, batch, message in (
        ((x[:, :5], y), None, 32, "fit: the network takes 6 features, but data has 5"),
        ((x, y), (x[:, :5], y), 32, "fit: the network takes 6 features, but data has 5"),
        ((x, y + 1), None, 32, "fit: the network has 3 outputs, but data has 4 classes"),
        ((x, numbers), None, 32, r"\(\d+, 3\).*\(\d+, 2\)"),
        ((x, y), None, 0, "batch_size must be positive and epochs not negative, got 0 and 1"),
        ((x[:0], y[:0]), None, 32, "data: empty"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            make(device, engine="autograd").fit(data, 1, batch, evaluate)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="reduction mean or sum, got none"):
        make(device, loss=mlp.SoftmaxCrossEntropy(reduction="none"))
    other = Trainer(MLP((6, 9, 3)).to(device), verbose=False)
    before = copy.deepcopy(other.model.state_dict())
    with pytest.raises(ValueError, match="the state of another network"):
        other.load_state_dict(make(device).state_dict())
    assert all(torch.equal(p, before[name]) for name, p in other.model.state_dict().items())
