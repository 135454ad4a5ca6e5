"""`Trainer.fit` trains several epochs in one call where nothing looks between them.

The bits must be those of one epoch a call, which a callback after each epoch forces.
"""

import itertools

import pytest
import torch
from torch.optim import lr_scheduler

import mlp
from kernels import cpu
from mlp import schedule
from mlp.engines import Epoch
from tests.checks import ctrl_c

pytest.importorskip("numba", reason="optional: needs numba")

EPOCHS, ROWS, BATCH = 9, 50, 16
OPTIMIZERS = {
    "sgd": lambda p: mlp.SGD(p, lr=0.05),
    "nesterov": lambda p: mlp.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "adam": lambda p: mlp.Adam(p, lr=0.01),
}


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    """The number of epochs in each call of the engine. A call takes as many as are left."""
    counts: list[int] = []
    several, one = Epoch.epochs, Epoch.epoch

    def epochs(engine, data, orders, *more):
        counts.append(len(orders))
        return several(engine, data, orders, *more)

    def epoch(*arguments):
        counts.append(1)
        return one(*arguments)

    monkeypatch.setattr(Epoch, "epochs", epochs)
    monkeypatch.setattr(Epoch, "epoch", epoch)
    monkeypatch.setattr("mlp.trainer._Pace.SECONDS", 1e9)
    return counts


def labels():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, 12, generator=generator)
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 1).long()


def trainer(optimizer="nesterov", loss=None, outputs=3):
    torch.manual_seed(1)
    model = mlp.MLP([12, 9, outputs], "tanh")
    made = OPTIMIZERS.get(optimizer, optimizer)
    return mlp.Trainer(model, loss, made, engine="epoch", verbose=False)


def fit(one_by_one, data=None, epochs=EPOCHS, made=None, **arguments):
    """A trained trainer."""
    made = made or trainer()
    told = (lambda row: None) if one_by_one else None
    made.fit(data or labels(), epochs, BATCH, on_epoch=told, **arguments)
    return made


def assert_same(one, other):
    """Both trainers have the same bits: history, weights, states, rates and schedule."""
    timed = ("seconds", "samples_per_second")
    rows = [
        [{k: v for k, v in row.items() if k not in timed} for row in t.history]
        for t in (one, other)
    ]
    assert rows[0] == rows[1]
    for p, q in zip(one.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(p, q)
    states = one.optimizer.state_dict(), other.optimizer.state_dict()
    assert states[0]["param_groups"] == states[1]["param_groups"]
    for p, q in zip(*(s["state"].values() for s in states), strict=True):
        assert p.keys() == q.keys()
        for key, value in p.items():
            assert value is q[key] or torch.equal(value, q[key])
    assert str(one.state_dict()["scheduler"]) == str(other.state_dict()["scheduler"])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_bits_are_those_of_one_by_one(optimizer, calls):
    one = fit(True, made=trainer(optimizer))
    assert calls == [1] * EPOCHS
    calls.clear()
    several = fit(False, made=trainer(optimizer))
    assert calls == [1, EPOCHS - 1], "the first epoch shows how long one takes"
    assert_same(one, several)


@pytest.mark.parametrize("name", ["cosine", "step", "onecycle", "warm-up", "constant"])
@pytest.mark.parametrize("drop_last", [False, True])
def test_a_schedule_is_stepped_ahead(name, drop_last, calls):
    steps = ROWS // BATCH if drop_last else -(-ROWS // BATCH)
    plan = schedule.Plan(EPOCHS, steps, 2 if name == "warm-up" else 0)
    made = [schedule.named("cosine" if name == "warm-up" else name, plan) for _ in range(2)]
    one, several = (
        fit(one, scheduler=each, drop_last=drop_last) for one, each in zip((True, False), made)
    )
    assert calls[-1] == EPOCHS - 1
    assert_same(one, several)


@pytest.mark.parametrize("kind", ["sum", "numbers", "ignored"])
def test_losses_of_all_kinds(kind, calls):
    x, y = labels()
    loss, outputs = mlp.SoftmaxCrossEntropy(reduction="sum", scale=0.1), 3
    if kind == "numbers":
        y, loss, outputs = x[:, :1] * 2, mlp.HuberLoss(delta=0.5), 1
    if kind == "ignored":  # a batch may have ignored labels alone, and no loss
        y[::2], loss = -100, mlp.SoftmaxCrossEntropy()
    one, several = (fit(way, (x, y), made=trainer("sgd", loss, outputs)) for way in (True, False))
    assert calls[-1] == EPOCHS - 1
    assert_same(one, several)


def test_batches_of_ignored_labels_alone():
    """Such a batch has the loss NaN, which is no divergence."""
    x, y = labels()
    y[:-2] = -100
    one, several = (fit(way, (x, y), made=trainer("sgd")) for way in (True, False))
    assert_same(one, several)


def test_a_divergence_is_that_of_one_by_one(calls):
    found = []
    for one_by_one in (True, False):
        made = trainer("sgd", mlp.MeanSquaredError())
        rise = lr_scheduler.StepLR(made.optimizer, 6, gamma=1e35)
        with pytest.raises(mlp.Diverged) as raised:
            fit(one_by_one, made=made, scheduler=rise)
        found.append((made, str(raised.value)))
    assert "of epoch 7 with" in found[0][1] and "end of epoch 6" in found[0][1]
    assert found[0][1] == found[1][1]
    assert calls[-4:] == [1, EPOCHS - 1, 5, 1]
    assert_same(found[0][0], found[1][0])


def test_a_resumed_training_is_as_if_never_stopped(calls):
    cosine = schedule.named("cosine", schedule.Plan(EPOCHS, 4))
    whole, first = fit(False, scheduler=cosine), fit(False, epochs=4, scheduler=cosine)
    again = trainer()
    again.load_state_dict(first.state_dict())
    fit(False, made=again, scheduler=cosine)
    assert calls == [1, EPOCHS - 1, 1, 3, 1, 4]
    assert_same(whole, again)


@pytest.mark.parametrize(
    "arguments",
    [
        {"on_step": lambda count: None},
        {"evaluate": labels()},
        {"validation": labels()},
        {"early_stopping": 3},
        {"scheduler": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch)},
        {"scheduler": lambda o: lr_scheduler.ReduceLROnPlateau(o)},
    ],
    ids=["on_step", "evaluate", "validation", "stopping", "lambda", "plateau"],
)
def test_one_epoch_a_call_where_something_looks(arguments, calls):
    fit(False, epochs=4, **arguments)
    assert calls == [1] * 4


def test_ctrl_c_keeps_the_epochs_that_are_whole(monkeypatch):
    from kernels.cpu import epoch

    made, cosine = trainer(), schedule.named("cosine", schedule.Plan(10**6, 4))
    fit(False, epochs=3, made=made, scheduler=cosine)
    pieces = itertools.count()

    def piece(choice, left):
        if next(pieces) == 50:
            press()
        return 1, int(left)

    monkeypatch.setattr(epoch._Choice, "next", piece)
    with ctrl_c() as press, pytest.raises(KeyboardInterrupt):
        fit(False, epochs=30_000, made=made, scheduler=cosine)
    done = len(made.history)
    assert 50 <= done < 30_000 and made.history[-1]["epoch"] == done
    assert made.schedule.scheduler.last_epoch == done
    whole = fit(False, epochs=min(done, 60), scheduler=cosine)
    assert [row["train_loss"] for row in whole.history] == [
        row["train_loss"] for row in made.history[:60]
    ]


def test_a_bar_counts_every_step(monkeypatch):
    counted, rows = [], []

    class Bar:
        disable = False

        def update(self, steps=1):
            counted.append(steps)

        def set_postfix_str(self, text, refresh):
            rows.append(text)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

    monkeypatch.setattr("mlp.progress.bar", lambda *_: Bar())
    fit(False, progress=True)
    assert sum(counted) == EPOCHS * -(-ROWS // BATCH) and len(rows) == EPOCHS


def test_a_number_of_epochs_that_takes_about_a_quarter_of_a_second(monkeypatch):
    monkeypatch.undo()
    made = mlp.trainer._Pace(1000)
    assert made.next(50) == 1
    made.took(1, 1, [{"seconds": 0.01}])
    assert (made.next(50), made.next(7)) == (25, 7)
    made.took(25, 25, [{"seconds": 1e-6}])
    assert made.next(10**6) == 2000, "orders must not fill the memory"
    made.took(2000, 12, [{"seconds": 1e-6}])
    assert made.next(50) == 1, "the next epoch diverges"
    assert cpu.serves(torch.zeros(1))
