"""A whole epoch of training in one launch: forward, loss, backward and update of every step,
formulas in `network`.

Two kernels. `epoch_kernel`: one program trains one network alone, so that one launch trains as many
networks as it has programs (`train_replicas` in `replicas`). `exchange_kernel` in `exchange`:
programs share one network, each owns rows of w_1. In both, the update of w_1 by step t and the
forward of step t + 1 share one reading of it: w_1 is most of the network, and nothing else is read
from beyond the processor's own cache.

The loop runs to step n + 1, whose first layer only applies the last update.
"""

import torch
import triton
import triton.language as tl

from . import launch
from .exchange import train_programs
from .layers import backward_layer, batch_rows, first_tile, top
from .network import Spec, check_training, inputs_ref, plan, step_ref, steps_of
from .optim import Parameters, numbers_at


def train_epoch_ref(
    spec: Spec,
    parameters,
    states,
    data,
    targets,
    indices,
    batch,
    hyper,
    count,
    *,
    scale=1.0,
    shift=0.0,
    losses=None,
    correct=None,
):
    """The reference of `train_epoch`: a loop of the operations' references."""
    losses, correct = results(
        data, steps_of(len(indices), batch), losses, correct, parameters[0].dtype
    )
    numbers, step = hyper.tolist(), int(count)
    for t, rows in enumerate(indices.long().split(batch)):
        x = inputs_ref(data, rows, scale, shift, parameters[0].dtype)
        losses[t], correct[t] = step_ref(
            spec, parameters, states, x, targets[rows], numbers, step + t + 1
        )
    count += len(losses)
    return losses, correct


def results(data, steps, losses, correct, dtype=torch.float32):
    """The buffers given, or new ones, for every step's loss and number of correct predictions.
    steps: an int or a shape.
    """
    shape = (steps,) if isinstance(steps, int) else steps
    for name, given in (("losses", losses), ("correct", correct)):
        if given is not None and (tuple(given.shape) != shape or not given.is_contiguous()):
            raise ValueError(
                f"epoch: {name} must be contiguous {shape}, one for each step, got "
                f"{tuple(given.shape)}"
            )
    losses = torch.empty(shape, dtype=dtype, device=data.device) if losses is None else losses
    return losses, torch.empty(
        shape, dtype=torch.int32, device=data.device
    ) if correct is None else correct


@triton.jit
def epoch_kernel(
    loss_ptr,
    correct_ptr,
    net,
    y_ptr,
    dz_ptr,
    x_ptr,
    t_ptr,
    i_ptr,
    hyper_ptr,
    count_ptr,
    n,
    batch,
    scale,
    shift,
    stride_hyper,
    ACT: tl.constexpr,
    ACT_BWD: tl.constexpr,
    OUT: tl.constexpr,
    OUT_BWD: tl.constexpr,
    NET: tl.constexpr,
):
    """Program r trains network r on the n rows of its permutation: everything but data, targets and
    count is stacked.
    """
    L: tl.constexpr = len(NET.sizes) - 1
    r = tl.program_id(0).to(tl.int64)
    steps = tl.cdiv(n, batch)
    loss_ptr += r * steps
    correct_ptr += r * steps
    y_ptr += r * (L * NET.block_m * NET.pitch)
    dz_ptr += r * (L * NET.block_m * NET.pitch)
    i_ptr += r * n
    hyper_ptr += r * stride_hyper
    count = tl.load(count_ptr).to(tl.float32)
    for t in tl.range(
        0, steps + 1, num_stages=1, disable_licm=True
    ):  # a deeper pipeline would load across the barriers
        rows_before, mask_before = batch_rows(i_ptr, t - 1, n, batch, NET)
        rows, mask_m = batch_rows(i_ptr, t, n, batch, NET)
        numbers = numbers_at(hyper_ptr, count + t, NET)
        for k in tl.range(0, NET.sizes[1], NET.tiles[1], num_stages=1):
            first_tile(
                y_ptr,
                dz_ptr,
                net,
                r,
                x_ptr,
                rows,
                mask_m,
                rows_before,
                mask_before,
                t > 0,
                k + tl.arange(0, NET.tiles[1]),
                numbers,
                scale,
                shift,
                ACT,
                OUT,
                NET,
            )
        tl.debug_barrier()
        if t < steps:
            numbers = numbers_at(hyper_ptr, count + t + 1, NET)
            top(
                y_ptr,
                dz_ptr,
                loss_ptr + t,
                correct_ptr + t,
                net,
                r,
                t_ptr,
                rows,
                mask_m,
                numbers,
                True,
                ACT,
                OUT,
                OUT_BWD,
                NET,
            )
            for j in tl.static_range(L - 1):
                backward_layer(y_ptr, dz_ptr, net, r, numbers, L - j, True, ACT_BWD, NET)


def run_epoch_kernel(
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
    replicas,
) -> None:
    """Launch `epoch_kernel` for `replicas` networks and advance count; arguments as checked by the
    callers.
    """
    made, _, options = plan(spec, batch, targets, "epoch")
    y, dz = torch.empty(
        (2, replicas, len(spec.sizes) - 1, made.block_m, made.pitch), device=data.device
    )
    launch.run(
        epoch_kernel,
        (replicas,),
        losses,
        correct,
        Parameters(tuple(parameters), tuple(map(tuple, states))),
        y,
        dz,
        data,
        targets,
        indices,
        hyper,
        count,
        indices.shape[-1],
        batch,
        float(scale),
        float(shift),
        hyper.shape[-1],
        **options,
    )
    count += losses.shape[-1]


def train_epoch(
    spec: Spec,
    parameters,
    states,
    data,
    targets,
    indices,
    batch,
    hyper,
    count,
    *,
    scale=1.0,
    shift=0.0,
    losses=None,
    correct=None,
    programs=None,
    exchange="words",
):
    """Train one network in place on the batches of one permutation, in one launch: (losses,
    correct), a value for each step.

    parameters, states: lists of float32 tensors, see `network`; data (n, features) uint8 or
    float32, of which data · scale + shift is the input; targets (n,) labels, or (n, classes)
    float32; indices: the epoch's rows of data in order, int32 or int64, the last batch as small as
    it comes out; hyper: `hyperparameters(…)`, read at launch; count: one-element tensor, steps
    taken so far, advanced. losses float32, correct integer: (steps,) buffers to fill. programs: how
    many share the work: 1, or as many as own the rows of w_1 (None: the latter where the device
    can); exchange: their means, "words" or "counter". Sums in a fixed order: deterministic,
    whatever the means. ValueError: limits passed (`refusal`), shapes that do not fit, more programs
    than the device runs at once.
    """
    check_training("epoch", spec, parameters, states, data, targets, batch)
    if launch.backend(*parameters) == "torch":
        return train_epoch_ref(
            spec,
            parameters,
            states,
            data,
            targets,
            indices,
            batch,
            hyper,
            count,
            scale=scale,
            shift=shift,
            losses=losses,
            correct=correct,
        )
    losses, correct = results(data, steps_of(len(indices), batch), losses, correct)
    arguments = (
        spec,
        parameters,
        states,
        data,
        targets,
        indices.contiguous(),
        batch,
        hyper,
        count,
        scale,
        shift,
        losses,
        correct,
    )
    if programs == 1 or (programs is None and not shareable(spec, batch, targets)):
        run_epoch_kernel(*arguments, 1)
    else:
        train_programs(*arguments, programs, exchange)
    return losses, correct


def shareable(spec: Spec, batch: int, targets) -> bool:
    """Whether the device can run at once all the programs that would share the network, and waits
    as `words` need it.
    """
    rows = plan(spec, batch, targets, "exchange")[1]
    nvidia = launch.arch(targets.device).startswith("sm_")
    return nvidia and 1 < triton.cdiv(spec.sizes[1], rows) <= launch.sm_count(targets.device)
