"""A whole epoch of training in one launch: forward, loss, backward and update of every step.

The formulas are in `network`.

There are two kernels. In `epoch_kernel`, each program trains one network alone, so one launch
trains as many networks as it has programs (`train_replicas` in `replicas`). In `exchange_kernel`
(see `exchange`), programs share one network, and each owns rows of w_1.

In both, one reading of w_1 serves the update of step t and the forward of step t + 1. w_1 is most
of the network. Everything else stays in the processor's own cache.

The loop has one turn more than there are steps. Its first layer only applies the last update.
"""

import torch

from .. import launch
from ..language import tl, triton
from .exchange import spills, train_programs
from .layers import (
    backward_layer,
    batch_rows,
    first_tile,
    numbers_of,
    results_at,
    scratch_of,
    top,
)
from .plan import plan, refuse
from .run import Order, Run, step_ref
from .step import new_scratch


def train_epoch_ref(run: Run) -> tuple[torch.Tensor, torch.Tensor]:
    """The reference of `train_epoch`: a loop over the steps, by the operations' references."""
    numbers, step = run.rows().tolist(), int(run.count)
    losses, correct = run.results()
    for t, rows in enumerate(run.order.long().split(run.batch)):
        losses[t], correct[t] = step_ref(run, rows, numbers[t], step + t + 1)
    run.count += run.steps
    return run.results()


@triton.jit
def epoch_kernel(
    results,  # Results [networks, steps]
    net,  # Parameters, [networks, …] each
    scratch,  # Scratch
    samples,  # Samples
    order,  # Order [networks, n]
    hyper_ptr,  # [networks, columns], or scheduled: [networks, steps, columns]
    count_ptr,
    NET: tl.constexpr,
):
    """Program r trains network r on the n rows of its permutation.

    Data, targets and count are shared. Everything else is stacked, network after network.
    """
    L: tl.constexpr = len(NET.sizes) - 1
    r = tl.program_id(0).to(tl.int64)
    steps = tl.cdiv(order.n, order.batch)
    results = results_at(results, r * steps)
    scratch = scratch_of(scratch, r, NET)
    order = Order(order.indices + r * order.n, order.n, order.batch)
    hyper_ptr += r * len(NET.columns) * (steps if NET.scheduled else 1)
    count = tl.load(count_ptr).to(tl.float32)
    # A deeper pipeline would load across the barriers.
    for t in tl.range(0, steps + 1, num_stages=1, disable_licm=True):
        before = batch_rows(order, t - 1, NET)
        rows = batch_rows(order, t, NET)
        numbers = numbers_of(hyper_ptr, t - 1, count + t, NET)
        for k in tl.range(0, NET.sizes[1], NET.tiles[1], num_stages=1):
            offs_n = k + tl.arange(0, NET.tiles[1])
            first_tile(scratch, net, r, samples, rows, before, t > 0, offs_n, numbers, NET)
        tl.debug_barrier()
        if t < steps:
            numbers = numbers_of(hyper_ptr, t, count + t + 1, NET)
            top(scratch, results_at(results, t), net, r, samples, rows, numbers, True, NET)
            for j in tl.static_range(L - 1):
                backward_layer(scratch, net, r, numbers, L - j, True, NET)


def run_epoch_kernel(run: Run) -> None:
    """Launches `epoch_kernel` for the networks of a run, and advances the run's count."""
    planned, _, options = plan(run, "epoch")
    results, net, samples, order = run.bundles()
    scratch = new_scratch(run, planned, run.replicas)
    numbers = run.hyper, run.count
    launch.run(
        epoch_kernel, (run.replicas,), results, net, scratch, samples, order, *numbers, **options
    )
    launch.changed(run.parameters, *run.states)
    run.count += run.steps


def train_epoch(
    run: Run, *, programs: int | None = None, exchange: str = "words"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Trains one network in place on the batches of one permutation. Returns (losses, correct).

    Both are the run's buffers, (steps,): the loss of each step, and its number of correct
    predictions. The run's count is advanced by the number of steps.

    programs: how many share the work. It is 1, or the number of programs that own all rows of w_1.
    None takes the second if the device can run them (`shareable`). exchange: how they exchange y_1,
    "words" or "counter" (see the module `exchange`). One launch. Sums have a fixed order, so it is
    deterministic with both exchanges. ValueError: a limit of `refusal` is exceeded, a number of
    programs that does not fit, or more programs than the device runs at once.
    """
    refuse(run, "epoch")
    if launch.backend(*run.parameters) != "triton":
        return train_epoch_ref(run)
    if programs == 1 or (programs is None and not shareable(run)):
        run_epoch_kernel(run)
    else:
        train_programs(run, programs, exchange)
    return run.results()


def shareable(run: Run) -> bool:
    """True if several programs may share this run's network.

    The device must run all of them at once, without spilling. It must be an NVIDIA GPU, because the
    exchange by words does not work on others.
    """
    rows = plan(run, "exchange")[1]
    nvidia = launch.arch(run.device).startswith("sm_")
    if spills(run):
        return False
    return nvidia and 1 < triton.cdiv(run.spec.sizes[1], rows) <= launch.sm_count(run.device)
