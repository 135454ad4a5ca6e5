"""Several trainers train together. Each network is the one that its trainer trains alone."""

import functools
import importlib.util
import math
import threading

import pytest
import torch

import mlp
from kernels import cpu
from mlp import schedule, together

COMPILED = pytest.mark.skipif(
    importlib.util.find_spec("numba") is None, reason="needs numba: pip install 'handgrad[cpu]'"
)
RULES = {
    "momentum": functools.partial(mlp.SGD, lr=0.1, momentum=0.9),
    "adam": functools.partial(mlp.Adam, lr=0.02, weight_decay=0.01),
}


def data(rows=22, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 5, generator=generator)
    return mlp.Dataset(x, (x[:, 0] * x[:, 1] > 0).long(), ("no", "yes"))


def trainer(seed, rule=RULES["momentum"], pack=None, device="cpu"):
    model = mlp.MLP([5, 6, 2], "tanh", device=device)
    mlp.initialise(dict(model.named_parameters()), None, seed)
    made = mlp.Trainer(model, None, rule, "epoch", verbose=False)
    made.together = None if pack is None else pack.train
    return made


# By numba's compiled epoch, and by the kernel of many networks, which takes seconds in the
# interpreter.
CASES = [
    pytest.param(rule, plan, False, marks=COMPILED, id=f"{rule}-{plan}-compiled")
    for rule in RULES
    for plan in ("constant", "onecycle", "plateau")
] + [
    pytest.param(rule, plan, True, marks=pytest.mark.interpreter, id=f"{rule}-{plan}-kernel")
    for rule, plan in (("momentum", "onecycle"), ("adam", "constant"))
]


@pytest.mark.parametrize("rule, plan, by_kernels", CASES)
def test_each_network_is_that_of_its_trainer_alone(rule, plan, by_kernels, device):
    """This holds with each kind of schedule, and where each network stops at its own epoch."""
    train, test, pack = data(), data(seed=1), together.Together()
    made = schedule.named(plan, schedule.Plan(3, 3))

    def fit(one, seed):
        options = {"seed": seed, "early_stopping": 1, "scheduler": made}
        return one.fit(train, 3, 8, test, **options)

    place = device if by_kernels else "cpu"
    packed = [trainer(seed, RULES[rule], pack, place) for seed in range(3)]
    histories = pack.call([functools.partial(fit, one, i) for i, one in enumerate(packed)])
    for seed, (one, history) in enumerate(zip(packed, histories, strict=True)):
        alone = trainer(seed, RULES[rule], device=place)
        expected = fit(alone, seed)
        assert len(history) == len(expected) and one.engine.name == "epoch"
        for row, other in zip(history, expected, strict=True):
            for key in ("train_loss", "train_accuracy", "test_loss", "test_accuracy"):
                assert row[key] == pytest.approx(other[key], rel=1e-5), (seed, key)
        for ours, theirs in zip(one.model.parameters(), alone.model.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs)
        states = (t.optimizer.state_dict()["state"] for t in (one, alone))
        for ours, theirs in zip(*(state.values() for state in states), strict=True):
            torch.testing.assert_close(ours, theirs)


@COMPILED
def test_epochs_are_trained_together(monkeypatch):
    """An epoch is one call for all networks that still train. A network that diverges does not end
    the others.
    """
    sizes, train_all = [], together.train_all
    monkeypatch.setattr(
        together, "train_all", lambda runs: sizes.append(len(runs)) or train_all(runs)
    )
    pack, train = together.Together(), data()
    wild = functools.partial(mlp.SGD, lr=1e38, momentum=0.9)
    made = [trainer(0, pack=pack), trainer(1, wild, pack), trainer(2, pack=pack)]
    with torch.no_grad():  # a large rate alone may end in finite losses, if all hidden units die
        [*made[1].model.parameters()][-1].fill_(math.nan)
    with pytest.raises(mlp.Diverged, match=r"learning rate 1e\+38"):
        pack.call(
            [functools.partial(one.fit, train, 2 + i, 8) for i, one in enumerate(made)],
        )
    assert [len(one.history) for one in made] == [2, 0, 4]
    assert sizes == [3, 2, 1, 1]


@COMPILED
def test_an_interruption_ends_all(monkeypatch):
    calls, train_all, before = [], together.train_all, threading.active_count()

    def interrupted(runs):
        calls.append(len(runs))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return train_all(runs)

    monkeypatch.setattr(together, "train_all", interrupted)
    pack, train = together.Together(), data()
    made = [trainer(seed, pack=pack) for seed in range(2)]
    with pytest.raises(KeyboardInterrupt):
        pack.call([functools.partial(one.fit, train, 5, 8) for one in made])
    assert [len(one.history) for one in made] == [1, 1] and calls == [2, 2]
    assert threading.active_count() == before


@COMPILED
def test_other_data_are_trained_one_after_another():
    """Networks with different data are not stacked, but train one after another."""
    pack, sets = together.Together(), [data(), data(seed=3)]
    made = [trainer(seed, pack=pack) for seed in range(2)]
    pack.call([functools.partial(one.fit, d, 2, 8) for one, d in zip(made, sets, strict=True)])
    alone = trainer(1)
    alone.fit(sets[1], 2, 8)
    for ours, theirs in zip(made[1].model.parameters(), alone.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


@COMPILED
def test_networks_with_other_class_weights_are_not_stacked(monkeypatch):
    """Rows of the same data count differently in each network, as in a training alone."""
    counts, train_replicas = [], cpu.train_replicas
    monkeypatch.setattr(
        cpu, "train_replicas", lambda run: counts.append(run.replicas) or train_replicas(run)
    )
    for others in ([1.0, 2.0], [3.0, 1.0]):
        pack, train = together.Together(), data()
        made = [trainer(seed, pack=pack) for seed in range(2)]
        for one, weight in zip(made, ([1.0, 2.0], others), strict=True):
            one.loss.options = (torch.tensor(weight), *one.loss.options[1:])
        pack.call([functools.partial(one.fit, train, 2, 8) for one in made])
        alone = trainer(1)
        alone.loss.options = (torch.tensor(others), *alone.loss.options[1:])
        alone.fit(train, 2, 8)
        for ours, theirs in zip(made[1].model.parameters(), alone.model.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs)
    assert counts == [2, 2]  # both epochs of the first pair


@COMPILED
def test_refused():
    made = trainer(0)
    made.check(data(), 1, 8)
    assert together.refusal(made, 8, 1000) is None
    made.requested = "manual"
    assert together.refusal(made, 8, 1000) == "engine manual trains one network"
    clipped = mlp.Trainer(mlp.MLP([5, 6, 2]), verbose=False, clip_norm=1.0)
    clipped.check(data(), 1, 8)
    assert "cannot clip" in together.refusal(clipped, 8, 1000)
