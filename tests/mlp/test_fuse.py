"""Fused models of many kinds give the same outputs and gradients. They keep their modules,
parameters and names.
"""

import copy
import functools
import pickle
import threading

import pytest
import torch
from torch import nn

import mlp
from mlp import fuse
from tests.checks import assert_as_accurate, assert_equal, operations


class Mixer(nn.Module):
    """A block of MLP-Mixer, which is torchvision's MLP over 6 tokens, then over 8 channels."""

    def __init__(self):
        from torchvision.ops import MLP

        super().__init__()
        options = {"activation_layer": nn.GELU, "inplace": None, "dropout": 0.1}
        self.tokens, self.channels = (
            MLP(6, [12, 6], **options),
            MLP(8, [16, 8], norm_layer=nn.LayerNorm, **options),
        )
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(2))

    def forward(self, x):
        x = x + self.tokens(self.norms[0](x).mT).mT
        return x + self.channels(self.norms[1](x))


class ActorCritic(nn.Module):
    """Two heads on one trunk. The trunk is registered three times."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(7, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh())
        self.actor, self.critic = (
            nn.Sequential(self.trunk, nn.Linear(16, 4)),
            nn.Sequential(self.trunk, nn.Linear(16, 1)),
        )

    def forward(self, x):
        return torch.cat([self.actor(x), self.critic(x)], 1)


def autoencoder():
    encoder = nn.Sequential(
        nn.Linear(20, 9, bias=False), nn.LeakyReLU(inplace=True), nn.Linear(9, 3), nn.Tanh()
    )
    return nn.Sequential(
        encoder, nn.Sequential(nn.Linear(3, 9), nn.SiLU(), nn.Linear(9, 20), nn.Sigmoid())
    )


def perceptron():
    return nn.Sequential(
        nn.Linear(7, 12),
        nn.Identity(),
        nn.ReLU(True),
        nn.Linear(12, 12),
        nn.GELU("tanh"),
        nn.Linear(12, 5),
    )


def vgg():
    """torchvision's VGG, with fewer features and a smaller classifier."""
    from torchvision.models.vgg import VGG, make_layers

    with torch.device("meta"):
        model = VGG(nn.Identity(), init_weights=False)
    model.features, model.avgpool = make_layers([4, "M", 6, 6, "M"]), nn.AdaptiveAvgPool2d(2)
    classifier = (
        nn.Linear(24, 16),
        nn.ReLU(True),
        nn.Dropout(),
        nn.Linear(16, 16),
        nn.ReLU(True),
        nn.Dropout(),
        nn.Linear(16, 5),
    )
    model.classifier = nn.Sequential(*classifier)
    return model


# name -> (model, shape of its input, what its layers compute)
MODELS = {
    "perceptron": (perceptron, (9, 7), [["relu", "gelu_tanh"], "identity"]),
    # one GELU follows a LayerNorm
    "mixer": (Mixer, (3, 6, 8), ["gelu", "identity", "identity", "identity"]),
    "transformer": (
        lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
        (3, 6, 8),
        ["identity", "identity"],
    ),
    "vgg": (
        vgg,
        (3, 3, 12, 12),
        [("relu", (2, 2)), ("relu", 1), ("relu", (2, 2)), "relu", "relu", "identity"],
    ),
    "autoencoder": (autoencoder, (5, 20), [["leaky_relu", "tanh"], ["silu", "sigmoid"]]),
    "actor-critic": (ActorCritic, (5, 7), [["tanh", "tanh"], "identity"] * 2),
}


def built(name, device="cpu"):
    torch.manual_seed(0)
    make, shape, _ = MODELS[name]
    return make().to(device).eval(), torch.randn(shape, device=device)


def with_gradients(model, x):
    x = x.clone().requires_grad_()
    y = model(x)
    return [
        y,
        *torch.autograd.grad(
            y, [x, *model.parameters()], torch.cos(torch.arange(y.numel()).view(y.shape)).to(y)
        ),
    ]


@pytest.mark.parametrize("name", MODELS)
def test_same_model(name, device):
    """Outputs and gradients stay the same in float32 and float64. Modules and parameters are the
    same objects under the same names. A second `fuse` changes nothing.
    """
    model, x = built(name, device)
    before, parameters = copy.deepcopy(model), dict(model.named_parameters())
    keys, modules = list(model.state_dict()), dict(model.named_modules())
    assert fuse(model) is model
    assert all(parameters.pop(key) is p for key, p in model.named_parameters()) and not parameters
    assert all(modules.pop(key) is m for key, m in model.named_modules()) and not modules
    assert list(model.state_dict()) == keys and not any(m.training for m in model.modules())
    assert not [m for m in model.modules() if type(m) in (nn.Linear, nn.Conv2d)]
    assert operations(lambda: model(x)) == MODELS[name][2]
    ours, exact = (
        functools.partial(with_gradients, copy.deepcopy(m).double(), x.double())
        for m in (model, before)
    )
    torch.testing.assert_close(ours(), exact())
    assert_as_accurate(with_gradients(model, x), with_gradients(before, x), exact, name)
    again, shown = [], str(model)
    assert str(fuse(model, again.append)) == shown and not [line for line in again if "->" in line]
    for twin in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        fuse(copy.deepcopy(before)),
    ):
        twin.load_state_dict(before.state_dict())
        assert_equal(twin(x), model(x))


@pytest.mark.parametrize("name", ["mixer", "vgg"])
def test_training_mode(name):
    """Dropout in a fused model draws the same numbers."""
    model, x = built(name)
    results = []
    for each in (copy.deepcopy(model).train(), fuse(model.train())):
        torch.manual_seed(1)
        results.append(with_gradients(each, x))
    torch.testing.assert_close(*results)


def test_optimizer_goes_on(device):
    """Fusing between two steps of Adam changes nothing, also with the loss inside the model."""
    net, x = (t.double() for t in built("autoencoder", device))
    model = nn.ModuleDict({"net": net, "loss": nn.MSELoss()})
    twin = copy.deepcopy(model)
    optimizers = [torch.optim.Adam(m.parameters(), lr=0.01) for m in (model, twin)]
    for step in range(6):
        for m, optimizer in zip((model, twin), optimizers):
            optimizer.zero_grad()
            m["loss"](m["net"](x), x).backward()
            optimizer.step()
        if step == 2:
            fuse(model)
    assert type(model["loss"]) is mlp.MSELoss
    torch.testing.assert_close(list(model.parameters()), list(twin.parameters()))


def test_shared_layers():
    """A layer used in several places, also outside of the model, is right in each and stays
    tied.
    """
    fc, act = nn.Linear(4, 4), nn.Tanh()
    model = nn.ModuleDict(
        {
            "tied": nn.Sequential(fc, act, fc, act),
            "other": nn.Sequential(fc, nn.Sigmoid()),
            "lone": fc,
            "act": act,
        }
    )
    outside, held, x = nn.Sequential(fc, act), [fc], torch.randn(3, 4)
    places = (*model.values(), outside, *held)
    before = [place(x) for place in places]
    keys = list(model.state_dict())
    assert fuse(model)["tied"][0] is model["tied"][2] is fc and model["tied"][1] is act
    torch.testing.assert_close([place(x) for place in places], before)
    assert list(model.state_dict()) == keys and len(list(model.parameters())) == 2
    model["lone"].weight = nn.Parameter(torch.zeros(4, 4))
    assert not any(p.any() for name, p in model.state_dict().items() if "weight" in name)
    assert not pickle.loads(pickle.dumps(model))["tied"][2].weight.any()


def test_feature_extractor():
    """torchvision's feature extractor finds the output of each layer."""
    from torchvision.models.feature_extraction import create_feature_extractor

    model, x = built("perceptron")
    places = {f"0.{i}": str(i) for i in range(6)}
    models = nn.Sequential(copy.deepcopy(model)), nn.Sequential(fuse(model))
    torchs, ours = (create_feature_extractor(each, places)(x) for each in models)
    torch.testing.assert_close(ours, torchs)


class Locked(nn.Sequential):
    """A pickle leaves out what `__getstate__` leaves out."""

    def __init__(self, *layers):
        super().__init__(*layers)
        self.lock = threading.Lock()

    def __getstate__(self):
        return {name: value for name, value in vars(self).items() if name != "lock"}

    def __setstate__(self, state):
        super().__setstate__(state)
        self.lock = threading.Lock()


class Rebuilt(nn.Sequential):
    """A pickle calls the class with the arguments of `__reduce__`."""

    def __reduce__(self):
        return type(self), (nn.Linear(4, 3), nn.ReLU()), self.__dict__


@pytest.mark.parametrize("kind", [Locked, Rebuilt])
def test_pickles_are_as_the_class_defines_them(kind):
    model, x = fuse(kind(nn.Linear(4, 3), nn.ReLU())), torch.randn(2, 4)
    assert operations(lambda: model(x)) == ["relu"]
    for made in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert isinstance(made, kind) and hasattr(made, "lock") == hasattr(model, "lock")
        torch.testing.assert_close(made(x), model(x))


def test_a_class_without_subclasses_is_left_alone():
    class Final(nn.Sequential):
        def __init_subclass__(cls):
            raise TypeError("Final has no subclasses")

    lines = []
    model = fuse(Final(nn.Linear(4, 3), nn.ReLU()), lines.append)
    assert type(model) is Final and type(model[0]) is mlp.Linear
    reason = "its Final takes no subclass (TypeError: Final has no subclasses)"
    assert lines[-1] == f"1: ReLU left alone: {reason}"
