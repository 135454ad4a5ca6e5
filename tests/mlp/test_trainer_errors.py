"""Errors of Trainer are one line, and the weights stay those of the last good epoch."""

import copy
import math

import pytest
import torch

import mlp
from mlp import MLP, Diverged, Trainer
from tests.mlp.test_trainer import make, tensors


@pytest.mark.parametrize("engine", ["auto", "autograd"])
def test_diverged(engine, device):
    """The error is one line with epoch, step and rate. Weights and history are those of the last
    good epoch.
    """
    x, y = tensors()
    trainer = make(device, lambda p: mlp.SGD(p, lr=0.1, momentum=0.9), engine=engine)
    trainer.fit(tensors(), 2, 32)
    good = copy.deepcopy(trainer.model.state_dict())
    x[40:] *= 5e37  # data must be finite, but products of these numbers are not
    message = (
        r"the loss is (nan|inf) at step \d of epoch 3 with learning rate 0.1; .* end of epoch 2"
    )
    with pytest.raises(Diverged, match=message) as error:
        trainer.fit((x, y), 5, 32)
    assert "\n" not in str(error.value)
    for name, p in trainer.model.state_dict().items():
        assert torch.equal(p, good[name])
    assert len(trainer.history) == 2
    rows = trainer.fit(tensors(), 4, 32)
    assert all(math.isfinite(row["train_loss"]) for row in rows), "training must be able to go on"


@pytest.mark.parametrize("loss", ["mse", "bce", "huber", "pinball"])
def test_numbers_that_do_not_fit_the_outputs(loss):
    """The error names the data, what it has and what the network has, wherever they meet."""
    x, y, two = torch.rand(9, 4), torch.rand(9).round(), torch.rand(9, 2).round()
    trainer = Trainer(MLP([4, 1]), loss=loss, verbose=False)
    fault = "the network has 1 output, but data has 2 targets a row; make the network with 2"
    for call in (
        lambda: trainer.fit((x, two), 1),
        lambda: trainer.fit((x, y), 1, evaluate=(x, two)),
        lambda: trainer.evaluate((x, two)),
        lambda: mlp.Sweep([4, 1], 2, lr=0.1, loss=loss).fit((x, two), 1),
    ):
        with pytest.raises(ValueError, match=fault):
            call()
    assert len(trainer.history) == 0
    other = Trainer(MLP([4, 3]), loss=loss, verbose=False)
    with pytest.raises(ValueError, match="has 3 outputs, but data has 1 target a row"):
        other.fit((x, y), 1)


class FirstOutput(mlp.MeanSquaredError):
    """A user's own loss: the squared error of the first output alone."""

    def __call__(self, output, target):
        return super().__call__(output[:, :1], target[:, None])


def test_a_class_derived_from_a_loss_may_take_other_targets():
    x, y = torch.rand(9, 4), torch.rand(9)
    trainer = Trainer(MLP([4, 2]), loss=FirstOutput(), engine="autograd", verbose=False)
    assert len(trainer.fit((x, y), 1)) == 1
    with pytest.raises(ValueError, match=r"target must be \(9, 4\) as input is, got \(9, 2, 2\)"):
        Trainer(MLP([4, 4]), loss="mse", verbose=False).fit((x, torch.rand(9, 2, 2)), 1)


def test_a_quantile_for_each_output_needs_one_target():
    x, y = torch.rand(9, 4), torch.rand(9)
    for targets in (y, y[:, None], torch.rand(9, 3)):
        trainer = Trainer(MLP([4, 3]), loss=mlp.Pinball((0.1, 0.5, 0.9)), verbose=False)
        assert len(trainer.fit((x, targets), 1)) == 1


def test_data_that_do_not_fit_the_network(device):
    x, y = tensors()
    numbers = torch.zeros(70, 2)
    for data, evaluate, batch, message in (
        ((x[:, :5], y), None, 32, "fit: the network takes 6 features, but data has 5"),
        ((x, y), (x[:, :5], y), 32, "fit: the network takes 6 features, but data has 5"),
        ((x, y + 1), None, 32, "fit: the network has 3 outputs, but data has 4 classes"),
        (
            (x, numbers),
            None,
            32,
            "fit: the network has 3 outputs, but data has 2 targets a row; make the network with 2",
        ),
        ((x, y), None, 0, "batch_size must be a whole number, at least 1, got 0"),
        ((x[:0], y[:0]), None, 32, "data: empty"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            make(device, engine="autograd").fit(data, 1, batch, evaluate)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="reduction mean or sum, got none"):
        make(device, loss=mlp.SoftmaxCrossEntropy(reduction="none"))


def test_scheduler_of_the_wrong_kind(device):
    x, y = torch.randn(8, 6, device=device), torch.zeros(8, dtype=torch.int64, device=device)
    with pytest.raises(
        TypeError,
        match="scheduler must be a torch scheduler, or a function of the optimizer, got 3",
    ):
        make(device, engine="autograd").fit((x, y), 1, scheduler=3)


def test_the_state_of_another_network(device):
    """Such a state is refused, and nothing changes."""
    other = Trainer(MLP((6, 9, 3)).to(device), verbose=False)
    before = copy.deepcopy(other.model.state_dict())
    with pytest.raises(
        ValueError, match=r"another network: it has .*\(8, 6\).*, but .*\(9, 6\).* is needed"
    ):
        other.load_state_dict(make(device).state_dict())
    assert all(torch.equal(p, before[name]) for name, p in other.model.state_dict().items())


@pytest.mark.parametrize("name", ["epochs", "batch_size", "seed", "augment"])
def test_an_argument_that_is_no_integer(name):
    trainer = Trainer(MLP((6, 3)), verbose=False)
    with pytest.raises(ValueError, match=f"fit: {name} must be a whole number.*, got 1.5"):
        trainer.fit(tensors(), **{name: 1.5})


def test_rows_of_another_width_are_refused_by_name():
    trainer = Trainer(MLP((6, 3)), verbose=False)
    trainer.fit(tensors(), 1)
    x, y = tensors()
    takes = "the network takes 6 features, but"
    with pytest.raises(ValueError, match=f"predict: {takes} x has 5"):
        trainer.predict(x[:, :5])
    with pytest.raises(ValueError, match=f"predict: {takes} x has 1; give one row as x\\[None\\]"):
        trainer.predict(x[0])
    with pytest.raises(ValueError, match=f"evaluate: {takes} data has 5"):
        trainer.evaluate((x[:, :5], y))


def test_columns_of_a_frame_keep_their_order():
    """Other names or another order would be predicted from in silence."""
    pandas = pytest.importorskip("pandas")
    x, y = tensors()
    frame, labels = pandas.DataFrame(x.numpy(), columns=list("abcdef")), pandas.Series(y.numpy())
    trainer = Trainer(MLP((6, 3)), verbose=False)
    trainer.fit((frame, labels), 1)
    assert (trainer.predict(frame) == trainer.predict(frame.to_numpy())).all()
    order = "column 0 is 'f', but the network was trained on 'a' there; give the columns in the"
    backwards = frame[list("fedcba")]
    for call in (
        lambda: trainer.predict(backwards),
        lambda: trainer.evaluate((backwards, labels)),
        lambda: Trainer(MLP((6, 3))).fit((frame, labels), 1, evaluate=(backwards, labels)),
    ):
        with pytest.raises(ValueError, match=order):
            call()
    again = Trainer(MLP((6, 3)), verbose=False)
    again.load_state_dict(trainer.state_dict())
    with pytest.raises(ValueError, match=order):
        again.predict(backwards)
    with pytest.raises(ValueError, match="predict: x has no rows"):
        trainer.predict(x[:0])


@pytest.mark.parametrize("engine", ["auto", "autograd", "manual", "epoch", "lean"])
def test_a_parameter_that_a_callback_freezes(engine):
    """It stays as it is, or the engine refuses to go on."""
    model = MLP((6, 8, 3))
    weight, kept = next(model.parameters()), []

    def freeze(row):
        weight.requires_grad_(False)
        kept.append(weight.detach().clone())

    if engine == "epoch":
        pytest.importorskip("numba", reason="the compiled epoch needs numba")
    trainer = Trainer(model, engine=engine, verbose=False)
    if engine in ("auto", "autograd"):
        trainer.fit(tensors(), 3, on_epoch=freeze)
    else:
        with pytest.raises(ValueError, match=f"{engine}: trains every parameter, but 0.weight"):
            trainer.fit(tensors(), 3, on_epoch=freeze)
    assert torch.equal(weight, kept[0])


def test_epochs_that_are_done_already(capsys):
    trainer = Trainer(MLP((6, 3)), engine="autograd")
    trainer.fit(tensors(), 2)
    trainer.fit(tensors(), 2)
    assert "nothing is trained: 2 epochs are done, and epochs=2 counts" in capsys.readouterr().out
