"""Kernel launches and bytes of global memory a training step, counted without a GPU.

Our kernels run in Triton's interpreter. Launches are the calls of `launch.run`. Bytes are those
that the interpreter's loads and stores pass through their masks, without the savings of a GPU's
caches. For eager PyTorch, launches are the operations that its dispatcher sees, except views, and
bytes are those of their inputs and outputs.
"""

import json
import os
import subprocess
import sys
from functools import partial

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import kernels
import mlp
from kernels import launch
from mlp import engines

from .rivals import BATCH, SIZES, Eager, weights
from .table import Table

STEPS = 2
_VIEWS = (
    "view",
    "t",
    "transpose",
    "detach",
    "expand",
    "unsqueeze",
    "squeeze",
    "slice",
    "select",
    "alias",
    "_unsafe_view",
    "as_strided",
    "permute",
    "split",
    "empty",
    "empty_like",
    "new_empty",
)


class Operations(TorchDispatchMode):
    """Counts operations that would launch a kernel, and the bytes of their tensors."""

    def __init__(self):
        super().__init__()
        self.launches = self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func._schema.name.split("::")[1] not in _VIEWS:
            self.launches += 1
            tensors = [
                t for t in tree_leaves((args, kwargs, result)) if isinstance(t, torch.Tensor)
            ]
            self.bytes += sum(t.nbytes for t in tensors)
        return result


class Accesses:
    """While open, counts launches of our kernels and the bytes of their masked loads and stores."""

    def __enter__(self):
        self.launches = self.bytes = 0
        self.builder = triton.runtime.interpreter.interpreter_builder
        self.kept = {
            name: getattr(self.builder, name)
            for name in ("create_masked_load", "create_masked_store")
        }
        load, store = self.kept.values()

        def counted_load(ptrs, mask, *rest, **options):
            value = load(ptrs, mask, *rest, **options)
            self.bytes += int(mask.data.sum()) * value.data.itemsize
            return value

        def counted_store(ptrs, value, mask, *rest, **options):
            self.bytes += int(mask.data.sum()) * value.data.itemsize
            return store(ptrs, value, mask, *rest, **options)

        self.builder.create_masked_load, self.builder.create_masked_store = (
            counted_load,
            counted_store,
        )
        self.context = launch.observe(self._launched)
        self.context.__enter__()
        return self

    def _launched(self, kernel, grid, args, options):
        self.launches += 1

    def __exit__(self, *error):
        for name, function in self.kept.items():
            setattr(self.builder, name, function)
        self.context.__exit__(*error)


def _samples() -> tuple:
    pixels = torch.randint(0, 256, (BATCH * STEPS, SIZES[0]), dtype=torch.uint8)
    data = mlp.Dataset(
        pixels, torch.randint(0, 10, (len(pixels),)), tuple("0123456789"), scale=1 / 255
    )
    return data, torch.arange(len(pixels))


def _eager() -> dict:
    x, y = torch.rand(BATCH, SIZES[0]), torch.randint(0, 10, (BATCH,))
    eager = Eager(weights("cpu"), partial(torch.optim.SGD, lr=0.1, foreach=True), data=None)
    eager.step(x, y)
    with Operations() as counted:
        eager.step(x, y)
    return {
        "engine": "eager",
        "launches a step": counted.launches,
        "kB a step": counted.bytes / 1e3,
    }


def _engine(name: str) -> dict:
    """One engine's row. For autograd and manual, torch reads the batch, which is not counted."""
    data, order = _samples()
    model = mlp.MLP(SIZES, activation="sigmoid")
    engine = engines.ENGINES[name](
        model, mlp.SoftmaxCrossEntropy(), mlp.SGD(model.parameters(), lr=0.1)
    )
    with Accesses() as counted:
        engine.epoch(data, order, BATCH)
    per_step = f"1/{STEPS}" if counted.launches == 1 else counted.launches / STEPS
    return {"engine": name, "launches a step": per_step, "kB a step": counted.bytes / STEPS / 1e3}


def _two_launches() -> dict:
    """The row of the step kernels, two launches a step, which `graph` captures and replays."""
    data, order = _samples()
    model = mlp.MLP(SIZES, activation="sigmoid")
    spec = kernels.Spec(SIZES, "sigmoid")
    parameters = [p.detach() for p in model.parameters()]
    run = kernels.Run(
        spec,
        parameters,
        [],
        data.inputs,
        data.targets,
        order,
        BATCH,
        kernels.hyperparameters(lr=0.1),
        torch.zeros(1),
        scale=1 / 255,
    )
    state = kernels.StepState(run)
    with Accesses() as counted:
        for _ in range(STEPS):
            kernels.train_step(state)
    return {
        "engine": "graph (step kernels)",
        "launches a step": counted.launches / STEPS,
        "kB a step": counted.bytes / STEPS / 1e3,
    }


def run() -> Table:
    """Launches and kilobytes a step of 784-100-50-10, batch 32, plain SGD."""
    if not launch.INTERPRETED:  # only a new process can import jit functions as interpreted
        script = "import json, bench.bench_launches as b; print(json.dumps(b.run().rows))"
        environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONWARNINGS": "ignore"}
        done = subprocess.run(
            [sys.executable, "-c", script],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        rows = json.loads(done.stdout.splitlines()[-1])
    else:
        rows = [_eager(), _engine("autograd"), _engine("manual"), _two_launches(), _engine("epoch")]
    title = f"Launches and memory, {'-'.join(map(str, SIZES))} sigmoid, batch {BATCH}, SGD"
    table = Table(title, "python -m bench launches", rows)
    table.note = f"`epoch` is one launch for an epoch of any length, here of {STEPS} steps."
    table.headline = (
        ", ".join(f"{row['engine']} {row['launches a step']:g}" for row in rows[:-1])
        + " launches a step"
    )
    return table
