"""Our modules work with torch.fx and torch.jit.trace, and take arguments in torch's order."""

import io
import pickle

import pytest
import torch
from torch import nn
from torch.fx import symbolic_trace

import mlp
from kernels.activations import ACTIVATIONS


class WithLosses(nn.Module):
    """Two losses on one layer."""

    def __init__(self):
        super().__init__()
        self.layer = mlp.Linear(7, 3, activation="tanh")
        self.losses = nn.ModuleList([mlp.CrossEntropyLoss(), mlp.MSELoss()])

    def forward(self, x):
        y = self.layer(x)
        return self.losses[0](y, y.argmax(1)) + self.losses[1](y, 2 * y)


MODELS = {
    "mlp": (lambda: mlp.MLP((7, 5, 3)), (4, 7)),
    "convnet": (lambda: mlp.ConvNet((1, 8, 8), (2, 3), 3, 1, (6,), 5), (2, 64)),
    "sequential": (lambda: nn.Sequential(mlp.Linear(7, 5), mlp.LayerNorm(5)), (4, 7)),
    "fused": (lambda: mlp.Sequential(mlp.Linear(7, 5), nn.Tanh(), mlp.Linear(5, 3)), (4, 7)),
    "losses": (WithLosses, (4, 7)),
}


@pytest.mark.parametrize("name", MODELS)
def test_symbolic_trace(name):
    """Our operations are nodes of the graph. The graph can be trained and pickled."""
    make, shape = MODELS[name]
    model, x = make(), torch.randn(shape)
    traced = symbolic_trace(model)
    called = {n.target.__module__ for n in traced.graph.nodes if n.op == "call_function"}
    assert any(module.startswith("kernels.") for module in called)
    for graph in (traced, pickle.loads(pickle.dumps(traced))):
        torch.testing.assert_close(graph(x), model(x))
    traced(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated", "ignore::torch.jit.TracerWarning")
def test_torchscript(name):
    """A traced model can be saved, loaded and trained."""
    make, shape = MODELS[name]
    model, x = make(), torch.randn(shape)
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(model, (x,)), file)
    file.seek(0)
    loaded = torch.jit.load(file)
    more = torch.randn(9, *shape[1:])  # another batch size than the trace saw
    torch.testing.assert_close(loaded(more), model(more))
    loaded(x).sum().backward()
    assert all(p.grad is not None for p in loaded.parameters())


@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated", "ignore::torch.jit.TracerWarning")
def test_torchscript_takes_every_activation():
    """A trace compares itself with another one without gradients."""
    x = torch.randn(4, 7)
    for name in ACTIVATIONS:
        model = mlp.MLP((7, 5, 3), name)
        torch.testing.assert_close(torch.jit.trace(model, (x,))(x), model(x))


@pytest.mark.parametrize(
    ("ours", "torchs", "arguments"),
    [
        (mlp.Linear, nn.Linear, (3, 4, True, "cpu", torch.float64)),
        (mlp.Conv2d, nn.Conv2d, (3, 4, 2, 1, 0, 1, 1, True, "zeros", "cpu", torch.float64)),
        (mlp.LayerNorm, nn.LayerNorm, (3, 0.1, True, True, "cpu", torch.float64)),
        (mlp.CrossEntropyLoss, nn.CrossEntropyLoss, (torch.ones(3), None, 1, None, "sum", 0.1)),
        (mlp.MSELoss, nn.MSELoss, (None, None, "sum")),
    ],
)
@pytest.mark.filterwarnings("ignore:size_average and reduce args")
def test_positions_are_torchs(ours, torchs, arguments):
    """Arguments in torch's order mean what they mean in torch. Our own arguments come last."""
    mine, theirs = ours(*arguments), torchs(*arguments)
    assert repr(mine).startswith(repr(theirs)[:-1])
    assert [p.dtype for p in mine.parameters()] == [p.dtype for p in theirs.parameters()]
