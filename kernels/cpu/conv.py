"""Compiled convolutions on the host: their memory, their threads, and a stage of a Net."""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import njit

from .. import activations
from . import images, products, rows, team
from .tiles import VECTOR

CHUNKS = 16  # most chunks of a batch
_KIND = np.dtype(np.float32)  # of images and weights
_LANES = VECTOR // _KIND.itemsize  # floats of a vector


class Code(NamedTuple):
    """The compiled functions."""

    load: Any
    forward: Any
    backward: Any
    add_up: Any


@functools.cache
def compiled() -> Code:
    """The functions, compiled or read from disk at their first call."""
    products.compiled(_KIND)
    functions = (rows.named(getattr(images, name)) for name in Code._fields)
    return Code(
        *[rows.cached(njit, function, nogil=True, error_model="numpy") for function in functions]
    )


def is_loaded(kind: np.dtype) -> bool:
    """True if this process has compiled or loaded the functions for this dtype."""
    return kind == _KIND and all([function.signatures for function in compiled()])


def is_compiled(kind: np.dtype) -> bool:
    """True if the functions of this version for this dtype are compiled, here or on disk."""
    if kind != _KIND:
        return False
    return is_loaded(kind) or all([rows.is_kept(function.py_func) for function in compiled()])


class Memory:
    """The flat array for batches of at most `batch` images, and a `Run` that points into it.

    shapes: (image (C, H, W), channels out, side of the kernel, side of the pooling window) of each
    layer. workers: the number of threads.
    """

    def __init__(self, shapes: Sequence[tuple], activation: str, batch: int, workers: int):
        self.batch, self.workers, self.size = batch, workers, 0
        act = activations.get(activation)
        layers = np.zeros((len(shapes), images.COLUMNS), np.int64)
        places = np.zeros(images.ENTRIES, np.int64)
        places[images.CHUNK] = max(1, -(-batch // CHUNKS))
        most = [self._sizes(layer, *shape) for layer, shape in zip(layers, shapes)]
        image, outputs = (max(column) for column in zip(*most))
        places[images.IMAGE], places[images.DX] = self._take(image), self._take(image)
        places[images.Z], places[images.ACT] = self._take(outputs), self._take(outputs)
        room = max(int(layer[images.PITCH]) + _LANES for layer in layers)
        places[images.MAXIMA], places[images.LISTED] = self._take(4 * room), self._take(2 * room)
        places[images.ROOM] = room
        places[images.SHARE] = self.size
        self.size *= workers
        places[images.ZEROS], places[images.NUMBERS] = self._take(outputs), self._take(2 * room)
        for layer in layers:
            self._place(layer, batch, act.needs)
        self.w = np.zeros(self.size + _LANES, _KIND)
        whole = self.w.view(np.int32)
        whole[places[images.NUMBERS] :][: 2 * room] = np.arange(2 * room)
        for layer in layers:
            c, y, x = np.ix_(*(np.arange(layer[i]) for i in (images.C, images.K, images.K)))
            taps = (c * layer[images.H] + y) * layer[images.W] + x
            whole[layer[images.PLACES] : layer[images.PLACES] + layer[images.TERMS]] = taps.ravel()
        self.functions = (
            *rows.activation(act, _KIND),
            products.compiled(_KIND)[1],
        )  # must outlive the addresses
        places[images.FORWARD : images.NEEDS] = [function.address for function in self.functions]
        places[images.NEEDS] = {"nothing": 0, "y": 1, "z": 2}[act.needs]
        places[images.BASE] = self.w.ctypes.data
        self.run = images.Run(self.w, whole, layers, places)
        last = layers[-1]
        features = last[images.O] * last[images.PH] * last[images.PW]
        y = self.w[last[images.Y] : last[images.Y] + batch * features].reshape(batch, features)
        self.y = torch.from_numpy(y)

    def _take(self, count: int) -> int:
        """The place of so many floats. A vector more may be read or written behind them."""
        start = self.size
        self.size += (-(-count // _LANES) + 1) * _LANES
        return start

    @staticmethod
    def _sizes(layer, image, channels, side, pool) -> tuple[int, int]:
        """Set a layer's sizes. Returns the floats of an image, and of its outputs."""
        c, h, w = image
        high, long = h - side + 1, w - side + 1
        layer[:7] = c, h, w, channels, side, pool, high // pool
        layer[images.PW], layer[images.TERMS] = long // pool, c * side * side
        layer[images.PITCH] = -(-((high - 1) * w + long) // _LANES) * _LANES
        layer[images.WIDE] = -(-side // _LANES) * _LANES
        return c * h * w, int(channels * layer[images.PITCH])

    def _place(self, layer, batch: int, needs: str) -> None:
        """Give everything of a layer its place."""
        image = layer[images.C] * layer[images.H] * layer[images.W]
        winners = batch * layer[images.O] * layer[images.PH] * layer[images.PW]
        weights = layer[images.O] * layer[images.C] * layer[images.K] * layer[images.WIDE]
        sizes = {
            images.SPREAD: layer[images.O] * image,
            images.PADDED: weights,
            images.BIAS: layer[images.O],
            images.PLACES: layer[images.TERMS],
            images.Y: winners,
            images.KEPT: winners if needs == "z" else 0,
            images.WINNER: winners,
            images.D: winners,
            images.DW: CHUNKS * weights,
            images.DB: CHUNKS * layer[images.O],
        }
        for column, size in sizes.items():
            layer[column] = self._take(size)
        if needs != "z":
            layer[images.KEPT] = layer[images.Y]


class Convolutions:
    """All convolutions of an `mlp.Net` as one of its stages, computed by the compiled code.

    stages: the net's `Convolution` stages, whose parameters and gradients it uses. They also
    compute what the compiled code does not: larger batches, and the gradient of the images. batch:
    rows of the largest batch. pool: threads for `workers` - 1 workers besides the calling thread.
    """

    def __init__(self, stages: Sequence[Any], batch: int, workers: int, pool: Any):
        self.stages, self.pool = stages, pool
        (_, _, activation, _), *_ = [stage.options for stage in stages]
        self.memory = Memory([shape_of(stage) for stage in stages], activation, batch, workers)
        self.features = math.prod(stages[0].image_shape)

    def forward(self, x: torch.Tensor, keep: bool = True) -> torch.Tensor:
        """(rows, C·H·W) -> (rows, features), in memory that the next forward overwrites.

        keep: prepare `backward`. Without it, the result is in new memory.
        """
        if keep:
            self.x = x.contiguous()
        if not (keep and self._serves(x)):
            for stage in self.stages:
                x = stage.forward(x, keep=False)
            return x
        code, run, workers = compiled(), self.memory.run, self.memory.workers
        for l, stage in enumerate(self.stages):
            weight, bias = stage.weight.contiguous(), stage.bias.contiguous()
            code.load(run, l, weight.data_ptr(), bias.data_ptr())
        address, count = self.x.data_ptr(), len(x)

        def work(worker: int) -> None:
            begin, end = (count * i // workers for i in (worker, worker + 1))
            code.forward(run, address, worker, begin, end)

        team.together(self.pool, workers, work)
        return self.memory.y[:count]

    def backward(self, dy: torch.Tensor, input_grad: bool = False) -> torch.Tensor | None:
        """Fill the gradients from dy (rows, features). Returns dx if `input_grad`, else None."""
        if input_grad or not self._serves(self.x):
            return self._backward_of_stages(dy, input_grad)
        code, run, workers = compiled(), self.memory.run, self.memory.workers
        dy = dy.contiguous()
        x, address, count = self.x.data_ptr(), dy.data_ptr(), len(dy)
        chunks = -(-count // int(run.places[images.CHUNK]))

        def work(worker: int) -> None:
            begin, end = (chunks * i // workers for i in (worker, worker + 1))
            code.backward(run, x, address, worker, begin, end, count)

        team.together(self.pool, workers, work)
        for l, stage in enumerate(self.stages):
            dw, db = stage.grads
            code.add_up(run, l, chunks, dw.data_ptr(), db.data_ptr())
        return None

    def _serves(self, x: torch.Tensor) -> bool:
        """True if the compiled code can compute this batch."""
        fits = x.dim() == 2 and x.shape[1] == self.features and len(x) <= self.memory.batch
        return fits and x.dtype == torch.float32

    def _backward_of_stages(self, dy: torch.Tensor, input_grad: bool) -> torch.Tensor | None:
        y = self.x
        for stage in self.stages:
            y = stage.forward(y)
        d: torch.Tensor | None = dy
        for i in reversed(range(len(self.stages))):
            d = self.stages[i].backward(d, input_grad=input_grad or i > 0)
        return d


def shape_of(stage: Any) -> tuple:
    """What `Memory` takes of a stage: (image (C, H, W), channels out, kernel's side, window's)."""
    channels, _, side, _ = stage.weight.shape
    return tuple(stage.image_shape), channels, side, stage.options[3]
