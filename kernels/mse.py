"""Squared error: ℓ_i = (x_i - t_i)², reduced to their mean, their sum, or not at all.

    x, t of one shape        d = x - t        ℓ = d²

Backward, from dy (a scalar, or of the shape of ℓ): dx = 2 d dy / n for the mean over n elements, 2
d dy otherwise; dt = -dx.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import launch, tape
from .tiles import cast

REDUCTIONS = ("none", "mean", "sum")
_BLOCK = 1024


class MSESaved(NamedTuple):
    """What the forward keeps for the backward."""

    x: torch.Tensor
    t: torch.Tensor
    reduction: str


def _factor(n: int, reduction: str) -> float:
    """What the sum of squares (or one square) is multiplied by; the mean of nothing is NaN, as in
    torch.
    """
    if reduction == "mean":
        return 1.0 / n if n else float("nan")
    return 1.0


def mse_fwd_ref(x, t, reduction="mean"):
    """The reference of `mse_fwd`."""
    d = x - t
    loss = d * d
    if reduction != "none":
        loss = loss.mean() if reduction == "mean" else loss.sum()
    return loss, MSESaved(x, t, reduction)


def mse_bwd_ref(dy, x, t, reduction, *, needs=(True, True)):
    """The reference of `mse_bwd`."""
    dx = (x - t) * (dy * (2 * _factor(x.numel(), reduction)))
    return dx if needs[0] else None, -dx if needs[1] else None


@triton.jit
def mse_fwd_kernel(out_ptr, x_ptr, t_ptr, size, factor, REDUCE: tl.constexpr, BLOCK: tl.constexpr):
    """Squares of one block, or under REDUCE their sum times factor: one float32 partial sum a
    program.
    """
    pid = tl.program_id(0).to(tl.int64)
    offs = pid * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size
    d = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    d -= tl.load(t_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    if REDUCE:
        tl.store(out_ptr + pid, tl.sum(d * d, axis=0) * factor)
    else:
        tl.store(out_ptr + offs, cast(d * d, out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def sum_kernel(out_ptr, parts_ptr, count, BLOCK: tl.constexpr):
    """The sum of `count` float32 parts, by one program in a fixed order."""
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, count, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        total += tl.load(parts_ptr + offs, mask=offs < count, other=0.0)
    tl.store(out_ptr, cast(tl.sum(total, axis=0), out_ptr.dtype.element_ty))


@triton.jit
def mse_bwd_kernel(
    dx_ptr, dt_ptr, dy_ptr, x_ptr, t_ptr, size, factor, SCALAR: tl.constexpr, BLOCK: tl.constexpr
):
    """Forward was ℓ = (x - t)², so dx = 2 (x - t) dy · factor and dt = -dx."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size
    d = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    d -= tl.load(t_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    if SCALAR:
        dy = tl.load(dy_ptr).to(tl.float32)
    else:
        dy = tl.load(dy_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    dx = d * (2.0 * factor * dy)
    if dx_ptr is not None:
        tl.store(dx_ptr + offs, cast(dx, dx_ptr.dtype.element_ty), mask=mask)
    if dt_ptr is not None:
        tl.store(dt_ptr + offs, cast(-dx, dt_ptr.dtype.element_ty), mask=mask)


def check_reduction(op: str, reduction: str) -> None:
    """A ValueError that lists the reductions if `reduction` is not one."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"{op}: unknown reduction {reduction!r}; known: {', '.join(REDUCTIONS)}")


def mse_fwd(x, t, reduction="mean"):
    """Σ (x - t)² · factor as a scalar, or (x - t)² of x's shape, and what `mse_bwd` takes after dy.

    x, t: one shape, dtype and device; made contiguous. Float32 sums in a fixed order:
    deterministic. Reads x and t once. ValueError: an unknown reduction, shapes, dtypes or devices
    that differ, integers.
    """
    check_reduction("mse_loss", reduction)
    launch.check_same("mse_loss", input=x, target=t)
    if x.shape != t.shape:
        raise ValueError(
            f"mse_loss: target must be {tuple(x.shape)} as input is, got {tuple(t.shape)}"
        )
    if not x.is_floating_point():
        raise ValueError(
            f"mse_loss: input must be floating point, got {x.dtype}; convert it, for example with "
            ".float()"
        )
    if launch.backend(x, t) == "torch":
        return mse_fwd_ref(x, t, reduction)
    x, t = x.contiguous(), t.contiguous()
    size, blocks = x.numel(), triton.cdiv(x.numel(), _BLOCK)
    reduce = reduction != "none"
    out = x.new_empty(blocks, dtype=torch.float32) if reduce else torch.empty_like(x)
    factor = _factor(size, reduction)
    launch.run(mse_fwd_kernel, (blocks,), out, x, t, size, factor, REDUCE=reduce, BLOCK=_BLOCK)
    if not reduce:
        return out, MSESaved(x, t, reduction)
    loss = x.new_empty(()) if size else x.new_full((), 0.0 * factor)
    launch.run(sum_kernel, (min(blocks, 1),), loss, out, blocks, BLOCK=_BLOCK)
    return loss, MSESaved(x, t, reduction)


def mse_bwd(dy, x, t, reduction, *, needs=(True, True)):
    """(dx, dt) from dy, a scalar or of the shape of an unreduced loss; one pass. None where not
    needed.
    """
    if launch.backend(dy, x, t) == "torch":
        return mse_bwd_ref(dy, x, t, reduction, needs=needs)
    x, t = x.contiguous(), t.contiguous()
    dx = torch.empty_like(x) if needs[0] else None
    dt = torch.empty_like(x) if needs[1] else None
    launch.run(
        mse_bwd_kernel,
        (triton.cdiv(x.numel(), _BLOCK),),
        dx,
        dt,
        dy.contiguous(),
        x,
        t,
        x.numel(),
        _factor(x.numel(), reduction),
        SCALAR=reduction != "none",
        BLOCK=_BLOCK,
    )
    return dx, dt


MSE = tape.Differentiable(
    name="mse",
    fwd=mse_fwd,
    fwd_ref=mse_fwd_ref,
    bwd=mse_bwd,
    bwd_ref=mse_bwd_ref,
    saved=MSESaved,
    inputs=2,
    autocast=torch.float32,
)


@tape.traceable
def mse_loss(input: torch.Tensor, target: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
    """`torch.nn.functional.mse_loss` for input and target of one shape; the gradient of the target
    as well.
    """
    return tape.call(MSE, input, target, reduction)
