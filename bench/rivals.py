"""What a PyTorch user writes to train the reference network, plainly and with each of PyTorch's
means to make it fast.

A provider of trainings has `epoch(data, order)`; `enqueue`, the same without anything that waits
for the GPU; and `losses`, every step's loss. `start`: the initial weights and biases, which are
left alone. `optimizer`: a function of the parameters.
"""

import dataclasses
import os
import shutil
import warnings
from itertools import pairwise

import torch

SIZES, BATCH = (784, 100, 50, 10), 32


class NotHereError(RuntimeError):
    """A provider that this machine cannot run, and what it needs."""


def weights(on) -> list[torch.Tensor]:
    """[w_1, b_1, w_2, …] as torch.nn.Linear draws them, always the same."""
    g = torch.Generator().manual_seed(0)

    def uniform(fan_in, *shape):
        return (torch.rand(shape, generator=g) * 2 - 1).mul_(fan_in**-0.5).to(on)

    return [p for k, n in pairwise(SIZES) for p in (uniform(k, n, k), uniform(k, n))]


class Eager:
    """nn.Sequential, cross_entropy, backward, an optimizer of torch.optim; batches gathered from
    tensors on the device.
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
        """Go back to the first step, where the states of SGD and Adam are zeros."""
        for p, value in zip(self.model.parameters(), self.start):
            p.copy_(value)
        for state in self.optimizer.state.values():
            for value in state.values():
                value.zero_()

    def forward_loss(self, x, y):
        """The batch's loss, with its tape."""
        return torch.nn.functional.cross_entropy(self.model(x), y)

    def step(self, x, y):
        """One step; its loss."""
        self.optimizer.zero_grad()
        loss = self.forward_loss(x, y)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def epoch(self, data, order):
        """Train on the samples of `order`."""
        for rows in order.split(BATCH):
            self.step(*data.batch(rows))

    enqueue = epoch

    def losses(self, data, order) -> list[float]:
        """Train as `epoch` does, reading every loss."""
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
        """One step; its loss, which the next step may overwrite."""
        # before the mark, behind which the gradients' memory may be used again
        self.optimizer.zero_grad()
        torch.compiler.cudagraph_mark_step_begin()
        loss = self.forward_loss(x, y)
        loss.backward()
        self.update()
        return loss.detach()


class Captured(Eager):
    """A whole step, gathering of the batch included, captured in a CUDA graph by hand: a copy of
    indices and a replay a step.
    """

    def __init__(self, start, optimizer, data):
        if start[0].device.type != "cuda":
            raise NotHereError("needs a GPU")
        super().__init__(start, optimizer, data)
        self.data = dataclasses.replace(
            data, _buffers={}
        )  # the batch's buffers, which nobody else makes anew
        self.rows = torch.zeros(BATCH, dtype=torch.int64, device=start[0].device)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), warnings.catch_warnings():
            # torch's Adam says of these steps that they are not captured.
            warnings.filterwarnings("ignore", message=".*capturable=True", category=UserWarning)
            for _ in range(3):  # libraries and autograd allocate what they keep before the capture
                self.step(*self.data.batch(self.rows))
        torch.cuda.current_stream().wait_stream(stream)
        self._reset()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.loss = self.step(*self.data.batch(self.rows))

    def epoch(self, data, order):
        """Train on the samples of `order`: of the data set given at the beginning, in whole
        batches.
        """
        for rows in order.split(BATCH):
            self.rows.copy_(rows)
            self.graph.replay()

    enqueue = epoch

    def losses(self, data, order):
        """Train as `epoch` does, reading every loss."""
        found = []
        for rows in order.split(BATCH):
            self.epoch(data, rows)
            found.append(float(self.loss))
        return found
