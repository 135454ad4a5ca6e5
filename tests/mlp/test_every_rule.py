"""Weight decay, schedules, early stopping, clipping, smoothing and class weights on every engine.

Each engine, and a sweep, trains as engine `manual` does, or one line says why not.
"""

import functools
import importlib.util

import pytest
import torch

import mlp
from kernels import cpu
from mlp import engines, schedule

EPOCHS, BATCH, HIDDEN = 5, 8, (6,)
WEIGHT = [0.5, 2.0, 1.0]


class Case:
    """The settings of a training: arguments of the optimizer, of `fit`, of Trainer, of the loss.

    plan: (schedule, epochs of warm-up). refused: {engine or "sweep": a part of its error}.
    """

    def __init__(self, optimizer="sgd", numbers=None, plan=("constant", 0), refused=None, **more):
        self.optimizer, self.numbers, self.plan = optimizer, numbers or {}, plan
        self.refused = refused or {}
        self.fit = {k: more.pop(k) for k in [*more] if k == "early_stopping"}
        self.trainer = {k: more.pop(k) for k in [*more] if k == "clip_norm"}
        self.loss = more


CLIPS = {
    "lean": "cannot clip",
    "epoch": "cannot clip the norm of them all",
    "sweep": "no setting 'clip_norm'",
}
SMOOTHS = {"epoch": "takes cross-entropy without smoothing"}
CASES = {
    **{
        f"weight decay {name}": Case(name, {"weight_decay": 0.05})
        for name in ("sgd", "adam", "adamw", "rmsprop", "adagrad", "lion")
    },
    "weight decay and momentum": Case(numbers={"weight_decay": 0.05, "momentum": 0.9}),
    **{name: Case(plan=(name, 0)) for name in schedule.SCHEDULES},
    **{
        f"{name} after warm-up": Case("adam", plan=(name, 2))
        for name in schedule.SCHEDULES
        if name != "plateau"
    },
    "early stopping": Case(numbers={"lr": 0.3}, early_stopping=1),
    "early stopping, plateau": Case(numbers={"lr": 0.3}, plan=("plateau", 0), early_stopping=2),
    "clipping": Case(clip_norm=0.05, refused=CLIPS),
    "clipping adam": Case("adam", clip_norm=0.05, refused=CLIPS),
    "label smoothing": Case(label_smoothing=0.2, refused=SMOOTHS),
    "class weights": Case(weight=WEIGHT),
    "all together": Case(
        numbers={"weight_decay": 0.05, "momentum": 0.9},
        plan=("cosine", 1),
        early_stopping=3,
        label_smoothing=0.1,
        weight=WEIGHT,
        refused=SMOOTHS,
    ),
}


def data(seed, is_wrong=False):
    """is_wrong: each label is that of the next class. No training on right ones meets it."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(44, 5, generator=generator)
    y = (x[:, 0] * x[:, 1] + x[:, 2]).mul(2).long().clamp(-1, 1) + 1
    return mlp.Dataset(x, (y + 1) % 3 if is_wrong else y, ("few", "many", "some"))


def held_out(case):
    """Validation data. It stops a training early, whatever the random numbers are."""
    return data(1, is_wrong="early_stopping" in case.fit)


def trained(case, engine, device):
    """(training losses, weights) of a training by an engine. ValueError if it refuses."""
    model = mlp.MLP([5, *HIDDEN, 3], "tanh", device=device)
    mlp.initialise(dict(model.named_parameters()), None, 7)
    optimizer = mlp.optim.OPTIMIZERS[case.optimizer](
        model.parameters(), **{"lr": 0.02, **case.numbers}
    )
    loss = mlp.SoftmaxCrossEntropy(**case.loss)
    trainer = mlp.Trainer(model, loss, optimizer, engine, verbose=False, **case.trainer)
    plan = schedule.Plan(EPOCHS, -(-44 // BATCH), case.plan[1])
    options = {"scheduler": schedule.named(case.plan[0], plan), "seed": 7, **case.fit}
    history = trainer.fit(data(0), EPOCHS, BATCH, validation=held_out(case), **options)
    assert trainer.engine.name == engine
    return [row["train_loss"] for row in history], list(model.parameters())


def swept(case, device):
    """(training losses, weights) of the same training as one of two networks of a sweep."""
    settings = {"hidden": HIDDEN, "activation": "tanh", "optimizer": case.optimizer}
    settings |= {"lr": 0.02, "schedule": case.plan[0], "warmup": case.plan[1], "batch_size": BATCH}
    settings |= {"seed": 7, **case.numbers, **case.trainer}
    loss = mlp.SoftmaxCrossEntropy(**case.loss)
    sweep = mlp.Sweep([{**settings, "seed": 8}, settings], loss=loss, device=device)
    sweep.fit(data(0), EPOCHS, validation=held_out(case), **case.fit)
    return sweep.members[1].losses, list(sweep.network(1).parameters())


@pytest.mark.parametrize("way", [*engines.ENGINES, "sweep"])
@pytest.mark.parametrize("name", CASES)
def test_as_manual_or_refused(name, way, device, monkeypatch):
    """Losses agree to 1e-5 and weights to 1e-4, as engines sum in different orders in float32."""
    case = CASES[name]
    if way == "epoch" and device == "cpu" and importlib.util.find_spec("numba") is None:
        pytest.skip("the compiled epoch needs numba: pip install 'handgrad[cpu]'")
    if way == "epoch" or way == "sweep":
        monkeypatch.setattr(cpu, "costs", lambda *args: None)
    refused = case.refused.get(way)
    if way == "graph" and device == "cpu":
        refused = "graph: "
    train = functools.partial(trained, engine=way) if way in engines.ENGINES else swept
    if refused is not None:
        with pytest.raises(ValueError, match=refused) as error:
            train(case, device=device)
        assert "\n" not in str(error.value)
        return
    losses, weights = train(case, device=device)
    expected, theirs = trained(case, "manual", device)
    assert losses == pytest.approx(expected, rel=1e-5)
    if "early stopping" in name:
        assert len(losses) < EPOCHS
    for one, other in zip(weights, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
