"""An epoch by several programs that share one network and exchange y_1 once a step.

Program g alone owns some rows of w_1. It computes the columns of y_1 and dz_1 that belong to them.
Layers 2 … L are small, so every program computes all of them on its own copies. All programs get
the same numbers. So only y_1 must be exchanged. Each program publishes its columns of step t + 1.
It then updates w_2, while the others' columns arrive.

There are two ways to exchange:

- `words`: every element is one 64-bit word (step, value). A relaxed atomic exchange stores it at
  once, so a program that reads the step also has the value, without a fence. NCCL's protocol LL
  packs data and flag into one word in the same way.
- `counter`: plain values, then one atomic count of arrivals with release, which the others await
  with acquire. It is slower, but does not rely on 64-bit stores.

Two buffers suffice. A program writes step t + 2 only after all others published t + 1, so they have
finished reading t. A program reads a buffer once, into scratch.

All programs must run at once. A cooperative launch fails if they cannot. The launcher refuses
earlier, with a ValueError.
"""

from typing import Any, NamedTuple

import torch

from .. import configs, launch
from ..configs import padded
from ..language import tl, triton
from .layers import (
    backward_layer,
    backward_tile,
    batch_rows,
    first_act,
    input_tile,
    load_columns,
    numbers_of,
    offsets,
    results_at,
    scratch_of,
    top,
)
from .plan import Plan, plan
from .run import Run
from .step import new_scratch

EXCHANGES = ("words", "counter")


class Box(NamedTuple):
    """The memory through which programs exchange y_1: two buffers, and a count of arrivals."""

    columns: Any  # [2, block_m, pitch] int64 words, or float32
    counter: Any


@triton.jit
def publish(box, y, offs_n, t, NET: tl.constexpr, WORDS: tl.constexpr):
    """Stores columns offs_n of y_1 of step t in the box, for all programs."""
    ptrs = box.columns + (t & 1) * (NET.block_m * NET.pitch) + offsets(1, offs_n, NET)
    mask = (offs_n < NET.sizes[1])[None, :]
    if WORDS:
        tag = tl.full((), 1, tl.int64) + t
        bits = y.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
        tl.atomic_xchg(ptrs, (tag << 32) | bits, mask=mask, sem="relaxed", scope="gpu")
    else:
        tl.store(ptrs, y, mask=mask, cache_modifier=".cg")
        tl.debug_barrier()
        tl.atomic_add(box.counter, 1, sem="release", scope="gpu")


@triton.jit
def receive(y_ptr, box, t, NET: tl.constexpr, PROGRAMS: tl.constexpr, WORDS: tl.constexpr):
    """Waits for all columns of y_1 of step t, and stores them in scratch."""
    box_ptr = box.columns + (t & 1) * (NET.block_m * NET.pitch)
    if not WORDS:
        while tl.atomic_add(box.counter, 0, sem="acquire", scope="gpu") < (t + 1) * PROGRAMS:
            pass
        tl.debug_barrier()
    for n in tl.range(0, NET.sizes[1], NET.tiles[1], num_stages=1):
        offs_n = n + tl.arange(0, NET.tiles[1])
        offs = offsets(1, offs_n, NET)
        mask = (offs_n < NET.sizes[1])[None, :]
        if WORDS:
            tag = tl.full((), 1, tl.int64) + t
            word = tl.load(box_ptr + offs, mask=mask, other=tag << 32, volatile=True)
            while tl.max(tl.max(((word >> 32) != tag).to(tl.int32), 1), 0) != 0:
                word = tl.load(box_ptr + offs, mask=mask, other=tag << 32, volatile=True)
            y = word.to(tl.int32).to(tl.float32, bitcast=True)
        else:
            y = tl.load(box_ptr + offs, mask=mask, other=0.0, cache_modifier=".cg")
        tl.store(y_ptr + offs, y)
    tl.debug_barrier()


@triton.jit
def own_dz(scratch, net, g, y, z, own, numbers, NET: tl.constexpr):
    """Columns `own` of dz_1. y and z are those columns of layer 1.

    They are computed from dz_2 and w_2 before its update. If layer 1 is the last, `top` has stored
    them already.
    """
    if len(NET.sizes) == 2:
        dz = load_columns(scratch.dz, 1, own, NET)
    else:
        dy = backward_tile(scratch.dz, net, g, y, own, numbers, 2, True, False, NET)
        if NET.keeps_z:
            dz = NET.act_bwd(dy, z)
        else:
            dz = NET.act_bwd(dy, y)
    return dz


@triton.jit
def exchange_kernel(
    results,  # Results
    net,  # Parameters; layers 2 … L have a copy for each program
    scratch,  # Scratch
    box,  # Box
    samples,  # Samples
    order,  # Order
    hyper_ptr,  # [columns], or scheduled: [steps, columns]
    count_ptr,
    first,
    NET: tl.constexpr,
    ROWS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    WORDS: tl.constexpr,
):
    """Program g = first + program_id of PROGRAMS owns rows g·ROWS … of w_1.

    It also owns copy g of layers 2 … L.

    Step t: receive y_1. Then forward through layers 2 … L, loss, and backward up to the update of
    w_3. Then compute the own columns of dz_1, before w_2 changes.

    The beginning of step t + 1: update the own rows of w_1 and compute the own columns of y_1 in
    one reading. Publish them. Then update w_2.
    """
    L: tl.constexpr = len(NET.sizes) - 1
    M: tl.constexpr = NET.block_m
    g = (tl.program_id(0) + first).to(tl.int64)
    own = (tl.program_id(0) + first) * ROWS + tl.arange(0, ROWS)
    scratch = scratch_of(scratch, g, NET)
    steps = tl.cdiv(order.n, order.batch)
    count = tl.load(count_ptr).to(tl.float32)
    dz = tl.zeros((M, ROWS), dtype=tl.float32)
    # A deeper pipeline would load ahead of the exchange.
    for t in tl.range(0, steps + 1, num_stages=1, disable_licm=True):
        before = batch_rows(order, t - 1, NET)
        rows = batch_rows(order, t, NET)
        numbers = numbers_of(hyper_ptr, t - 1, count + t, NET)
        z = input_tile(net, g * 0, samples, rows, before, dz, t > 0, own, numbers, NET)
        y = first_act(z, NET)
        if t < steps:
            publish(box, y, own, t, NET, WORDS)
        tl.debug_barrier()
        if L > 1 and t > 0:
            backward_layer(scratch, net, g, numbers, 2, False, NET)
        if t < steps:
            numbers = numbers_of(hyper_ptr, t, count + t + 1, NET)
            receive(scratch.y, box, t, NET, PROGRAMS, WORDS)
            top(scratch, results_at(results, t), net, g, samples, rows, numbers, g == 0, NET)
            for j in tl.static_range(L - 2):
                backward_layer(scratch, net, g, numbers, L - j, True, NET)
            dz = own_dz(scratch, net, g, y, z, own, numbers, NET)


def spills(run: Run) -> bool:
    """True if programs that share this network would spill registers, see `configs`."""
    return padded(run.batch) > most_rows(run)


def most_rows(run: Run) -> int:
    """The most rows of a batch for programs that share this network, see `configs`."""
    return configs.most_shared(launch.arch(run.device), launch.dot_precision())


def check_programs(run: Run, rows: int, programs: int | None, exchange: str) -> int:
    """How many programs share w_1: one for each block of so many rows.

    ValueError, which names both values: an unknown exchange, a number of programs that does not
    fit, or more programs than the device runs at once.
    """
    device, needed = run.device, triton.cdiv(run.spec.sizes[1], rows)
    most = launch.sm_count(device)
    if exchange not in EXCHANGES:
        raise ValueError(f"epoch: exchange must be one of {', '.join(EXCHANGES)}, got {exchange!r}")
    if exchange == "words" and launch.arch(device).startswith("gfx"):
        # Triton 3.6 to 3.9 turn the volatile load into a plain buffer load there. It may read an
        # old word again and again.
        raise ValueError(
            "epoch: exchange 'words' would wait for ever on AMD; pass programs=1, or "
            "exchange='counter'"
        )
    if programs not in (None, needed):
        raise ValueError(
            f"epoch: programs must be {needed} ({rows} rows of w_1 for each) or 1, got {programs}"
        )
    if spills(run):
        raise ValueError(
            "epoch: programs that share a network spill registers at a batch of "
            f"{run.batch}, more than {most_rows(run)}; pass programs=1"
        )
    if needed > most:
        raise ValueError(
            f"epoch: {needed} programs must run at once, but {device} runs {most}; pass programs=1"
        )
    return needed


def prepare(run: Run, planned: Plan, programs: int, exchange: str) -> tuple[tuple, list]:
    """(the kernel's arguments before `first`, [(tensor, copies)]).

    The copies (programs, …) of layers 2 … L belong to the programs.
    """
    results, net, samples, order = run.bundles()
    shared = 1 + run.spec.bias  # parameters of layer 1
    lists: list = []
    copied: list = []
    for tensors in (net.tensors, *net.states):
        copies = [
            t.new_empty((programs, *t.shape)).copy_(t.expand(programs, *t.shape))
            for t in tensors[shared:]
        ]
        lists.append((*tensors[:shared], *copies))
        copied += zip(tensors[shared:], copies)
    net = net._replace(tensors=lists[0], states=tuple(lists[1:]))
    kind = torch.int64 if exchange == "words" else torch.float32
    columns = torch.zeros((2, planned.block_m, planned.pitch), dtype=kind, device=run.device)
    box = Box(columns, torch.zeros(1, dtype=torch.int32, device=run.device))
    scratch = new_scratch(run, planned, programs)
    return (results, net, scratch, box, samples, order, run.hyper, run.count), copied


def train_programs(run: Run, programs: int | None = None, exchange: str = "words") -> None:
    """`train_epoch` by as many programs as own the rows of w_1. The caller has called `refuse`.

    Memory traffic of a step: all programs together read and write w_1 once. y_1 goes once through
    the L2 cache. Layers 2 … L stay in each processor's own cache. Their copies are made before the
    launch, and the first program's copies are written back after it.
    """
    planned, rows, options = plan(run, "exchange")
    programs = check_programs(run, rows, programs, exchange)
    args, copied = prepare(run, planned, programs, exchange)
    launch.run(
        exchange_kernel,
        (programs,),
        *args,
        0,
        ROWS=rows,
        PROGRAMS=programs,
        WORDS=exchange == "words",
        launch_cooperative_grid=True,
        **options,
    )
    for tensor, copies in copied:
        tensor.copy_(copies[0])
    launch.changed(run.parameters, *run.states)
    run.count += run.steps
