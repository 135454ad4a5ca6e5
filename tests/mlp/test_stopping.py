"""Named schedules, clipped gradients, early stopping, and callbacks that end a training."""

import copy
import itertools
import math

import pytest
import torch
from torch import nn

import mlp
from kernels import cpu
from mlp import MLP, Trainer
from mlp.schedule import SCHEDULES, Plan, named
from mlp.stopping import EarlyStopping, kept_row


def tensors():
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    return x, x[:, :3].argmax(1)


def trainer(engine="manual", **options):
    torch.manual_seed(0)
    model = MLP([6, 8, 3])
    sgd = {"lr": 0.2, "momentum": 0.9}
    return Trainer(
        model, optimizer=lambda p: mlp.SGD(p, **sgd), engine=engine, verbose=False, **options
    )


def weights(made):
    return torch.cat([p.detach().flatten() for p in made.model.parameters()])


def rates(name, plan):
    """The learning rate of each epoch, or of each step for onecycle."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    made = named(name, plan)(optimizer)
    steps, seen = plan.epochs * (plan.steps if name == "onecycle" else 1), []
    for step in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if step + 1 < steps:
            made.step()
    return seen


def test_values_of_named_schedules():
    cosine = [(1 + math.cos(math.pi * e / 4)) / 2 for e in range(4)]
    assert rates("cosine", Plan(4, 3)) == pytest.approx(cosine)
    assert rates("cosine", Plan(6, 3, 2)) == pytest.approx([1 / 3, 2 / 3, *cosine])
    assert rates("constant", Plan(4, 3, 1)) == pytest.approx([0.5, 1, 1, 1])
    assert rates("step", Plan(6, 1)) == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    cycle = rates("onecycle", Plan(4, 5, 1))
    assert cycle[0] == pytest.approx(1 / 25) and cycle[4] == pytest.approx(1)
    assert cycle[-1] < 1e-4 and cycle == sorted(cycle[:5]) + sorted(cycle[5:], reverse=True)
    assert named("constant", Plan(4, 3)) is None


def test_named_schedules_refuse():
    with pytest.raises(ValueError, match=f"unknown schedule 'sine'; known: {', '.join(SCHEDULES)}"):
        named("sine", Plan(4, 3))
    with pytest.raises(ValueError, match="warm-up must be shorter than the 4 epochs, got 4"):
        named("cosine", Plan(4, 3, 4))
    with pytest.raises(ValueError, match="plateau has no warm-up"):
        named("plateau", Plan(4, 3, 1))


@pytest.mark.parametrize("name", [*SCHEDULES])
def test_engines_agree_under_a_schedule(name):
    made = {engine: trainer(engine) for engine in ("autograd", "manual")}
    if cpu.serves(torch.zeros(1)):
        made["epoch"] = trainer("epoch")
    for one in made.values():
        one.fit(tensors(), 4, 16, scheduler=named(name, Plan(4, 3)))
    for one in made.values():
        torch.testing.assert_close(weights(one), weights(made["autograd"]))
        rate = one.optimizer.param_groups[0]["lr"]
        assert rate == made["autograd"].optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize("kind", [mlp.SGD, mlp.Adam, torch.optim.SGD])
@pytest.mark.parametrize("engine", ["autograd", "manual"])
def test_clipping_is_torchs(engine, kind):
    made = trainer(engine, clip_norm=0.05)
    made = Trainer(
        made.model,
        optimizer=lambda p: kind(p, lr=0.1),
        engine=engine,
        verbose=False,
        clip_norm=0.05,
    )
    twin = copy.deepcopy(made.model)
    optimizer = getattr(torch.optim, kind.__name__)(twin.parameters(), lr=0.1)
    x, y = tensors()
    for epoch in (1, 2):
        for rows in mlp.data.permutation(40, 0, epoch).split(16):
            optimizer.zero_grad()
            nn.functional.cross_entropy(twin(x[rows]), y[rows]).backward()
            norm = nn.utils.clip_grad_norm_(twin.parameters(), 0.05)
            assert norm > 0.05
            optimizer.step()
    made.fit((x, y), 2, 16)
    for p, q in zip(made.model.parameters(), twin.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


def test_auto_takes_an_engine_that_clips():
    made = trainer("auto", clip_norm=1.0)
    made.fit(tensors(), 1, 16)
    assert made.engine.name == "manual"
    with pytest.raises(ValueError, match="clip_norm must be positive and finite, got 0"):
        trainer(clip_norm=0)


def test_early_stopping_keeps_the_best():
    model, stopping = nn.Linear(1, 1, bias=False), EarlyStopping(2)
    for epoch, loss in enumerate([3.0, 2.0, 2.5, math.nan], 1):
        assert not stopping.is_over
        nn.init.constant_(model.weight, epoch)
        stopping.after_epoch({"epoch": epoch, "train_loss": 0.0, "test_loss": loss}, [model])
    assert stopping.is_over and (stopping.epoch, stopping.best) == (2, 2.0)
    stopping.take_best([model])
    assert model.weight.item() == 2
    EarlyStopping.of(copy.deepcopy(stopping.state_dict())).go_on([model])
    assert model.weight.item() == 4


def test_early_stopping_ends_a_fit():
    x, y = tensors()
    wrong = (x, (y + 1) % 3)  # while the training loss falls, the loss on these rises
    made = trainer()
    history = made.fit((x, y), 20, 16, wrong, early_stopping=2)
    losses = [row["test_loss"] for row in history]
    best = min(range(len(losses)), key=losses.__getitem__)
    assert len(losses) == best + 3 < 20
    assert made.evaluate(wrong)["test_loss"] == pytest.approx(losses[best])


def test_validation_decides():
    """Early stopping and plateau use the validation loss. Here it rises and the test loss falls."""
    x, y = tensors()
    wrong = (x, (y + 1) % 3)
    made, plateau = trainer(), []

    def scheduler(optimizer):
        plateau.append(torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=50))
        return plateau[-1]

    history = made.fit(
        (x, y), 20, 16, (x, y), validation=wrong, early_stopping=2, scheduler=scheduler
    )
    losses = [row["validation_loss"] for row in history]
    best = min(range(len(losses)), key=losses.__getitem__)
    assert len(losses) == best + 3 < 20
    assert made.evaluate(wrong)["test_loss"] == pytest.approx(losses[best])
    assert history[-1]["test_loss"] < history[best]["test_loss"]
    assert plateau[0].best == made.stopping.best == losses[best]
    assert kept_row(history, 2, 20) is history[best]
    assert kept_row(history, None, 20) is kept_row(history, 2 * len(losses), 20) is history[-1]
    assert history[-1]["validation_accuracy"] < history[-1]["test_accuracy"]
    with pytest.raises(ValueError, match="the network takes 6 features, but"):
        made.fit((x, y), 1, 16, validation=(x[:, :5], y))


def test_early_stopping_is_resumed():
    whole, part = trainer(), trainer()
    whole.fit(tensors(), 6, 16, early_stopping=3)
    part.fit(tensors(), 3, 16, early_stopping=3)
    again = trainer()
    again.load_state_dict(copy.deepcopy(part.state_dict()))
    again.fit(tensors(), 6, 16, early_stopping=3)
    assert [row["train_loss"] for row in again.history] == [
        row["train_loss"] for row in whole.history
    ]
    assert torch.equal(weights(again), weights(whole))
    assert again.stopping.epoch == whole.stopping.epoch


def test_callbacks_end_a_training():
    made = trainer()
    made.fit(tensors(), 5, 16, on_epoch=lambda row: row["epoch"] < 2)
    assert [row["epoch"] for row in made.history] == [1, 2]


@pytest.mark.parametrize("engine", ["autograd", "manual"])
def test_a_step_ends_a_training(engine):
    made, steps = trainer(engine), itertools.count(1)
    made.fit(tensors(), 5, 16, on_step=lambda: next(steps) < 5)  # the second step of epoch 2
    assert [row["epoch"] for row in made.history] == [1, 2]
    twin = trainer(engine)
    twin.fit(tensors(), 1, 16)
    rows = mlp.data.permutation(40, 0, 2)[:32]
    x, y = tensors()
    values = [twin.engine.step(x[part], y[part])[1].item() for part in rows.split(16)]
    assert made.history[1]["train_loss"] == pytest.approx(sum(values) / 2)
    torch.testing.assert_close(weights(made), weights(twin))
