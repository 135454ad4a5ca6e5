"""Every recipe builds its network, survives JSON, trains on every engine that serves it, and can be
changed.
"""

import dataclasses
import json

import pytest
import torch

import mlp
from mlp import Dataset, Net, Trainer, recipes
from mlp.recipes import LOSSES, OPTIMIZERS, RECIPES, Recipe, changed
from tests.checks import assert_equal

EACH = pytest.mark.parametrize("name", RECIPES)
# The number of weights and biases of each reference network.
PARAMETERS = {
    "default": 784 * 100 + 100 + 100 * 50 + 50 + 50 * 10 + 10,
    "convnet": 6 * 25 + 6 + 12 * 6 * 25 + 12 + 192 * 120 + 120 + 120 * 60 + 60 + 60 * 10 + 10,
    "classifier": 784 * 120 + 120 + 120 * 256 + 256 + 256 * 10 + 10,
    "sigmoid": 784 * 100 + 100 + 100 * 50 + 50 + 50 * 10 + 10,
    "deep-linear": 784 * 64 + 64 + 4 * (64 * 64 + 64) + 64 * 10 + 10,
    "mse": 784 * 100 + 100 * 10,
}


@pytest.fixture(scope="module")
def images():
    """230 images of 28 × 28 in ten classes. The height of the bright rows shows the class."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(230) % 10
    pixels = torch.randint(0, 60, (230, 1, 28, 28), generator=generator, dtype=torch.uint8)
    for i, label in enumerate(labels.tolist()):
        pixels[i, 0, 2 * label + 2 : 2 * label + 6] += 180
    return Dataset(pixels, labels, image_shape=(1, 28, 28), scale=1 / 255, name="bars")


@EACH
def test_builds(name, images, device):
    """A recipe gives the reference network. A seed gives module and Net the same weights."""
    recipe = recipes.get(name)
    model = recipe.model(images, seed=3, device=device)
    if name in PARAMETERS:
        assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    net = recipes.net(recipe, images, seed=3, device=device)
    assert isinstance(net, Net) and net.config() == model.config()
    assert_equal(list(net.parameters.values()), [p.detach() for p in model.parameters()])
    assert not torch.equal(net.flat, recipes.net(recipe, images, seed=4, device=device).flat)
    assert recipe.make_loss() is not recipe.make_loss()
    assert isinstance(recipe.make_optimizer(list(model.parameters())), OPTIMIZERS[recipe.optimizer])
    x = torch.zeros(2, 784, device=device)
    assert_equal(net.forward(x), model(x).detach())


@EACH
def test_survives_json(name, images):
    """A recipe read from JSON, as from config.json, gives the same network, data, loss and
    optimizer.
    """
    recipe = recipes.get(name)
    again = Recipe(**json.loads(json.dumps(dataclasses.asdict(recipe))))
    assert again.network(images) == recipe.network(images)
    for part, same in zip(again.prepare(images, images), recipe.prepare(images, images)):
        assert (part.scale, part.shift, len(part)) == (same.scale, same.shift, len(same))
    assert json.dumps(dataclasses.asdict(again)) == json.dumps(dataclasses.asdict(recipe))
    assert_equal(
        list(again.model(images, 1).parameters()), list(recipe.model(images, 1).parameters())
    )


@EACH
@pytest.mark.parametrize("engine", mlp.ENGINES)
def test_trains(name, engine, images, device):
    """Two epochs lower the loss. Each engine has autograd's losses."""
    recipe = recipes.get(name)
    data, _ = recipe.prepare(images, images)
    losses = []
    for kind in (engine, "autograd"):
        model = recipe.model(data, device=device)
        if reason := mlp.ENGINES[kind].refuses(
            model, recipe.make_loss(), recipe.make_optimizer(model.parameters()), 32
        ):
            pytest.skip(f"by design: {reason}")
        trainer = Trainer(model, recipe.make_loss(), recipe.make_optimizer, kind)
        rows = trainer.fit(data, 2, recipe.batch_size, drop_last=recipe.drop_last)
        losses.append([row["train_loss"] for row in rows])
    assert losses[0][1] < losses[0][0]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@EACH
def test_inputs(name, images):
    """`prepare` normalises and takes the first samples, as the recipe says."""
    recipe = dataclasses.replace(recipes.get(name), train_samples=100)
    train, test = recipe.prepare(images, images)
    assert (len(train), len(test)) == (100, 230)
    mean, std = recipe.normalize or (0.0, 1.0)
    expected = (images.inputs[:5].double() / 255 - mean) / std
    torch.testing.assert_close(
        train.read(train.inputs[:5]).double(), expected, rtol=1e-5, atol=1e-6
    )


def test_changed():
    """None changes nothing. lr and momentum go to the optimizer. A new optimizer or loss starts
    without the old one's options, with its own default rate.
    """
    recipe = recipes.get("default")
    assert changed(recipe, lr=None, momentum=None, hidden=None, epochs=None) == recipe
    new = changed(recipe, lr=0.3, hidden=(7,), epochs=2, activation="tanh")
    assert (new.hidden, new.epochs, new.activation) == ((7,), 2, "tanh")
    assert new.optimizer_options == {**recipe.optimizer_options, "lr": 0.3}
    assert recipes.get("default") == recipe and RECIPES["default"].optimizer_options["lr"] != 0.3
    assert changed(recipe, momentum=0.5).optimizer_options == {
        **recipe.optimizer_options,
        "momentum": 0.5,
    }
    adam = changed(recipe, optimizer="adam")
    assert adam.optimizer_options == {"lr": 0.001}
    assert changed(recipe, optimizer="adam", lr=0.01).optimizer_options == {"lr": 0.01}
    assert changed(recipe, optimizer=recipe.optimizer).optimizer_options == recipe.optimizer_options
    half_sum = dataclasses.replace(
        recipe, loss="mse", loss_options={"reduction": "sum", "scale": 0.5}
    )
    assert changed(half_sum, lr=0.1).loss_options == half_sum.loss_options
    assert changed(half_sum, loss="cross_entropy").loss_options == {}


def test_regression(images):
    """Floating-point targets give an output for each column."""
    data = Dataset(images.inputs, torch.randn(230, 3))
    assert recipes.get("default").network(data)["sizes"] == [784, 100, 50, 3]


def test_unknown_names(images):
    with pytest.raises(ValueError, match=f"unknown recipe 'gan'; known: {', '.join(RECIPES)}"):
        recipes.get("gan")
    with pytest.raises(ValueError, match=f"unknown loss 'hinge'; known: {', '.join(LOSSES)}"):
        changed(recipes.get("default"), loss="hinge").make_loss()
    with pytest.raises(
        ValueError, match=f"unknown optimizer 'lamb'; known: {', '.join(OPTIMIZERS)}"
    ):
        changed(recipes.get("default"), optimizer="lamb").make_optimizer([])
    rows = Dataset(torch.zeros(20, 4), torch.arange(20) % 2, name="rows")
    with pytest.raises(
        ValueError, match="a network with convolutions needs images, but rows has rows of 4 numbers"
    ):
        Recipe("a test", channels=(2,)).model(rows)


def test_a_loss_of_classes_is_kept_for_shares_of_classes_only():
    shares = torch.tensor([[0.25, 0.75], [1.0, 0.0]])
    recipe = recipes.get("default")
    data = Dataset(torch.zeros(2, 3), shares)
    assert recipes.suited(recipe, data, loss_chosen=True) is recipe
    for bad in (shares * 2, shares - 0.5, shares[:, :1]):
        with pytest.raises(ValueError, match="the loss cross_entropy is for classes, but the targ"):
            recipes.suited(recipe, Dataset(torch.zeros(2, 3), bad), loss_chosen=True)
