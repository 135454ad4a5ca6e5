"""A training step of the small reference network, every engine against eager PyTorch on the same in-memory batches."""

import os
from itertools import pairwise

import torch

import mlp
from mlp import data, engines

from .harness import Table, device, measure

SIZES, BATCH, STEPS = (784, 100, 50, 10), 32, 100


class Eager:
    """What a PyTorch user writes: nn.Sequential, cross_entropy, torch.optim.SGD."""

    def __init__(self, on, lr, **options):
        layers = [torch.nn.Linear(k, n) for k, n in pairwise(SIZES)]
        modules = [m for layer in layers for m in (layer, torch.nn.Sigmoid())][:-1]
        self.model = torch.nn.Sequential(*modules).to(on)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=lr, **options)

    def epoch(self, dataset, order, batch_size):
        """Train on the samples of `order`, reading batches as the engines do."""
        for indices in order.split(batch_size):
            self.step(*dataset.batch(indices))

    def step(self, x, y):
        """One step."""
        loss = torch.nn.functional.cross_entropy(self.model(x), y)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


def dataset(on) -> mlp.Dataset:
    """MNIST if HANDGRAD_DATA is set, else random pixels of its shape."""
    if os.environ.get("HANDGRAD_DATA"):
        return data.load("mnist")[0].to(on)
    pixels = torch.randint(0, 256, (60_000, 784), dtype=torch.uint8)
    return mlp.Dataset(pixels, torch.randint(0, 10, (60_000,)), scale=1 / 255, name="random pixels").to(on)


def providers(on) -> dict:
    """Name -> something with `epoch(dataset, order, batch_size)`: eager, then every engine that serves here."""
    found = {"eager": Eager(on, 0.1)}
    for name, engine in engines.ENGINES.items():
        model = mlp.MLP(SIZES, activation="sigmoid", device=on)
        loss, optimizer = mlp.SoftmaxCrossEntropy(), mlp.SGD(model.parameters(), lr=0.1)
        if engine.refuses(model, loss, optimizer) is None:
            found[name] = engine(model, loss, optimizer)
    return found


def run() -> Table:
    """µs a step, and the ratio to eager, of 784-100-50-10 with sigmoid at batch 32."""
    on = device()
    samples = dataset(on)
    order = data.permutation(len(samples), 0, 0, on)[: STEPS * BATCH]
    times = measure({name: lambda p=p: p.epoch(samples, order, BATCH) for name, p in providers(on).items()})
    title = f"Training step, {'-'.join(map(str, SIZES))} sigmoid, batch {BATCH}, SGD, {samples.name}"
    note = "The engines count correct predictions and check every loss; eager does neither."
    table = Table(title, "python -m bench train", note=note)
    for name, seconds in times.items():
        step = seconds / STEPS
        table.rows.append({"engine": name, "µs a step": step * 1e6, "of eager": seconds / times["eager"],
                           "MNIST epoch, ms": step * 1e3 * len(samples) / BATCH})  # fmt: skip
    return table
