"""Launches every kernel a few times on small shapes, as a short program for a tool such as
compute-sanitizer.

compute-sanitizer python -m bench.each_kernel

It prints the kernels that it launched. The exit status is 1 if it missed one.
"""

import importlib
import pkgutil
import re
import sys

import torch
import triton

import kernels
from kernels import launch
from kernels.operations import OPERATIONS, Make
from kernels.training.exchange import EXCHANGES

from .table import device

_SHAPE = (33, 17, 7)  # batch, features in, features out; no tile divides them
# A network large enough for several programs. The last batch is smaller.
_SIZES, _BATCH, _ROWS = (17, 20, 9, 3), 5, 13
# These kernels need several processors, and the interpreter has one.
_NEED_PROCESSORS = re.compile(r"exchange_kernel|linear_.*reduce_kernel")


def names() -> set[str]:
    """The names of all jit functions of `kernels` that end with _kernel."""
    modules = [
        importlib.import_module(module.name)
        for module in pkgutil.walk_packages(kernels.__path__, "kernels.")
    ]
    found = {
        name: value
        for module in modules
        for name, value in vars(module).items()
        if name.endswith("_kernel")
    }
    return {
        name for name, value in found.items() if isinstance(value, triton.runtime.KernelInterface)
    }


def operations(on) -> None:
    """Launches forward and backward of every case of every operation, in float32.

    Linear layers also run with the library's products and, on a GPU, with many rows, whose sums are
    split.
    """
    for operation in OPERATIONS.values():
        for _, arguments in operation.cases(Make(on), *_SHAPE):
            operation.results(arguments)
    with kernels.use(products="library"):
        for _, arguments in OPERATIONS["linear"].cases(Make(on), *_SHAPE):
            OPERATIONS["linear"].results(arguments)
    for name in (
        name for name in OPERATIONS if on.type == "cuda" and name.startswith(("linear", "mlp"))
    ):
        _, arguments = next(OPERATIONS[name].cases(Make(on), 4096, 20, 9))
        OPERATIONS[name].results(arguments)


def trainings(on) -> None:
    """Launches a step, an epoch by one program and by several with each exchange, and an epoch of
    two networks.
    """
    spec = kernels.Spec(_SIZES, "sigmoid")
    make = Make(on)
    data, targets, order = (
        make.real(_ROWS, _SIZES[0]),
        make.labels(_SIZES[-1], _ROWS),
        torch.arange(_ROWS, device=on),
    )

    def training(order, hyper, *lead):
        parameters = [make.real(*lead, *shape) for shape in spec.shapes]
        count = torch.zeros(1, device=on)
        return kernels.Run(spec, parameters, [], data, targets, order, _BATCH, hyper, count)

    hyper = kernels.hyperparameters(lr=0.1, device=on)
    kernels.train_step(kernels.StepState(training(order, hyper)))
    kernels.train_epoch(training(order, hyper), programs=1)
    for exchange in EXCHANGES if on.type == "cuda" and launch.arch(on).startswith("sm_") else ():
        kernels.train_epoch(training(order, hyper), exchange=exchange)
    hyper = kernels.hyperparameters(lr=0.1, replicas=2, device=on)
    kernels.train_replicas(training(torch.stack([order, order]), hyper, 2))


def main() -> int:
    """Launches everything and prints the kernels. Returns 1 if one was missed."""
    on, seen = device(), set()
    with launch.observe(lambda kernel, grid, args, options: seen.add(kernel.fn.__name__)):
        operations(on)
        trainings(on)
    if on.type == "cuda":
        torch.cuda.synchronize()
    missed = {
        name for name in names() - seen if on.type == "cuda" or not _NEED_PROCESSORS.fullmatch(name)
    }
    print(f"launched {len(seen)} kernels: {', '.join(sorted(seen))}")
    if missed:
        print(f"missed {', '.join(sorted(missed))}")
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main())
