"""Epochs and steps inside kernels train as the reference does. On a CPU the kernels run in the
interpreter.
"""

from contextlib import nullcontext

import pytest
import torch

import kernels
import mlp
from mlp import ENGINES
from mlp.loss import LOSSES
from mlp.modules import loss_of
from tests.mlp.test_engines import OPTIONS, assert_same_run, problem, train

pytestmark = pytest.mark.interpreter
IN_KERNELS = pytest.mark.parametrize(
    "engine", [e for e in ENGINES if e not in ("autograd", "manual")]
)


def by_the_reference(device, data, **options):
    """On the same device, because it draws the orders of samples."""
    with kernels.use("torch"):
        return train("autograd", device, data, epochs=2, **options)


@pytest.mark.parametrize("engine", ENGINES)
def test_losses_are_the_references(engine, device):
    """A short run on the kernels has the reference's losses and weights, to 1e-5."""
    data = problem(count=40)
    assert_same_run(train(engine, device, data, epochs=2), by_the_reference(device, data))


@IN_KERNELS
@pytest.mark.parametrize("optimizer", OPTIONS.values(), ids=OPTIONS)
def test_every_optimizer(optimizer, engine, device):
    data = problem(count=20)
    run = train(engine, device, data, optimizer=optimizer, epochs=2)
    assert_same_run(run, by_the_reference(device, data, optimizer=optimizer), tolerance=1e-4)


@IN_KERNELS
@pytest.mark.parametrize(
    "loss",
    [
        lambda: mlp.PinballLoss((0.1, 0.5, 0.9)),
        lambda: mlp.BCEWithLogitsLoss(pos_weight=torch.tensor([0.5, 1.0, 2.0])),
        lambda: torch.nn.HuberLoss(delta=0.2),
        lambda: "mse",
    ],
    ids=["quantiles", "pos_weight", "delta", "by name"],
)
def test_losses_with_parameters(loss, engine, device):
    """`Trainer` takes losses as modules and by name. One column of targets serves several
    quantiles.
    """
    given = loss()
    torch.manual_seed(0)
    x, y = torch.randn(20, 12), torch.rand(20, 3)
    y = y[:, 0] if isinstance(given, mlp.PinballLoss) else y
    results = []
    for name in (engine, "autograd"):
        torch.manual_seed(1)
        model = mlp.MLP((12, 7, 3), "tanh").to(device)
        optimizer = mlp.SGD(model.parameters(), lr=0.1)
        if ENGINES[name].refuses(model, loss_of(given), optimizer, 8):
            pytest.skip(f"{name} needs a GPU")
        with kernels.use("torch") if name == "autograd" else nullcontext():
            trainer = mlp.Trainer(model, given, optimizer, name, verbose=False)
            rows = trainer.fit((x.to(device), y.to(device)), 2, 8)
        losses = [(row["train_loss"], None) for row in rows]
        results.append((losses, [p.detach() for p in model.parameters()]))
    assert_same_run(*results)


def test_quantiles_that_are_not_the_outputs():
    """Engines of whole epochs refuse such quantiles, so the operation says which shapes differ."""
    model, loss = mlp.MLP((12, 7, 2)), mlp.Pinball((0.1, 0.5, 0.9))
    reason = ENGINES["epoch"].refuses(model, loss, mlp.SGD(model.parameters(), lr=0.1), 8)
    assert reason is not None and "one for each of 2 outputs, got 3" in reason
    trainer = mlp.Trainer(model, loss, verbose=False)
    with pytest.raises(ValueError, match=r"quantile must broadcast to input \(8, 2\), got \(3,\)"):
        trainer.fit((torch.randn(20, 12), torch.rand(20)), 2, 8)


@IN_KERNELS
@pytest.mark.parametrize("kind", ["labels", "numbers"])
@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss(loss, kind, engine, device):
    data = problem(kind, count=20)
    run = train(engine, device, data, loss=LOSSES[loss](reduction="sum", scale=0.1), epochs=2)
    assert_same_run(
        run, by_the_reference(device, data, loss=LOSSES[loss](reduction="sum", scale=0.1))
    )


def test_states_of_another_dtype_are_refused():
    """After `model.double()` the states are float32. torch refuses them too."""
    pytest.importorskip("numba")
    data = torch.randn(20, 4), torch.randint(0, 3, (20,))
    trainer = mlp.Trainer(mlp.MLP([4, 6, 3]), optimizer="adam", engine="epoch", verbose=False)
    trainer.fit(data, 1)
    trainer.model.double()
    with pytest.raises(ValueError, match=r"but exp_avg is torch\.float32; make a new"):
        trainer.fit(data, 2)
