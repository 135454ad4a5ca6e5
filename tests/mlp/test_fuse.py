"""Fused models of many kinds give the same outputs and gradients. They keep their parameters and
names.
"""

import copy
import functools
import pickle

import pytest
import torch
from torch import nn

import mlp
from mlp import fuse
from tests.checks import assert_as_accurate, assert_equal


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


# name -> (model, shape of its input, number of activations and poolings that are not fused)
MODELS = {
    "perceptron": (perceptron, (9, 7), 0),
    "mixer": (Mixer, (3, 6, 8), 1),  # one GELU follows a LayerNorm
    "transformer": (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), (3, 6, 8), 0),
    "vgg": (vgg, (3, 3, 12, 12), 0),
    "autoencoder": (autoencoder, (5, 20), 0),
    "actor-critic": (ActorCritic, (5, 7), 0),
}
FOLLOWERS = (nn.ReLU, nn.LeakyReLU, nn.Sigmoid, nn.Tanh, nn.GELU, nn.SiLU, nn.MaxPool2d)


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
    """Outputs and gradients stay the same in float32 and float64, and parameters keep their names.
    A second `fuse` changes nothing.
    """
    model, x = built(name, device)
    before, parameters = copy.deepcopy(model), dict(model.named_parameters())
    keys = list(model.state_dict())
    assert fuse(model) is model
    assert all(parameters.pop(key) is p for key, p in model.named_parameters()) and not parameters
    assert list(model.state_dict()) == keys and not any(m.training for m in model.modules())
    assert not [m for m in model.modules() if type(m) in (nn.Linear, nn.Conv2d)]
    assert sum(isinstance(m, FOLLOWERS) for m in model.modules()) == MODELS[name][2]
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
    assert fuse(model)["tied"][0] is model["tied"][2]
    torch.testing.assert_close([place(x) for place in places], before)
    assert list(model.state_dict()) == keys and len(list(model.parameters())) == 2
    model["lone"].weight = nn.Parameter(torch.zeros(4, 4))
    assert not any(p.any() for name, p in model.state_dict().items() if "weight" in name)
    assert not pickle.loads(pickle.dumps(model))["tied"][2].weight.any()


class Indexed(nn.Module):
    """Calls layers of its Sequential one by one."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 6), nn.ReLU())
        self.head = nn.Sequential(nn.Linear(6, 3), nn.Tanh())

    def forward(self, x):
        before = self.body[0](x)
        return self.head(self.body[1](before) + before)


class Iterating(Indexed):
    def forward(self, x):
        for layer in self.body:
            x = layer(x) + 1
        return self.head(x)


class Listing(Indexed):
    def forward(self, x):
        return self.head(sum([layer(x) for layer in list(self.body)]))


@pytest.mark.parametrize("kind", [Indexed, Iterating, Listing])
def test_a_sequential_whose_layers_are_called_one_by_one(kind):
    """Its layers stay apart, because the first would return what the second returned before."""
    model, x, lines = kind(), torch.randn(5, 6), []
    expected = model(x)
    mlp.fuse(model, report=lines.append)
    torch.testing.assert_close(model(x), expected)
    assert isinstance(model.body[1], nn.ReLU) and isinstance(model.head[1], nn.Identity)
    left = "body.1: ReLU left alone: a method of the model does more with body than call it"
    assert left in lines


def layers():
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))


class Hidden(nn.Sequential):
    def hidden(self, x):
        return self[0](x)


class Owner(nn.Module):
    """A model with a Sequential in every place."""

    def __init__(self):
        super().__init__()
        self.body, self.bodies = layers(), nn.ModuleList([layers()])
        self.inner, self.kind = nn.Sequential(layers()), Hidden(*layers())
        self.short = lambda x: self.body[0](x)

    @property
    def first(self):
        return self.body[0]


def first_of_all(self, x):
    return next(m for m in self.modules() if isinstance(m, nn.Linear))(x)


WAYS = {
    "a property": lambda self, x: self.first(x),
    "a decorated method": torch.no_grad()(lambda self, x: self.body[0](x)),
    "a text": lambda self, x: getattr(self, "body")[0](x),  # noqa: B009
    "a path": lambda self, x: self.get_submodule("body.0")(x),
    "a list": lambda self, x: self.bodies[0][0](x),
    "nested": lambda self, x: self.inner[0][0](x),
    "a subclass": lambda self, x: self.kind.hidden(x),
    "a function of the object": lambda self, x: self.short(x),
    "all modules": first_of_all,
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_one_layer(way, monkeypatch):
    """Wherever a model calls one layer of a Sequential, it gets the same value as before."""
    monkeypatch.setattr(Owner, "forward", WAYS[way], raising=False)
    model, x = Owner(), torch.randn(4, 6)
    expected = model(x)
    torch.testing.assert_close(fuse(model)(x), expected)


def test_a_hook_that_calls_one_layer():
    model, x, seen = layers(), torch.randn(4, 6), []
    model.register_forward_pre_hook(lambda module, inputs: seen.append(module[0](*inputs)))
    model(x)
    fuse(model)(x)
    torch.testing.assert_close(seen[1], seen[0])


def test_a_subclass_whose_caller_indexes_it():
    model, x = Hidden(*layers()), torch.randn(4, 6)
    expected = model.hidden(x)
    torch.testing.assert_close(fuse(model).hidden(x), expected)


def test_lists_that_are_only_called_are_fused(monkeypatch):
    def forward(self, x):
        for i, body in enumerate(self.bodies):
            x = x[:, :6] + i if i else x
            x = body(x)
        return self.inner(x.repeat(1, 2)) + self.body(x.repeat(1, 2))

    def initialise(self):
        for module in self.modules():
            nn.init.zeros_(module.weight)

    monkeypatch.setattr(Owner, "forward", forward, raising=False)
    monkeypatch.setattr(Owner, "initialise", initialise, raising=False)
    model = Owner()
    del model.short
    type_of = type(model)
    monkeypatch.delattr(type_of, "first")
    fuse(model)
    assert model.body[0].activation == "relu" and model.inner[0][0].activation == "relu"
