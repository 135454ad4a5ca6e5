"""Launches all kernels through Triton's own launcher, on a stub of the CUDA driver.

    python -m tests.proof.worker [--full]    # one JSON object on standard output

It is a process of its own, because under pytest jit functions are interpreted. Tensors in the
host's memory stand for a GPU's. Specialisation, compilation, signature and launch are the real
ones, and only the kernel does not run. So this finds launches that a driver would refuse: too much
shared memory, too large a grid, more programs than run at once, an argument without a pointer.
"""

import ctypes
import itertools
import json
import math
import sys

from tests.proof import stub  # before torch

# isort: split
import torch
import triton
from triton.backends.nvidia import driver as nvidia

import kernels
from kernels import launch
from kernels.operations import OPERATIONS, Make
from kernels.ops.mlp_update import linear_update
from kernels.ops.optim import apply_rule
from kernels.rules import RULES, hyperparameters, row_of
from tests.compile.worker import resources

ARCH, PROCESSORS = "sm_90", 132
SHAPES = [(33, 17, 7), (2048, 100, 50)]  # a shape that no tile divides; a batch that is split


class Driver(nvidia.CudaDriver):
    """Triton's driver for NVIDIA with one device, which torch need not know."""

    def __init__(self):
        self.utils, self.launcher_cls = nvidia.CudaUtils(), nvidia.CudaLauncher

    def get_device_capability(self, device=0):
        return divmod(int(ARCH[3:]), 10)

    def get_current_stream(self, device=0):
        return 0

    def get_current_device(self):
        return 0

    def set_current_device(self, device):
        pass

    def get_active_torch_device(self):
        return torch.device("cpu")

    def get_device_interface(self):
        return torch.cuda


def together(name: str, grid, compiled) -> dict:
    """The needs of programs that wait for each other. A driver compares them with its device,
    because all must be resident at once.
    """
    return {
        "kernel": name,
        "programs": math.prod(grid),
        "threads": 32 * compiled.metadata.num_warps,
        "registers": resources(compiled.asm["cubin"])["registers"],
        "shared": compiled.metadata.shared,
    }


def launched(seen: dict):
    """An observer that really launches, counts kernels in `seen` and keeps refusals there."""

    def observe(kernel, grid, args, options):
        name = kernel.fn.__name__
        seen["kernels"][name] = seen["kernels"].get(name, 0) + 1
        try:
            compiled = kernel[grid](*args, enable_fp_fusion=True, **options)
            if options.get("launch_cooperative_grid"):
                seen["together"].append(together(name, grid, compiled))
        except Exception as error:  # the test judges errors of any kind
            seen["refused"].append(f"{name}: {type(error).__name__}: {str(error)[-300:]}")

    return observe


def operations(full: bool) -> None:
    """Launches forward and backward of every operation, in one case, or if full in all cases and
    types.
    """
    for operation in OPERATIONS.values():
        for shape in SHAPES if full else SHAPES[:1]:
            for dtype in launch.KERNEL_DTYPES if full else (torch.float32,):
                cases = list(operation.cases(Make("cpu", dtype), *shape))
                for _, arguments in cases if full else cases[:1]:
                    for products in launch.PRODUCTS:
                        with launch.use(products=products):
                            operation.results(arguments)


def descriptors(full: bool) -> int:
    """Launches products whose factors are read by descriptors. Returns how many descriptors.

    If full, also of large tiles, of rows of dz that have no descriptor, and of a split batch.
    """
    count = 0
    shapes = (64, 48, 40), (8192, 64, 1024), (64, 48, 33), (4096, 64, 64)
    dtypes = torch.float16, torch.bfloat16
    cases = itertools.product(dtypes if full else dtypes[:1], shapes if full else shapes[:1])
    for dtype, (M, K, N) in cases:
        make = Make("cpu", dtype)
        x, w, dz = make.real(M, K), make.real(N, K), make.real(M, N)
        with launch.use(products="fused", tma=True):
            kernels.linear_fwd(x, w)
            kernels.linear_bwd_dx(dz, w)
            kernels.linear_bwd_dw(dz, x)
        count += 2 if N % 8 else 6
    return count


def updates(full: bool) -> None:
    """Launches every rule's step in a layer's backward and on tensors.

    Every second rule has a bias. If full, each runs with a bias and without, also with a batch that
    is split.
    """
    make, pairs = Make("cpu", torch.float32), zip(RULES.values(), itertools.cycle((True, False)))
    for rule, bias in itertools.product(RULES.values(), (True, False)) if full else pairs:
        for M, K, N in SHAPES if full else SHAPES[:1]:
            parameters = [make.real(N, K), make.real(N)][: 1 + bias]
            states = [[torch.zeros_like(p) for p in parameters] for _ in rule.states]
            hyper = hyperparameters(rule)
            linear_update(make.real(M, N), make.real(M, K), parameters, states, hyper, 1, rule)
        apply_rule(rule, parameters, parameters, states, row_of(rule), 1)


def trainings(full: bool) -> None:
    """Launches step, epoch, exchange and replicas for one rule, or if full for all rules, also with
    a schedule.
    """
    rules = RULES.values() if full else (RULES["adamw"],)
    for rule, scheduled in itertools.product(rules, (False, True) if full else (False,)):
        run = training(kernels.Spec((36, 20, 10, 4), "sigmoid", rule=rule))
        if scheduled:
            run.hyper = run.hyper.repeat(run.steps, 1)
        kernels.train_epoch(run, programs=1)
        for exchange in ("words", "counter") if full else ("words",):
            kernels.train_epoch(run, exchange=exchange)
        kernels.train_step(kernels.StepState(run))
        kernels.train_replicas(training(run.spec, 3))


def training(spec: kernels.Spec, replicas: int | None = None) -> kernels.Run:
    """A training of 23 samples in batches of 5."""
    make, lead = Make("cpu", torch.float32), () if replicas is None else (replicas,)
    lists = [
        [torch.zeros(*lead, *shape) for shape in spec.shapes]
        for _ in range(1 + len(spec.rule.states))
    ]
    order = torch.arange(23).expand(*lead, 23)
    data, targets = make.real(23, spec.sizes[0]), make.labels(spec.sizes[-1], 23)
    numbers = hyperparameters(spec.rule, replicas=replicas), torch.zeros(1)
    return kernels.Run(spec, lists[0], lists[1:], data, targets, order, 5, *numbers)


def main() -> None:
    """Launches everything and prints launches and refusals as JSON."""
    seen = {"kernels": {}, "refused": [], "together": [], "triton": triton.__version__}
    triton.runtime.driver.set_active(Driver())
    with launch.dry_run(ARCH, PROCESSORS), launch.observe(launched(seen)):
        operations("--full" in sys.argv)
        updates("--full" in sys.argv)
        trainings("--full" in sys.argv)
        seen["descriptors"] = descriptors("--full" in sys.argv)
        parameter, host = torch.ones(4), torch.tensor(0.1)
        stub.driver.stub_on_host(ctypes.c_ulonglong(host.data_ptr()))
        before = len(seen["refused"])
        kernels.sgd([parameter], [parameter], [], host)
        seen["host tensor"] = seen["refused"][before:]
        del seen["refused"][before:]
    seen["launches"], seen["refused by the driver"] = (
        stub.driver.stub_launches(),
        stub.driver.stub_refused(),
    )
    seen["encoded"] = stub.driver.stub_maps()
    json.dump(seen, sys.stdout)


if __name__ == "__main__":
    main()
