"""The last layer and its loss as one operation: cross_entropy(x wᵀ + b, target).

    x (M, K)   w (C, K)   b (C,)   target (M,) labels or (M, C) probabilities

Up to FUSED_CLASSES classes, one kernel holds a row of logits in one tile. It computes product,
softmax, loss and ∂ℓ/∂z, and never stores the logits. With more classes, the two operations run one
after the other. The backward scales ∂ℓ/∂z as `cross_entropy` does, then computes dx, dw and db as
`linear` does.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from .. import configs, launch, tape
from ..language import tl, triton
from ..losses import softmax_loss_tile, target_tile
from ..tiles import cast, matrix, product_tile
from .cross_entropy import (
    check_cross_entropy,
    check_range,
    class_options,
    cross_entropy,
    cross_entropy_bwd,
    cross_entropy_bwd_ref,
    cross_entropy_fwd,
    cross_entropy_fwd_ref,
    finish,
    is_late,
    items,
    labels,
    store_loss,
)
from .linear import check_linear, linear, linear_bwd, linear_bwd_ref, linear_fwd, linear_fwd_ref

FUSED_CLASSES = 128


class LinearCrossEntropySaved(NamedTuple):
    """What the forward keeps for the backward. From `grad` on, the fields are cross_entropy's."""

    x: torch.Tensor  # (M, K)
    w: torch.Tensor  # (C, K)
    bias: bool
    grad: torch.Tensor  # (M, C)
    dtarget: torch.Tensor | None  # None, as probabilities get no gradient here
    denominator: torch.Tensor | int | None
    reduction: str
    target: torch.Tensor
    ignore_index: int
    late: bool


def linear_cross_entropy_fwd_ref(
    x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None, target: torch.Tensor, *options: Any
) -> tuple[torch.Tensor, LinearCrossEntropySaved]:
    """The reference of `linear_cross_entropy_fwd`: same arguments, same results, plain torch."""
    logits, _ = linear_fwd_ref(x, w, b)
    loss, saved = cross_entropy_fwd_ref(logits, target, *options)
    return loss, LinearCrossEntropySaved(x, w, b is not None, *saved)


def linear_cross_entropy_bwd_ref(
    dy: torch.Tensor,
    x: torch.Tensor,
    w: torch.Tensor,
    bias: bool,
    *saved: Any,
    needs: Sequence[bool] = (True, True, True),
) -> tuple[torch.Tensor | None, ...]:
    """The reference of `linear_cross_entropy_bwd`: same arguments, same results, plain torch."""
    dz: Any = cross_entropy_bwd_ref(dy, *saved)[0]
    return linear_bwd_ref(dz, x, w, None, bias, "identity", needs=needs)


@triton.jit
def linear_cross_entropy_fwd_kernel(
    loss_ptr,  # [3, programs], or [M]
    grad_ptr,  # [M, C]
    x,  # Matrix [M, K]
    w,  # Matrix [C, K]
    b_ptr,  # [C], or None
    t,  # Items: labels [M, 1], or probabilities [M, C, 1]
    classes,  # Classes
    K,
    REDUCE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Logits, softmax, loss and gradient of BLOCK_M rows, in one tile [BLOCK_M, BLOCK_N].

    BLOCK_N holds all classes. The logits x wᵀ + b are never stored.
    """
    SOFT: tl.constexpr = t.ptr.dtype.element_ty.is_floating()  # probabilities
    pid = tl.program_id(0)
    m = pid * BLOCK_M
    rows = m + tl.arange(0, BLOCK_M)
    offs_c = tl.arange(0, BLOCK_N)
    M = x.rows
    C = w.rows
    z, _ = product_tile(
        x, w, m, 0, 0, K, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION, False, False, (False, False)
    )
    if b_ptr is not None:
        z += tl.load(b_ptr + offs_c, mask=offs_c < C, other=0.0).to(tl.float32)[None, :]
    z = tl.where((offs_c < C)[None, :], z, float("-inf"))
    rows = rows.to(tl.int64)
    mask_r = rows < M
    mask = mask_r[:, None] & (offs_c < C)[None, :]
    t_ptrs = t.ptr + rows * t.stride_n
    label, weight = labels(t_ptrs, mask_r, classes, SOFT)
    q, counted = target_tile(t_ptrs, t.stride_c, label, offs_c, mask, classes, SOFT)
    m = tl.max(z, axis=1)
    s = tl.sum(tl.exp(z - m[:, None]), axis=1)
    loss, grad = softmax_loss_tile(z, m, s, q, counted, tl.sum(q, axis=1))
    tl.store(
        grad_ptr + rows[:, None] * C + offs_c[None, :],
        cast(grad, grad_ptr.dtype.element_ty),
        mask=mask,
    )
    store_loss(loss_ptr, rows, mask_r, loss, weight, label != classes.ignored, REDUCE)


def linear_cross_entropy_fwd(
    x: torch.Tensor,
    w: torch.Tensor,
    b: torch.Tensor | None,
    target: torch.Tensor,
    weight: torch.Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> tuple[torch.Tensor, LinearCrossEntropySaved]:
    """The loss of x wᵀ + b, and the LinearCrossEntropySaved that the backward takes after dy.

    x (M, K), w (C, K), b (C,) or None, of one floating-point dtype. target: labels (M,), or
    probabilities (M, C). weight: (C,) or None. The other options are those of `cross_entropy_fwd`.
    The loss is a scalar, or (M,) for reduction "none".

    Up to 128 classes, one kernel does both and never stores the logits. With more, two kernels do.
    Computes in float32, deterministic. ValueError: x is not two-dimensional. Other errors are those
    of `linear_fwd` and `cross_entropy_fwd`.
    """
    options = (weight, ignore_index, reduction, label_smoothing)
    check_linear(x, w, b, "linear_cross_entropy")
    if x.dim() != 2:
        raise ValueError(
            f"linear_cross_entropy: input must be (N, in), got {tuple(x.shape)}; flatten it and "
            "the target"
        )
    C = w.shape[0]
    if launch.backend(x, w, b, weight) != "triton" or C > FUSED_CLASSES:
        logits, _ = linear_fwd(x, w, b)
        loss, saved = cross_entropy_fwd(logits, target, *options)
        return loss, LinearCrossEntropySaved(x, w, b is not None, *saved)
    (M, K), logits_like = x.shape, x.new_empty((1, 1)).expand(x.shape[0], C)
    check_cross_entropy(logits_like, target, *options, op="linear_cross_entropy")
    if not target.is_floating_point():
        check_range(target, C, ignore_index)
    config = configs.product("linear_cross_entropy", x, M, 1).options
    config["BLOCK_N"] = max(16, triton.next_power_of_2(C))
    programs = triton.cdiv(M, config["BLOCK_M"])
    reduce = reduction != "none"
    rows = x.new_empty(3 * programs, dtype=torch.float32) if reduce else x.new_empty(M)
    grad = x.new_empty(M, C)
    launch.run(
        linear_cross_entropy_fwd_kernel,
        (programs,),
        rows,
        grad,
        matrix(x),
        matrix(w),
        None if b is None else b.contiguous(),
        items(target.unsqueeze(-1)),
        class_options(C, weight, ignore_index, label_smoothing),
        K,
        REDUCE=reduce,
        **config,
    )
    loss, denominator = finish(rows, programs, x, (M,), reduction)
    kept = grad, None, denominator, reduction, target, ignore_index, False
    return loss, LinearCrossEntropySaved(x, w, b is not None, *kept)


def linear_cross_entropy_bwd(
    dy: torch.Tensor,
    x: torch.Tensor,
    w: torch.Tensor,
    bias: bool,
    *saved: Any,
    needs: Sequence[bool] = (True, True, True),
) -> tuple[torch.Tensor | None, ...]:
    """(dx, dw, db) from dy and what `linear_cross_entropy_fwd` saved.

    dy: a scalar, or (M,) for reduction "none". dx (M, K), dw (C, K), db (C,). needs: three bools. A
    gradient is None if it is not needed or if there is no bias. The saved gradient of the logits is
    scaled by dy and then goes through `linear_bwd`. Deterministic.
    """
    dz: Any = cross_entropy_bwd(dy, *saved)[0]
    return linear_bwd(dz, x, w, None, bias, "identity", needs=needs)


_LATE = "target", "weight", "label_smoothing"
LINEAR_CROSS_ENTROPY = tape.Differentiable(
    name="linear_cross_entropy",
    fwd=linear_cross_entropy_fwd,
    fwd_ref=linear_cross_entropy_fwd_ref,
    bwd=linear_cross_entropy_bwd,
    bwd_ref=linear_cross_entropy_bwd_ref,
    saved=LinearCrossEntropySaved,
    inputs=3,
    derived={
        "bias": lambda given: given["b"] is not None,
        "late": lambda given: is_late(given["x"], *(given[name] for name in _LATE)),
    },
)


@tape.traceable
def linear_cross_entropy(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    class_weight: torch.Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """cross_entropy(linear(input, weight, bias), target, …) as one operation.

    input (N, in), weight (C, in), bias (C,) or None, of one floating-point dtype. target: labels
    (N,), or probabilities (N, C). class_weight: (C,) or None. The other options are those of
    `cross_entropy`. Probability targets get no gradient here. Where they need one, call the two
    operations. Differentiable twice. Errors: see `linear_cross_entropy_fwd`.
    """
    options = class_weight, ignore_index, reduction, label_smoothing
    if tape.autocasting(input):  # as in torch, only the product is in half precision
        return cross_entropy(linear(input, weight, bias), target, *options)
    return tape.call(LINEAR_CROSS_ENTROPY, input, weight, bias, target, *options)
