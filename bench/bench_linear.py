"""Linear layer with activation, forward and backward, against torch.nn.functional with autograd."""

import contextlib
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

import kernels
from kernels import configs, launch

from .harness import compare, conclude, microseconds
from .table import Table, device

SHAPES = {
    "cpu": ((32, 784, 100), (32, 100, 50), (256, 784, 128), (1024, 512, 512)),
    "cuda": ((32, 784, 100), (256, 784, 128), (4096, 1024, 1024), (8192, 4096, 4096)),
}
# How the products may be computed: a row's name -> arguments of `kernels.use`
KINDS: dict[str, dict[str, Any]] = {
    "fused": {"products": "fused", "tma": False},
    "fused, TMA": {"products": "fused", "tma": True},
    "library": {"products": "library"},
}
NUMBA = "numba"  # a row on a CPU: `kernels.use("numba")`
# These limits only keep wrong results out of a table. The tests check accuracy.
TOLERANCE = {torch.float32: 2e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}


def _eager(activation, x, w, b):
    return activation(F.linear(x, w, b))


def _provider(function, x, w, b, dy, kind=None):
    """A function that runs forward and backward. kind: of KINDS, NUMBA or None."""

    def run():
        options = {"backend": kind} if kind == NUMBA else KINDS.get(kind)
        with kernels.use(**options) if options else contextlib.nullcontext():
            return torch.autograd.grad(function(x, w, b), (x, w, b), dy)

    return run


def _providers(on, activation, tensors):
    """(kinds of product, providers). Where kernels serve, each kind is a provider, next to
    torch's.
    """
    eager = partial(_eager, kernels.ACTIVATIONS[activation].torch)
    ours = partial(kernels.linear, activation=activation)
    kinds = _kinds(on, tensors[0].dtype) if kernels.backend(tensors[0]) == "triton" else (None,)
    if on.type == "cpu" and kinds == (None,) and launch.has_numba():
        kinds = (None, NUMBA)
    providers = {_name(kind): _provider(ours, *tensors, kind) for kind in kinds}
    providers["eager"] = _provider(eager, *tensors)
    if on.type == "cuda" and activation == "relu":  # only one, because compiling takes seconds
        providers["compile"] = _provider(torch.compile(eager), *tensors)
    return kinds, providers


def _kinds(on, dtype) -> tuple[str, ...]:
    """The KINDS that a device has for a dtype."""
    has_tma = configs.has_tma(launch.arch(on)) and dtype.itemsize == 2
    return tuple(kind for kind, use in KINDS.items() if has_tma or not use.get("tma"))


def _name(kind) -> str:
    return f"handgrad {kind}" if kind else "handgrad"


def _rows(on, activation, tensors, tolerance):
    """(a row for each kind of product, {provider: what was wrong}). All are timed in turn."""
    kinds, providers = _providers(on, activation, tensors)
    wrong: dict[str, str] = {}
    times = compare(providers, tolerance, wrong)
    rivals = {name: times[name] for name in providers if not name.startswith("handgrad")}
    rows = []
    for kind in kinds:
        row = microseconds({"handgrad": times[_name(kind)], **rivals}, "eager")
        rows.append({"products": kind or "reference", **row})
    return rows, wrong


def run() -> Table:
    """µs of forward and backward for each shape, dtype and activation.

    On a GPU each case has a row for products in the fused kernel and one for products by the
    library. From Hopper on, half precision has one more row: the fused kernel with TMA.
    """
    on = device()
    table = Table("Linear + activation, forward and backward", "python -m bench linear")
    wrong = {}
    dtypes = (torch.float32, torch.bfloat16) if on.type == "cuda" else (torch.float32,)
    for m, k, n in SHAPES[on.type]:
        for dtype in dtypes:
            for activation in ("relu", "sigmoid", "gelu", "gelu_tanh"):
                x, w, b, dy = (
                    torch.randn(s, device=on, dtype=dtype) for s in ((m, k), (n, k), (n,), (m, n))
                )
                x, w, b = (t.requires_grad_() for t in (x, w * k**-0.5, b))
                case = {"M×K×N": f"{m}×{k}×{n}", "dtype": str(dtype)[6:], "activation": activation}
                rows, found = _rows(on, activation, (x, w, b, dy), TOLERANCE[dtype])
                table.rows += [{**case, **row} for row in rows]
                wrong |= {f"{name}, {' '.join(case.values())}": why for name, why in found.items()}
    conclude(table, wrong)
    return table
