"""The epoch in one compiled call trains as the references in float64 do.

This holds for every network, row of the tables, batch size and number of threads.
"""

import contextlib
import ctypes
import itertools
import math
import os
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

import kernels
import mlp
from kernels import cpu
from kernels.activations import ACTIVATIONS
from kernels.losses import LOSSES
from kernels.rules import RULES, hyperparameters
from mlp import engines
from mlp.data import permutation
from tests import PATIENCE, run_command, uninterpreted
from tests.checks import ctrl_c

pytest.importorskip("numba", reason="the compiled epoch needs numba")
import numba

from kernels.cpu import doubles, epoch, language, loop, rows, session, team

OPTIONS = {"lr": 0.05, "weight_decay": 0.01, "momentum": 0.9, "dampening": 0.3}
# By dtype of the network: the errors of losses, and those of parameters and states as a share of
# their largest number.
ERRORS = {torch.float32: (1e-6, 1e-5), torch.float64: (1e-12, 1e-11)}
both = pytest.mark.parametrize("dtype", ERRORS, ids=str)


@pytest.fixture(autouse=True)
def on_the_cpu():
    with kernels.use("torch"):
        yield


@pytest.fixture
def fixed(monkeypatch):
    """A function of (workers, steps) that gives every piece this many threads and steps."""

    def use(workers, steps):
        monkeypatch.setattr(
            epoch._Choice, "next", lambda choice, left: (workers, int(min(steps, left)))
        )
        monkeypatch.setattr(torch, "get_num_threads", lambda: workers)

    return use


def training(sizes, n=70, *, pixels=True, soft=False, seed=0, dtype=torch.float32, **fields):
    """A Spec with parameters, states, data, targets and an order of n samples.

    dtype: of all numbers but pixels.
    """
    torch.manual_seed(seed)
    spec = kernels.Spec(tuple(sizes), **{"activation": "sigmoid", **fields})
    parameters = []
    for k, width in itertools.pairwise(sizes):
        parameters.append(torch.randn(width, k) / k**0.5)
        parameters += [0.1 * torch.randn(width)] if spec.bias else []
    parameters = [p.to(dtype) for p in parameters]
    states = [[torch.zeros_like(p) for p in parameters] for _ in spec.rule.states]
    data = torch.randn(n + 5, sizes[0]).to(dtype)
    if pixels:
        data = torch.randint(0, 256, (n + 5, sizes[0]), dtype=torch.uint8)
    targets = torch.randint(0, sizes[-1], (n + 5,))
    if soft:
        targets = torch.softmax(torch.randn(n + 5, sizes[-1]), 1).to(dtype)
    return spec, parameters, states, data, targets, torch.randperm(n)


def options(rule):
    return {name: OPTIONS[name] for name, _ in rule.hyperparameters if name in OPTIONS}


def check(spec, parameters, states, data, targets, order, batch=32, taken=0, weights=None):
    """Trains by the compiled epoch, and by the reference in float64. Losses, parameters and states
    must agree to the ERRORS of the parameters' dtype. In float32, that is about 8 ulps of a loss.
    """
    of_losses, of_numbers = ERRORS[parameters[0].dtype]
    hyper = hyperparameters(spec.rule, dtype=torch.float64, **options(spec.rule))
    scale, shift = (1 / 255, -0.3) if data.dtype == torch.uint8 else (0.9, 0.1)
    exact = (
        [p.double().clone() for p in parameters],
        [[s.double().clone() for s in lists] for lists in states],
    )
    count, count_ref = torch.full((1,), float(taken)), torch.full((1,), float(taken))
    losses, correct = cpu.train_epoch(
        kernels.Run(
            spec,
            parameters,
            states,
            data,
            targets,
            order,
            batch,
            hyper,
            count,
            scale=scale,
            shift=shift,
            weights=weights,
        )
    )
    expected, right = kernels.train_epoch_ref(
        kernels.Run(
            spec,
            *exact,
            data,
            targets,
            order,
            batch,
            hyper,
            count_ref,
            scale=scale,
            shift=shift,
            weights=weights,
        )
    )
    assert losses.dtype == parameters[0].dtype
    torch.testing.assert_close(losses.double(), expected, rtol=of_losses, atol=of_losses)
    for found, wanted in zip([parameters, *states], [exact[0], *exact[1]]):
        for tensor, reference in zip(found, wanted):
            largest = max(float(reference.abs().max()), 1e-6)
            assert float((tensor - reference).abs().max()) <= of_numbers * largest
    if not targets.is_floating_point():
        assert correct.tolist() == right.tolist()
    assert count == count_ref == taken + len(losses)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float16, torch.int16, torch.int64, torch.bool]
)
def test_data_of_every_type(dtype):
    spec, parameters, states, data, *rest = training((33, 9, 5), pixels=False)
    check(spec, parameters, states, (data * 3).to(dtype), *rest)


@both
@pytest.mark.parametrize("features", [1, 3, 4, 5, 7, 8, 9, 15, 16, 17])
def test_numbers_that_fill_no_vector_or_whole_ones(features, dtype):
    check(*training((features, 5, 2), n=20, pixels=False, dtype=dtype), batch=7)


@both
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation_in_hidden_layers_and_at_the_end(name, dtype):
    ends = {"activation": "tanh", "output_activation": name, "loss": "mse"}
    check(*training((33, 20, 7, 5), activation=name, dtype=dtype))
    check(*training((33, 9, 5), **ends, dtype=dtype))


@both
@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_of_labels_and_of_numbers(name, dtype):
    numbers = {"soft": True, "pixels": False, "loss_mean": False}
    check(*training((50, 17, 6), loss=name, dtype=dtype))
    check(*training((50, 17, 6), loss=name, **numbers, dtype=dtype))


@both
@pytest.mark.parametrize("name", LOSSES)
def test_rows_with_weights_in_every_loss(name, dtype, fixed):
    fixed(3, 2)
    weights = torch.rand(75, dtype=dtype) * 3
    weights[::4] = 0.0
    for mean in (True, False):
        fields = {"loss": name, "rule": "momentum", "loss_mean": mean, "dtype": dtype}
        check(*training((50, 17, 6), **fields), weights=weights)
        check(*training((50, 17, 6), soft=True, pixels=False, **fields), weights=weights)
    check(*training((50, 17, 6), n=1, **fields), weights=torch.full((6,), 0.3))


def test_rows_with_weights_train_as_torch():
    """The loss of a batch is Σ weight · loss / Σ weight, as with torch's weighted mean."""
    order, weights = torch.randperm(23), torch.rand(23, dtype=torch.float64)
    for row in LOSSES.values():
        torch.manual_seed(0)
        parts = [torch.randn(n, k, dtype=torch.float64) for k, n in ((5, 4), (4, 3))]
        data, soft = torch.randn(23, 5, dtype=torch.float64), torch.rand(23, 3).double()
        plain, losses = [p.clone().requires_grad_() for p in parts], []
        for rows_ in order.split(9):
            y = torch.sigmoid(data[rows_] @ plain[0].T) @ plain[1].T
            t = soft[rows_] / soft[rows_].sum(1, keepdim=True)
            terms = row.torch(y, t, row.default, "none").reshape(len(rows_), -1).sum(1)
            loss = (terms * weights[rows_]).sum() / weights[rows_].sum()
            for p, grad in zip(plain, torch.autograd.grad(loss, plain)):
                p.data -= 0.1 * grad
            losses.append(loss.item())
        spec = kernels.Spec((5, 4, 3), "sigmoid", bias=False, loss=row)
        soft = soft / soft.sum(1, keepdim=True)
        numbers = hyperparameters("sgd", lr=0.1, dtype=torch.float64), torch.zeros(1)
        run = kernels.Run(spec, parts, [], data, soft, order, 9, *numbers, weights=weights)
        assert cpu.train_epoch(run)[0].tolist() == pytest.approx(losses, rel=1e-12)
        for p, expected in zip(parts, plain):
            torch.testing.assert_close(p, expected.data, rtol=1e-11, atol=1e-12)


def test_weights_of_rows_are_checked():
    spec, parameters, states, data, targets, order = training((20, 9, 4))
    numbers = hyperparameters("sgd"), torch.zeros(1)
    case = spec, parameters, states, data, targets, order, 32, *numbers
    for bad in (torch.ones(74), torch.ones(75, 1), torch.ones(75, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"weights must be floating point \(75,\)"):
            kernels.Run(*case, weights=bad)
    with pytest.raises(ValueError, match="the kernels count every row as 1, but the run has"):
        kernels.Run(*case, weights=torch.ones(75)).bundles()


def test_a_loss_with_a_number_for_each_output():
    fields = {"loss": "pinball", "loss_parameter": (0.1, 0.5, 0.9), "loss_scale": 1 / 3}
    check(*training((8, 5, 3), soft=True, **fields))


@both
@pytest.mark.parametrize("name", RULES)
def test_every_rule_from_the_first_step_and_later(name, dtype):
    fields = {"rule": name, "activation": "tanh", "dtype": dtype}
    check(*training((50, 17, 6), **fields))
    check(*training((50, 17, 6), **fields, bias=False), taken=3)


@both
@pytest.mark.parametrize(
    ("sizes", "batch", "n"),
    [
        ((784, 100, 50, 10), 32, 70),  # the reference network, and a last batch of 6
        ((784, 100, 50, 10), 1, 3),
        ((1, 1), 32, 40),  # vectors are nearly all padding
        ((4, 3), 200, 70),  # one layer, and a batch larger than the data
        ((300, 260, 256, 70), 50, 120),  # too wide, with too many classes, for GPU kernels
        ((20, 9, 9, 9, 9, 4), 3, 10),
    ],
)
def test_any_depth_width_batch_and_number_of_classes(sizes, batch, n, dtype):
    loss = "mse" if sizes[-1] == 1 else "cross_entropy"
    check(*training(sizes, n, loss=loss, dtype=dtype), batch=batch)


@both
@pytest.mark.parametrize("vectors", range(1, 12))
def test_every_split_of_a_row_into_tiles(vectors, dtype):
    # Vectors of 32 bytes. A batch of 37 leaves rows over from tiles of 4, 6 and 8.
    width = 256 // torch.finfo(dtype).bits * vectors
    check(*training((30, width, width, 3), n=60, pixels=False, dtype=dtype), batch=37)


@both
@pytest.mark.parametrize("outputs", [1, 2, 4, 5])
@pytest.mark.parametrize("rule", ["adam", "momentum"])
def test_few_outputs_with_transposed_weights(outputs, rule, dtype, fixed):
    fields = {"rule": rule, "loss": "bce", "soft": True, "pixels": False, "dtype": dtype}
    results = []
    for workers in (1, 3):
        case = training((20, 30, 11, outputs), **fields)
        fixed(workers, 2)
        check(*case)
        results.append(case[1])
    assert all(torch.equal(a, b) for a, b in zip(*results))
    check(*training((20, 30, outputs), bias=False, activation="gelu", dtype=dtype))


@both
def test_ignored_labels_count_for_nothing(dtype):
    spec, parameters, states, data, targets, order = training((20, 9, 4), dtype=dtype)
    targets[::3] = -100
    check(spec, parameters, states, data, targets, order)


@pytest.mark.parametrize("weight", [None, [0.2, 1.0, 3.0], [1.0, 0.0, 2.0]], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_training_leaves_out_ignored_labels(reduction, weight):
    """As engine manual: weights, loss and accuracy; a batch of them alone is no divergence."""
    torch.manual_seed(0)
    x, y = torch.rand(80, 6), torch.randint(0, 3, (80,))
    y[permutation(80, 0, 1)[:20]] = -100  # all of the first batch, and some of the second
    found = []
    for engine in ("manual", "epoch"):
        torch.manual_seed(1)
        trainer = mlp.Trainer(
            mlp.MLP([6, 8, 3]),
            mlp.SoftmaxCrossEntropy(weight, reduction=reduction),
            lambda p: mlp.SGD(p, lr=0.05, momentum=0.9),
            engine,
            verbose=False,
        )
        row = trainer.fit((x, y), 1, 16)[0]
        assert trainer.engine.name == engine
        found.append((row["train_loss"], row["train_accuracy"], *trainer.model.parameters()))
    (loss, accuracy, *weights), (ours, share, *trained) = found
    assert ours == pytest.approx(loss, rel=1e-5) and share == accuracy
    for expected, got in zip(weights, trained, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("engine", ["manual", "epoch"])
def test_class_weights_train_as_torchs_loss(engine):
    """Losses, weights of the network and measures of a ragged batch, several epochs in a call."""
    torch.manual_seed(0)
    x, y = torch.rand(50, 6, dtype=torch.float64), torch.randint(0, 3, (50,))
    weight = [0.2, 1.0, 3.0]
    model = mlp.MLP([6, 8, 3], "tanh", dtype=torch.float64)
    plain = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    for p, ours in zip(plain.double().parameters(), model.parameters(), strict=True):
        p.data.copy_(ours)
    criterion = torch.nn.CrossEntropyLoss(torch.tensor(weight, dtype=torch.float64))
    optimizer, total = torch.optim.Adam(plain.parameters(), lr=0.01), criterion.weight[y].sum()
    losses = []
    for epoch_ in range(1, 6):
        losses.append(0.0)
        for rows_ in permutation(50, 0, epoch_).split(16):
            loss = criterion(plain(x[rows_]), y[rows_])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1] += (loss * criterion.weight[y[rows_]].sum() / total).item()
    loss = mlp.SoftmaxCrossEntropy(weight)
    trainer = mlp.Trainer(model, loss, lambda p: mlp.Adam(p, lr=0.01), engine, verbose=False)
    history = trainer.fit((x, y), 5, 16)
    assert trainer.engine.name == engine
    assert [row["train_loss"] for row in history] == pytest.approx(losses, rel=1e-9)
    for ours, p in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, p, rtol=1e-7, atol=1e-9)
    expected = criterion(plain(x), y).item()
    assert trainer.evaluate((x, y))["test_loss"] == pytest.approx(expected, rel=1e-9)


def test_what_class_weights_do_not_multiply_is_left_to_engine_manual():
    """Rows of probabilities, smoothed labels, and weights of another dtype."""
    x, y = torch.rand(8, 6), torch.softmax(torch.rand(8, 3), 1)
    weight = torch.tensor([1.0, 2.0, 3.0])

    def chosen(targets, **options):
        loss = mlp.SoftmaxCrossEntropy(**options)
        trainer = mlp.Trainer(mlp.MLP([6, 3]), loss, lambda p: mlp.SGD(p, lr=0.1), verbose=False)
        with kernels.cpu.many():
            trainer.check((x, targets), 2)
        return trainer.engine.name, trainer.engine_note

    assert chosen(y.argmax(1), weight=weight)[0] == "epoch"
    for targets, options, reason in (
        (y, {"weight": weight}, "but the targets are probabilities"),
        (y.argmax(1), {"weight": weight, "label_smoothing": 0.1}, "without smoothing"),
        (y.argmax(1), {"weight": weight.double()}, r"class weights torch.float32 (3,), got"),
    ):
        name, note = chosen(targets, **options)
        assert name == "manual" and reason in note


def test_another_ignored_label_is_left_to_engine_manual():
    """The row of the table ignores -100 and no other label."""
    x, y = torch.rand(8, 6), torch.tensor([0, 1, 2, -1] * 2)
    loss = mlp.SoftmaxCrossEntropy(ignore_index=-1)
    trainer = mlp.Trainer(mlp.MLP([6, 3]), loss, lambda p: mlp.SGD(p, lr=0.1), verbose=False)
    trainer.fit((x, y), 1, 8)
    assert trainer.engine.name == "manual" and "ignores some of them" in trainer.engine_note


@both
def test_a_label_that_is_no_class_shows_in_the_loss(dtype):
    spec, parameters, states, data, targets, order = training((20, 9, 4), dtype=dtype)
    targets[order[40]] = 4
    losses, _ = cpu.train_epoch(
        kernels.Run(
            spec,
            parameters,
            states,
            data,
            targets,
            order,
            32,
            hyperparameters("sgd"),
            torch.zeros(1),
        )
    )
    assert losses.isnan().tolist() == [False, True, True]


@both
def test_the_number_of_threads_and_pieces_changes_no_bit(fixed, dtype):
    results = []
    for workers, steps in ((1, 100), (2, 3), (3, 1), (5, 4)):
        spec, parameters, states, data, targets, order = training(
            (500, 90, 40, 10), 300, activation="gelu", rule="adam", dtype=dtype
        )
        fixed(workers, steps)
        losses, _ = cpu.train_epoch(
            kernels.Run(
                *(spec, parameters, states, data, targets, order, 32),
                hyperparameters("adam", lr=0.01),
                torch.zeros(1),
            )
        )
        results.append([losses, *parameters, *states[0], *states[1]])
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], others))


def sparse(*arguments, **fields):
    """As `training`, with data of which three quarters are 0."""
    spec, parameters, states, data, targets, order = training(*arguments, **fields)
    data[torch.rand(data.shape) < 0.75] = 0
    return spec, parameters, states, data, targets, order


@both
@pytest.mark.parametrize("pixels", [True, False])
@pytest.mark.parametrize(
    ("sizes", "batch", "n"),
    [
        ((300, 40, 7), 32, 70),
        ((1, 3), 5, 11),
        ((13, 130, 2), 1, 9),
        ((67, 9), 6, 20),
    ],
)
def test_inputs_that_are_0_are_left_out(pixels, sizes, batch, n, dtype):
    """Pixels of 0 are read as -0.3, and that part is added for all of them at once."""
    check(*sparse(sizes, n, pixels=pixels, rule="momentum", dtype=dtype), batch)


@both
def test_leaving_out_zeros_changes_no_bit(fixed, monkeypatch, dtype):
    results = []
    for share, workers, steps in ((2.0, 1, 100), (0.4, 1, 100), (0.4, 2, 3), (0.4, 3, 1)):
        monkeypatch.setattr(epoch, "_ZEROS", share)
        spec, parameters, states, data, targets, order = sparse((500, 90, 10), 300, dtype=dtype)
        fixed(workers, steps)
        losses, _ = cpu.train_epoch(
            kernels.Run(
                *(spec, parameters, states, data, targets, order, 32),
                hyperparameters("sgd", lr=0.1),
                torch.zeros(1),
                scale=1 / 255,
            )
        )
        results.append([losses, *parameters])
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], others))


@both
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_weight_that_is_not_finite_shows_although_its_input_is_0(bad, dtype):
    spec, parameters, states, data, targets, order = sparse((40, 9, 3), dtype=dtype)
    data[:, 17] = 0
    parameters[0][4, 17] = bad
    losses, _ = cpu.train_epoch(
        kernels.Run(
            *(spec, parameters, states, data, targets, order, 32),
            hyperparameters("sgd", lr=0.1),
            torch.zeros(1),
        )
    )
    assert losses[0].isnan()


def test_threads_stay_on_cores_apart_while_they_work():
    if not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two cores, and a system where a thread can choose its core")
    before, cores = os.sched_getaffinity(0), {}

    def work(worker):
        cores[worker] = os.sched_getaffinity(0)

    with team.threads(2) as pool:
        team.together(pool, 2, work)
        assert len(cores[0]) == 1 and cores[1] == before - cores[0]
        assert os.sched_getaffinity(0) == before
        assert pool.submit(os.sched_getaffinity, 0).result() == before
    with team.threads(2) as again:
        assert again is pool, "the pool must be kept for the next epoch"


def test_a_team_has_all_its_threads_from_the_start():
    """A pool that starts threads when it thinks that none is free may have one too few."""
    before = set(threading.enumerate())
    crew = team.Team(3)
    assert len(set(threading.enumerate()) - before) == 3
    meeting = threading.Barrier(3)
    for _ in range(2):
        waiting = [crew.submit(meeting.wait, timeout=PATIENCE) for _ in range(3)]
        assert sorted(one.result() for one in waiting) == [0, 1, 2]


def test_a_team_gives_results_and_errors_and_keeps_nothing():
    crew, kept = team.Team(1), torch.zeros(1)
    there = weakref.ref(kept)
    assert crew.submit(divmod, 7, 2).result() == (3, 1)
    with pytest.raises(SystemExit):
        crew.submit(sys.exit, 3).result()
    # The second call starts after the first one's memory was given up.
    given = crew.submit(torch.Tensor.neg, kept)
    assert given.result() == 0
    del kept, given
    crew.submit(int).result()
    assert there() is None


def test_a_team_that_gets_no_more_threads_ends_those_it_has(monkeypatch):
    started, start = [], threading.Thread.start

    def limited(thread):
        if len(started) == 2:
            raise RuntimeError("can't start new thread")
        start(thread)
        started.append(thread)

    monkeypatch.setattr(threading.Thread, "start", limited)
    with pytest.raises(RuntimeError, match="can't start"):
        team.Team(4)
    for thread in started:
        thread.join(PATIENCE)
        assert not thread.is_alive()


def test_a_thread_trains_on_after_the_main_one_has_ended():
    code = (
        "import threading, torch, mlp\n"
        "torch.set_num_threads(2)\n"
        "data = torch.randn(16, 9), torch.randint(3, (16,))\n"
        "trains = threading.Event()\n"
        "def train():\n"
        "    trainer = mlp.Trainer(mlp.MLP([9, 7, 3]), engine='epoch', verbose=False)\n"
        "    trainer.fit(data, 2, 8)\n"
        "    trains.set()\n"
        "    threading.main_thread().join()\n"
        "    print(len(trainer.fit(data, 7, 8)))\n"
        "threading.Thread(target=train).start()\n"
        "trains.wait()\n"  # since Python 3.12, no thread starts after the main one has ended
    )
    done = run_command([sys.executable, "-c", code], env=uninterpreted())
    assert (done.returncode, done.stdout) == (0, "7\n"), done.stderr


def trained_here(threads, meeting=None):
    """The weights, as bytes, that engine epoch trains. torch has other threads in each epoch.

    threads: of the first epoch. 1 stays. meeting: a Barrier, with which trainings at the same time
    start each epoch together.
    """
    generator = torch.Generator().manual_seed(0)
    model = mlp.MLP([9, 7, 3])
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    data = torch.randn(900, 9, generator=generator), torch.arange(900) % 3

    def change(row):
        torch.set_num_threads(1 + row["epoch"] % 4)
        if meeting is not None:
            meeting.wait(PATIENCE)

    torch.set_num_threads(threads)
    trainer = mlp.Trainer(model, engine="epoch", verbose=False)
    trainer.fit(data, 9, 8, seed=0, on_epoch=change if threads > 1 else None)
    return b"".join(p.detach().numpy().tobytes() for p in model.parameters())


def test_trainings_at_once_and_threads_that_change_leave_the_bits(monkeypatch):
    """Also where the threads outnumber the cores that they may use."""
    monkeypatch.setattr(epoch, "_choices", {})
    monkeypatch.setattr(team, "_idle", {})  # new threads may use the cores of those that start them
    before, meeting = torch.get_num_threads(), threading.Barrier(3)

    def on_one_core():
        if hasattr(os, "sched_setaffinity"):  # it holds for this thread and those that it starts
            os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

    try:
        expected = trained_here(1)
        assert trained_here(8) == expected
        for start in (None, on_one_core):
            team._idle.clear()
            with ThreadPoolExecutor(3, initializer=start) as pool:
                at_once = [pool.submit(trained_here, 8, meeting) for _ in range(3)]
                assert [one.result(PATIENCE) for one in at_once] == [expected] * 3
        used = {count for choice in epoch._choices.values() for count in choice.seconds}
        assert used >= {1, 2, 3, 4}
    finally:
        torch.set_num_threads(before)


def test_an_error_waits_for_the_other_threads():
    """They use the caller's memory, which it gives up after the error."""
    raised, ended = threading.Event(), []

    def work(worker):
        if worker == 0:
            raised.set()
            raise KeyboardInterrupt
        raised.wait()
        time.sleep(0.05)
        ended.append(worker)

    with team.threads(2) as pool, pytest.raises(KeyboardInterrupt):
        team.together(pool, 2, work)
    assert ended == [1]


def test_threads_are_measured_and_the_fastest_is_taken():
    choice = epoch._Choice(6, 1e-3)
    assert choice.counts == [1, 2, 4, 6]
    seconds = {1: 3e-4, 2: 2e-4, 4: 1e-4, 6: 5e-4}
    for slower in (2, 1, 3):  # the best of three trials counts
        for workers in (1, 2, 4, 6):
            assert choice.next()[0] == workers
            choice.took(workers, seconds[workers] * slower)
    assert choice.seconds == seconds
    assert choice.next() == (4, 500)  # a twentieth of a second
    choice.took(4, 4e-4)  # one slow piece changes nothing: a thread may have started late
    assert choice.next() == (2, 100), "a number that lost is soon measured again"
    for _ in range(2):
        choice.took(4, 4e-4)  # three slow pieces do: another program takes time
    assert choice.next() == (2, 100), "what it took before says little about now"
    choice.took(2, 2.5e-4)
    assert choice.next() == (6, 40), "it is the turn of another one that lost"
    assert choice.next() == (2, 200)
    workers, steps = zip(*(choice.next() for _ in range(40)))
    assert set(workers) == {1, 2, 4, 6}, "slower counts must be measured again"
    assert min(steps) * 2.5e-4 < 0.021, "a slower count must be measured briefly"


def test_the_number_of_threads_that_lost_is_measured_soon_and_then_less_often():
    choice = epoch._Choice(2, 1e-3)
    for workers in (1, 2) * 3:
        choice.took(workers, 1e-4 * workers)
    measured = [piece for piece in range(1, 97) if choice.next()[0] == 2]
    assert measured == [2, 4, 8, 16, 32, 64, 96]
    # A hundred pieces of a hundredth, as in small epochs, are one piece.
    short = [choice.next(5)[0] for _ in range(6600)]
    assert short.count(2) == 2


def test_a_trial_of_an_unknown_number_is_long_enough():
    choice = epoch._Choice(2, 4e-4)
    assert choice.next() == (1, 200), "a step may take a quarter of the guess"
    choice.took(1, 1e-4)
    assert choice.next() == (2, 400), "two threads may take half"


def test_a_number_of_threads_takes_over_only_if_it_is_faster_now():
    choice = epoch._Choice(2, 1e-3)
    for workers in (1, 2) * 3:
        choice.took(workers, 1e-4 * workers)
    assert choice.next()[0] == 1
    for _ in range(3):  # another process slows both down
        choice.took(1, 2.1e-4)
    assert choice.next() == (2, 100)
    choice.took(2, 4e-4)
    assert choice.next()[0] == 1


def test_an_interrupt_is_answered_within_the_epoch(monkeypatch):
    spec, parameters, states, data, targets, _ = training((50, 17, 6), rule="adam")
    before = [p.clone() for p in parameters]
    order, count = torch.randint(0, 70, (3_200_000,)), torch.zeros(1)
    numbers, pieces = hyperparameters("adam"), itertools.count()

    def piece(choice, left):
        if next(pieces) == 20:
            press()
        return 1, min(50, int(left))

    monkeypatch.setattr(epoch._Choice, "next", piece)
    with ctrl_c() as press, pytest.raises(KeyboardInterrupt):
        cpu.train_epoch(
            kernels.Run(spec, parameters, states, data, targets, order, 32, numbers, count)
        )
    assert 20 * 50 <= int(count) < 100_000 and int(count) % 50 == 0
    assert all(not torch.equal(p, q) and p.isfinite().all() for p, q in zip(parameters, before))


def test_an_interrupt_right_after_the_training_thread_started_leaves_no_training(monkeypatch):
    spec, parameters, states, data, targets, order = training((50, 17, 6), rule="adam")
    before, count = [p.clone() for p in parameters], torch.zeros(1)
    submitted = []

    class Pool:
        """A pool whose `submit` is interrupted after it has started the work."""

        def submit(self, work):
            submitted.append(threads.submit(work))
            raise KeyboardInterrupt

    run = kernels.Run(
        spec, parameters, states, data, targets, order, 32, hyperparameters("adam"), count
    )
    monkeypatch.setattr(epoch, "_PIECE", 0.0)  # no epoch is so short that no thread is needed
    monkeypatch.setattr(epoch.team, "threads", lambda count: contextlib.nullcontext(Pool()))
    with ThreadPoolExecutor(1) as threads:
        with pytest.raises(KeyboardInterrupt):
            cpu.train_epoch(run)
        submitted[0].result()
    assert int(count) == 0 and all(torch.equal(p, q) for p, q in zip(parameters, before))


def test_a_session_refuses_a_watch_that_it_cannot_look_at():
    spec, parameters, states, data, targets, order = training((50, 17, 6), rule="adam")
    samples, orders = (data, targets, 1.0, 0.0), order[None].numpy()
    held = session.Held(data, targets)
    for rows_held, kind, known in ((None, session.LABELS, "0"), (held, 7, "0 or 1 or 2 or 3 or 4")):
        trained = session.Session(spec, parameters, states, samples, len(order), 32, rows_held)
        with pytest.raises(ValueError, match=f"looks at kind {known}, got {kind}"):
            trained.epochs(orders, hyperparameters("adam"), 0, session.Watch(kind))


def fit(engine, optimizer, dtype, epochs=2):
    torch.manual_seed(3)
    x, y = torch.rand(100, 12, dtype=dtype), torch.randint(0, 4, (100,))
    model = mlp.MLP([12, 9, 4], dtype=dtype)
    trainer = mlp.Trainer(model, optimizer=optimizer, engine=engine, verbose=False)
    return trainer, trainer.fit((x, y), epochs, batch_size=32)


@both
@pytest.mark.parametrize("name", ["sgd", "momentum", "adamw"])
def test_the_engine_trains_as_manual(name, dtype):
    def optimizer(parameters):
        made = {"sgd": mlp.SGD, "momentum": mlp.SGD, "adamw": mlp.AdamW}[name]
        return made(parameters, lr=0.01, **({"momentum": 0.9} if name == "momentum" else {}))

    epochs = 2 if dtype == torch.float32 else 30
    (ours, found), (other, expected) = (
        fit(name, optimizer, dtype, epochs) for name in ("epoch", "manual")
    )
    rel, within = (1e-5, (1e-4, 1e-7)) if dtype == torch.float32 else (1e-11, (1e-9, 1e-12))
    assert ours.engine.name == "epoch" and other.engine.name == "manual"
    for row, reference in zip(found, expected):
        assert row["train_loss"] == pytest.approx(reference["train_loss"], rel=rel)
        assert row["train_accuracy"] == reference["train_accuracy"]
    states = [t.optimizer.state_dict()["state"] for t in (ours, other)]
    for state, reference in zip(*(s.values() for s in states)):
        for key, value in reference.items():
            torch.testing.assert_close(state[key], value, rtol=within[0], atol=within[1])


@pytest.mark.parametrize("count", [1, 2, 3, 64, 65, 700])
def test_orders_are_drawn_as_by_numpy(count):
    spec, parameters, states, data, targets, _ = training((3, 2), n=count, pixels=False)
    samples, random = (data, targets, 1.0, 0.0), np.random.RandomState(7)
    trained = session.Session(spec, parameters, states, samples, count, 32)
    draws = np.array([*random.get_state()[1], random.get_state()[2]], np.uint32)
    numbers, order = hyperparameters(spec.rule, **options(spec.rule)), np.arange(count)
    for epochs in (1, 3):
        drawn = order[None].copy()
        trained.epochs(drawn, numbers, 0, session.Watch(), draws=session.Draws(draws, epochs))
        for _ in range(epochs):
            places = np.arange(count)
            random.shuffle(places)
            order = order[places]
        assert drawn[0].tolist() == order.tolist()
        assert draws.tolist() == [*random.get_state()[1], random.get_state()[2]]


@both
def test_it_diverges_as_other_engines_do(dtype):
    x, y = torch.rand(100, 12), torch.randint(0, 4, (100,))
    for engine in ("epoch", "manual"):
        trainer = mlp.Trainer(
            mlp.MLP([12, 9, 4], dtype=dtype),
            mlp.loss.MeanSquaredError(),
            lambda p: mlp.SGD(p, lr=1e20 if dtype == torch.float32 else 1e150),
            engine=engine,
            verbose=False,
        )
        with pytest.raises(mlp.Diverged, match=r"the loss is (nan|inf) at step"):
            trainer.fit((x, y), 3, batch_size=32)


def test_auto_takes_it_where_it_pays(monkeypatch):
    monkeypatch.setattr(cpu, "is_loaded", lambda *_: False)
    model = mlp.MLP([784, 100, 50, 10])
    arguments = "auto", model, mlp.SoftmaxCrossEntropy(), mlp.SGD(model.parameters(), lr=0.1), 32
    assert engines.choose(*arguments)[0].name == "epoch"
    large = mlp.MLP([784, 2048, 2048, 10])
    others = arguments[2], mlp.SGD(large.parameters(), lr=0.1), 32
    chosen, note = engines.choose("auto", large, *others, steps=1_000_000)
    assert chosen.name == "manual" and "5,820,416 weights" in note
    few, note = engines.choose(*arguments, steps=100)
    assert few.name == "manual" and "more than it saves here" in note
    monkeypatch.setattr(epoch, "is_compiled", lambda kind: False)
    cold, note = engines.choose(*arguments, steps=10_000)
    assert cold.name == "manual" and "for all later runs" in note
    assert engines.choose(*arguments, steps=1_000_000)[0].name == "epoch"
    monkeypatch.setattr(epoch, "is_compiled", lambda kind: True)
    assert engines.choose(*arguments, steps=10_000)[0].name == "epoch"
    chosen, _ = engines.choose("epoch", *arguments[1:], steps=1)
    assert chosen.name == "epoch", "an engine that is asked for by name is taken"
    monkeypatch.setattr(cpu, "is_loaded", lambda *_: True)
    assert engines.choose(*arguments, steps=1)[0].name == "epoch", "numba is loaded already"


def _twice(x):
    return 2 * x


def test_only_code_for_this_processor_counts_as_kept(tmp_path, monkeypatch):
    """numba keeps the code of several processors under one name, in a home that they share."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    made = [rows.cached(numba.njit, rows.named(_twice)) for _ in range(2)]
    assert not rows.is_kept(made[0].py_func)
    assert made[0](3) == 6 and rows.is_kept(made[1].py_func)
    files = made[1]._cache._cache_file
    ((key, name),) = files._load_index().items()
    triple, processor, features = key[1]
    for other in ((triple, "another", features), (triple, processor, features + ",+another")):
        files._save_index({(key[0], other, key[2]): name})
        assert not rows.is_kept(made[1].py_func)
    files._save_index({key: name})
    assert rows.is_kept(made[1].py_func)
    next(tmp_path.rglob("*.nbc")).unlink()
    assert not rows.is_kept(made[1].py_func)
    next(tmp_path.rglob("*.nbi")).write_bytes(b"damaged")
    assert not rows.is_kept(made[1].py_func)


@pytest.mark.parametrize("suffix", ["nbi", "nbc"])
@pytest.mark.parametrize("damage", [b"", bytes(500), b"cut off"], ids=["empty", "zeros", "cut"])
def test_damaged_files_are_compiled_again(suffix, damage, tmp_path, monkeypatch):
    """Files are cut off, or zeros, where a machine lost its power, and numba raises for them."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))

    def made():
        return rows.cached(numba.njit, rows.named(_twice))

    assert made()(3) == 6
    (file,) = tmp_path.rglob(f"*.{suffix}")
    whole = file.read_bytes()
    file.write_bytes(damage)
    assert made()(3) == 6
    assert file.stat().st_size == len(whole) and rows.is_kept(made().py_func)


def test_tables_of_numbers_have_one_type():
    """numba compiles a function anew for arrays that are read-only, which takes many seconds."""
    rule, row, kind = RULES["momentum"], hyperparameters("momentum").tolist(), np.dtype("float32")
    steps = epoch._BLOCK + 1
    tables = [
        epoch._numbers(rule, row, 0, 3, kind),
        epoch._numbers(rule, row, 0, steps, kind),
        epoch._numbers(rule, [row] * 3, 0, 3, kind),
    ]
    assert len({numba.typeof(table) for table in tables}) == 1


def test_the_call_of_many_epochs_is_compiled_for_itself(monkeypatch):
    """It takes longer to compile than the call of one epoch, which may be loaded already."""
    monkeypatch.setattr(cpu, "is_loaded", lambda dtype, call: call is cpu.EPOCH)
    monkeypatch.setattr(session, "is_compiled", lambda kind: False)
    training, steps = ((30, 60, 2), 32), 150_000  # they save 14 s
    assert cpu.costs(*training, steps, torch.float32) is None
    many = torch.float32, cpu.MANY_EPOCHS
    reason = cpu.costs(*training, steps, *many)
    assert reason is not None and "takes about 17 s, more than the" in reason
    assert cpu.costs(*training, 2 * steps, *many) is None
    monkeypatch.setattr(session, "is_compiled", lambda kind: True)
    assert cpu.costs(*training, steps, *many) is None


def test_code_for_another_dtype_is_compiled_for_itself(monkeypatch):
    monkeypatch.setattr(cpu, "is_loaded", lambda dtype, call: dtype == torch.float32)
    monkeypatch.setattr(epoch, "is_compiled", lambda kind: kind == np.float32)
    training = (30, 60, 2), 32, 50_000
    assert cpu.costs(*training, torch.float32) is None
    reason = cpu.costs(*training, torch.float64)
    assert reason is not None and "to compile it once" in reason
    kept = [rows.named(check, kind.name).__qualname__ for kind in cpu.DTYPES.values()]
    assert kept[0] != kept[1], "each dtype must have a file of its own"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes_are_left_to_other_engines(dtype):
    model = mlp.MLP([4, 3], dtype=dtype)
    reason = mlp.ENGINES["epoch"].refuses(
        model, mlp.SoftmaxCrossEntropy(), mlp.SGD(model.parameters()), 8
    )
    assert reason == f"epoch: trains float32 and float64 networks, got {dtype}"


def test_without_numba_the_note_says_what_would_be_faster(monkeypatch):
    monkeypatch.setattr("kernels.launch.has_numba", lambda: False)
    model = mlp.MLP([4, 3])
    made = engines.choose("auto", model, mlp.SoftmaxCrossEntropy(), mlp.SGD(model.parameters()))
    assert made[0].name == "manual"
    assert "pip install 'handgrad[cpu]'" in made[1]


@pytest.mark.parametrize("threads", [1, 3])
def test_many_networks_are_trained_as_the_reference_trains_them(monkeypatch, threads):
    torch.manual_seed(0)
    x, y = torch.rand(70, 12), torch.randint(0, 4, (70,))
    results = []
    for reason in (None, "so the reference trains"):
        monkeypatch.setattr(cpu, "costs", lambda *_, reason=reason: reason)
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        sweep = mlp.Sweep([12, 9, 4], 5, [0.01, 0.1, 0.2, 0.3, 0.4], momentum=0.9)
        assert (sweep._backend(32, 15) is cpu.train_replicas) == (reason is None)
        means = []
        rows_ = sweep.fit((x, y), 3, 32, on_epoch=lambda _, m, kept=means: kept.append(m))
        order = sorted(rows_, key=lambda row: row.replica)
        results.append((torch.stack(means), [row.train_loss for row in order], sweep.parameters))
    (found, losses, ours), (expected, wanted, theirs) = results
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    assert losses == pytest.approx(wanted, rel=1e-5)
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def call(function, *arguments):
    kinds = [ctypes.c_int64 if isinstance(a, int) else ctypes.c_void_p for a in arguments]
    values = [a if isinstance(a, int) else a.data_ptr() for a in arguments]
    ctypes.CFUNCTYPE(None, *kinds)(function.address)(*values)


@both
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_scalars_of_the_table_at_their_ends(name, dtype):
    row = ACTIVATIONS[name]
    z = torch.cat([torch.linspace(-30, 30, 2001), torch.tensor([0.0, -100, 100, torch.nan])])
    z = torch.cat([z, 1e-9 * z]).to(dtype)
    y = torch.empty_like(z)
    forward, backward = rows.activation(row, cpu.DTYPES[dtype])
    call(forward, z, y, len(z))
    rtol, atol = (4e-6, 1e-6) if dtype == torch.float32 else (2e-14, 4e-15)
    torch.testing.assert_close(y, row.forward_ref(z), rtol=rtol, atol=atol, equal_nan=True)
    dy = torch.linspace(1, 2, len(z), dtype=dtype)
    dz, kept = dy.clone(), z if row.needs == "z" else y
    call(backward, dz, kept, len(z))
    expected = row.backward_ref(dy, kept)
    if name == "elu":  # of NaN, torch's own operator gives dy or NaN, depending on the place
        dz, expected = dz[~kept.isnan()], expected[~kept.isnan()]
    torch.testing.assert_close(dz, expected, rtol=rtol, atol=4 * atol, equal_nan=True)


def test_exp_and_erf_are_accurate_over_all_they_take():
    x = torch.cat(
        [torch.linspace(-103, 88.7, 50_001), torch.tensor([89.0, 1e30, -1e30, torch.inf])]
    )
    y = torch.tensor([language.exp(value) for value in x[::50].tolist() + x[-4:].tolist()])
    exact = torch.cat([x[::50], x[-4:]]).double().exp().float()
    torch.testing.assert_close(y, exact, rtol=2e-7, atol=2e-45)
    z = torch.linspace(-6, 6, 501)
    found = torch.tensor([language.erf(value) for value in z.tolist()])
    torch.testing.assert_close(found, torch.erf(z), rtol=0, atol=5e-7)
    assert language.exp(float("nan")) != language.exp(float("nan"))


def test_log_is_accurate_over_all_it_takes():
    x = torch.cat([torch.logspace(-44.8, 38.5, 801), torch.linspace(0.5, 2, 801)])
    ends = torch.tensor([0.0, -0.0, -1.0, torch.inf, -torch.inf, torch.nan])
    x = torch.cat([x, ends])
    y = torch.tensor([language.log(value) for value in x.tolist()])
    expected = x.double().log().float()
    torch.testing.assert_close(y, expected, rtol=2.5e-7, atol=0, equal_nan=True)


def test_doubles_are_accurate_over_all_they_take():
    x = torch.cat([torch.linspace(-740, 709.7, 2001), torch.linspace(-1e-9, 1e-9, 9)]).double()
    x = torch.cat([x, torch.tensor([0.0, 709.9, 1e300, -1e300, torch.inf, -torch.inf])])
    y = torch.tensor([doubles.exp(value) for value in x.tolist()], dtype=torch.float64)
    torch.testing.assert_close(y, x.exp(), rtol=5e-16, atol=5e-324)
    x = x[x < 700]
    y = torch.tensor([doubles.expm1(value) for value in x.tolist()], dtype=torch.float64)
    torch.testing.assert_close(y, x.expm1(), rtol=5e-16, atol=0)
    x = torch.cat([torch.logspace(-323, 308, 801), torch.linspace(0.5, 2, 801)]).double()
    ends = torch.tensor([0.0, -0.0, -1.0, torch.inf, -torch.inf, torch.nan])
    x = torch.cat([torch.logspace(-323, 308, 801, dtype=torch.float64), x[801:], ends])
    y = torch.tensor([doubles.log(value) for value in x.tolist()], dtype=torch.float64)
    torch.testing.assert_close(y, x.log(), rtol=5e-16, atol=0, equal_nan=True)
    z = torch.linspace(-7, 7, 501, dtype=torch.float64)
    y = torch.tensor([doubles.erf(value) for value in z.tolist()], dtype=torch.float64)
    torch.testing.assert_close(y, torch.erf(z), rtol=0, atol=1e-15)
    for function in (doubles.exp, doubles.expm1, doubles.log, doubles.erf):
        assert math.isnan(function(math.nan))


@both
def test_softmax_agrees_with_its_row(dtype):
    row = LOSSES["cross_entropy"]
    y = 20 * torch.randn(9, 16, dtype=dtype)
    t = torch.zeros(9, 16, dtype=dtype)
    t[:, :11] = torch.softmax(torch.randn(9, 11), 1)
    d, losses, parameters = (torch.ones(shape, dtype=dtype) for shape in ((9, 16), 9, 16))
    call(rows.loss(row, cpu.DTYPES[dtype]), y, t, d, losses, parameters, 9, 11, 16)
    error = ERRORS[dtype][0]
    exact = y[:, :11].double(), t[:, :11].double()
    values = row.value_ref(*exact).sum(1)
    torch.testing.assert_close(losses.double(), values, rtol=error, atol=error)
    gradient = row.gradient_ref(*exact)
    torch.testing.assert_close(d[:, :11].double(), gradient, rtol=error, atol=error)


def test_code_on_disk_is_found_by_its_digest():
    kind = cpu.DTYPES[torch.float32]
    steps = epoch.compiled(kind).code
    is_kept = rows.is_kept(rows.named(loop.steps_at, kind.name))
    assert is_kept or steps.function._cache.cache_path is None
    one, two = (rows.scalar(ACTIVATIONS[name].forward, kind).text for name in ("silu", "sigmoid"))
    assert two in one, "the digest of a scalar must include the functions that it calls"

    def other():
        return 2

    names = {rows.named(other, text).__qualname__ for text in (one, two, one)}
    assert len(names) == 2


def test_a_place_that_cannot_be_written_is_no_error():
    def compiler(cache=False):
        if cache:
            raise RuntimeError("cannot cache function 'f': no locator available for file 'f.py'")
        return lambda function: function

    assert rows.cached(compiler, check) is check
