"""The reference networks on real MNIST from five seeds each. Our median lies among torch's results,
with its own initial weights and shuffling.

test_recipes_mnist.py tests `sigmoid`, because its first epoch is a plateau, where accuracies mean
nothing.
"""

import statistics

import pytest
import torch
from torch import nn

import mlp
from mlp import recipes
from tests.mlp.test_recipes_mnist import TORCH, mnist, pytestmark, torch_network  # noqa: F401

SEEDS = range(5)
# The number of batches, enough for a clear accuracy. A batch of `convnet` takes longest.
BATCHES = {"convnet": 60, "classifier": 600, "deep-linear": 400, "mse": 200}
# name -> torch's function for the notebook's initial weights, where biases start at 0. The other
# networks start as torch's layers do.
WEIGHTS = {"deep-linear": nn.init.xavier_normal_, "mse": nn.init.normal_}


def by_torch(name, inputs, targets, held_out, seed):
    """(mean loss of an epoch, accuracy after it) of a plain PyTorch loop."""
    torch.manual_seed(seed)
    _, criterion, make_optimizer, batch = TORCH[name]
    network = torch_network(name)
    for parameter in network.parameters() if name in WEIGHTS else ():
        WEIGHTS[name](parameter) if parameter.dim() > 1 else nn.init.zeros_(parameter)
    optimizer, total = make_optimizer(network.parameters()), 0.0
    for indices in torch.randperm(len(inputs)).split(batch):
        loss = criterion(network(inputs[indices]), targets[indices])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item()
    with torch.no_grad():
        right = network(held_out[0]).argmax(1) == held_out[1]
    scale = batch if name == "mse" else 1  # the trainer reports a summed loss for one sample
    return total / (len(inputs) // batch) / scale, right.float().mean().item()


def by_us(name, train, held_out, seed):
    """(mean loss of an epoch, accuracy after it) of the recipe."""
    recipe = recipes.get(name)
    trainer = mlp.Trainer(
        recipe.model(train, seed), recipe.make_loss(), recipe.make_optimizer, verbose=False
    )
    row = trainer.fit(train, 1, recipe.batch_size, seed=seed)[-1]
    return row["train_loss"], trainer.evaluate(held_out)["test_accuracy"]


@pytest.mark.parametrize("name", BATCHES)
def test_median_lies_among_torchs_results(name, mnist):  # noqa: F811
    recipe = recipes.get(name)
    train, test = recipe.prepare(*mnist)
    train, test = train.take(BATCHES[name] * recipe.batch_size), test.take(2000)
    (mean, std), rows = TORCH[name][0], len(train)
    inputs, images = (
        (d.inputs[:n].flatten(1) / 255 - mean) / std for d, n in zip(mnist, (rows, 2000))
    )
    theirs = [
        by_torch(name, inputs, mnist[0].targets[:rows], (images, mnist[1].targets[:2000]), seed)
        for seed in SEEDS
    ]
    ours = [by_us(name, train, test, seed) for seed in SEEDS]
    for what, a, b in zip(("loss", "accuracy"), zip(*ours), zip(*theirs), strict=True):
        assert min(b) <= statistics.median(a) <= max(b), f"{what}: {a}, torch {b}"
