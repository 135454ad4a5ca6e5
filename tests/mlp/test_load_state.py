"""A state that does not fit is refused, and nothing of it is loaded."""

import copy
import itertools

import pytest
import torch
from torch.optim import lr_scheduler

import mlp
from mlp.optim import OPTIMIZERS

SIZES = [6, 5, 3]
FOREIGN = {"torch_sgd": torch.optim.SGD, "torch_adam": torch.optim.Adam}
# These two have the same options and states, as in torch.
ALIKE = [{"adam", "adamw", "torch_adam"}, {"sgd", "torch_sgd"}]


def made(name="adam", sizes=SIZES, seed=0, loss=None):
    torch.manual_seed(seed)
    make = {**OPTIMIZERS, **FOREIGN}[name]
    return mlp.Trainer(
        mlp.MLP(sizes), loss, lambda p: make(p, lr=0.01), engine="autograd", verbose=False
    )


def data(features=6):
    torch.manual_seed(1)
    return torch.rand(20, features), torch.randint(0, 3, (20,))


def fitted(*args, epochs=2, **options):
    trainer = made(*args)
    trainer.fit(data(trainer.model.sizes[0]), epochs, **options)
    return trainer


def everything(trainer):
    return copy.deepcopy(trainer.state_dict())


def assert_same(one, other):
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        for first, second in zip(one, other, strict=True):
            assert_same(first, second)
    else:
        assert one == other


PAIRS = [
    pair
    for pair in itertools.permutations([*OPTIMIZERS, *FOREIGN], 2)
    if not any(alike >= {*pair} for alike in ALIKE)
]


@pytest.mark.parametrize(("saved", "name"), PAIRS)
@pytest.mark.parametrize("epochs", [0, 1])
def test_the_state_of_another_optimizer(saved, name, epochs):
    state, trainer = everything(fitted(saved, epochs=epochs)), fitted(name)
    before = everything(trainer)
    kind = type(trainer.optimizer).__name__
    with pytest.raises(ValueError, match=f"{kind}: the state is of another optimizer"):
        trainer.load_state_dict(state)
    assert_same(everything(trainer), before)
    if name in OPTIMIZERS:
        with pytest.raises(ValueError, match=f"{kind}: the state is of another optimizer"):
            trainer.optimizer.load_state_dict(state["optimizer"])
        assert_same(everything(trainer), before)


def test_the_state_of_an_optimizer_with_the_same_options():
    """Adamax has Adam's options, but keeps another second moment."""
    (p,) = parameters = [torch.ones(3, requires_grad=True)]
    p.grad = torch.ones(3)
    theirs, ours = torch.optim.Adamax(parameters), mlp.Adam(parameters)
    theirs.step()
    with pytest.raises(ValueError, match="keeps exp_avg, exp_inf of a parameter, but Adam keeps"):
        ours.load_state_dict(theirs.state_dict())
    assert not ours.state


@pytest.mark.parametrize("name", ["adam", "sgd", "rmsprop", "lion", "torch_adam"])
def test_its_own_state_is_loaded(name):
    state, trainer = everything(fitted(name)), made(name, seed=3)
    trainer.load_state_dict(copy.deepcopy(state))
    assert_same(everything(trainer), state)


def test_the_state_of_parameters_of_other_shapes():
    optimizer = mlp.Adam([torch.zeros(2, 3)])
    other = mlp.Adam([torch.zeros(3, 2)])
    for each in (optimizer, other):
        each.step(grads=[torch.ones_like(each.param_groups[0]["params"][0])])
    with pytest.raises(ValueError, match=r"exp_avg of parameter 0 is \(2, 3\), but .* \(3, 2\)"):
        other.load_state_dict(optimizer.state_dict())


def broken(state, name):
    if name in ("model", "optimizer", "history"):
        del state[name]
    elif name == "another network":
        state["model"] = mlp.MLP([6, 4, 3]).state_dict()
    elif name == "a group more":
        state["optimizer"]["param_groups"] *= 2
    elif name == "the loss":
        state["loss"] = [{"weight": torch.ones(3)}]
    else:
        state["stopping"]["patience"] = 0
    return state


@pytest.mark.parametrize(
    "name",
    [
        "model",
        "optimizer",
        "history",
        "another network",
        "a group more",
        "the loss",
        "the patience",
    ],
)
def test_a_state_with_a_wrong_part_changes_nothing(name):
    schedule = {"scheduler": lambda o: lr_scheduler.StepLR(o, 1, 0.5), "early_stopping": 9}
    state = broken(everything(fitted(epochs=3, **schedule)), name)
    trainer = fitted(**schedule)
    before = everything(trainer)
    with pytest.raises(ValueError):
        trainer.load_state_dict(state)
    assert_same(everything(trainer), before)
    trainer.fit(data(), 3, **{**schedule, "scheduler": trainer.schedule.given})  # it goes on
    assert len(trainer.history) == 3


def test_an_ended_training_says_why_it_trains_nothing(capsys):
    trainer = mlp.Trainer(mlp.MLP(SIZES), engine="autograd")
    trainer.optimizer.param_groups[0]["lr"] = 0.0
    # Its loss has the same bits after each epoch; a sum over another order of the samples may not.
    held = {"evaluate": data()}
    trainer.fit(data(), 9, early_stopping=2, **held)
    assert len(trainer.history) == 3
    capsys.readouterr()
    trainer.fit(data(), 9, early_stopping=2, **held)
    assert len(trainer.history) == 3
    assert (
        "nothing is trained: early stopping has ended this training, because 2 epochs had no lower "
        "loss than epoch 1; give early_stopping=3 or more, or None, to go on"
    ) in capsys.readouterr().out
    trainer.fit(data(), 9, early_stopping=3, **held)
    assert len(trainer.history) == 4


def test_check_keeps_nothing_of_the_data():
    trainer = made()
    x, y = data()
    before = everything(trainer)
    trainer.check((x, [("a", "b", "c")[i] for i in y]))
    assert_same(everything(trainer), before)
    assert trainer.fit((x, y), 1) and trainer.predict(x).dtype == torch.int64
