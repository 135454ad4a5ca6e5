"""Linear layer with activation, forward and backward: ours against torch.nn.functional with its
tape.
"""

from functools import partial

import torch
import torch.nn.functional as F

import kernels

from .harness import compare, conclude, microseconds
from .table import Table, device

SHAPES = {
    "cpu": ((32, 784, 100), (32, 100, 50), (256, 784, 128), (1024, 512, 512)),
    "cuda": ((32, 784, 100), (256, 784, 128), (4096, 1024, 1024), (8192, 4096, 4096)),
}
TOLERANCE = {
    torch.float32: 2e-3,
    torch.float16: 2e-2,
    torch.bfloat16: 5e-2,
}  # gate against wrong results, not a test


def _eager(activation, x, w, b):
    return activation(F.linear(x, w, b))


def _provider(function, x, w, b, dy):
    def run():
        return torch.autograd.grad(function(x, w, b), (x, w, b), dy)

    return run


def run() -> Table:
    """µs of forward and backward for each shape, dtype and activation."""
    on = device()
    table = Table("Linear + activation, forward and backward", "python -m bench linear")
    wrong = {}
    dtypes = (torch.float32, torch.bfloat16) if on.type == "cuda" else (torch.float32,)
    for m, k, n in SHAPES[on.type]:
        for dtype in dtypes:
            for activation in ("relu", "sigmoid", "gelu"):
                x, w, b, dy = (
                    torch.randn(s, device=on, dtype=dtype) for s in ((m, k), (n, k), (n,), (m, n))
                )
                x, w, b = (t.requires_grad_() for t in (x, w * k**-0.5, b))
                eager = partial(_eager, kernels.ACTIVATIONS[activation].torch)
                functions = {
                    "handgrad": partial(kernels.linear, activation=activation),
                    "eager": eager,
                }
                if on.type == "cuda" and activation == "relu":  # compiling each takes seconds
                    functions["compile"] = torch.compile(eager)
                providers = {
                    name: _provider(function, x, w, b, dy) for name, function in functions.items()
                }
                case, found = (
                    {"M×K×N": f"{m}×{k}×{n}", "dtype": str(dtype)[6:], "activation": activation},
                    {},
                )
                table.rows.append(
                    {**case, **microseconds(compare(providers, TOLERANCE[dtype], found), "eager")}
                )
                wrong |= {f"{name}, {' '.join(case.values())}": why for name, why in found.items()}
    conclude(table, wrong)
    return table
