"""Every scheduler of torch gives a trainer the numbers of torch's own loop, also after a stop."""

import copy
import io
import itertools
import math

import pytest
import torch
from torch.optim import lr_scheduler as s

import mlp
from mlp import ENGINES, MLP, Trainer, schedule
from mlp.schedule import Schedule, options_of

STEPS = 3  # 40 samples in batches of 16


def tensors():
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    return x, x[:, :3].argmax(1)


def sequence(o):
    return s.SequentialLR(o, [s.LinearLR(o, 0.2, 1.0, 2), s.ExponentialLR(o, 0.5)], [2])


def chain(o):
    return s.ChainedScheduler([s.LinearLR(o, 0.2, 1.0, 3), s.ExponentialLR(o, 0.7)])


def cyclic(o, **options):
    return s.CyclicLR(o, 0.001, 0.1, step_size_up=2, **options)


BY_EPOCH = {
    "StepLR": lambda o: s.StepLR(o, 2, 0.1),
    "MultiStepLR": lambda o: s.MultiStepLR(o, [2, 4], 0.1),
    "LambdaLR": lambda o: s.LambdaLR(o, lambda epoch: 1 / (1 + epoch)),
    "MultiplicativeLR": lambda o: s.MultiplicativeLR(o, lambda epoch: 0.9),
    "ConstantLR": lambda o: s.ConstantLR(o, 0.5, 4),
    "LinearLR": lambda o: s.LinearLR(o, 0.1, 1.0, 5),
    "ExponentialLR": lambda o: s.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: s.PolynomialLR(o, 6, 2.0),
    "CosineAnnealingLR": lambda o: s.CosineAnnealingLR(o, 6),
    "CosineAnnealingWarmRestarts": lambda o: s.CosineAnnealingWarmRestarts(o, 2, 2),
    "SequentialLR": sequence,
    "ChainedScheduler": chain,
    "ReduceLROnPlateau": lambda o: s.ReduceLROnPlateau(o, factor=0.5, patience=0, threshold=0.5),
}
BY_STEP = {
    "OneCycleLR": lambda o: s.OneCycleLR(o, 0.1, total_steps=6 * STEPS),
    "CyclicLR": cyclic,
    "CyclicLR, triangular2": lambda o: cyclic(o, mode="triangular2"),
}
SCHEDULERS = BY_EPOCH | BY_STEP


def recording(make):
    """(a trainer's make_optimizer, a list that gets (lr, momentum) at each step)."""
    seen = []

    class Recording(mlp.SGD):
        """Notes lr and momentum at each step."""

        def step(self, closure=None, *, grads=None):
            group = self.param_groups[0]
            seen.append((group["lr"], group["momentum"]))
            return super().step(closure, grads=grads)

    return lambda p: Recording(p, lr=0.01, momentum=0.9), seen


def flat(pairs):
    return [number for pair in pairs for number in pair]


def trainer_of(make_optimizer, engine="autograd", seed=0):
    torch.manual_seed(seed)
    return Trainer(MLP((6, 8, 3)), optimizer=make_optimizer, engine=engine, verbose=False)


def torchs(make, epochs, per_step):
    """(lr, momentum) at each step of torch's own loop, with a trainer's losses as metrics."""
    make_optimizer, _ = recording(make)
    trainer = trainer_of(make_optimizer)
    optimizer, seen = torch.optim.SGD([torch.zeros(1)], lr=0.01, momentum=0.9), []
    scheduler = make(optimizer)
    for epoch in range(1, epochs + 1):
        for _ in range(STEPS):
            seen.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"]))
            optimizer.step()
            if per_step:
                scheduler.step()
        if isinstance(scheduler, s.ReduceLROnPlateau):
            copy_numbers(optimizer, trainer.optimizer)
            scheduler.step(trainer.fit(tensors(), epoch, 16)[-1]["train_loss"])
        elif not per_step:
            scheduler.step()
    return seen


def copy_numbers(source, target):
    target.param_groups[0]["lr"] = source.param_groups[0]["lr"]


@pytest.mark.parametrize("name", SCHEDULERS)
def test_numbers_are_torchs(name):
    make_optimizer, seen = recording(SCHEDULERS[name])
    trainer_of(make_optimizer).fit(tensors(), 6, 16, scheduler=SCHEDULERS[name])
    assert flat(seen) == pytest.approx(flat(torchs(SCHEDULERS[name], 6, name in BY_STEP)))
    assert len({numbers for numbers in seen}) > 1


@pytest.mark.parametrize("given", ["function", "object before", "object after"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_resumed_is_as_if_never_stopped(name, given):
    """Three epochs, a save and load by torch, and three more give the numbers of six epochs."""
    make = SCHEDULERS[name]
    make_optimizer, seen = recording(make)
    trainer_of(make_optimizer).fit(tensors(), 6, 16, scheduler=make)
    expected = seen.copy()
    first = trainer_of(make_optimizer)
    seen.clear()
    first.fit(tensors(), 3, 16, scheduler=make)
    torch.save(first.state_dict(), buffer := io.BytesIO())
    buffer.seek(0)
    second = trainer_of(make_optimizer, seed=1)
    scheduler = make(second.optimizer) if given == "object before" else make
    second.load_state_dict(torch.load(buffer, weights_only=True))
    scheduler = make(second.optimizer) if given == "object after" else scheduler
    second.fit(tensors(), 6, 16, scheduler=scheduler)
    assert flat(seen) == pytest.approx(flat(expected))
    assert second.history[-1]["train_loss"] == pytest.approx(
        trainer_of(make_optimizer).fit(tensors(), 6, 16, scheduler=make)[-1]["train_loss"]
    )


@pytest.mark.parametrize("name", SCHEDULERS)
def test_two_fits_are_one(name):
    """A second fit goes on with the same function, with an object, or with another function that
    makes the same scheduler.
    """
    make = SCHEDULERS[name]
    make_optimizer, seen = recording(make)
    trainer_of(make_optimizer).fit(tensors(), 6, 16, scheduler=make)
    expected = seen.copy()
    for first, second in (
        (make, make),
        (make, lambda o: make(o)),
        (None, None),
    ):
        seen.clear()
        trainer = trainer_of(make_optimizer)
        made = make(trainer.optimizer) if first is None else None
        trainer.fit(tensors(), 3, 16, scheduler=first or made)
        trainer.fit(tensors(), 6, 16, scheduler=second or made)
        assert flat(seen) == pytest.approx(flat(expected))


def test_step_lr_resumed():
    """Resumed after three epochs, StepLR(o, 2, 0.1) goes on with its rates."""
    make = SCHEDULERS["StepLR"]
    make_optimizer, seen = recording(make)
    first = trainer_of(make_optimizer)
    first.fit(tensors(), 3, 40, scheduler=make)
    second = trainer_of(make_optimizer)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    second.fit(tensors(), 6, 40, scheduler=make)
    assert [lr for lr, _ in seen] == pytest.approx([0.01, 0.01, 0.001, 0.001, 0.0001, 0.0001])


@pytest.mark.parametrize(
    ("kind", "engine"),
    [
        *itertools.product(["sgd", "adam", "torch's adam"], ["autograd", "manual"]),
        ("sgd", "epoch"),
        ("adam", "epoch"),
    ],
)
@pytest.mark.parametrize("name", BY_STEP)
def test_per_step_on_each_engine(name, kind, engine):
    """Weights are those of torch's loop, also where momentum or betas change at each step."""
    if engine == "epoch":
        pytest.importorskip("numba", reason="the compiled epoch needs numba")
    make = BY_STEP[name]
    options = {"lr": 0.01, "momentum": 0.9} if kind == "sgd" else {"lr": 0.01}
    theirs = torch.optim.SGD if kind == "sgd" else torch.optim.Adam
    ours = {"sgd": mlp.SGD, "adam": mlp.Adam, "torch's adam": torch.optim.Adam}[kind]
    trainer = trainer_of(lambda p: ours(p, **options), engine)
    twin = copy.deepcopy(trainer.model)
    optimizer = theirs(twin.parameters(), **options)
    scheduler, (x, y) = make(optimizer), tensors()
    for epoch in (1, 2, 3):
        for rows in mlp.data.permutation(40, 0, epoch).split(16):
            loss = torch.nn.functional.cross_entropy(twin(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
    trainer.fit((x, y), 3, 16, scheduler=make)
    for p, q in zip(trainer.model.parameters(), twin.parameters()):
        assert torch.allclose(p, q, rtol=1e-4, atol=1e-6)
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(optimizer.param_groups[0]["lr"])


def test_engines_of_whole_epochs_refuse_a_norm(device):
    for engine in (e for e in ENGINES if e not in ("autograd", "manual")):
        for demands in (mlp.engines.Demands(), mlp.engines.Demands(per_step=True)):
            assert ENGINES[engine].cannot(demands) is None
        reason = ENGINES[engine].cannot(mlp.engines.Demands(clip_norm=1.0))
        assert "cannot clip the norm of them all" in reason


@pytest.mark.interpreter
def test_auto_keeps_its_engine_for_steps(device):
    """`auto` keeps the epoch engine for a scheduler that steps at each batch. Weights are those of
    single steps.
    """
    data, trained = [t.to(device) for t in tensors()], []
    for engine in ("manual", "auto"):
        torch.manual_seed(0)
        trainer = Trainer(MLP((6, 8, 3)).to(device), engine=engine, verbose=False)
        trainer.fit(data, 1, 16)
        trainer.fit(data, 2, 16, scheduler=lambda o: s.StepLR(o, 1, 0.5), interval="step")
        trained.append([p.detach() for p in trainer.model.parameters()])
    assert trainer.engine.name == "epoch"
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.5**STEPS)
    for p, q in zip(*trained, strict=True):
        assert (p - q).abs().max() <= 1e-5 * p.abs().max()


def test_a_schedule_that_makes_another_rule_is_refused_by_whole_epochs():
    """Momentum that falls to 0 within an epoch is refused, because plain SGD has no buffers."""
    pytest.importorskip("numba", reason="the compiled epoch needs numba")
    make = lambda o: cyclic(o, base_momentum=0.0, max_momentum=0.9)  # noqa: E731
    trainer = trainer_of(lambda p: mlp.SGD(p, lr=0.01, momentum=0.9), "epoch")
    with pytest.raises(ValueError, match=r"moves momentum to sgd at step 3 of the epoch.*'manual'"):
        trainer.fit(tensors(), 2, 16, scheduler=make)


@pytest.mark.interpreter
@pytest.mark.parametrize("engine", ENGINES)
def test_each_engine_uses_a_changed_momentum(engine, device):
    """After each epoch momentum changes from 0.5 to 0 or back, which changes the kernels' rule."""
    losses = []
    for name in (engine, "autograd"):
        torch.manual_seed(0)
        model = MLP((6, 8, 3)).to(device)
        optimizer = mlp.SGD(model.parameters(), lr=0.1, momentum=0.5)
        if refusal := ENGINES[name].refuses(model, mlp.SoftmaxCrossEntropy(), optimizer, 16):
            pytest.skip(f"by design: {refusal}")

        class Momentum:
            """A scheduler that is not torch's."""

            def __init__(self, optimizer):
                self.optimizer = optimizer

            def step(self):
                group = self.optimizer.param_groups[0]
                group["momentum"] = 0.0 if group["momentum"] else 0.5

            def state_dict(self):
                return {}

        trainer = Trainer(model, None, optimizer, name, verbose=False)
        data = [t[:16].to(device) for t in tensors()]
        rows = trainer.fit(data, 3, 8, scheduler=Momentum)
        losses.append([row["train_loss"] for row in rows])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_plateau_looks_at_the_test_loss():
    """Without test data it looks at the training loss. In mode "max" it looks at the accuracy."""

    class Noted(s.ReduceLROnPlateau):
        def step(self, metrics, epoch=None):
            noted.append(float(metrics))
            super().step(metrics)

    for options, evaluate, key in (
        ({}, tensors(), "test_loss"),
        ({}, None, "train_loss"),
        ({"mode": "max"}, tensors(), "test_accuracy"),
        ({"mode": "max"}, None, "train_accuracy"),
    ):
        noted = []
        trainer = trainer_of(None)
        make = lambda o: Noted(o, **options)  # noqa: E731, B023
        rows = trainer.fit(tensors(), 3, 16, evaluate, scheduler=make)
        assert noted == [row[key] for row in rows]
    x = tensors()[0]
    trainer = Trainer(MLP((6, 3)), "mse", verbose=False)
    with pytest.raises(ValueError, match="mode='max' needs the accuracy, but these targets"):
        trainer.fit((x, x[:, :3]), 1, scheduler=lambda o: s.ReduceLROnPlateau(o, "max"))


def test_a_divergence_restores_the_schedule():
    """The scheduler's steps of the failed epoch are undone, so that the run can go on."""
    x, y = tensors()
    make = BY_STEP["OneCycleLR"]
    make_optimizer, _ = recording(make)
    trainer = trainer_of(make_optimizer)
    trainer.fit((x, y), 1, 16, scheduler=make)
    before = options_of(trainer.optimizer), trainer.schedule.state_dict()
    bad = x.clone()
    bad[mlp.data.permutation(40, 0, 2)[32:]] = 3e38
    with torch.no_grad():
        for p in trainer.model.parameters():
            p.abs_().add_(1)  # then six times 3e38 is infinite, whatever the weights were
    with pytest.raises(mlp.Diverged):
        trainer.fit((bad, y), 2, 16, scheduler=make)
    assert (options_of(trainer.optimizer), trainer.schedule.state_dict()) == before
    assert len(trainer.fit((x, y), 6, 16, scheduler=make)) == 6


def test_refusals():
    make_optimizer, _ = recording(None)
    make = BY_EPOCH["StepLR"]
    first = trainer_of(make_optimizer)
    first.fit(tensors(), 2, 16, scheduler=make)
    state = copy.deepcopy(first.state_dict())
    data = tensors()
    for scheduler, message in (
        (None, "was trained with a StepLR; give fit the scheduler again"),
        (BY_EPOCH["ExponentialLR"], "the state is of a StepLR, but the scheduler given is a Expo"),
        (lambda o: s.StepLR(o, 5, 0.1), "a StepLR with step_size 2, but the scheduler given has 5"),
    ):
        second = trainer_of(make_optimizer)
        second.load_state_dict(copy.deepcopy(state))
        with pytest.raises(ValueError, match=message):
            second.fit(data, 3, 16, scheduler=scheduler)
        assert second.state_dict()["scheduler"]["name"] == "StepLR"
    for hostile in ("StepLR", {"name": "StepLR"}, [1]):
        with pytest.raises(ValueError, match="the state of scheduler must hold made, name, state"):
            second.load_state_dict({**state, "scheduler": hostile})
    state["scheduler"] = None
    second.load_state_dict(state)
    assert len(second.fit(data, 3, 16)) == 3
    other = mlp.SGD([torch.zeros(1)], lr=0.1)
    for scheduler, options, message in (
        (s.StepLR(other, 1), {}, "belongs to another optimizer than the trainer's"),
        (make, {"interval": "batch"}, "interval must be one of epoch, step, got 'batch'"),
        (
            BY_EPOCH["ReduceLROnPlateau"],
            {"interval": "step"},
            "ReduceLROnPlateau needs an epoch's loss, but its interval is 'step'; give 'epoch'",
        ),
        (
            lambda o: s.OneCycleLR(o, 0.1, total_steps=8),
            {},
            "OneCycleLR has total_steps=8, but this training steps it 9 times, once a batch",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            trainer_of(make_optimizer).fit(data, 3, 16, scheduler=scheduler, **options)


def test_one_cycle_by_epochs():
    """`interval` counts, not the usual interval of the scheduler's class."""
    make_optimizer, seen = recording(None)
    make = lambda o: s.OneCycleLR(o, 0.1, total_steps=6)  # noqa: E731
    trainer_of(make_optimizer).fit(tensors(), 6, 16, scheduler=make, interval="epoch")
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.01, momentum=0.9)
    scheduler, expected = make(optimizer), []
    for _ in range(6):
        expected += [optimizer.param_groups[0]["lr"]] * STEPS
        optimizer.step()
        scheduler.step()
    assert [lr for lr, _ in seen] == pytest.approx(expected)
    assert Schedule(make, optimizer).per_step and math.isfinite(seen[-1][0])


@pytest.mark.parametrize("warmup", [0, 2])
@pytest.mark.parametrize("name", schedule.SCHEDULES)
def test_a_named_schedule_resumed(name, warmup):
    """A run that was killed makes its schedule for an optimizer whose rate is that of its end."""
    plan = schedule.Plan(6, STEPS, warmup)
    try:
        make = schedule.named(name, plan)
    except ValueError as error:
        assert warmup and "has no warm-up" in str(error)
        return
    make_optimizer, seen = recording(make)
    trainer_of(make_optimizer).fit(tensors(), 6, 16, scheduler=make)
    expected = seen.copy()
    for stop in (1, 4):
        seen.clear()
        first, second = trainer_of(make_optimizer), trainer_of(make_optimizer, seed=1)
        first.fit(tensors(), stop, 16, scheduler=make)
        second.load_state_dict(copy.deepcopy(first.state_dict()))
        second.fit(tensors(), 6, 16, scheduler=schedule.named(name, plan))
        assert flat(seen) == flat(expected)
