"""Losses that are a sum over elements: squared error, binary cross-entropy, Huber, pinball.

Any row of `losses` with a scalar works.

    x, t of one shape        ℓ_i = w_i f(x_i, t_i, parameter_i)        f: the row's scalar

reduced to their mean, their sum, or not at all. The mean divides by the number of elements, also
under weights, as torch does. parameter is a number, or a tensor that broadcasts to x, as w is.

Backward, from dy (a scalar, or of the shape of ℓ): dx = w ∂f/∂x dy / n for the mean over n
elements, w ∂f/∂x dy otherwise. dt = -dx where f depends on x - t alone, else the row says it.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .. import launch, losses, tape
from ..tiles import cast

REDUCTIONS = ("none", "mean", "sum")
_BLOCK = 1024


class ElementwiseLossSaved(NamedTuple):
    """What the forward keeps for the backward: its arguments."""

    x: torch.Tensor
    t: torch.Tensor
    loss: str
    parameter: float | torch.Tensor | None
    weight: torch.Tensor | None
    reduction: str


class Elements(NamedTuple):
    """What a kernel reads of each element.

    A tensor of `period` numbers repeats along the elements.
    """

    x: Any
    t: Any
    number: float  # the parameter, where it is one number
    parameter: float | torch.Tensor | None
    period: int
    weight: Any
    weight_period: int


def _factor(n: int, reduction: str) -> float:
    """What the sum of losses (or one loss) is multiplied by.

    The mean of nothing is NaN, as in torch.
    """
    if reduction == "mean":
        return 1.0 / n if n else float("nan")
    return 1.0


def _wide(*values):
    """Half-precision tensors as float32, in which the references compute.

    Others stay.
    """
    half = (torch.float16, torch.bfloat16)
    return [v.float() if isinstance(v, torch.Tensor) and v.dtype in half else v for v in values]


def elementwise_loss_fwd_ref(
    x: torch.Tensor,
    t: torch.Tensor,
    loss: str = "mse",
    parameter: float | torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    reduction: str = "mean",
) -> tuple[torch.Tensor, tuple]:
    """The reference of `elementwise_loss_fwd`."""
    row = losses.get(loss)
    wide_x, wide_t, p, w = _wide(x, t, row.default if parameter is None else parameter, weight)
    value = row.value_ref(wide_x, wide_t, p)
    if w is not None:
        value = value * w
    if reduction != "none":
        value = value.mean() if reduction == "mean" else value.sum()
    saved = ElementwiseLossSaved(x, t, loss, parameter, weight, reduction)
    return value.to(x.dtype), saved


def elementwise_loss_bwd_ref(
    dy: torch.Tensor,
    x: torch.Tensor,
    t: torch.Tensor,
    loss: str,
    parameter: float | torch.Tensor | None,
    weight: torch.Tensor | None,
    reduction: str,
    *,
    needs: Sequence[bool] = (True, True),
) -> tuple[torch.Tensor | None, ...]:
    """The reference of `elementwise_loss_bwd`."""
    row = losses.get(loss)
    wide_x, wide_t, p, w = _wide(x, t, row.default if parameter is None else parameter, weight)
    scale = dy * _factor(x.numel(), reduction)
    scale = scale if w is None else scale * w
    dx: Any = None
    dt = None
    if needs[0] or row.target_gradient_ref is None:
        dx = (row.gradient_ref(wide_x, wide_t, p) * scale).to(x.dtype)
    if needs[1] and row.target_gradient_ref is None:
        dt = -dx
    elif needs[1] and row.target_gradient_ref is not None:
        dt = (row.target_gradient_ref(wide_x, wide_t, p) * scale).to(x.dtype)
    return dx if needs[0] else None, dt


@triton.jit
def element_tile(e, offs, mask):
    """(x, t, parameter, weight) of a block's elements in float32.

    The last two may be one number.
    """
    x = tl.load(e.x + offs, mask=mask, other=0.0).to(tl.float32)
    t = tl.load(e.t + offs, mask=mask, other=0.0).to(tl.float32)
    parameter = (offs * 0).to(tl.float32) + e.number
    weight = 1.0
    if e.parameter is not None:
        parameter = tl.load(e.parameter + offs % e.period, mask=mask, other=1.0).to(tl.float32)
    if e.weight is not None:
        weight = tl.load(e.weight + offs % e.weight_period, mask=mask, other=0.0).to(tl.float32)
    return x, t, parameter, weight


@triton.jit
def elementwise_loss_fwd_kernel(
    out_ptr,
    elements,
    size,
    factor,
    SCALAR: tl.constexpr,
    REDUCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Losses of one block, or under REDUCE their sum times factor.

    The sum is one float32 for each program.
    """
    pid = tl.program_id(0).to(tl.int64)
    offs = pid * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size
    x, t, parameter, weight = element_tile(elements, offs, mask)
    loss, _ = SCALAR(x, t, parameter)
    loss = loss * weight
    if REDUCE:
        tl.store(out_ptr + pid, tl.sum(tl.where(mask, loss, 0.0), axis=0) * factor)
    else:
        tl.store(out_ptr + offs, cast(loss, out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def sum_kernel(out_ptr, parts_ptr, count, BLOCK: tl.constexpr):
    """The sum of `count` float32 parts, by one program in a fixed order."""
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, count, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        total += tl.load(parts_ptr + offs, mask=offs < count, other=0.0)
    tl.store(out_ptr, cast(tl.sum(total, axis=0), out_ptr.dtype.element_ty))


@triton.jit
def elementwise_loss_bwd_kernel(
    dx_ptr,
    dt_ptr,
    dy_ptr,
    elements,
    size,
    factor,
    SCALAR: tl.constexpr,
    ONE_DY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Forward was ℓ = w f(x, t), so dx = w ∂f/∂x dy · factor; dt = -dx where f takes x - t."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size
    x, t, parameter, weight = element_tile(elements, offs, mask)
    if ONE_DY:
        dy = tl.load(dy_ptr).to(tl.float32)
    else:
        dy = tl.load(dy_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    _, gradient = SCALAR(x, t, parameter)
    dx = gradient * (factor * dy * weight)
    if dx_ptr is not None:
        tl.store(dx_ptr + offs, cast(dx, dx_ptr.dtype.element_ty), mask=mask)
    if dt_ptr is not None:
        tl.store(dt_ptr + offs, cast(-dx, dt_ptr.dtype.element_ty), mask=mask)


def check_reduction(op: str, reduction: str) -> None:
    """A ValueError that lists the reductions if `reduction` is not one."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"{op}: unknown reduction {reduction!r}; known: {', '.join(REDUCTIONS)}")


def _check(x, t, row, parameter, weight, reduction):
    """Shapes, dtypes and options; a ValueError that names both values."""
    op = row.function
    check_reduction(op, reduction)
    launch.check_same(op, input=x, target=t)
    if x.shape != t.shape:
        raise ValueError(f"{op}: target must be {tuple(x.shape)} as input is, got {tuple(t.shape)}")
    if not x.is_floating_point():
        raise ValueError(
            f"{op}: input must be floating point, got {x.dtype}; convert it, for example with "
            ".float()"
        )
    for name, value in ((row.parameter, parameter), ("weight", weight)):
        if isinstance(value, torch.Tensor):
            _check_broadcast(op, name, value, x)
    if not isinstance(parameter, torch.Tensor):
        row.numbers(parameter)


def _check_broadcast(op, name, value, x):
    if value.device != x.device:
        raise ValueError(
            f"{op}: {name} must be on {x.device} as input is, got {value.device}; move one of them"
        )
    pairs = zip(reversed(value.shape), reversed(x.shape))
    if value.dim() > x.dim() or any(v not in (1, size) for v, size in pairs):
        raise ValueError(
            f"{op}: {name} must broadcast to input {tuple(x.shape)}, got {tuple(value.shape)}"
        )


def _operand(value, x):
    """A tensor as kernels read it, contiguous, and after how many elements of x it repeats."""
    if not isinstance(value, torch.Tensor):
        return None, 1
    if value.numel() != 1 and value.shape != x.shape[x.dim() - value.dim() :]:
        value = value.expand(x.shape)
    return value.contiguous(), max(value.numel(), 1)


def _elements(x, t, row, parameter, weight):
    number = row.default if parameter is None or isinstance(parameter, torch.Tensor) else parameter
    return Elements(x, t, float(number), *_operand(parameter, x), *_operand(weight, x))


def elementwise_loss_fwd(
    x: torch.Tensor,
    t: torch.Tensor,
    loss: str = "mse",
    parameter: float | torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    reduction: str = "mean",
) -> tuple[torch.Tensor, tuple]:
    """(loss, what `elementwise_loss_bwd` takes after dy).

    The loss is Σ w f(x, t, parameter) · factor, a scalar, or w f in x's shape.

    x, t: one shape, dtype and device; made contiguous. loss: a row of `losses` with a scalar, by
    name. parameter: a number, a tensor that broadcasts to x, or None for the row's own; weight: a
    tensor that broadcasts to x, or None. Float32 sums in a fixed order: deterministic. Reads x and
    t once. ValueError: an unknown loss or reduction, shapes, dtypes or devices that differ,
    integers; what the row says of a parameter out of range.
    """
    row = losses.get(loss)
    if row.scalar is None:
        raise ValueError(f"elementwise_loss: {loss!r} looks at a whole row; call {row.function}")
    _check(x, t, row, parameter, weight, reduction)
    if launch.backend(x, t) == "torch":
        return elementwise_loss_fwd_ref(x, t, loss, parameter, weight, reduction)
    x, t = x.contiguous(), t.contiguous()
    saved = ElementwiseLossSaved(x, t, loss, parameter, weight, reduction)
    size, blocks = x.numel(), triton.cdiv(x.numel(), _BLOCK)
    reduce = reduction != "none"
    out = x.new_empty(blocks, dtype=torch.float32) if reduce else torch.empty_like(x)
    factor = _factor(size, reduction)
    launch.run(
        elementwise_loss_fwd_kernel,
        (blocks,),
        out,
        _elements(x, t, row, parameter, weight),
        size,
        factor,
        SCALAR=row.scalar,
        REDUCE=reduce,
        BLOCK=_BLOCK,
    )
    if not reduce:
        return out, saved
    value = x.new_empty(()) if size else x.new_full((), 0.0 * factor)
    launch.run(sum_kernel, (min(blocks, 1),), value, out, blocks, BLOCK=_BLOCK)
    return value, saved


def elementwise_loss_bwd(
    dy: torch.Tensor,
    x: torch.Tensor,
    t: torch.Tensor,
    loss: str,
    parameter: float | torch.Tensor | None,
    weight: torch.Tensor | None,
    reduction: str,
    *,
    needs: Sequence[bool] = (True, True),
) -> tuple[torch.Tensor | None, ...]:
    """(dx, dt) from dy, in one pass.

    dy is a scalar, or of the shape of an unreduced loss. None where not needed. If the loss depends
    on more than x - t, dt comes from the reference.
    """
    row = losses.get(loss)
    if launch.backend(dy, x, t) == "torch":
        return elementwise_loss_bwd_ref(dy, x, t, loss, parameter, weight, reduction, needs=needs)
    x, t = x.contiguous(), t.contiguous()
    dx = torch.empty_like(x) if needs[0] else None
    dt = torch.empty_like(x) if needs[1] and row.target_gradient_ref is None else None
    launch.run(
        elementwise_loss_bwd_kernel,
        (triton.cdiv(x.numel(), _BLOCK) if needs[0] or dt is not None else 0,),
        dx,
        dt,
        dy.contiguous(),
        _elements(x, t, row, parameter, weight),
        x.numel(),
        _factor(x.numel(), reduction),
        SCALAR=row.scalar,
        ONE_DY=reduction != "none",
        BLOCK=_BLOCK,
    )
    if needs[1] and row.target_gradient_ref is not None:
        saved = (x, t, loss, parameter, weight, reduction)
        dt = elementwise_loss_bwd_ref(dy, *saved, needs=(False, True))[1]
    return dx, dt


ELEMENTWISE_LOSS = tape.Differentiable(
    name="elementwise_loss",
    fwd=elementwise_loss_fwd,
    fwd_ref=elementwise_loss_fwd_ref,
    bwd=elementwise_loss_bwd,
    bwd_ref=elementwise_loss_bwd_ref,
    saved=ElementwiseLossSaved,
    inputs=2,
    autocast=torch.float32,
)


@tape.traceable
def elementwise_loss(
    input: torch.Tensor,
    target: torch.Tensor,
    loss: str = "mse",
    parameter: float | torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    reduction: str = "mean",
) -> torch.Tensor:
    """The loss of that name in `kernels.LOSSES`, for input and target of one shape.

    It has gradients for both. See `elementwise_loss_fwd`.
    """
    for name, value in (("parameter", parameter), ("weight", weight)):
        if isinstance(value, torch.Tensor) and value.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"elementwise_loss: {name} gets no gradient; pass it .detach()ed")
    return tape.call(ELEMENTWISE_LOSS, input, target, loss, parameter, weight, reduction)


@tape.traceable
def mse_loss(input: torch.Tensor, target: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
    """`torch.nn.functional.mse_loss` for input and target of one shape.

    It has gradients for both.
    """
    return elementwise_loss(input, target, "mse", None, None, reduction)


@tape.traceable
def binary_cross_entropy_with_logits(
    input: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None = None,
    reduction: str = "mean",
    pos_weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """`torch.nn.functional.binary_cross_entropy_with_logits`: several labels for each row.

    Each label is 0, 1, or a probability between.

    input, target: one shape. weight, pos_weight: tensors that broadcast to it; they get no
    gradient.
    """
    return elementwise_loss(input, target, "bce", pos_weight, weight, reduction)


@tape.traceable
def huber_loss(
    input: torch.Tensor,
    target: torch.Tensor,
    reduction: str = "mean",
    delta: float = 1.0,
    weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """`torch.nn.functional.huber_loss` for input and target of one shape.

    Squared error up to delta, a line beyond.
    """
    return elementwise_loss(input, target, "huber", delta, weight, reduction)


@tape.traceable
def pinball_loss(
    input: torch.Tensor,
    target: torch.Tensor,
    quantile: float | torch.Tensor = 0.5,
    reduction: str = "mean",
) -> torch.Tensor:
    """The loss whose minimum is a quantile of the targets.

    It is quantile · (t - y) where t > y, else (1 - quantile) (y - t).

    input, target: one shape. quantile: a number between 0 and 1, or a tensor that broadcasts to
    input, such as one number for each column. At t = y the gradient is the mean of both sides.
    """
    return elementwise_loss(input, target, "pinball", quantile, None, reduction)
