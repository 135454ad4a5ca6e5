"""Every kernel launched once or a few times on small shapes: a short program to watch with a tool
such as compute-sanitizer.

compute-sanitizer python -m bench.each_kernel      # prints the kernels it launched; status 1 if one
                                                   was missed
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

_SHAPE = (33, 17, 7)  # batch, features in, features out: nothing divides anything
_SIZES, _BATCH, _ROWS = (
    (17, 20, 9, 3),
    5,
    13,
)  # a network, with programs enough to exchange; the last batch is smaller
_NEED_PROCESSORS = re.compile(
    r"exchange_kernel|linear_.*reduce_kernel"
)  # more than the interpreter has


def names() -> set[str]:
    """Every function called …_kernel that a module of kernels defines with triton.jit."""
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
    """Forward and backward of every case of every operation in float32.

    Linear layers also with the library's products; products of many rows, whose sums are split.
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
    """A step, an epoch by one program and by several with either exchange, an epoch of two
    networks.
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
    """Launch, wait, and list what was launched."""
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
