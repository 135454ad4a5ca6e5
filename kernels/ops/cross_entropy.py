"""Softmax cross-entropy: loss and gradient of the logits in one pass over the logits.

    z (N, C) or (N, C, d1, …) or (C,): logits; one row is the C logits of one item
    p = softmax(z)     q_c: the target's weight on class c     Q = Σ_c q_c

    ℓ = -Σ_c q_c log p_c = Σ_c q_c (lse - z_c),   lse = log Σ_c exp z_c
    ∂ℓ/∂z_c = Q p_c - q_c                         since ∂lse/∂z_c = p_c
One formula serves every kind of target. With class weights w and label smoothing ε:
    a label y:            q_c = w_c ((1 - ε) [c = y] + ε / C), all zero where y is `ignore_index`
    probabilities t:      q_c = w_c ((1 - ε) t_c + ε / C)
The mean divides Σ ℓ by Σ w_y over the labels that are not ignored, as torch does. For probabilities
it divides by the number of rows. The gradient is kept before that division, so that half precision
does not underflow. The backward only scales it.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from .. import configs, launch, tape
from ..language import tl, triton
from ..losses import NEVER, Classes, label_weight, softmax_loss_tile, target_tile
from ..tiles import cast
from .elementwise_loss import REDUCTIONS, check_reduction

_TILE = 4096  # logits of one program's tile
_nll: Any = torch.ops.aten.nll_loss_forward.default
_nll_bwd: Any = torch.ops.aten.nll_loss_backward.default
# What F.cross_entropy calls. Its own lines in Python cost a tenth of a small loss.
_cross_entropy: Any = torch._C._nn.cross_entropy_loss
_check_labels_on_device = False


class CrossEntropySaved(NamedTuple):
    """What the forward keeps for the backward."""

    grad: torch.Tensor  # ∂ℓ/∂z, of the logits' shape; if `late`, log p
    dtarget: torch.Tensor | None  # ∂ℓ/∂t, if probabilities need a gradient
    denominator: torch.Tensor | int | None  # of the mean; if `late`, the number of counted labels
    reduction: str
    target: torch.Tensor
    ignore_index: int
    late: bool  # True if the backward computes ∂ℓ/∂z, see `is_late`


class Items(NamedTuple):
    """A tensor (N, C, D) as a kernel takes it: its address and strides.

    For labels (N, D), the stride of classes is 0.
    """

    ptr: Any
    stride_n: Any
    stride_c: Any
    stride_d: Any


def items(t: torch.Tensor) -> Items:
    """t (N, C, D), or labels (N, D), of any strides, as a kernel's Items."""
    n, *c, d = t.stride()
    return Items(t, n, c[0] if c else 0, d)


def class_options(
    count: int, weight: torch.Tensor | None, ignore_index: int, label_smoothing: float
) -> Classes:
    """The options of cross-entropy as a kernel's Classes. weight: (count,) or None."""
    stride = 0 if weight is None else weight.stride(0)
    return Classes(count, weight, stride, ignore_index, float(label_smoothing))


@contextlib.contextmanager
def check_labels() -> Iterator[None]:
    """Inside `with check_labels():`, labels on a GPU are checked as they are on the CPU.

    A label that is no class is then an IndexError instead of a loss of NaN. The check costs one
    host synchronisation in each call.
    """
    global _check_labels_on_device
    before, _check_labels_on_device = _check_labels_on_device, True
    try:
        yield
    finally:
        _check_labels_on_device = before


def expected_shape(logits):
    """The shape of labels and of an unreduced loss for these logits."""
    return logits.shape[:1] * (logits.dim() > 1) + logits.shape[2:]


def _rows(logits, target):
    """(logits (N, C, D), target): the target is labels (N, D) or probabilities (N, C, D).

    Both are views where the strides allow it.
    """
    if logits.dim() == 1:
        logits, target = logits.unsqueeze(0), target.unsqueeze(0)
    n, c = logits.shape[:2]
    z = (
        logits.unsqueeze(-1)
        if logits.dim() == 2
        else logits.reshape(n, c, logits.shape[2:].numel())
    )
    return z, target.reshape(z.shape if target.is_floating_point() else (n, z.shape[2]))


def check_range(
    target: torch.Tensor, classes: int, ignore_index: int = NEVER.value, op: str = "cross_entropy"
) -> bool:
    """True if all labels were checked and are classes.

    target: integer labels of any shape. classes: how many there are. op: a name for the error.
    False where labels cannot be read (on a GPU, traced), or if the range of labels includes
    ignore_index. IndexError: names the first label that is neither a class nor ignored.
    """
    if launch.watched() or not launch.plain(target):
        return False
    if not target.is_cpu and not _check_labels_on_device:
        return False
    if target.numel() == 0:
        return True
    target = target.long()  # in uint8, a label of 156 would compare equal to -100
    lowest, highest = torch.aminmax(target)
    low, high = lowest.item(), highest.item()
    if low >= 0 and high < classes:
        return not low <= ignore_index <= high
    bad = ((target < 0) | (target >= classes)) & (target != ignore_index)
    if bad.any():
        bad, target = (
            x.squeeze(1) if x.dim() > 1 and x.shape[1] == 1 else x for x in (bad, target)
        )
        index = bad.nonzero()[0].tolist()
        raise IndexError(
            f"{op}: target{index or ''} is {target[tuple(index)].item()}, but there are {classes} "
            f"classes: labels are 0 to {classes - 1}"
            + ("" if ignore_index == NEVER.value else f", or ignore_index = {ignore_index}")
        )
    return False


def cross_entropy_fwd_ref(
    logits: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    target_grad: bool = False,
    *,
    labels_valid: bool = False,
) -> tuple[torch.Tensor, CrossEntropySaved]:
    """The reference of `cross_entropy_fwd`: same arguments, same results, plain torch."""
    if is_late(logits, target, weight, label_smoothing):
        return _late_fwd_ref(logits, target, ignore_index, reduction, labels_valid)
    z, t = (logits, target) if logits.dim() > 1 else (logits.unsqueeze(0), target.unsqueeze(0))
    z = _widened(z)
    logp = torch.log_softmax(z, 1)
    w = None if weight is None else weight.to(z.dtype).view(-1, *(1,) * (z.dim() - 2))
    dtarget = None
    if t.is_floating_point():
        w = torch.ones_like(logp[:1]) if w is None else w
        q = w * ((1 - label_smoothing) * t + label_smoothing / max(z.shape[1], 1))
        loss, grad = -(q * logp).sum(1), logp.exp() * q.sum(1, keepdim=True) - q
        denominator = loss.numel()
        dtarget = (
            (logp * w * (label_smoothing - 1)).to(logits.dtype).view(logits.shape)
            if target_grad
            else None
        )
    else:
        t = t.long().unsqueeze(1)
        if not labels_valid:
            check_range(t, z.shape[1], ignore_index)
        loss, grad, denominator = _label_terms_ref(logp, t, w, ignore_index, label_smoothing)
    if reduction == "none":
        loss = tape.reshaped(loss, expected_shape(logits))
    elif reduction == "sum":
        loss = loss.sum()
    else:
        loss = loss.sum() / denominator if isinstance(denominator, torch.Tensor) else loss.mean()
    grad = grad.to(logits.dtype).view(logits.shape)
    divisor = denominator if reduction == "mean" else None
    kept = grad, dtarget, divisor, reduction, target, ignore_index, False
    return loss.to(logits.dtype), CrossEntropySaved(*kept)


def is_late(
    logits: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
) -> bool:
    """True if the reference leaves ∂ℓ/∂z to its backward.

    It does so for labels (N,) without weights or smoothing, where there is no kernel.
    """
    if weight is not None or label_smoothing != 0 or logits.dim() != 2:
        return False
    return not (target.is_floating_point() or launch.has_kernels(logits))


def _widened(z: torch.Tensor) -> torch.Tensor:
    """Logits, with half precision as float32."""
    return z.float() if z.dtype in (torch.float16, torch.bfloat16) else z


@functools.cache
def _loops() -> Any:
    """The module of compiled loops. numba is slow to import, so it is imported where it is used."""
    from ..cpu import softmax

    return softmax


def _late_fwd_ref(logits, target, ignore_index, reduction, labels_valid):
    """ℓ = -log p_y of labels (N,): the loss, and log p for the backward.

    torch's own operators check the arguments. If one raises, our checks name both values.
    """
    try:
        logp, kind = torch.log_softmax(_widened(logits), 1), REDUCTIONS.index(reduction)
        t = target if target.dtype is torch.int64 else target.long()
        if labels_valid and reduction == "mean":
            loss = F.nll_loss(logp, t)
            counted = logp.new_full((), len(t))
        else:
            loss, counted = _nll(logp, t, None, kind, ignore_index)
    except (IndexError, RuntimeError, ValueError):
        check_cross_entropy(logits, target, None, ignore_index, reduction, 0.0)
        check_range(target, logits.shape[1], ignore_index)
        raise
    loss = loss if loss.dtype is logits.dtype else loss.to(logits.dtype)
    kept = logp, None, counted, reduction, target, ignore_index, True
    return loss, CrossEntropySaved(*kept)


def _late_bwd_ref(dy, logp, counted, reduction, target, ignore_index):
    """dlogits of `_late_fwd_ref`.

    Forward was log p = z - lse and ℓ = -log p_y. So g = ∂ℓ/∂log p is -dy at the label, divided by
    the number of labels for the mean, and dz_c = g_c - p_c Σ g. torch's own operators compute them,
    the same that its tape calls for `F.cross_entropy`.
    """
    options = reduction, target, ignore_index
    if launch.is_batched(dy):  # by is_grads_batched=True
        one = torch.ones(dy.shape, dtype=dy.dtype, device=dy.device)
        unit = _late_bwd_ref(one, logp, counted, *options)
        return unit * (dy.unsqueeze(1) if reduction == "none" else dy)
    kind, given = REDUCTIONS.index(reduction), dy
    dy = dy if dy.dtype == logp.dtype else dy.to(logp.dtype)
    t = target if target.dtype is torch.int64 else target.long()
    if not isinstance(counted, torch.Tensor):  # the compiled loops count in a number
        counted = logp.new_full((), counted)
    g = _nll_bwd(dy, logp, t, None, kind, ignore_index, counted)
    dz = torch._log_softmax_backward_data(g, logp, 1, logp.dtype)
    return dz if dz.dtype == given.dtype else dz.to(given.dtype)


def _label_terms_ref(logp, t, w, ignore_index, label_smoothing):
    """(losses (N, …), gradient before reduction, the mean's denominator).

    t: labels (N, 1, …). w: weights (C, …) or None.
    """
    valid = t != ignore_index
    t = t.masked_fill(~valid, 0)
    w = torch.ones_like(logp[:1]) if w is None else w.expand(logp[:1].shape)
    w_label = w.expand(logp.shape).gather(1, t) * valid
    a, u = w_label * (1 - label_smoothing), w * valid * (label_smoothing / max(logp.shape[1], 1))
    loss = -a * logp.gather(1, t)
    p = logp.exp()
    grad = (p * a).scatter_add(1, t, -a)
    if label_smoothing:
        loss = loss - (u * logp).sum(1, keepdim=True)
        grad = grad + p * u.sum(1, keepdim=True) - u
    return loss.masked_fill(~valid, 0).squeeze(1), grad, _denominator_ref(w_label, valid)


def _denominator_ref(w_label, valid):
    """The sum of the labels' weights. It is NaN if labels count but their weights sum to 0.

    torch gives NaN there too, as 0 / 0.
    """
    total = w_label.sum()
    return torch.where((total == 0) & valid.any(), float("nan"), total)


def cross_entropy_bwd_ref(
    dy: torch.Tensor,
    grad: torch.Tensor,
    dtarget: torch.Tensor | None,
    denominator: torch.Tensor | int | None,
    reduction: str,
    target: torch.Tensor,
    ignore_index: int,
    late: bool,
    *,
    needs: Sequence[bool] = (True, True),
) -> tuple[torch.Tensor | None, ...]:
    """The reference of `cross_entropy_bwd`: same arguments, same results, plain torch."""
    if late:
        options = denominator, reduction, target, ignore_index
        return _late_bwd_ref(dy, grad, *options) if needs[0] else None, None
    if reduction == "none":
        scale = dy if grad.dim() == 1 else dy.unsqueeze(1)
    elif isinstance(denominator, torch.Tensor):  # of the mean
        # If every row is ignored there is no gradient, as in torch.
        scale = torch.where(denominator == 0, 0, dy / denominator)
    else:
        scale = dy if denominator is None else dy / max(denominator, 1)
    dz = dt = None
    if needs[0]:
        dz = grad * scale
        dz = dz if dz.dtype == grad.dtype else dz.to(grad.dtype)
    if needs[1] and dtarget is not None:
        dt = (dtarget * scale).to(dtarget.dtype)
    return dz, dt


@triton.jit
def store_loss(loss_ptr, rows, mask, loss, weight, counted, REDUCE: tl.constexpr):
    """Stores each row's loss, or with REDUCE this program's partial sums.

    There are three sums for each program: of losses, of weights and of counted rows.
    """
    loss = tl.where(mask, tl.where(weight == weight, loss, float("nan")), 0.0)
    pid, programs = tl.program_id(0), tl.num_programs(0)
    if REDUCE:
        tl.store(loss_ptr + pid, tl.sum(loss, axis=0))
        tl.store(loss_ptr + programs + pid, tl.sum(weight, axis=0))
        tl.store(loss_ptr + 2 * programs + pid, tl.sum((mask & counted).to(tl.float32), axis=0))
    else:
        tl.store(loss_ptr + rows, cast(loss, loss_ptr.dtype.element_ty), mask=mask)


@triton.jit
def labels(t_ptrs, mask_r, classes, SOFT: tl.constexpr):
    """(label, weight in the mean) of each row. For probabilities they are (0, 1)."""
    label = tl.zeros(mask_r.shape, tl.int64)
    weight = tl.where(mask_r, 1.0, 0.0)
    if not SOFT:
        label = tl.load(t_ptrs, mask=mask_r, other=classes.ignored).to(tl.int64)
        weight = label_weight(label, mask_r, classes)
    return label, weight


@triton.jit
def softmax_rows(
    z_ptrs,  # [BLOCK_R]
    stride_zc,
    mask_r,  # [BLOCK_R]
    t_ptrs,  # [BLOCK_R]
    stride_tc,
    label,  # [BLOCK_R]
    classes,  # Classes
    SOFT: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """(maximum m, Σ exp(z - m), Q) of each row, computed tile by tile.

    This is the online softmax of Milakov and Gimelshein (2018, "Online normalizer calculation for
    softmax").
    """
    m = tl.full(mask_r.shape, float("-inf"), tl.float32)
    s = tl.zeros(mask_r.shape, tl.float32)
    total = tl.zeros(mask_r.shape, tl.float32)
    for c in range(0, classes.count, BLOCK_C):
        offs_c = c + tl.arange(0, BLOCK_C).to(tl.int64)
        mask = mask_r[:, None] & (offs_c < classes.count)[None, :]
        z = tl.load(
            z_ptrs[:, None] + offs_c[None, :] * stride_zc, mask=mask, other=float("-inf")
        ).to(tl.float32)
        higher = tl.maximum(m, tl.max(z, axis=1))
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        s = s * tl.exp(m - shift) + tl.sum(tl.exp(z - shift[:, None]), axis=1)
        m = higher
        q, _ = target_tile(t_ptrs, stride_tc, label, offs_c, mask, classes, SOFT)
        total += tl.sum(q, axis=1)
    return m, s, total


@triton.jit
def cross_entropy_fwd_kernel(
    loss_ptr,  # [3, programs], or [R]
    grad_ptr,  # [N, C, D]
    z,  # Items [N, C, D]
    t,  # Items: labels [N, D], or probabilities [N, C, D]
    classes,  # Classes
    R,
    D,
    REDUCE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Loss and gradient of rows r = n·D + d.

    The first loop over tiles is an online softmax. The second computes loss and gradient, and reads
    the logits from the cache.
    """
    SOFT: tl.constexpr = t.ptr.dtype.element_ty.is_floating()  # probabilities
    pid = tl.program_id(0)
    rows = pid.to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_r = rows < R
    n, d = rows // D, rows % D
    z_ptrs = z.ptr + n * z.stride_n + d * z.stride_d
    t_ptrs = t.ptr + n * t.stride_n + d * t.stride_d
    grad_ptrs = grad_ptr + n * classes.count * D + d
    label, weight = labels(t_ptrs, mask_r, classes, SOFT)
    m, s, total = softmax_rows(
        z_ptrs, z.stride_c, mask_r, t_ptrs, t.stride_c, label, classes, SOFT, BLOCK_C
    )
    loss = tl.zeros((BLOCK_R,), tl.float32)
    for c in range(0, classes.count, BLOCK_C):
        offs_c = c + tl.arange(0, BLOCK_C).to(tl.int64)
        mask = mask_r[:, None] & (offs_c < classes.count)[None, :]
        tile_ptrs = z_ptrs[:, None] + offs_c[None, :] * z.stride_c
        tile = tl.load(tile_ptrs, mask=mask, other=float("-inf")).to(tl.float32)
        q, counted = target_tile(t_ptrs, t.stride_c, label, offs_c, mask, classes, SOFT)
        tile_loss, grad = softmax_loss_tile(tile, m, s, q, counted, total)
        loss += tile_loss
        grad = cast(grad, grad_ptr.dtype.element_ty)
        tl.store(grad_ptrs[:, None] + offs_c[None, :] * D, grad, mask=mask)
    store_loss(loss_ptr, rows, mask_r, loss, weight, label != classes.ignored, REDUCE)


@triton.jit
def cross_entropy_reduce_kernel(
    loss_ptr, denominator_ptr, parts_ptr, count, MEAN: tl.constexpr, BLOCK: tl.constexpr
):
    """Adds partial losses, weights and counted rows, (3, count), in one program and a fixed order.

    For the mean it divides. If rows count but their weights sum to 0, the denominator is NaN, as
    torch's 0 / 0. Loss and gradient are then NaN. If no row counts, the denominator is 0, and the
    gradient is 0 too.
    """
    loss = tl.zeros((BLOCK,), tl.float32)
    weight = tl.zeros((BLOCK,), tl.float32)
    counted = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, count, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        loss += tl.load(parts_ptr + offs, mask=offs < count, other=0.0)
        weight += tl.load(parts_ptr + count + offs, mask=offs < count, other=0.0)
        counted += tl.load(parts_ptr + 2 * count + offs, mask=offs < count, other=0.0)
    result = tl.sum(loss, axis=0)
    denominator = tl.sum(weight, axis=0)
    weightless = (denominator == 0) & (tl.sum(counted, axis=0) > 0)
    denominator = tl.where(weightless, float("nan"), denominator)
    if MEAN:
        result = result / denominator
    tl.store(denominator_ptr, denominator)
    tl.store(loss_ptr, cast(result, loss_ptr.dtype.element_ty))


@triton.jit
def cross_entropy_bwd_kernel(
    dz_ptr,
    dy_ptr,
    grad_ptr,
    denominator_ptr,
    size,
    row_size,
    D,
    SCALAR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dz = ∂ℓ/∂z · dy, divided by the denominator for the mean.

    Forward kept ∂ℓ/∂z. dy is one number (SCALAR), or one for each row.
    """
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size
    if SCALAR:
        dy = tl.load(dy_ptr).to(tl.float32)
    else:
        dy = tl.load(dy_ptr + offs // row_size * D + offs % D, mask=mask, other=0.0).to(tl.float32)
    if denominator_ptr is not None:
        denominator = tl.load(denominator_ptr)
        # If every row is ignored there is no gradient, as in torch.
        dy = tl.where(denominator == 0, 0.0, dy / denominator)
    grad = tl.load(grad_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(dz_ptr + offs, cast(grad * dy, dz_ptr.dtype.element_ty), mask=mask)


def check_cross_entropy(
    logits, target, weight, ignore_index, reduction, label_smoothing, op="cross_entropy"
) -> None:
    """Raises a ValueError, which names both values, unless shapes, dtypes and options fit.

    The requirements are torch's. label_smoothing out of [0, 1] is a RuntimeError, as in torch.
    """
    check_reduction(op, reduction)
    if not 0 <= label_smoothing <= 1:
        raise RuntimeError(f"{op}: label_smoothing must be between 0 and 1, got {label_smoothing}")
    if logits.dim() == 0 or not logits.is_floating_point():
        raise ValueError(
            f"{op}: input must be floating-point logits (N, C), (N, C, d1, …) or (C,), "
            f"got {logits.dtype} {tuple(logits.shape)}"
        )
    classes = logits.shape[logits.dim() > 1]
    if target.is_floating_point():
        launch.check_same(op, input=logits, target=target)
        expected = logits.shape
        if ignore_index >= 0:
            raise ValueError(
                f"{op}: ignore_index is for labels; probability targets take none, got "
                f"{ignore_index}"
            )
    else:
        expected = expected_shape(logits)
    if target.shape != expected:
        kind = "class probabilities" if target.is_floating_point() else "labels"
        raise ValueError(
            f"{op}: target must be {kind} {tuple(expected)} for logits {tuple(logits.shape)}, "
            f"got {tuple(target.shape)}"
        )
    if target.dtype == torch.bool or target.is_complex():
        raise ValueError(
            f"{op}: target must be integer labels or floating-point probabilities, got "
            f"{target.dtype}"
        )
    if target.device != logits.device:
        raise ValueError(
            f"{op}: target must be on {logits.device} as input is, got {target.device}; move one "
            "of them"
        )
    if weight is not None:
        launch.check_same(op, input=logits, weight=weight)
        if weight.shape != (classes,):
            raise ValueError(
                f"{op}: weight must be ({classes},), one for each class, got {tuple(weight.shape)}"
            )


def cross_entropy_fwd(
    logits: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    target_grad: bool = False,
    *,
    labels_valid: bool = False,
) -> tuple[torch.Tensor, CrossEntropySaved]:
    """The loss and the CrossEntropySaved that `cross_entropy_bwd` takes after dy.

    logits: (N, C), (N, C, d1, …) or (C,), floating point. target: integer labels (N, d1, …), or
    probabilities of logits' shape and dtype. weight: (C,) of logits' dtype, or None. Strides may be
    any, and logits stay unchanged. reduction: "mean", "sum" or "none". The loss has logits' dtype:
    a scalar, or (N, d1, …) for "none". target_grad: keep the gradient of probabilities too, by the
    reference. labels_valid: the caller knows that every label is a class, so nothing is checked.

    Reads the logits once from memory and writes their gradient once. Computes in float32 and adds
    in a fixed order, so it is deterministic. ValueError: shapes, dtypes, devices or a reduction
    that do not fit. RuntimeError: label_smoothing out of [0, 1]. IndexError: a label that is no
    class, on the CPU. On a GPU the loss is then NaN, because a check would need a host
    synchronisation. `check_labels()` turns the check on.
    """
    options = (weight, ignore_index, reduction, label_smoothing)
    is_free = target.dtype is torch.int64 and not launch.is_forced()
    if is_free and is_late(logits, target, weight, label_smoothing):
        if launch.takes_loops(logits):
            found = _loops().forward(logits, target, ignore_index, reduction)
            if found is not None:
                loss, logp, counted = found
                kept = logp, None, counted, reduction, target, ignore_index, True
                return loss, CrossEntropySaved(*kept)
        return _late_fwd_ref(logits, target, ignore_index, reduction, labels_valid)
    check_cross_entropy(logits, target, *options)
    if target_grad or launch.backend(logits, weight) != "triton":
        return cross_entropy_fwd_ref(
            logits, target, *options, target_grad, labels_valid=labels_valid
        )
    z, t = _rows(logits, target)
    N, C, D = z.shape
    if not t.is_floating_point() and not labels_valid:
        check_range(t, C, ignore_index)
    block_c = min(_TILE, max(16, triton.next_power_of_2(C)))
    block_r = max(1, min(_TILE // 4 // block_c, triton.next_power_of_2(max(N * D, 1))))
    programs = triton.cdiv(N * D, block_r)
    reduce = reduction != "none"
    rows = (
        logits.new_empty(3 * programs, dtype=torch.float32) if reduce else logits.new_empty(N * D)
    )
    grad = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    launch.run(
        cross_entropy_fwd_kernel,
        (programs,),
        rows,
        grad,
        items(z),
        items(t),
        class_options(C, weight, ignore_index, label_smoothing),
        N * D,
        D,
        REDUCE=reduce,
        BLOCK_R=block_r,
        BLOCK_C=block_c,
        num_warps=8 if block_c > 2048 else 4,
        **configs.all_registers(z.device),
    )
    loss, denominator = finish(rows, programs, logits, expected_shape(logits), reduction)
    kept = grad, None, denominator, reduction, target, ignore_index, False
    return loss, CrossEntropySaved(*kept)


def finish(rows, programs, like, shape, reduction):
    """(loss, denominator of the mean or None), reduced from what the forward kernel stored.

    rows: losses, or partial sums (3 · programs,). like: a tensor of the loss's dtype and device.
    """
    if reduction == "none":
        return tape.reshaped(rows, shape), None
    loss = like.new_empty(())
    denominator = like.new_empty((), dtype=torch.float32)
    launch.run(
        cross_entropy_reduce_kernel,
        (1,),
        loss,
        denominator,
        rows,
        programs,
        MEAN=reduction == "mean",
        BLOCK=1024,
    )
    return loss, denominator if reduction == "mean" else None


def cross_entropy_bwd(
    dy: torch.Tensor,
    grad: torch.Tensor,
    dtarget: torch.Tensor | None,
    denominator: torch.Tensor | int | None,
    reduction: str,
    target: torch.Tensor,
    ignore_index: int,
    late: bool,
    *,
    needs: Sequence[bool] = (True, True),
) -> tuple[torch.Tensor | None, ...]:
    """(dlogits, dtarget) from dy and what `cross_entropy_fwd` saved, in one scaling pass.

    dy: a scalar, or (N, d1, …) for reduction "none". dlogits has the shape and dtype of the logits.
    dtarget is None unless the forward kept it. needs: two bools. Deterministic.
    """
    if late and needs[0] and launch.takes_loops(dy, grad):
        dz = _loops().backward(dy, grad, denominator, reduction, target, ignore_index)
        if dz is not None:
            return dz, None
    # Only the reference saves a number as denominator.
    is_tensor = denominator is None or isinstance(denominator, torch.Tensor)
    if late or dtarget is not None or not is_tensor or launch.backend(dy, grad) != "triton":
        options = denominator, reduction, target, ignore_index, late
        return cross_entropy_bwd_ref(dy, grad, dtarget, *options, needs=needs)
    dz = torch.empty_like(grad)
    D = grad.shape[2:].numel() if grad.dim() > 2 else 1
    row_size = grad.shape[grad.dim() > 1] * D
    launch.run(
        cross_entropy_bwd_kernel,
        (triton.cdiv(grad.numel(), 1024),),
        dz,
        dy.contiguous(),
        grad,
        denominator,
        grad.numel(),
        row_size,
        D,
        SCALAR=reduction != "none",
        BLOCK=1024,
    )
    return dz, None


def _on_tape(logits, target, weight, ignore_index, reduction, label_smoothing, _):
    """The loss by torch's own function, or None.

    It serves float32 and float64. For labels (N,) without weights or smoothing its gradient equals
    that of the reference, bit for bit, and else to rounding.
    """
    if reduction not in REDUCTIONS or logits.dtype not in (torch.float32, torch.float64):
        return None
    if isinstance(weight, torch.Tensor) and weight.requires_grad:
        weight = weight.detach()  # it gets no gradient, and torch refuses to leave it out
    options = weight, ignore_index, reduction, label_smoothing
    fits = weight is None or (weight.dtype is logits.dtype and weight.shape == logits.shape[1:])
    is_usual = target.dtype is torch.int64 and is_late(logits, target, None, label_smoothing)
    if not (fits and is_usual):
        # torch takes some arguments that we refuse.
        check_cross_entropy(logits, target, *options)
        target = target if target.is_floating_point() else target.long()
    try:
        kind = REDUCTIONS.index(reduction)
        return _cross_entropy(logits, target, weight, kind, ignore_index, label_smoothing)
    except (IndexError, RuntimeError, ValueError):
        check_cross_entropy(logits, target, *options)  # these two errors name both values
        if not target.is_floating_point():
            check_range(target, logits.shape[logits.dim() > 1], ignore_index)
        raise


CROSS_ENTROPY = tape.Differentiable(
    name="cross_entropy",
    fwd=cross_entropy_fwd,
    fwd_ref=cross_entropy_fwd_ref,
    bwd=cross_entropy_bwd,
    bwd_ref=cross_entropy_bwd_ref,
    saved=CrossEntropySaved,
    inputs=2,
    derived={
        "late": lambda given: is_late(
            given["logits"], given["target"], given["weight"], given["label_smoothing"]
        )
    },
    autocast=torch.float32,
    on_tape=_on_tape,
)


@tape.traceable
def cross_entropy(
    input: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """`torch.nn.functional.cross_entropy`, with loss and gradient in one pass over the logits.

    input: logits (N, C), (N, C, d1, …) or (C,). target: integer labels (N, d1, …), or probabilities
    of input's shape and dtype, which may need a gradient. weight: (C,) or None. reduction: "mean",
    "sum" or "none". The result has input's dtype. Differentiable twice. TypeError: target is no
    tensor. Other errors: see `cross_entropy_fwd`.
    """
    if not isinstance(target, torch.Tensor):
        raise TypeError(
            f"cross_entropy: target must be a torch.Tensor, got {type(target).__name__}; convert "
            "it with torch.as_tensor"
        )
    options = weight, ignore_index, reduction, label_smoothing, target.requires_grad
    return tape.call(CROSS_ENTROPY, input, target, *options)
