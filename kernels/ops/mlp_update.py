"""The backward of a stack of linear layers, with an optimizer's step in it.

For every layer, from the last down, with dz_l and y_{l-1} as in `mlp` and the rules of `rules`:

    dz_{l-1} = (dz_l w_l) ⊙ act'(s_{l-1})                 with w_l as it was in the forward
    w_l ← rule(w_l, dz_lᵀ y_{l-1})    b_l ← rule(b_l, Σ_m dz_l)

The kernel of the product takes the step, so a weight's gradient is not stored. There are two
exceptions. If the batch is split, the float32 parts are stored. If a large float32 product is
torch's own (see `linear`), its result is stored. One more kernel then takes the step.

The step gets the gradient in float32, also if the weights are float16 or bfloat16.
"""

import functools
import itertools
from collections.abc import Sequence

import torch

from .. import launch, rules
from ..language import tl, triton
from ..rules import Rule
from ..tiles import matrix, product_tile, tile_of_program
from .linear import (
    as_matrix,
    dw_parts,
    dw_plan,
    linear_bwd_dw_ref,
    linear_bwd_dx,
    linear_bwd_dx_ref,
    linear_bwd_dz,
    linear_bwd_dz_ref,
    sum_of_splits,
)
from .mlp import MLPSaved, stack_backward
from .optim import Parameters, number, numbers_at, read, update_tile


def linear_update_ref(
    dz: torch.Tensor,
    x: torch.Tensor,
    parameters: list[torch.Tensor],
    states: list[list[torch.Tensor]],
    hyper: torch.Tensor | Sequence[float],
    step: float | torch.Tensor,
    rule: str | Rule,
) -> None:
    """The reference of `linear_update`: same arguments, same results, plain torch."""
    rule, x = rules.get(rule, "mlp_update"), as_matrix(x)
    row = hyper.tolist() if isinstance(hyper, torch.Tensor) else hyper
    add = functools.partial(_add_products, dz, x)
    if rule.product_ref is None or not rule.product_ref(add, parameters, states, row, step):
        grads = [g for g in linear_bwd_dw_ref(dz, x, len(parameters) == 2) if g is not None]
        rules.apply_ref(rule, parameters, grads, states, row, step)


def _add_products(dz, x, targets, beta, alpha):
    """t ← beta t + alpha g for w and b. g is dzᵀ x for w, and Σ_m dz for b."""
    targets[0].addmm_(dz.t(), x, beta=beta, alpha=alpha)
    if len(targets) == 2:
        targets[1].addmv_(dz.t(), dz.new_ones(dz.shape[0]), beta=beta, alpha=alpha)


@triton.jit
def linear_update_kernel(
    net,  # Parameters: w (N, K), and b (N,) if there is one
    dz,  # Matrix [N, M]: transposed
    x,  # Matrix [K, M]: transposed
    hyper_ptr,
    step,  # Number
    M,
    RULE: tl.constexpr,
    SHARED: tl.constexpr,  # a tile has fewer elements than the program has threads
    WHOLE: tl.constexpr,  # M is a multiple of BLOCK_K
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Takes the step of one tile of w.

    The programs of the first column of tiles also take the step of b. The tiles are those of
    `linear_bwd_dw_kernel`.
    """
    row, column = tile_of_program(tl.cdiv(dz.rows, BLOCK_M))
    n = row * BLOCK_M
    k = column * BLOCK_N
    numbers = numbers_at(hyper_ptr, read(step), RULE)
    N = dz.rows
    K = x.rows
    BIAS: tl.constexpr = len(net.tensors) == 2
    dw, db = product_tile(
        dz, x, n, k, 0, M, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION, BIAS, WHOLE, (True, True)
    )
    offs_n = n + tl.arange(0, BLOCK_M)
    offs_k = k + tl.arange(0, BLOCK_N)
    if BIAS:  # noqa: SIM102  this is known at compile time, the next is not
        if column == 0:
            b = tl.load(net.tensors[1] + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)
            # Several warps hold the same elements of a bias.
            update_tile(net, 1, 0, offs_n, offs_n < N, b, db, numbers, RULE, True)
    mask = (offs_n < N)[:, None] & (offs_k < K)[None, :]
    offs = offs_n.to(tl.int64)[:, None] * K + offs_k[None, :]
    w = tl.load(net.tensors[0] + offs, mask=mask, other=0.0).to(tl.float32)
    update_tile(net, 0, 0, offs, mask, w, dw, numbers, RULE, SHARED)


@triton.jit
def linear_update_reduce_kernel(
    net,  # Parameters: w, and b if there is one
    parts_ptr,
    hyper_ptr,
    step,  # Number
    SIZE,
    N,
    splits,
    split_stride,
    RULE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Adds the splits' parts as `linear_bwd_reduce_kernel` does, and takes the steps of w and b."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    numbers = numbers_at(hyper_ptr, read(step), RULE)
    g = sum_of_splits(parts_ptr, offs, SIZE + N, splits, split_stride)
    w = tl.load(net.tensors[0] + offs, mask=offs < SIZE, other=0.0).to(tl.float32)
    update_tile(net, 0, 0, offs, offs < SIZE, w, g, numbers, RULE, False)
    if len(net.tensors) == 2:
        mask = (offs >= SIZE) & (offs < SIZE + N)
        b = tl.load(net.tensors[1] + offs - SIZE, mask=mask, other=0.0).to(tl.float32)
        update_tile(net, 1, 0, offs - SIZE, mask, b, g, numbers, RULE, False)


def linear_update(dz, x, parameters, states, hyper, step, rule):
    """One step of `rule` on one layer, in place, from dz (M, N) and the layer's input x (…, K).

    parameters: [w (N, K)] or [w, b (N,)]. states: for each of the rule's states a list of the same
    shapes. All are contiguous. hyper: a row of `hyperparameters`, or its numbers. step: the count
    of this step, 1 at the first, as a number or a one-element device tensor. rule: a row of
    `rules`, or its name.

    Deterministic: if the batch is split as in `linear_bwd_dw`, the parts are added in a fixed order
    before the step. A float32 product by the library counts as the only part.
    """
    if launch.backend(dz, x, *parameters) != "triton":
        return linear_update_ref(dz, x, parameters, states, hyper, step, rule)
    rule, x = rules.get(rule, "mlp_update"), as_matrix(x)
    (M, N), K = dz.shape, x.shape[1]
    net = Parameters(tuple(parameters), tuple(map(tuple, states)))
    hyper = torch.as_tensor(hyper, dtype=torch.float32, device=dz.device)
    heavy = len(rule.states) > 1
    # In half precision, the library would round the gradient before the step.
    library = dz.dtype == torch.float32
    plan = dw_plan("linear_update", dz, x, heavy=heavy, library=library)
    if plan.splits == 1 and not plan.library:
        options = plan.options
        threads = options["num_warps"] * launch.lanes(launch.arch(dz.device))
        return launch.run(
            linear_update_kernel,
            (plan.tiles,),
            net,
            matrix(dz.t()),
            matrix(x.t()),
            hyper,
            number(step),
            M,
            RULE=rule,
            SHARED=options["BLOCK_M"] * options["BLOCK_N"] < threads,
            **options,
        )
    size, bias = N * K, len(parameters) == 2
    parts = dw_parts(dz, x, bias, plan)
    launch.run(
        linear_update_reduce_kernel,
        (triton.cdiv(size + N, 512),),
        net,
        parts,
        hyper,
        number(step),
        size,
        N,
        plan.splits,
        size + N,
        RULE=rule,
        BLOCK=512,
    )


def check_mlp_update(saved, parameters, states, hyper, rule) -> None:
    """Raises a ValueError unless hyper, states and parameters fit the rule and the forward.

    There must be as many parameters as the forward had, and as many of each state, of the same
    shapes. All must be contiguous.
    """
    layers, bias = len(saved.weights), saved.bias
    if len(hyper) != len(rule.columns):
        raise ValueError(
            f"mlp_update: hyper must be a row of {len(rule.columns)} numbers "
            f"({', '.join(rule.columns)}), see hyperparameters, got {len(hyper)}"
        )
    if len(states) != len(rule.states):
        raise ValueError(
            f"mlp_update: rule {rule.name!r} needs {len(rule.states)} lists of states, got "
            f"{len(states)}"
        )
    if len(parameters) != layers + sum(bias) or any(len(s) != len(parameters) for s in states):
        counts = [len(parameters), *map(len, states)]
        raise ValueError(
            f"mlp_update: there must be {layers + sum(bias)} parameters and as many of each state, "
            f"got {counts}"
        )
    shapes: list[torch.Size] = []
    for w, has_bias in zip(saved.weights, bias):
        shapes += (w.shape, w.shape[:1]) if has_bias else (w.shape,)
    for tensors in (parameters, *states):
        for i, (t, shape) in enumerate(zip(tensors, shapes)):
            if t.shape != shape:
                raise ValueError(
                    f"mlp_update: parameter {i} and its states must be {tuple(shape)} as in the "
                    f"forward, got {tuple(t.shape)}"
                )
            if not t.is_contiguous():
                raise ValueError(
                    "mlp_update: parameters and states must be contiguous, got a tensor of shape "
                    f"{tuple(t.shape)} that is not; pass .contiguous() and copy back"
                )


def _update(dy, saved, lists, numbers, out, bwd_dz, bwd_dx, update_layer):
    """`stack_backward` with a layer's update instead of its dw."""
    counts = [1 + bias for bias in saved.bias]
    ends = list(itertools.accumulate(counts))
    layers = [[ts[end - n : end] for ts in lists] for n, end in zip(counts, ends)]

    def update(dz, x, bias, *, out):
        update_layer(dz, x, out[0], out[1:], *numbers)
        return None, None

    needs = (False, *(True,) * 2 * len(layers))
    buffers = [None] * len(layers) if out is None else out
    stack_backward(dy, saved, needs, (buffers, layers), bwd_dz, bwd_dx, update)


def mlp_update_ref(
    dy: torch.Tensor,
    saved: MLPSaved,
    parameters: list[torch.Tensor],
    states: list[list[torch.Tensor]],
    hyper: torch.Tensor | Sequence[float],
    step: float | torch.Tensor,
    rule: str | Rule,
    *,
    out: Sequence[torch.Tensor] | None = None,
) -> None:
    """The reference of `mlp_update`: same arguments, same results, plain torch."""
    lists, numbers = (parameters, *states), (hyper, step, rule)
    parts = linear_bwd_dz_ref, linear_bwd_dx_ref, linear_update_ref
    _update(dy, saved, lists, numbers, out, *parts)


def mlp_update(
    dy: torch.Tensor,
    saved: MLPSaved,
    parameters: list[torch.Tensor],
    states: list[list[torch.Tensor]],
    hyper: torch.Tensor | Sequence[float],
    step: float | torch.Tensor,
    rule: str | Rule,
    *,
    out: Sequence[torch.Tensor] | None = None,
) -> None:
    """`mlp_bwd` and an optimizer's step on all parameters, in place. It returns None.

    dy (…, n_L). saved: what `mlp_fwd` returned beside y. parameters: the forward's own tensors,
    [w_1, b_1, w_2, …], or [w_1, w_2, …] without biases. states: for each of the rule's states a
    list of tensors of the same shapes, zeros at first. hyper: a row of `hyperparameters`, or its
    numbers. step: the count of this step, 1 at the first, as a number or a one-element device
    tensor. rule: a row of `kernels.RULES`, or its name. out: for each layer an (M, n_l) buffer for
    dz.

    Two launches for each layer (three if the batch is split), and gradients stay out of memory (see
    the module). Deterministic. There is no dx, because the input of the stack is data. ValueError:
    an unknown rule, or what `check_mlp_update` raises.
    """
    rule = rules.get(rule, "mlp_update")
    check_mlp_update(saved, parameters, states, hyper, rule)
    if launch.backend(dy, *parameters) != "triton":
        return mlp_update_ref(dy, saved, parameters, states, hyper, step, rule, out=out)
    lists, numbers = (parameters, *states), (hyper, step, rule)
    _update(dy, saved, lists, numbers, out, linear_bwd_dz, linear_bwd_dx, linear_update)
    launch.changed(*lists)
