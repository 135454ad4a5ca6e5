"""Adds a loss as CONTRIBUTING.md says, then trains with it on every engine.

A loss needs a scalar, two torch functions and a row in kernels/losses.py, and a class in
mlp/loss.py. Its cases in the table of operations follow from the row.
"""

import pytest
import torch
import torch.nn.functional as F

import kernels
import mlp
from kernels.language import tl, triton
from kernels.losses import LOSSES, Loss, unchanged
from kernels.operations import OPERATIONS, Make
from mlp import loss as losses
from tests.checks import compare


@triton.jit
def log_cosh(y, t, parameter):
    """log cosh d, d = y - t, without overflow: |d| + log(1 + exp(-2|d|)) - log 2."""
    d = y - t
    a = tl.abs(d)
    e = tl.exp(-2.0 * a)
    tanh = (1.0 - e) / (1.0 + e)
    return a + tl.log(1.0 + e) - 0.6931471805599453, tl.where(d < 0, -tanh, tanh)


def log_cosh_ref(y, t, parameter):
    a = (y - t).abs()
    return a + F.softplus(-2 * a) - 0.6931471805599453


def log_cosh_gradient_ref(y, t, parameter):
    return torch.tanh(y - t)


def torchs_log_cosh(y, t, parameter=None, reduction="mean"):
    loss = torch.cosh(y - t).log()
    return {"none": loss, "sum": loss.sum(), "mean": loss.mean()}[reduction]


ROW = Loss(
    "log_cosh",
    "elementwise_loss",
    log_cosh,
    log_cosh_ref,
    log_cosh_gradient_ref,
    torchs_log_cosh,
    "numbers",
    unchanged,
    unchanged,
)


class LogCosh(losses.Elementwise):
    row = ROW


@pytest.fixture(autouse=True)
def listed(monkeypatch):
    """Adds the row and the class to their tables."""
    monkeypatch.setitem(LOSSES, "log_cosh", ROW)
    monkeypatch.setitem(losses.LOSSES, "log_cosh", LogCosh)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_operation(backend, device):
    pair = [
        lambda x, t: kernels.elementwise_loss(x, t, "log_cosh", reduction="none"),
        lambda x, t: torchs_log_cosh(x, t, None, "none"),
    ]
    draws = [[torch.randn(7, 5, device=device) for _ in range(2)] for _ in range(4)]
    with kernels.use(backend):
        compare(*pair, *draws)
    labels = [label for label, _ in OPERATIONS["elementwise_loss"].cases(Make(device), 3, 4, 5)]
    assert "log_cosh, mean" in labels


@pytest.mark.parametrize("engine", [*mlp.ENGINES, "replicas"])
@pytest.mark.parametrize("kind", ["labels", "numbers"])
def test_every_engine(engine, kind, device):
    """Every engine finds the loss by name and trains as the autograd engine does on the reference,
    to float32 rounding of six steps.
    """
    torch.manual_seed(0)
    x, y = torch.randn(20, 6, device=device), torch.rand(20, 3, device=device)
    data = mlp.Dataset(x, y.argmax(1) if kind == "labels" else y)

    def trained(engine):
        model = mlp.MLP((6, 5, 3), "tanh").to(device)
        mlp.initialise(dict(model.named_parameters()), None, 4)
        optimizer = mlp.SGD(model.parameters(), lr=0.1)
        if mlp.ENGINES[engine].refuses(model, LogCosh(), optimizer, 8):
            pytest.skip(f"{engine} needs a GPU")
        trainer = mlp.Trainer(model, "log_cosh", optimizer, engine, verbose=False)
        return model, trainer.fit(data, 2, 8, seed=4)[-1]["train_loss"]

    with kernels.use("torch"):
        expected, value = trained("autograd")
    if engine == "replicas":
        sweep = mlp.Sweep(
            (6, 5, 3), 1, 0.1, seeds=[4], activation="tanh", loss="log_cosh", device=device
        )
        (row,) = sweep.fit(data, 2, 8)
        model, found = sweep.network(0), row.train_loss
    else:
        model, found = trained(engine)
    assert found == pytest.approx(value, rel=1e-5)
    for ours, reference in zip(model.parameters(), expected.parameters()):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-6)
