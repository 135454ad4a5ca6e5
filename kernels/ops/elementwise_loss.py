"""Losses that are a sum over elements: squared error, binary cross-entropy, Huber, pinball.

Any row of `losses` with a scalar works.

    x, t of one shape        ℓ_i = w_i f(x_i, t_i, parameter_i)        f: the row's scalar

The ℓ_i are reduced to their mean or their sum, or not reduced. The mean divides by the number of
elements, also with weights, as torch does. The parameter is a number, or a tensor that broadcasts
to x. w is None or such a tensor.

Backward, from dy (a scalar, or of the shape of ℓ): dx = w ∂f/∂x dy / n for the mean over n
elements, else dx = w ∂f/∂x dy. dt = -dx if f depends on x - t alone. Else the row has a function
for ∂f/∂t.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from .. import launch, losses, tape
from ..language import tl, triton
from ..losses import REDUCTIONS
from ..tiles import cast

_BLOCK = 1024


class ElementwiseLossSaved(NamedTuple):
    """What the forward keeps for the backward, which is its arguments."""

    x: torch.Tensor
    t: torch.Tensor
    loss: str
    parameter: float | torch.Tensor | None
    weight: torch.Tensor | None
    reduction: str


class Elements(NamedTuple):
    """What a kernel reads for each element.

    parameter and weight may be tensors that repeat after so many elements (`period`).
    """

    x: Any
    t: Any
    number: float  # the parameter, where it is one number
    parameter: float | torch.Tensor | None
    period: int
    weight: Any
    weight_period: int


def _factor(n: int, reduction: str) -> float:
    """The factor of the sum of losses, or of one loss.

    The mean of no elements is NaN, as in torch.
    """
    if reduction == "mean":
        return 1.0 / n if n else float("nan")
    return 1.0


def _wide(*values):
    """The values, with half-precision tensors in float32. The references compute in float32.

    Other values stay as they are.
    """
    half = (torch.float16, torch.bfloat16)
    return [v.float() if isinstance(v, torch.Tensor) and v.dtype in half else v for v in values]


def _numbers(row: losses.Loss, parameter, weight) -> tuple[float, ...] | None:
    """The last arguments of the row's operators, or None if they do not compute this loss.

    What follows torch's operations sees the formulas. Not all of it knows these operators.
    """
    if row.operators is None or weight is not None or isinstance(parameter, torch.Tensor):
        return None
    if launch.watched():
        return None
    if row.parameter is None:
        return None if parameter is not None else ()  # a row without one refuses it
    return (row.default if parameter is None else float(parameter),)


def elementwise_loss_fwd_ref(
    x: torch.Tensor,
    t: torch.Tensor,
    loss: str = "mse",
    parameter: float | torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    reduction: str = "mean",
) -> tuple[torch.Tensor, ElementwiseLossSaved]:
    """The reference of `elementwise_loss_fwd`: same arguments, same results, plain torch."""
    row = losses.get(loss)
    wide_x, wide_t, p, w = _wide(x, t, row.default if parameter is None else parameter, weight)
    numbers = _numbers(row, parameter, weight)
    if numbers is not None and row.operators is not None:
        value = row.operators.forward(wide_x, wide_t, REDUCTIONS.index(reduction), *numbers)
    else:
        value = row.value_ref(wide_x, wide_t, p)
        value = value if w is None else value * w
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
    """The reference of `elementwise_loss_bwd`: same arguments, same results, plain torch."""
    row = losses.get(loss)
    wide_x, wide_t, p, w = _wide(x, t, row.default if parameter is None else parameter, weight)
    dx: Any = None
    dt = None
    numbers = _numbers(row, parameter, weight) if launch.plain(dy) else None
    if numbers is not None and row.operators is not None:
        (wide_dy,) = _wide(dy)
        kind = REDUCTIONS.index(reduction)
        dx = row.operators.backward(wide_dy, wide_x, wide_t, kind, *numbers).to(x.dtype)
        return dx if needs[0] else None, -dx if needs[1] else None
    scale = dy * _factor(x.numel(), reduction)
    scale = scale if w is None else scale * w
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
    """Losses of one block, or with REDUCE their sum times factor.

    Each program stores one such sum, in float32.
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
    """Forward was ℓ = w f(x, t), so dx = w ∂f/∂x dy · factor. If f depends on x - t, dt = -dx."""
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
    """Raises a ValueError, which lists the reductions, unless `reduction` is one of them."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"{op}: unknown reduction {reduction!r}; known: {', '.join(REDUCTIONS)}")


def _check(x, t, row, parameter, weight, reduction):
    """Raises a ValueError, which names both values, unless shapes, dtypes and options fit."""
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
    """(a contiguous tensor, or None for a number; the number of x's elements until it repeats)."""
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
) -> tuple[torch.Tensor, ElementwiseLossSaved]:
    """The loss and the ElementwiseLossSaved that `elementwise_loss_bwd` takes after dy.

    The loss has x's dtype. It is the mean or the sum of w f(x, t, parameter), a scalar, or for
    reduction "none" w f in x's shape.

    x, t: of one shape, floating-point dtype and device. They are made contiguous. loss: the name of
    a row of `losses` that has a scalar. parameter: a number, a tensor that broadcasts to x, or None
    for the row's default. weight: a tensor that broadcasts to x, or None. Adds in float32 and in a
    fixed order, so it is deterministic. Reads x and t once. ValueError: an unknown loss or
    reduction, shapes, dtypes or devices that differ, integers. A parameter out of range raises what
    the row's `check` raises.
    """
    row = losses.get(loss)
    if row.scalar is None:
        raise ValueError(
            f"elementwise_loss: {loss!r} is no sum over elements; call kernels.{row.function}"
        )
    _check(x, t, row, parameter, weight, reduction)
    if launch.backend(x, t) != "triton":
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
    """(dx, dt) from dy and what `elementwise_loss_fwd` saved, of x's shape and dtype, in one pass.

    dy: a scalar, or of x's shape for reduction "none". needs: two bools. A gradient that is not
    needed is None. If the loss depends on more than x - t, dt comes from the reference.
    Deterministic.
    """
    row = losses.get(loss)
    if launch.backend(dy, x, t) != "triton":
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


def _on_tape(x, t, loss, parameter, weight, reduction):
    """The loss by torch's own operator, or None.

    It serves where its gradients equal those of the reference, bit for bit.
    """
    row = losses.get(loss)
    numbers = _numbers(row, parameter, weight)
    if numbers is None or row.operators is None or reduction not in REDUCTIONS:
        return None
    dtype, dense = x.dtype, torch.strided
    if dtype is not torch.float32 and dtype is not torch.float64:
        return None
    if not isinstance(t, torch.Tensor) or not t.is_cpu or not launch.plain(t):
        return None
    if t.dtype is not dtype or t.shape != x.shape or t.layout is not dense or x.layout is not dense:
        return None
    for number in numbers:
        row.check(row.function, number)
    return row.operators.forward(x, t, REDUCTIONS.index(reduction), *numbers)


ELEMENTWISE_LOSS = tape.Differentiable(
    name="elementwise_loss",
    fwd=elementwise_loss_fwd,
    fwd_ref=elementwise_loss_fwd_ref,
    bwd=elementwise_loss_bwd,
    bwd_ref=elementwise_loss_bwd_ref,
    saved=ElementwiseLossSaved,
    inputs=2,
    autocast=torch.float32,
    on_tape=_on_tape,
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

    loss: the name of a row with a scalar. parameter: a number, a tensor that broadcasts to input,
    or None for the row's default. weight: a tensor that broadcasts to input, or None. reduction:
    "mean", "sum" or "none". The result has input's dtype. input and target get gradients.
    ValueError: a parameter or weight that needs a gradient, or what `elementwise_loss_fwd` raises.
    """
    for name, value in (("parameter", parameter), ("weight", weight)):
        if isinstance(value, torch.Tensor) and value.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"elementwise_loss: {name} gets no gradient, but requires_grad is True; pass "
                f"{name}.detach()"
            )
    return tape.call(ELEMENTWISE_LOSS, input, target, loss, parameter, weight, reduction)


@tape.traceable
def mse_loss(input: torch.Tensor, target: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
    """`torch.nn.functional.mse_loss` for input and target of one shape and dtype.

    The result is a scalar, or for reduction "none" it has input's shape. input and target get
    gradients. Errors: see `elementwise_loss_fwd`.
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
    """`torch.nn.functional.binary_cross_entropy_with_logits`, for several labels in each row.

    input: logits. target: of input's shape and dtype; each label is 0, 1, or a probability between.
    weight, pos_weight: tensors that broadcast to input, or None. They get no gradient. The result
    is a scalar, or for reduction "none" it has input's shape. Errors: see `elementwise_loss`.
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
    """`torch.nn.functional.huber_loss` for input and target of one shape and dtype.

    It is half the squared error up to delta, and a line beyond. weight: a tensor that broadcasts to
    input, or None. The result is a scalar, or for reduction "none" it has input's shape.
    RuntimeError: delta is not positive, as in torch. Other errors: see `elementwise_loss`.
    """
    return elementwise_loss(input, target, "huber", delta, weight, reduction)


@tape.traceable
def pinball_loss(
    input: torch.Tensor,
    target: torch.Tensor,
    quantile: float | torch.Tensor = 0.5,
    reduction: str = "mean",
) -> torch.Tensor:
    """The loss whose minimum is a quantile of the targets (Koenker and Bassett, 1978).

    It is quantile · (t - y) where t > y, else (1 - quantile) (y - t). At t = y, the gradient is the
    mean of both sides.

    input, target: of one shape and dtype. quantile: a number between 0 and 1, or a tensor that
    broadcasts to input, such as one number for each column. The result is a scalar, or for
    reduction "none" it has input's shape. ValueError: a quantile out of (0, 1). Other errors: see
    `elementwise_loss`.
    """
    return elementwise_loss(input, target, "pinball", quantile, None, reduction)
