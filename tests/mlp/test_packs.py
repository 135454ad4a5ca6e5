"""In a Sweep of settings, every network is the one that Trainer trains alone."""

import contextlib
import importlib.util
import math

import numpy as np
import pytest
import torch

import kernels
import mlp
from mlp import packs, schedule
from mlp.engines.threads import threads
from mlp.sweep import Sweep

SETTINGS = [
    {"hidden": (8, 6), "lr": 0.05, "seed": 1},
    {"hidden": (8, 6), "lr": 0.2, "seed": 2},
    {"hidden": 5, "activation": "tanh", "optimizer": "adam", "lr": 0.01, "batch_size": 20},
    {"hidden": (), "lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "schedule": "cosine"},
    {"hidden": (9,), "rows": list(range(0, 60, 2)), "lr": 0.1, "options": {"nesterov": False}},
    {"hidden": (9,), "rows": torch.arange(90) % 60 < 30, "schedule": "step", "warmup": 1},
    {"hidden": (9,), "rows": [3, 3, 3, 40, 50], "batch_size": 64},
]
WAYS = ["compiled", "grouped"]


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    """compiled: each network trains by compiled epochs. grouped: networks of one architecture train
    together.
    """
    if request.param == "grouped":
        monkeypatch.setattr(packs, "_is_compiled", lambda member, steps: False)
    elif importlib.util.find_spec("numba") is None:
        pytest.skip("the compiled epoch needs numba: pip install 'handgrad[cpu]'")
    else:
        monkeypatch.setattr(packs, "_is_compiled", lambda member, steps: True)
    return request.param


def data(seed=0, rows=90):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 7, generator=generator)
    noise = torch.randn(rows, generator=generator)
    return mlp.Dataset(x, (x[:, 0] * x[:, 1] + 0.5 * noise > 0).long(), ("no", "yes"))


def alone(given, train, epochs, validation=None, early_stopping=None, loss=None):
    """The network and the history of Trainer for these settings."""
    made = packs.Settings.of(given)
    if made.rows is not None:
        rows = torch.as_tensor(made.rows)
        rows = torch.nonzero(rows)[:, 0] if rows.dtype == torch.bool else rows
        train = mlp.Dataset(train.inputs[rows], train.targets[rows], train.classes)
    outputs = train.outputs
    model = mlp.MLP([7, *made.hidden, outputs], made.activation)
    mlp.initialise(dict(model.named_parameters()), None, made.seed)
    numbers = {"lr": made.lr, "weight_decay": made.weight_decay, **made.options}
    if made.momentum:
        numbers["momentum"] = made.momentum
    optimizer = mlp.optim.OPTIMIZERS[made.optimizer](model.parameters(), **numbers)
    trainer = mlp.Trainer(model, loss, optimizer, "manual", verbose=False)
    steps = -(-len(train) // made.batch_size)
    plan = schedule.named(made.schedule, schedule.Plan(epochs, steps, made.warmup))
    options = {"scheduler": plan, "validation": validation, "early_stopping": early_stopping}
    history = trainer.fit(train, epochs, made.batch_size, seed=made.seed, **options)
    return model, history


def assert_is(model, expected):
    """Checks weights to 1e-4: a pack and a Trainer sum in different orders in float32."""
    for ours, other in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-5)


def test_networks_that_differ_in_anything_are_those_of_the_trainer(way):
    train = data()
    sweep = Sweep(SETTINGS, device="cpu")
    rows = {row.replica: row for row in sweep.fit(train, 4)}
    for i, given in enumerate(SETTINGS):
        model, history = alone(given, train, 4)
        assert rows[i].train_loss == pytest.approx(history[-1]["train_loss"], rel=1e-5)
        assert_is(sweep.network(i), model)
    assert rows[2].settings["optimizer"] == "adam" and "rows" not in rows[4].settings


@pytest.mark.parametrize("watched", ["validation", "evaluate", "train"])
def test_each_stops_on_its_own_with_its_best_weights(way, watched):
    train, told = data(rows=40), []
    given = [{**one, "lr": 0.5} for one in SETTINGS[:2]]
    given += [{"lr": 0.5, "hidden": (9,), "schedule": "plateau"}]
    # Small steps along the gradient of all samples: the loss goes down in every epoch.
    given += [{"lr": 0.01, "hidden": (8, 6), "batch_size": 40}]
    # Few rows: the loss of all samples goes up soon.
    given += [{"lr": 0.5, "hidden": (9,), "rows": [3, 3, 3, 20, 30]}]
    more = {} if watched == "train" else {watched: train}
    sweep = Sweep(given, device="cpu")
    rows = sweep.fit(train, 25, early_stopping=2, on_progress=told.append, **more)
    assert sum(told) == 25 * len(given)
    by_number = {row.replica: row for row in rows}
    for i, one in enumerate(given):
        model, history = alone(one, train, 25, more.get(watched), 2)
        assert by_number[i].epochs == len(history)
        assert_is(sweep.network(i), model)
    assert by_number[3].epochs == 25
    if watched != "train":
        assert by_number[4].epochs < 25
    if watched == "validation":
        best = max(row.validation_accuracy for row in rows)
        assert rows[0].validation_accuracy == best and rows[0].test_accuracy is None


def test_regressions_with_one_that_diverges_and_is_last(way):
    x = data().inputs
    train = (x, x[:, 0] - 2 * x[:, 1])
    for reduction in ("mean", "sum"):
        loss = mlp.MeanSquaredError(reduction)
        given = [{"lr": 1e20}, {"lr": 1e-3}, {"lr": 1e-3, "hidden": (4,), "schedule": "step"}]
        sweep = Sweep(given, loss=loss, device="cpu")
        rows = sweep.fit(train, 3, evaluate=train)
        assert rows[-1].replica == 0 and rows[-1].diverged and not rows[0].diverged
        dataset = mlp.Dataset(x, train[1][:, None])
        for i in (1, 2):
            model, history = alone(given[i], dataset, 3, loss=mlp.MeanSquaredError(reduction))
            assert_is(sweep.network(i), model)
            found = next(row for row in rows if row.replica == i)
            assert found.train_loss == pytest.approx(history[-1]["train_loss"], rel=1e-5)
            expected = (model(x)[:, 0] - train[1]).square().mean().item()
            assert found.test_loss == pytest.approx(expected, rel=1e-4)


def test_a_rate_that_moves_every_step(way):
    given = [{"hidden": (6,), "schedule": name, "seed": 3} for name in ("onecycle", "constant")]
    sweep = Sweep(given, device="cpu")
    sweep.fit(data(), 3)
    for i, one in enumerate(given):
        assert_is(sweep.network(i), alone(one, data(), 3)[0])


@pytest.mark.interpreter
def test_the_kernel_takes_a_rate_that_moves_every_step(device):
    """One launch trains networks with a row of numbers for each step, as the reference does."""

    def trained():
        given = [{"hidden": (6,), "schedule": name, "seed": 3} for name in ("onecycle", "constant")]
        sweep = Sweep(given, device=device)
        sweep.fit(data(rows=40), 2)
        return [sweep.network(i) for i in range(2)]

    with kernels.use("torch"):
        expected = trained()
    ours = trained()
    for one, reference in zip(ours, expected, strict=True):
        assert_is(one, reference)
    assert not torch.equal(ours[0][0].weight, ours[1][0].weight)


def test_a_network_among_others_is_bitwise_the_same(monkeypatch):
    pytest.importorskip("numba")
    monkeypatch.setattr(packs, "_is_compiled", lambda member, steps: True)
    together = Sweep(SETTINGS, device="cpu")
    together.fit(data(), 3)
    for i, given in enumerate(SETTINGS):
        one = Sweep([given], device="cpu")
        one.fit(data(), 3)
        for a, b in zip(one.network(0).parameters(), together.network(i).parameters()):
            assert torch.equal(a, b)


def test_a_named_optimizer_has_its_own_rate_as_trainer_gives_it():
    rates = [packs.Settings.of(one).lr for one in ({}, {"optimizer": "adam"}, {"optimizer": "sgd"})]
    assert rates == [0.1, 1e-3, 1e-3]
    assert packs.Settings.of({"optimizer": "lion", "lr": 0.5}).lr == 0.5


def test_a_loss_that_no_kernel_knows_is_left_to_a_trainer():
    loss = mlp.SoftmaxCrossEntropy(weight=torch.tensor([1.0, 3.0]))
    given = {"hidden": (5,), "rows": list(range(50)), "schedule": "cosine"}
    sweep = Sweep([given, {"lr": 1e30}], loss=loss, device="cpu")
    rows = sweep.fit(data(), 3, validation=data(1), early_stopping=2)
    model, history = alone(given, data(), 3, data(1), 2, loss)
    assert rows[0].train_loss == pytest.approx(history[-1]["train_loss"]) and rows[1].diverged
    assert_is(sweep.network(0), model)


def test_a_grid_has_all_combinations_and_seeds():
    base = packs.Settings(seed=5)
    found = packs.grid(base, lr=[0.1, 0.2], hidden=[(4,), (5,), (6,)])
    assert [one.seed for one in found] == [5, 6, 7, 8, 9, 10]
    assert {(one.lr, one.hidden) for one in found} == {
        (lr, (n,)) for lr in (0.1, 0.2) for n in (4, 5, 6)
    }


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"width": 3}, "no setting 'width'; known: hidden, activation"),
        ({"optimizer": "adm"}, "unknown optimizer 'adm'; known: "),
        ({"optimizer": "adam", "momentum": 0.9}, "optimizer adam: .*momentum"),
        ({"lr": math.nan}, "lr must be a finite number, at least 0, got nan"),
        (packs.Settings(lr=-1.0), r"lr must be a finite number, at least 0, got -1\.0"),
        ({"weight_decay": "big"}, "weight_decay must be a finite number, at least 0, got 'big'"),
        ({"batch_size": 0}, "batch_size must be a whole number, at least 1, got 0"),
        ({"schedule": "up"}, "unknown schedule 'up'; known: constant"),
        ({"activation": "rel"}, "rel"),
        ({"rows": [0, 90]}, r"rows must be at least one index from 0 to 89, got \[0, 90\]"),
        ({"rows": []}, "got none"),
        ({"warmup": 3}, "the warm-up must be shorter than the 3 epochs, got 3"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_trained(settings, message):
    with pytest.raises(ValueError, match=message):
        Sweep([{"hidden": (4,)}, settings], device="cpu").fit(data(), 3)


def test_sizes_without_replicas_say_what_is_missing():
    with pytest.raises(ValueError, match="give replicas, how many networks"):
        Sweep((7, 4, 2))


def test_small_networks_of_one_launch_are_computed_by_one_thread(monkeypatch):
    counts, train = [], kernels.train_replicas_ref

    def noted(run):
        counts.append(torch.get_num_threads())
        return train(run)

    monkeypatch.setattr(packs, "_is_compiled", lambda member, steps: False)
    monkeypatch.setattr(kernels, "train_replicas_ref", noted)
    with threads(2):
        for width in (6, 3000):
            Sweep([{"hidden": (width,), "batch_size": 90}] * 3, device="cpu").fit(data(), 1)
        assert counts == [1, 2] and torch.get_num_threads() == 2


@pytest.mark.parametrize(
    "rows",
    [slice(0, 9), np.arange(9), torch.arange(90) < 9],
    ids=["slice", "indices", "mask"],
)
def test_rows_are_indices_a_mask_or_a_slice(rows):
    train = data()
    given = [{"hidden": (4,), "rows": rows}, {"hidden": (4,), "rows": list(range(9))}]
    first, second = mlp.Sweep(given, device="cpu").fit(train, 2)
    assert first.train_loss == second.train_loss


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({1, 2}, r"whole numbers, a mask or a slice, got set \{1, 2\}"),
        ([0.2, 1.9], r"whole numbers, a mask or a slice, got list \[0.2, 1.9\]"),
        (np.arange(10).reshape(2, 5), "whole numbers, a mask or a slice, got ndarray"),
        ("abc", "whole numbers, a mask or a slice, got str 'abc'"),
        (np.ones(80, bool), "a mask of rows must have 90 entries, one for each sample, got 80"),
        ([90], r"rows must be at least one index from 0 to 89, got \[90, 90\]"),
        (slice(0, 0), "rows must be at least one index from 0 to 89, got none"),
    ],
    ids=["set", "floats", "matrix", "text", "short mask", "beyond", "none"],
)
def test_other_rows_are_refused(rows, message):
    sweep = mlp.Sweep([{"hidden": (4,), "rows": rows}], device="cpu")
    with pytest.raises(ValueError, match=message):
        sweep.fit(data(), 1)


def test_every_launch_waits_for_what_the_current_stream_does_to_the_weights(monkeypatch):
    """On a GPU, networks are copied and taken out on the current stream, and groups train on their
    own streams. Recorders take the place of both.
    """
    said = []

    class Stream:
        def wait_stream(self, other):
            said.append(other)

        def synchronize(self):
            said.append("read")

    make = packs._Group.__init__

    def with_stream(group, *arguments):
        make(group, *arguments)
        group.stream, train = Stream(), group.train
        group.train = lambda run: (said.append(f"train {run.replicas}"), train(run))[1]

    monkeypatch.setattr(packs._Group, "__init__", with_stream)
    monkeypatch.setattr(packs, "_is_compiled", lambda member, steps: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"wait for {device}")
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    # The first network diverges at once and is taken out.
    given = [{"hidden": 3, "lr": 1e30}, {"hidden": 3, "lr": 0.1}]
    Sweep(given, device="cpu").fit(data(rows=40), 2)
    assert said == ["wait for cpu", "train 2", "read", "wait for cpu", "train 1", "read"]
