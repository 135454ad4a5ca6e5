"""Training on a CPU, a whole epoch in one call of code that numba compiles.

    language   what the tables' scalars call, as a compiler for the CPU needs it
    rows       the rows of the tables, compiled
    tiles      register tiles of matrix products
    products   the products, of such tiles
    waiting    how threads wait for each other
    loop       the steps of an epoch
    epoch      the host's side: memory and pieces
    team       the threads of a training, each on a core of its own
    session    many epochs of one small network

numba is optional and slow to import: what needs it is imported where it is used.
"""

import contextlib
import importlib
import importlib.util
import itertools
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

import kernels

NEEDS = (
    "needs a GPU, or on a CPU numba, with which small networks train more than twice as fast: "
    "pip install 'handgrad[cpu]'"
)


class Call(NamedTuple):
    """A function that numba compiles for itself: the module that has it, and how long that takes,
    in seconds of CPU.
    """

    module: str
    compiles: float


EPOCH, MANY_EPOCHS = Call("epoch", 10.0), Call("session", 24.0)

# Seconds of CPU to import numba and read what it kept on disk. Saved by a step beside engine
# manual, of one thread each: Python's part, and of each multiply-add. The rows `epoch, one thread`
# and `manual` of `python -m bench cpu` show the reference network's. In CPU time of one thread,
# 30-16-2 saved 88 µs, 784-256-10 187 µs with a batch of 32 and 474 with 128.
_LOADS = 0.6
_SAVED, _SAVED_EACH = 9e-5, 5e-12
# Weights that caches hold: beyond, BLAS, which packs what it reads, is faster than tiles.
_WEIGHTS = 1_500_000
_many = 0  # how many callers of `many` are at work


def serves(parameter: torch.Tensor) -> bool:
    """Whether the compiled epoch trains a network with this parameter."""
    on_cpu = parameter.device.type == "cpu" and parameter.dtype == torch.float32
    known = importlib.util.find_spec("numba") is not None
    return on_cpu and known and kernels.backend(parameter) == "torch"


def is_loaded(call: Call = EPOCH) -> bool:
    """Whether this process has trained by this call before."""
    # Another thread may be importing it.
    compiled = getattr(sys.modules.get(f"{__name__}.{call.module}"), "compiled", None)
    return compiled is not None and bool(compiled().signatures)


def costs(sizes: Sequence[int], batch: int, steps: int, call: Call = EPOCH) -> str | None:
    """Why compiled steps do not pay in a training of so many, or None. call: what takes them.

    It gains nothing, or less than compiling it, or reading what was compiled, takes.
    """
    products = sum(k * n for k, n in itertools.pairwise(sizes))
    if products > _WEIGHTS:
        return f"of {products:,} weights, which no cache holds, products by BLAS are faster"
    if is_loaded(call) or _many:
        return None
    saved = steps * (_SAVED + 3 * batch * products * _SAVED_EACH)
    if saved < _LOADS:
        return f"to load its compiled code takes about {_LOADS:.1f} s, more than it saves here"
    if saved < call.compiles:
        module = importlib.import_module(f".{call.module}", __name__)
        if not module.is_compiled():
            return (
                f"to compile it once takes about {call.compiles:.0f} s, more than the "
                f"{saved:.0f} s that it saves here; engine 'epoch' does it, for all later runs"
            )
    return None


@contextlib.contextmanager
def many() -> Iterator[None]:
    """So many trainings follow in here that to load or to compile the code always pays."""
    global _many
    _many += 1
    try:
        yield
    finally:
        _many -= 1


def train_epoch(run: kernels.Run) -> tuple[torch.Tensor, torch.Tensor]:
    """See `epoch.train_epoch`."""
    from . import epoch

    return epoch.train_epoch(run)


def train_replicas(run: kernels.Run) -> tuple[torch.Tensor, torch.Tensor]:
    """See `epoch.train_replicas`."""
    from . import epoch

    return epoch.train_replicas(run)
