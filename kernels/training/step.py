"""A training step in two launches that a CUDA graph can replay. The formulas are in `network`.

    input pass   each program owns rows of w_1. In one reading of w_1, it applies the update of the
                 step before, from its dz_1, and computes this step's y_1.
    head         one program computes layers 2 … L, loss and backward, and updates these layers. It
                 stores dz_1 for the next input pass.

So the update of w_1 is one step behind the others until `flush`.

Everything that changes from step to step is in device memory: the next batch, the rows of the data
whose update is pending, the learning rate, Adam's count. So the same two launches serve every step.

Past the end of the permutation, a step takes no batch and only applies the pending update. A
captured sequence may therefore be longer than the epoch. One step more than there are batches
completes the epoch.
"""

from typing import Any, NamedTuple

import torch

from .. import launch
from ..language import tl, triton
from .layers import Rows, backward_layer, batch_rows, first_tile, numbers_of, results_at, top
from .plan import plan, refuse
from .run import Run, Scratch, step_ref


class Progress(NamedTuple):
    """What a step reads from the step before.

    position: two numbers, the next batch, and how many rows have a pending update of w_1. pending:
    these rows. count: how many steps were taken.
    """

    position: Any
    pending: Any
    count: Any


@triton.jit
def step_input_kernel(
    scratch,  # Scratch
    net,  # Parameters
    samples,  # Samples
    order,  # Order
    progress,  # Progress
    hyper_ptr,  # [columns], or scheduled: [steps, columns]
    NET: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The input pass. Program g does rows g·ROWS … of w_1."""
    offs_n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    t = tl.load(progress.position)
    rows = batch_rows(order, t, NET)
    offs_m = tl.arange(0, NET.block_m)
    pending = tl.load(progress.position + 1)
    before = Rows(
        tl.load(progress.pending + offs_m, mask=offs_m < pending, other=0), offs_m < pending
    )
    numbers = numbers_of(hyper_ptr, t - 1, tl.load(progress.count).to(tl.float32), NET)
    r = tl.full((), 0, tl.int64)
    first_tile(scratch, net, r, samples, rows, before, pending > 0, offs_n, numbers, NET)


@triton.jit
def step_head_kernel(
    results,  # Results
    scratch,  # Scratch
    net,  # Parameters
    samples,  # Samples
    order,  # Order
    progress,  # Progress
    hyper_ptr,  # [columns], or scheduled: [steps, columns]
    NET: tl.constexpr,
):
    """The head: the rest of the step, by one program.

    It moves on to the next batch if this one had any rows.
    """
    L: tl.constexpr = len(NET.sizes) - 1
    r = tl.full((), 0, tl.int64)
    t = tl.load(progress.position)
    count = tl.load(progress.count).to(tl.float32)
    rows = batch_rows(order, t, NET)
    taken = tl.sum(rows.mask.to(tl.int32), axis=0)
    if taken > 0:
        numbers = numbers_of(hyper_ptr, t, count + 1.0, NET)
        top(scratch, results_at(results, t), net, r, samples, rows, numbers, True, NET)
        for j in tl.static_range(L - 1):
            backward_layer(scratch, net, r, numbers, L - j, True, NET)
        tl.store(progress.pending + tl.arange(0, NET.block_m), rows.index)
        tl.store(progress.position, t + 1)
        tl.store(progress.count, count + 1.0)
    tl.store(progress.position + 1, taken)


class StepState:
    """What the two launches of a step read and write, at fixed addresses.

    To start another epoch, call `flush`, write the new permutation into `run.order`, and call
    `position.zero_()`. `run.hyper` and `run.count` may be written at any time.

    run: of one network. ValueError: the kernels do not serve the network (`refusal`).
    """

    def __init__(self, run: Run):
        refuse(run, "graph")
        self.run = run
        self.planned, self.rows, self.input_options = plan(run, "step_input")
        _, _, self.head_options = plan(run, "step_head")
        self.scratch = new_scratch(run, self.planned, 1)
        self.pending = torch.zeros(self.planned.block_m, dtype=torch.int64, device=run.device)
        self.position = torch.zeros(2, dtype=torch.int32, device=run.device)


def new_scratch(run: Run, planned, programs: int) -> Scratch:
    """Scratch for so many programs, see `layers`."""
    shape = (programs, len(run.spec.sizes) - 1, planned.block_m, planned.pitch)
    y, dz = torch.empty((2, *shape), device=run.device)
    # Triton 3.6 cannot return a None in a tuple, so y takes its place, and no kernel reads it.
    z = torch.empty(shape, device=run.device) if planned.keeps_z else y
    return Scratch(y, dz, z)


def train_step_ref(state: StepState, n: int) -> None:
    """The reference of `train_step`. It leaves no update pending."""
    run, t = state.run, int(state.position[0])
    rows = run.order[:n][t * run.batch : (t + 1) * run.batch].long()
    if len(rows):
        run.count += 1
        row, count = run.rows()[t].tolist(), int(run.count)
        losses, correct = run.results()
        losses[t], correct[t] = step_ref(run, rows, row, count)
        state.position[0] += 1


def train_step(state: StepState, *, n: int | None = None) -> None:
    """One step in two launches: the pending update of w_1, then forward and backward of a batch.

    All parameters are updated in place, but w_1 and b_1 only by the next step or `flush`. The step
    writes losses[t] and correct[t] of the run, and moves on to the next batch. Past the end of the
    order it only applies the pending update. n: how many of the order's rows count, None for all.
    Deterministic, without host synchronisation.
    """
    run = state.run
    n = len(run.order) if n is None else n
    if launch.backend(*run.parameters) != "triton":
        return train_step_ref(state, n)
    results, net, samples, order = run.bundles()
    progress = Progress(state.position, state.pending, run.count)
    shared = net, samples, order._replace(n=n), progress, run.hyper
    launch.run(
        step_input_kernel,
        (triton.cdiv(run.spec.sizes[1], state.rows),),
        state.scratch,
        *shared,
        ROWS=state.rows,
        **state.input_options,
    )
    launch.run(step_head_kernel, (1,), results, state.scratch, *shared, **state.head_options)
    launch.changed(run.parameters, *run.states)


def flush(state: StepState) -> None:
    """Applies the pending update of w_1 and b_1, if there is one.

    Call it before weights are read, saved or evaluated. A second call does nothing.
    """
    train_step(state, n=0)
