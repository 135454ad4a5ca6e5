"""The reference recipes against the usual loop, with a DataLoader of two workers, per-sample
transforms and eager autograd.

Both train on the same pixels. The usual loop's time starts with its first batch, so the start of
its workers is not counted. Ours takes about as many steps as an epoch of MNIST has. In a short
epoch, the work around the steps would count too much.
"""

import time
from itertools import pairwise
from statistics import median

import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader
from torchvision import transforms

import mlp
from kernels import cpu
from mlp import engines, recipes

from .samples import mnist
from .table import Table, device

STEPS, ROUNDS = 150, 5
OURS = 1_500  # steps of ours, if there are enough samples


class Images(torch.utils.data.Dataset):
    """Samples as a torchvision data set gives them: PIL images that pass through transforms."""

    def __init__(self, data, normalize, count):
        self.images = [
            Image.fromarray(row.view(28, 28).numpy()) for row in data.inputs[:count].cpu()
        ]
        self.targets = data.targets[:count].tolist()
        steps = [transforms.ToTensor()] + (
            [transforms.Normalize(*((value,) for value in normalize))] if normalize else []
        )
        self.transform = transforms.Compose(steps)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.transform(self.images[index]), self.targets[index]


def eager_network(recipe) -> nn.Module:
    """The recipe's network in torch.nn."""
    act, out = (
        nn.Sigmoid if name == "sigmoid" else nn.ReLU if name == "relu" else nn.Identity
        for name in (recipe.activation, recipe.output_activation)
    )
    modules, features = [], 784
    if recipe.channels:
        for c, o in ((1, recipe.channels[0]), recipe.channels):
            modules += [nn.Conv2d(c, o, 5), nn.ReLU(), nn.MaxPool2d(2)]
        features = 16 * recipe.channels[-1]
    widths = [features, *recipe.hidden, 10]
    modules.append(nn.Flatten())
    for i, (k, n) in enumerate(pairwise(widths)):
        modules += [nn.Linear(k, n, bias=recipe.bias), (out if i == len(widths) - 2 else act)()]
    return nn.Sequential(*(m for m in modules if not isinstance(m, nn.Identity)))


def usual_step_seconds(recipe, images, on) -> float:
    """Seconds a step of the usual loop over all `images` after the first batch."""
    network = eager_network(recipe).to(on)
    optimizer = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[recipe.optimizer](
        network.parameters(), **recipe.optimizer_options
    )
    loader = DataLoader(
        images, batch_size=recipe.batch_size, shuffle=True, num_workers=2, drop_last=True
    )
    steps, started = 0, None
    for x, y in loader:
        started = time.perf_counter() if started is None else started
        x, y = x.to(on), y.to(on)
        output = network(x)
        if recipe.loss == "mse":
            loss = 0.5 * ((output - nn.functional.one_hot(y, 10)) ** 2).sum()
        else:
            loss = nn.functional.cross_entropy(output, y) * recipe.loss_options.get("scale", 1.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()
        steps += 1
    return (time.perf_counter() - started) / max(steps - 1, 1)


def run() -> Table:
    """ms a step of each recipe, by us and by the usual loop, in turns."""
    on = device()
    samples = mnist(on)
    table = Table(
        "Recipes against the usual loop (DataLoader, 2 workers)",
        "python -m bench recipes",
        note=f"Images: {samples.name}. The compiled epoch leaves out pixels that are 0.",
    )
    for name in ("convnet", "classifier", "sigmoid", "deep-linear", "mse"):
        recipe = recipes.get(name)
        train, _ = recipe.prepare(samples, samples)
        images = Images(train, recipe.normalize, (STEPS + 1) * recipe.batch_size)
        model = recipe.model(train, device=on)
        engine, _ = engines.choose(
            "auto",
            model,
            recipe.make_loss(),
            recipe.make_optimizer(model.parameters()),
            recipe.batch_size,
        )
        steps = min(OURS, len(train) // recipe.batch_size)
        order = mlp.data.permutation(len(train), 0, 0, on)[: steps * recipe.batch_size]
        with cpu.many():  # what is compiled, is compiled now
            engine.epoch(train, order, recipe.batch_size)
        ours, usual = [], []
        for _ in range(ROUNDS):
            started = time.perf_counter()
            engine.epoch(train, order, recipe.batch_size)
            ours.append((time.perf_counter() - started) / steps)
            usual.append(usual_step_seconds(recipe, images, on))
        step, other = median(ours), median(usual)
        table.rows.append(
            {
                "recipe": name,
                "batch": recipe.batch_size,
                "engine": engine.name,
                "ms a step": step * 1e3,
                "usual loop, ms": other * 1e3,
                "usual / ours": other / step,
            }
        )
    ratios = [row["usual / ours"] for row in table.rows]
    table.headline = f"{min(ratios):.1f} to {max(ratios):.1f} times as fast as the usual loop"
    return table
