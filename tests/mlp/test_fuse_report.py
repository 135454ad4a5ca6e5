"""What `fuse` reports: the modules that it replaced, those that it left alone, and why."""

import copy
import logging

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import mlp
from kernels.activations import ACTIVATIONS
from mlp import fuse
from tests.checks import assert_equal, operations, with_gradients


@pytest.mark.parametrize("activation", [name for name, row in ACTIVATIONS.items() if row.module])
def test_every_activation(activation):
    """`fuse` recognises each row's module. The module computes what the row does."""
    row, z = ACTIVATIONS[activation], torch.linspace(-3, 3, 101, dtype=torch.float64)
    assert_equal(row.module()(z), row.torch(z))
    model = fuse(nn.Sequential(nn.Linear(3, 2), row.module()))
    assert operations(lambda: model(torch.ones(1, 3))) == [activation]


class Skip(nn.Sequential):
    def forward(self, x):
        return x + super().forward(x)


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def patched(module):
    """The module with a forward of its own, as libraries that wrap modules set it."""
    module.forward = module.forward
    return module


LAYERS = {
    "subclass": (lambda: Scaled(3, 3), "a subclass"),
    "patched": (lambda: patched(nn.Linear(3, 3)), "has forward of its own"),
    "parametrized": (lambda: parametrizations.weight_norm(nn.Linear(3, 3)), "parametrized"),
    "pruned": (
        lambda: prune.l1_unstructured(nn.Linear(3, 3), "weight", 2),
        "bias, weight_orig, not weight and bias",
    ),
    "lazy": (lambda: nn.LazyLinear(3), "no weights yet"),
    "complex": (lambda: nn.Linear(3, 3, dtype=torch.complex64), "torch.complex64"),
    "grouped": (lambda: nn.Conv2d(3, 3, 2, groups=3), "this one has 3 and zeros"),
    "reflecting": (
        lambda: nn.Conv2d(3, 3, 2, padding=1, padding_mode="reflect"),
        "this one has 1 and reflect",
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name):
    make, reason = LAYERS[name]
    model, lines = nn.Sequential(make(), nn.ReLU()), []
    kind, shown = type(model[0]).__name__, str(model)
    assert str(fuse(model, lines.append)) == shown
    assert lines[0].startswith(f"0: {kind} left alone: ") and reason in lines[0]
    assert lines[1] == f"1: ReLU left alone: the {kind} before it is left alone"


def conv():
    return nn.Conv2d(2, 3, 2)


def linear():
    return nn.Linear(8, 8)


NEIGHBOURS = {  # name -> (model, place of the module that is left alone, reason)
    "slope": (
        lambda: nn.Sequential(linear(), nn.LeakyReLU(0.2)),
        1,
        "kernels have no LeakyReLU(negative_slope=0.2)",
    ),
    "second": (
        lambda: nn.Sequential(linear(), nn.SiLU(), nn.Tanh()),
        2,
        "already has activation=silu",
    ),
    "fused": (
        lambda: nn.Sequential(mlp.Linear(8, 8, activation="tanh"), nn.Tanh()),
        1,
        "already has activation=tanh",
    ),
    "overlap": (
        lambda: nn.Sequential(conv(), nn.MaxPool2d(3, 2)),
        1,
        "kernels have no MaxPool2d(kernel_size=3, stride=2",
    ),
    "ceil": (
        lambda: nn.Sequential(conv(), nn.MaxPool2d(2, ceil_mode=True)),
        1,
        "kernels have no MaxPool2d",
    ),
    "pool first": (
        lambda: nn.Sequential(conv(), nn.MaxPool2d(2), nn.Tanh()),
        2,
        "already has max_pool=(2, 2)",
    ),
    "no images": (
        lambda: nn.Sequential(linear(), nn.MaxPool2d(2)),
        1,
        "kernels have no Linear with MaxPool2d",
    ),
    "between": (
        lambda: nn.Sequential(linear(), nn.LayerNorm(8), nn.ReLU()),
        2,
        "does not directly follow",
    ),
    "nested": (
        lambda: nn.Sequential(nn.Sequential(linear()), nn.ReLU()),
        1,
        "does not directly follow",
    ),
    "own forward": (lambda: Skip(linear(), nn.ReLU()), 1, "Skip has a forward of its own"),
    "patched": (
        lambda: patched(nn.Sequential(linear(), nn.ReLU())),
        1,
        "Sequential has a forward of its own",
    ),
    "patched ReLU": (
        lambda: nn.Sequential(linear(), patched(nn.ReLU())),
        1,
        "it has a hook, a forward of its own or a compiled call",
    ),
    "overwritten": (
        lambda: nn.Sequential(linear(), nn.LeakyReLU(), nn.ELU(inplace=True)),
        1,
        "the module after it overwrites its output",
    ),
}


@pytest.mark.parametrize("name", NEIGHBOURS)
def test_neighbours(name):
    make, place, reason = NEIGHBOURS[name]
    model, x, lines = make().double(), torch.randn(3, 2, 8, 8, dtype=torch.float64), []
    before, stays = copy.deepcopy(model), model[place]
    assert fuse(model, lines.append)[place] is stays
    about = next(
        line for line in lines if line.startswith(f"{place}: {type(stays).__name__} left alone: ")
    )
    assert reason in about
    torch.testing.assert_close(with_gradients(model, [x]), with_gradients(before, [x]))


@pytest.mark.parametrize("place", [0, 1, 2])
def test_hooks(place):
    """The report names the module that has a hook, or that has one before it."""
    model, lines = nn.Sequential(nn.Linear(4, 3), nn.Identity(), nn.LeakyReLU()), []
    handle = model[place].register_forward_hook(lambda *_: None)
    fuse(model, lines.append)
    reasons = "the Linear before it has a hook", "does not directly follow", "it has a hook"
    assert lines[-1].startswith("2: LeakyReLU left alone: ") and reasons[place] in lines[-1]
    handle.remove()
    fuse(model, lines.append)
    assert lines[-1] == "0: Linear + LeakyReLU run as one operation"


def test_what_runs_together():
    """One line for each module that changes and each operation. A module in two places is told
    about in each, and changes once.
    """
    act, lines = nn.ReLU(), []
    first = nn.Sequential(nn.Linear(2, 2), act)
    model = nn.ModuleList([first, nn.Sequential(nn.LayerNorm(2), act), nn.Sequential(first, act)])
    fuse(model, lines.append)
    alone = "ReLU left alone: it does not directly follow a Linear or Conv2d in an nn.Sequential"
    linear = "mlp.Linear(in_features=2, out_features=2, bias=True, activation=identity)"
    assert lines == [
        "0: Sequential -> mlp.Sequential",
        f"0.0: Linear -> {linear}",
        "0.0: Linear + ReLU run as one operation",
        "1.0: LayerNorm -> mlp.LayerNorm((2,), eps=1e-05, elementwise_affine=True, bias=True)",
        f"1.1: {alone}",
        "2.0.0: Linear + ReLU run as one operation",
        f"2.1: {alone}",
    ]


def test_losses(caplog):
    """A loss keeps its options, also where it is the whole model. Without `report`, lines go to the
    log.
    """
    options = {
        "weight": torch.rand(5),
        "ignore_index": 2,
        "label_smoothing": 0.1,
        "reduction": "sum",
    }
    z, target = torch.randn(7, 5), torch.tensor([0, 2, 4, 2, 1, 3, 0])
    with caplog.at_level(logging.INFO, "handgrad"):
        ours = fuse(nn.CrossEntropyLoss(**options))
    assert (
        caplog.messages == ["module: CrossEntropyLoss -> mlp.CrossEntropyLoss()"]
        and type(ours) is mlp.CrossEntropyLoss
    )
    torch.testing.assert_close(ours(z, target), nn.CrossEntropyLoss(**options)(z, target))
    assert list(ours.state_dict()) == ["weight"] and type(fuse(nn.MSELoss())) is mlp.MSELoss


def test_attention():
    """MultiheadAttention uses its output layer's weight without calling the layer, so that layer is
    left alone. torch lists the attention among activations.
    """
    lines = []
    fuse(nn.TransformerEncoderLayer(8, 2), lines.append)
    names = ["self_attn.out_proj:", "linear1:", "linear2:", "norm1:", "norm2:"]
    assert [line.split(" ")[0] for line in lines] == names
    assert "a subclass" in lines[0]


@pytest.mark.parametrize(("window", "stride"), [(2, None), ([2, 2], 2), ((2, 3), [2, 3])])
def test_windows(window, stride):
    """A window and its stride may be a number, a tuple or a list."""
    model, x = nn.Sequential(conv(), nn.MaxPool2d(window, stride)), torch.randn(1, 2, 8, 8)
    before = model(x)
    expected = (2, 3) if window == (2, 3) else (2, 2)
    assert operations(lambda: fuse(model)(x)) == [("identity", expected)]
    torch.testing.assert_close(model(x), before)


def test_only_modules():
    with pytest.raises(TypeError, match=r"must be an nn.Module, got Net"):
        fuse(mlp.Net([3, 2]))
