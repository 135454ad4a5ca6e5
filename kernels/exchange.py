"""An epoch by several programs that share one network and exchange y_1 once a step.

Program g owns rows of w_1, which nobody else touches, and computes their columns of y_1 and of
dz_1. Layers 2 … L are small: every program computes them, on copies of its own, and all come to the
same numbers. So what has to travel is y_1: each program publishes its columns of step t + 1, then
updates w_2 while the others' columns are on their way.

`words`: every element is one 64-bit word (step, value), stored at once, so that a reader who sees
the step has the value: no fence, no atomics. Two buffers by the step's parity: who writes step t +
2 has received t + 1 from everyone, and they published that after they had read t. A buffer is read
once, into scratch; after publishing, it may be overwritten. `counter`: plain values, then one
atomic count of arrivals with release, awaited with acquire. Slower, but it assumes nothing of
64-bit stores.

All programs must run at once: a cooperative launch fails where they cannot, and the launcher has
refused before.
"""

import torch
import triton
import triton.language as tl

from . import launch
from .layers import (
    backward_layer,
    backward_tile,
    batch_rows,
    first_act,
    input_tile,
    load_columns,
    scratch,
    top,
)
from .network import Spec, plan
from .optim import Parameters, numbers_at

EXCHANGES = ("words", "counter")


@triton.jit
def publish(box_ptr, counter_ptr, y, offs_n, t, NET: tl.constexpr, WORDS: tl.constexpr):
    """Put columns offs_n of y_1 of step t where every program finds them."""
    box_ptr += (t & 1) * (NET.block_m * NET.pitch)
    mask = (offs_n < NET.sizes[1])[None, :]
    if WORDS:
        tag = tl.full((), 1, tl.int64) + t
        bits = y.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
        tl.store(
            box_ptr + scratch(1, offs_n, NET), (tag << 32) | bits, mask=mask, cache_modifier=".cg"
        )
    else:
        tl.store(box_ptr + scratch(1, offs_n, NET), y, mask=mask, cache_modifier=".cg")
        tl.debug_barrier()
        tl.atomic_add(counter_ptr, 1, sem="release", scope="gpu")


@triton.jit
def receive(
    y_ptr, box_ptr, counter_ptr, t, PROGRAMS: tl.constexpr, NET: tl.constexpr, WORDS: tl.constexpr
):
    """Wait for all columns of y_1 of step t and keep them in scratch."""
    box_ptr += (t & 1) * (NET.block_m * NET.pitch)
    if not WORDS:
        while tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu") < (t + 1) * PROGRAMS:
            pass
        tl.debug_barrier()
    for n in tl.range(0, NET.sizes[1], NET.tiles[1], num_stages=1):
        offs_n = n + tl.arange(0, NET.tiles[1])
        offs = scratch(1, offs_n, NET)
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
def own_dz(dz_ptr, net, g, y, own, numbers, ACT_BWD: tl.constexpr, NET: tl.constexpr):
    """Columns `own` of dz_1, y being those of y_1: from dz_2 through w_2 as it is, or the loss's
    where layer 1 is the last.
    """
    if len(NET.sizes) == 2:
        return load_columns(dz_ptr, 1, own, NET)
    else:
        return ACT_BWD(backward_tile(dz_ptr, net, g, y, own, numbers, 2, True, False, NET), y)


@triton.jit
def exchange_kernel(
    loss_ptr,
    correct_ptr,
    net,
    y_ptr,
    dz_ptr,
    box_ptr,
    counter_ptr,
    x_ptr,
    t_ptr,
    i_ptr,
    hyper_ptr,
    count_ptr,
    n,
    batch,
    scale,
    shift,
    first,
    ACT: tl.constexpr,
    ACT_BWD: tl.constexpr,
    OUT: tl.constexpr,
    OUT_BWD: tl.constexpr,
    NET: tl.constexpr,
    ROWS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    WORDS: tl.constexpr,
):
    """Program g = first + program_id of PROGRAMS: rows g·ROWS … of w_1, and copy g of everything of
    layers 2 … L.

    Step t: receive y_1; layers 2 … L forward, loss, backward to w_3's update; own columns of dz_1,
    before w_2 changes. Then, as the beginning of step t + 1: update own rows of w_1 and compute own
    columns of y_1; publish; update w_2.
    """
    L: tl.constexpr = len(NET.sizes) - 1
    g = (tl.program_id(0) + first).to(tl.int64)
    own = (tl.program_id(0) + first) * ROWS + tl.arange(0, ROWS)
    y_ptr += g * (L * NET.block_m * NET.pitch)
    dz_ptr += g * (L * NET.block_m * NET.pitch)
    steps = tl.cdiv(n, batch)
    count = tl.load(count_ptr).to(tl.float32)
    M: tl.constexpr = NET.block_m
    dz = tl.zeros((M, ROWS), dtype=tl.float32)
    for t in tl.range(
        0, steps + 1, num_stages=1, disable_licm=True
    ):  # a deeper pipeline would load ahead of the exchange
        rows_before, mask_before = batch_rows(i_ptr, t - 1, n, batch, NET)
        rows, mask_m = batch_rows(i_ptr, t, n, batch, NET)
        numbers = numbers_at(hyper_ptr, count + t, NET)
        z = input_tile(
            net,
            g * 0,
            x_ptr,
            rows,
            mask_m,
            rows_before,
            mask_before,
            dz,
            t > 0,
            own,
            numbers,
            scale,
            shift,
            NET,
        )
        y = first_act(z, ACT, OUT, NET)
        if t < steps:
            publish(box_ptr, counter_ptr, y, own, t, NET, WORDS)
        tl.debug_barrier()
        if L > 1 and t > 0:
            backward_layer(y_ptr, dz_ptr, net, g, numbers, 2, False, ACT_BWD, NET)
        if t < steps:
            numbers = numbers_at(hyper_ptr, count + t + 1, NET)
            receive(y_ptr, box_ptr, counter_ptr, t, PROGRAMS, NET, WORDS)
            top(
                y_ptr,
                dz_ptr,
                loss_ptr + t,
                correct_ptr + t,
                net,
                g,
                t_ptr,
                rows,
                mask_m,
                numbers,
                g == 0,
                ACT,
                OUT,
                OUT_BWD,
                NET,
            )
            for j in tl.static_range(L - 2):
                backward_layer(y_ptr, dz_ptr, net, g, numbers, L - j, True, ACT_BWD, NET)
            dz = own_dz(dz_ptr, net, g, y, own, numbers, ACT_BWD, NET)


def check_programs(spec: Spec, rows: int, programs: int | None, exchange: str, device) -> int:
    """How many programs share w_1, if the device runs that many at once; else a ValueError that
    names both.
    """
    needed, most = triton.cdiv(spec.sizes[1], rows), launch.sm_count(device)
    if exchange not in EXCHANGES:
        raise ValueError(f"epoch: exchange must be one of {', '.join(EXCHANGES)}, got {exchange!r}")
    if exchange == "words" and launch.arch(device).startswith("gfx"):
        # Triton 3.6 to 3.9 turn the volatile load into a plain buffer load there, which may go on
        # seeing an old word.
        raise ValueError(
            "epoch: exchange 'words' would wait for ever on AMD; pass programs=1, or "
            "exchange='counter'"
        )
    if programs not in (None, needed):
        raise ValueError(
            f"epoch: {rows} rows of w_1 a program make {needed} programs, or 1; got {programs}"
        )
    if needed > most:
        raise ValueError(
            f"epoch: {needed} programs must run at once, but {device} runs {most}; pass programs=1"
        )
    return needed


def prepare(
    spec: Spec,
    parameters,
    states,
    data,
    targets,
    indices,
    batch,
    hyper,
    count,
    scale,
    shift,
    losses,
    correct,
    programs,
    rows,
    exchange,
    made,
):
    """The kernel's arguments before `first`, with the programs' own copies of layers 2 … L: (args,
    [(tensor, copies)]).
    """
    shared = 1 + spec.bias  # parameters of layer 1
    lists, copied = [], []
    for tensors in (parameters, *states):
        copies = [
            t.new_empty((programs, *t.shape)).copy_(t.expand(programs, *t.shape))
            for t in tensors[shared:]
        ]
        lists.append((*tensors[:shared], *copies))
        copied += zip(tensors[shared:], copies)
    y, dz = torch.empty(
        (2, programs, len(spec.sizes) - 1, made.block_m, made.pitch), device=data.device
    )
    words = exchange == "words"
    box = torch.zeros(
        (2, made.block_m, made.pitch),
        dtype=torch.int64 if words else torch.float32,
        device=data.device,
    )
    counter = torch.zeros(1, dtype=torch.int32, device=data.device)
    args = (
        losses,
        correct,
        Parameters(lists[0], tuple(lists[1:])),
        y,
        dz,
        box,
        counter,
        data,
        targets,
        indices,
        hyper,
        count,
        len(indices),
        batch,
        float(scale),
        float(shift),
    )
    return args, copied


def train_programs(
    spec: Spec,
    parameters,
    states,
    data,
    targets,
    indices,
    batch,
    hyper,
    count,
    scale,
    shift,
    losses,
    correct,
    programs=None,
    exchange="words",
) -> None:
    """`train_epoch` by as many programs as own the rows of w_1; arguments as checked there.

    Memory a step: w_1 read and written once, by all programs together; (L - 1) small layers in each
    one's own cache; y_1 once through L2. Copies of layers 2 … L are made before the launch and the
    first one's brought back after it.
    """
    made, rows, options = plan(spec, batch, targets, "exchange")
    programs = check_programs(spec, rows, programs, exchange, targets.device)
    args, copied = prepare(
        spec,
        parameters,
        states,
        data,
        targets,
        indices,
        batch,
        hyper,
        count,
        scale,
        shift,
        losses,
        correct,
        programs,
        rows,
        exchange,
        made,
    )
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
    count += len(losses)
