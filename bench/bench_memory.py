"""Peak memory of a training step of wide layers: the manual API, the engines and the autograd
modules, against eager PyTorch.

On a GPU the figures come from its allocator. Without one, the bytes of living meta tensors are
counted, as an sm_90 would run the step. The losses are then compared on a smaller network.
"""

import gc
from functools import partial
from itertools import pairwise

import torch

import mlp
from kernels import launch
from mlp import engines

from . import harness
from .live import Live
from .table import Table, device, one_line

SIZES, BATCH, DTYPE = (4096,) * 5, 8192, torch.bfloat16
_SMALLER = 16  # the network that is compared on a CPU is so many times smaller
_AS = "sm_90", 132  # architecture and processors for the count on a CPU
_TOLERANCE = 2e-2  # how far losses may differ, as bfloat16 rounds to 3 digits


def _weights(sizes, on):
    if torch.device(on).type == "meta":
        return [
            torch.empty(s, device=on, dtype=DTYPE) for k, n in pairwise(sizes) for s in ((n, k), n)
        ]
    g = torch.Generator().manual_seed(0)

    def draw(fan_in, *shape):
        return (torch.rand(shape, generator=g) * 2 - 1).mul_(fan_in**-0.5).to(on, DTYPE)

    return [p for k, n in pairwise(sizes) for p in (draw(k, n, k), draw(k, n))]


def _start(parameters, sizes, on):
    with torch.no_grad():
        for p, value in zip(parameters, _weights(sizes, on)):
            p.copy_(value)


def eager(sizes, on):
    """A step of nn.Sequential, cross_entropy and torch.optim.SGD."""
    modules = [
        m
        for k, n in pairwise(sizes)
        for m in (torch.nn.Linear(k, n, device=on, dtype=DTYPE), torch.nn.ReLU())
    ]
    return _taped(
        torch.nn.Sequential(*modules[:-1]),
        torch.nn.functional.cross_entropy,
        torch.optim.SGD,
        sizes,
        on,
    )


def autograd(sizes, on):
    """The same by mlp's modules and autograd."""
    return _taped(
        mlp.MLP(sizes, device=on, dtype=DTYPE), mlp.CrossEntropyLoss(), mlp.SGD, sizes, on
    )


def _taped(model, loss, optimizer, sizes, on):
    _start(model.parameters(), sizes, on)
    optimizer = optimizer(model.parameters(), lr=0.01)

    def step(x, y):
        optimizer.zero_grad()  # first, so that the forward can use the gradients' memory
        value = loss(model(x), y)
        value.backward()
        optimizer.step()
        return value.detach()

    return step


def manual(sizes, on):
    """The same by mlp.Net, with permanent buffers and without a graph."""
    net, loss = mlp.Net(sizes, device=on, dtype=DTYPE), mlp.SoftmaxCrossEntropy()
    _start(net.parameters.values(), sizes, on)
    optimizer = mlp.SGD(net.parameters.values(), lr=0.01)

    @torch.no_grad()
    def step(x, y):
        value = loss.forward(net.forward(x), y)
        net.backward(loss.backward())
        optimizer.step(grads=net.grads)
        return value

    return step


def engine(kind, sizes, on):
    """The same by an engine, which may update weights during the backward pass."""
    net = mlp.Net(sizes, device=on, dtype=DTYPE)
    _start(net.parameters.values(), sizes, on)
    trainer = kind(net, mlp.SoftmaxCrossEntropy(), mlp.SGD(net.parameters.values(), lr=0.01))

    @torch.no_grad()
    def step(x, y):
        return trainer.step(x, y)[1].detach().clone()

    return step


PROVIDERS = {
    "eager": eager,
    "autograd": autograd,
    "manual": manual,
    "engine manual": partial(engine, engines.Manual),
    "engine lean": partial(engine, engines.Lean),
}


def _data(sizes, batch, on):
    if on == "meta":
        return torch.empty(batch, sizes[0], device=on, dtype=DTYPE), torch.empty(
            batch, device=on, dtype=torch.int64
        )
    x = torch.randn(batch, sizes[0], generator=torch.Generator().manual_seed(1)).to(on, DTYPE)
    y = torch.randint(0, sizes[-1], (batch,), generator=torch.Generator().manual_seed(2)).to(on)
    return x, y


def counted(make, sizes, batch) -> int:
    """Bytes of a second step without the data, counted from meta tensors as an sm_90 runs it."""
    gc.collect()
    x, y = _data(sizes, batch, "meta")
    live = Live()
    live.leave_out(x, y)
    # Python does not call eager's backward, so its operators are counted. It calls ours.
    following = live.operations() if make is eager else live.calls()
    with launch.dry_run(*_AS), following:
        step = make(sizes, "meta")
        step(x, y)
        live.peak = live.now
        step(x, y)
    return live.peak


def losses(make) -> list[float]:
    """The losses of two steps of a smaller network, on a CPU."""
    sizes, batch = tuple(size // _SMALLER for size in SIZES), BATCH // _SMALLER
    (x, y), step = _data(sizes, batch, "cpu"), make(sizes, "cpu")
    return [float(step(x, y)), float(step(x, y))]


def _without_gpu(make) -> dict:
    """The same keys as `measured`: losses of a smaller network, counted bytes of the whole one."""
    return {"losses": losses(make), "peak": counted(make, SIZES, BATCH), "seconds": None}


def measured(make, sizes, batch, on) -> dict:
    """Losses of two steps, peak bytes of the second, and seconds of a step.

    The peak leaves out the memory that was allocated before the network.
    """
    gc.collect()
    x, y = _data(sizes, batch, on)
    before = torch.cuda.memory_allocated()
    step = make(sizes, on)
    losses = [float(step(x, y))]
    torch.cuda.reset_peak_memory_stats()
    losses.append(float(step(x, y)))
    peak = torch.cuda.max_memory_allocated() - before
    return {
        "losses": losses,
        "peak": peak,
        "seconds": harness.measure({"": partial(step, x, y)}, rounds=5)[""],
    }


def run() -> Table:
    """MiB of a step: weights, gradients, tensors kept for the backward pass, and scratch. The data
    are not counted.
    """
    on = device()
    on_gpu = on.type == "cuda"
    title = (
        f"Peak memory of a training step, {'-'.join(map(str, SIZES))} relu, batch {BATCH}, "
        f"{str(DTYPE)[6:]}, SGD"
    )
    table = Table(title, "python -m bench memory", note=__doc__ or "")
    if on_gpu:
        measured(eager, SIZES, 16, on)  # so that libraries allocate before the first network
    found = {}
    for name, make in PROVIDERS.items():
        row = {"network": name, "peak MiB": None, "of eager": None, "ms a step": None}
        table.rows.append(row)
        try:
            found[name] = measured(make, SIZES, BATCH, on) if on_gpu else _without_gpu(make)
            error = max(
                abs(a / b - 1) for a, b in zip(found[name]["losses"], found["eager"]["losses"])
            )
            if not error <= _TOLERANCE:
                raise ArithmeticError(
                    f"losses differ from eager's by {error:.1e}, at most {_TOLERANCE:.0e}"
                )
        except Exception as error:  # out of memory or wrong; the others are still measured
            row["why not"] = one_line(error)
            table.failed = table.failed or f"{name}: {row['why not']}"
            continue
        of_eager = found[name]["peak"] / found["eager"]["peak"]
        row |= {
            "peak MiB": found[name]["peak"] / 2**20,
            "of eager": of_eager,
            "ms a step": found[name]["seconds"] and found[name]["seconds"] * 1e3,
        }
    table.headline = ", ".join(
        f"{row['network']} {row['of eager']:.2f} of eager"
        for row in table.rows[1:]
        if row["of eager"]
    )
    return table
