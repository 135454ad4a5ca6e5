"""Trainings of the reference network as a PyTorch user writes them, plain and with each of
PyTorch's ways to make them fast.

A provider of trainings has three methods: `epoch(data, order)` trains, `enqueue` does the same
without waiting for the GPU, and `losses` trains and returns every step's loss. `start` holds the
initial weights and biases, which stay unchanged. `optimizer` is a function of the parameters.
"""

import dataclasses
import os
import shutil
import warnings
from itertools import pairwise

import torch

SIZES, BATCH = (784, 100, 50, 10), 32


class NotHereError(RuntimeError):
    """This machine cannot run a provider. The text says what it needs."""


def weights(on) -> list[torch.Tensor]:
    """[w_1, b_1, w_2, …] from torch.nn.Linear's distribution, always the same numbers."""
    g = torch.Generator().manual_seed(0)

    def uniform(fan_in, *shape):
        return (torch.rand(shape, generator=g) * 2 - 1).mul_(fan_in**-0.5).to(on)

    return [p for k, n in pairwise(SIZES) for p in (uniform(k, n, k), uniform(k, n))]


class Eager:
    """nn.Sequential, cross_entropy, backward and an optimizer of torch.optim. Batches are gathered
    from tensors on the device.
    """

    def __init__(self, start, optimizer, data):
        layers = [torch.nn.Linear(k, n) for k, n in pairwise(SIZES)]
        modules = [m for layer in layers for m in (layer, torch.nn.Sigmoid())][:-1]
        self.model = torch.nn.Sequential(*modules).to(start[0].device)
        self.start = start
        self.optimizer = optimizer(self.model.parameters())
        self._reset()

    @torch.no_grad()
    def _reset(self):
        """Goes back to the first step, where the states of SGD and Adam are zeros."""
        for p, value in zip(self.model.parameters(), self.start):
            p.copy_(value)
        for state in self.optimizer.state.values():
            for value in state.values():
                value.zero_()

    def forward_loss(self, x, y):
        """The batch's loss, with its graph."""
        return torch.nn.functional.cross_entropy(self.model(x), y)

    def step(self, x, y):
        """Takes one step and returns its loss."""
        self.optimizer.zero_grad()
        loss = self.forward_loss(x, y)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def epoch(self, data, order):
        """Trains on the samples of `order`."""
        for rows in order.split(BATCH):
            self.step(*data.batch(rows))

    enqueue = epoch

    def losses(self, data, order) -> list[float]:
        """Trains as `epoch` does. Returns every step's loss."""
        return [float(self.step(*data.batch(rows))) for rows in order.split(BATCH)]


class Compiled(Eager):
    """Forward, backward and update through torch.compile."""

    def __init__(self, start, optimizer, data, mode):
        if mode != "default" and start[0].device.type != "cuda":
            raise NotHereError("needs a GPU")
        if start[0].device.type == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
            raise NotHereError("needs a C++ compiler")
        super().__init__(start, optimizer, data)
        self.forward_loss = torch.compile(self.forward_loss, mode=mode)
        self.update = torch.compile(self.optimizer.step, mode=mode)

    def step(self, x, y):
        """Takes one step and returns its loss, which the next step may overwrite."""
        # This comes before the mark. After the mark the gradients' memory may be used again.
        self.optimizer.zero_grad()
        torch.compiler.cudagraph_mark_step_begin()
        loss = self.forward_loss(x, y)
        loss.backward()
        self.update()
        return loss.detach()


class Captured(Eager):
    """A whole step, with the gathering of its batch, captured in a CUDA graph by hand. A step is a
    copy of indices and a replay.
    """

    def __init__(self, start, optimizer, data):
        if start[0].device.type != "cuda":
            raise NotHereError("needs a GPU")
        super().__init__(start, optimizer, data)
        # with buffers for batches that no other provider replaces
        self.data = dataclasses.replace(data, _buffers={})
        self.rows = torch.zeros(BATCH, dtype=torch.int64, device=start[0].device)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), warnings.catch_warnings():
            # torch's Adam warns that these steps are not captured.
            warnings.filterwarnings("ignore", message=".*capturable=True", category=UserWarning)
            for _ in range(3):  # so that libraries and autograd allocate before the capture
                self.step(*self.data.batch(self.rows))
        torch.cuda.current_stream().wait_stream(stream)
        self._reset()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.loss = self.step(*self.data.batch(self.rows))

    def epoch(self, data, order):
        """Trains on the samples of `order` in whole batches, from the data set of the
        constructor.
        """
        for rows in order.split(BATCH):
            self.rows.copy_(rows)
            self.graph.replay()

    enqueue = epoch

    def losses(self, data, order):
        """Trains as `epoch` does. Returns every step's loss."""
        found = []
        for rows in order.split(BATCH):
            self.epoch(data, rows)
            found.append(float(self.loss))
        return found
