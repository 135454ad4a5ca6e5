"""Code that numba compiles for a CPU: one call runs a whole epoch, or a layer's product.

    bits       floats and their bits
    language   the functions that the tables' scalars call, for float32
    doubles    the same for float64
    rows       the rows of the tables, compiled
    tiles      register tiles of matrix products
    products   matrix products that consist of such tiles, on padded matrices
    dense      the products of a linear layer, on matrices as torch stores them
    sparse     the same without the zeros of images
    linear     the host's side of these, for `kernels.use("numba")`
    stack      the calls of a Net's layers, repeated
    softmax    cross-entropy for it
    blocks     how these call compiled functions
    waiting    how threads wait for each other
    loop       the steps of an epoch
    epoch      the host's side: memory and pieces
    team       the threads of a training, each on a core of its own
    session    many epochs of one small network
    images     the convolutions of a batch
    conv       the host's side of these: memory, threads, a stage of a Net

numba is optional and slow to import. So modules that need it are imported where they are used.
"""

import contextlib
import importlib
import itertools
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from .. import launch
from ..training import Run

NEEDS = (
    "needs a GPU, or on a CPU numba, with which small networks train more than twice as fast: "
    "pip install 'handgrad[cpu]'"
)


class Call(NamedTuple):
    """A function that numba compiles separately, for each dtype of networks."""

    module: str  # of this package, which holds the function
    compiles: float  # seconds of CPU to compile it


EPOCH, MANY_EPOCHS = Call("epoch", 12.0), Call("session", 17.0)
CONVOLUTIONS = Call("conv", 9.0)
# {a dtype of networks that the compiled epoch trains: numpy's dtype}
DTYPES: dict[torch.dtype, np.dtype[Any]] = {
    torch.float32: np.dtype(np.float32),
    torch.float64: np.dtype(np.float64),
}

# Seconds of CPU to import numba and to read its compiled code from disk.
_LOADS = 0.6
# Seconds that a step saves against engine manual, with one thread each: Python's part, and the part
# of each multiply-add. `python -m bench cpu` shows the reference network's times in its rows
# `epoch, one thread` and `manual`. In CPU time of one thread, a step of 30-16-2 saved 88 µs. A step
# of 784-256-10 saved 187 µs with a batch of 32 and 474 µs with 128.
_SAVED, _SAVED_EACH = 9e-5, 5e-12
# Bytes of weights that caches hold. Beyond, BLAS is faster than tiles, because it packs what it
# reads.
_WEIGHTS = 6_000_000
# Seconds that compiled convolutions save for each image of a step, about the least that was
# measured with two threads. The most multiply-adds of an image's forward: beyond, torch is faster.
_SAVED_EACH_IMAGE, _PRODUCTS = 3e-5, 1_500_000
_SHARED = 8  # a thread more pays only for so many images
_many = 0  # callers that are inside `many`
_passed = 0.0  # seconds that this process would have saved by code that it did not compile


def serves(parameter: torch.Tensor) -> bool:
    """True if the compiled epoch can train a network with this parameter."""
    on_cpu = parameter.device.type == "cpu" and parameter.dtype in DTYPES
    return on_cpu and launch.has_numba() and launch.backend(parameter) != "triton"


def is_loaded(dtype: torch.dtype, call: Call = EPOCH) -> bool:
    """True if this process has already trained networks of this dtype by this call."""
    # While another thread imports the module, it may not have `is_loaded` yet.
    found = getattr(sys.modules.get(f"{__name__}.{call.module}"), "is_loaded", None)
    return found is not None and found(DTYPES[dtype])


def costs(
    sizes: Sequence[int],
    batch: int,
    steps: int,
    dtype: torch.dtype,
    call: Call = EPOCH,
    again: bool = False,
) -> str | None:
    """The reason why compiled steps do not pay in a training of `steps` steps, or None.

    They do not pay if they save nothing, or less time than it takes to load or compile them.
    dtype: of the network, one that `serves`.
    call: the compiled function that takes the steps.
    again: True if a process often has many such trainings, as with estimators. Then code that is
        on disk is loaded by the first one. So all of them use the same code, and one seed gives the
        same bits. To compile pays as soon as all trainings of this process save enough together.
    """
    global _passed
    products = sum(k * n for k, n in itertools.pairwise(sizes))
    if products * dtype.itemsize > _WEIGHTS:
        return f"of {products:,} weights, which no cache holds, products by BLAS are faster"
    if is_loaded(dtype, call) or _many:
        return None
    saved = steps * (_SAVED + 3 * batch * products * _SAVED_EACH)
    if again:
        saved += _passed
    elif saved < _LOADS:
        return f"to load its compiled code takes about {_LOADS:.1f} s, more than it saves here"
    if saved < call.compiles:
        module = importlib.import_module(f".{call.module}", __name__)
        if not module.is_compiled(DTYPES[dtype]):
            _passed = saved if again else _passed
            return (
                f"to compile it once takes about {call.compiles:.0f} s, more than the "
                f"{saved:.0f} s that it saves here; engine 'epoch' does it, for all later runs"
            )
    return None


@contextlib.contextmanager
def many() -> Iterator[None]:
    """Inside this block, `costs` assumes that loading or compiling the code pays.

    Use it where many trainings follow.
    """
    global _many
    _many += 1
    try:
        yield
    finally:
        _many -= 1


def convolves(stages: Sequence[Any], batch: int, steps: int) -> bool:
    """True if compiled code computes a net's convolutions faster in a training of `steps` steps.

    stages: of an `mlp.Net`. batch: images of a step.
    """
    weights = [stage.weight for stage in stages[:-1]]
    if not weights or weights[0].dtype != torch.float32 or not serves(weights[0]):
        return False
    products = 0
    for stage in stages[:-1]:
        high, wide = (side - stage.weight.shape[2] + 1 for side in stage.image_shape[1:])
        products += stage.weight.numel() * high * wide
    # Without pooling, every output has a gradient, and products compute them faster.
    pools = all([stage.options[-1] > 1 for stage in stages[:-1]])
    if products > _PRODUCTS or not pools:
        return False
    dtype = torch.float32
    if is_loaded(dtype, CONVOLUTIONS) or _many:
        return True
    saved = steps * batch * _SAVED_EACH_IMAGE
    if saved < _LOADS:
        return False
    if saved > CONVOLUTIONS.compiles:
        return True
    return importlib.import_module(f".{CONVOLUTIONS.module}", __name__).is_compiled(DTYPES[dtype])


@contextlib.contextmanager
def convolving(net: Any, batch: int) -> Iterator[None]:
    """Inside this block, compiled code computes the convolutions of an `mlp.Net`.

    It uses as many threads as torch does. batch: images of the largest step.
    """
    from . import conv, team

    stages, workers = net.stages, max(1, min(torch.get_num_threads(), batch // _SHARED))
    _ = net.grads  # allocated now, because they are bound to these stages
    with team.threads(workers) as pool:
        net.stages = [conv.Convolutions(stages[:-1], batch, workers, pool), stages[-1]]
        try:
            yield
        finally:
            net.stages = stages


def train_epoch(run: Run) -> tuple[torch.Tensor, torch.Tensor]:
    """See `epoch.train_epoch`."""
    from . import epoch

    return epoch.train_epoch(run)


def epochs(run: Run, orders: torch.Tensor, hyper: torch.Tensor) -> Any:
    """See `epoch.Epochs`."""
    from . import epoch

    return epoch.Epochs(run, orders, hyper)


def train_replicas(run: Run) -> tuple[torch.Tensor, torch.Tensor]:
    """See `epoch.train_replicas`."""
    from . import epoch

    return epoch.train_replicas(run)
