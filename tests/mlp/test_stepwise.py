"""Engines of single steps: unusual optimizers, two trainers of a module, replayed steps."""

import pytest
import torch

import mlp
from mlp import ENGINES, MLP, Dataset, Trainer
from mlp.engines.replay import Replay
from mlp.loss import LOSSES
from tests.mlp.test_engines import assert_same_run, problem


@pytest.mark.parametrize("engine", ENGINES)
def test_groups_in_another_order(engine, device):
    """An optimizer may hold the parameters in another order than the network, and only some."""
    results = []
    for name in (engine, "autograd"):
        torch.manual_seed(1)
        model = MLP((12, 12, 12, 4), "tanh").to(device)
        first, second, third = ([layer.weight, layer.bias] for layer in model)
        still = [p.detach().clone() for p in second]
        optimizer = mlp.SGD([{"params": third, "lr": 0.05}, {"params": first}], lr=0.1)
        if refusal := ENGINES[name].refuses(model, LOSSES["cross_entropy"](), optimizer, 16):
            pytest.skip(f"by design: {refusal}")
        rows = Trainer(model, optimizer=optimizer, engine=name).fit(problem(), 3, 16)
        assert all(torch.equal(p, q) for p, q in zip(still, second)), (
            "parameters outside the optimizer changed"
        )
        results.append(
            (
                [(row["train_loss"], row["train_accuracy"]) for row in rows],
                [p.detach() for p in model.parameters()],
            )
        )
    assert_same_run(*results)


def test_two_trainers_of_one_module(device):
    """Two trainers can take turns on one module, although each puts its parameters into a Net of
    its own.
    """
    torch.manual_seed(1)
    model = MLP((12, 6, 4)).to(device)
    trainers = [Trainer(model, engine="manual"), Trainer(model, engine="manual")]
    losses = [
        trainers[i % 2].fit(problem(), 1 + i // 2, 16, seed=i)[-1]["train_loss"] for i in range(8)
    ]
    assert losses == sorted(losses, reverse=True)
    assert trainers[0].evaluate(problem()) == trainers[1].evaluate(problem())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("stored", [torch.uint8, torch.float32, torch.float64], ids=str)
def test_steps_are_recorded_once(stored, dtype, device, monkeypatch):
    """On a CPU a step is recorded once for whole batches and once for the last one. All other steps
    are replays, for every dtype of data.
    """
    if device != "cpu":
        pytest.skip("replayed steps need a machine without a GPU")
    recorded = []
    enter = Replay.__enter__
    monkeypatch.setattr(Replay, "__enter__", lambda self: recorded.append(self) or enter(self))
    data = problem()
    data = Dataset(data.inputs.to(stored), data.targets, scale=data.scale, shift=data.shift)
    for make, most in (
        (lambda p: mlp.SGD(p, lr=0.1), 2),
        (lambda p: mlp.SGD(p, lr=0.1, momentum=0.9), 5),
        (mlp.Adam, 2),
    ):
        recorded.clear()
        Trainer(MLP((12, 6, 4), dtype=dtype), optimizer=make, engine="manual").fit(data, 10, 16)
        assert 2 <= len(recorded) <= most
