"""Optimizer updates in place, one launch for all parameters: SGD and Adam as `torch.optim` defines
them.

    g: the gradient, negated to maximise, plus weight_decay · p

    SGD     v ← momentum v + (1 - dampening) g  (v = g at the first step)      g ← g + momentum v
        (Nesterov) or v
            p ← p - lr g
    Adam    m ← β1 m + (1 - β1) g     v ← β2 v + (1 - β2) g²
            p ← p - lr / (1 - β1ᵗ) · m / (√v / √(1 - β2ᵗ) + ε)
    AdamW   as Adam, but the decay is p ← p (1 - lr weight_decay) instead of a term of g

A kernel takes the pointers of all tensors as a tuple; each program finds its tensor and its block
of it. The learning rate, and Adam's step count, may be device tensors: a captured graph then sees
their new values.
"""

import math

import torch
import triton
import triton.language as tl

from . import launch
from .tiles import cast

_BLOCK = 1024
MAX_TENSORS = 64  # in one launch: the kernel unrolls over them


def sgd_ref(
    params,
    grads,
    buffers,
    lr,
    momentum=0.0,
    dampening=0.0,
    weight_decay=0.0,
    nesterov=False,
    maximize=False,
    first=False,
):
    """The reference of `sgd`."""
    lr, grads = _scalar_ref(lr), _decayed_ref(params, grads, weight_decay, maximize)
    if momentum:
        if first:
            torch._foreach_copy_(buffers, grads)
        else:
            torch._foreach_mul_(buffers, momentum)
            torch._foreach_add_(buffers, grads, alpha=1 - dampening)
        grads = torch._foreach_add(grads, buffers, alpha=momentum) if nesterov else buffers
    if isinstance(lr, torch.Tensor):
        torch._foreach_sub_(params, torch._foreach_mul(grads, lr))
    else:
        torch._foreach_add_(params, grads, alpha=-lr)


def adam_ref(
    params,
    grads,
    exp_avgs,
    exp_avg_sqs,
    step,
    lr,
    betas=(0.9, 0.999),
    eps=1e-8,
    weight_decay=0.0,
    decoupled=False,
    maximize=False,
):
    """The reference of `adam`."""
    (beta1, beta2), step, lr = betas, _scalar_ref(step), _scalar_ref(lr)
    if decoupled and weight_decay:
        torch._foreach_mul_(params, 1 - lr * weight_decay)
    grads = _decayed_ref(params, grads, 0.0 if decoupled else weight_decay, maximize)
    torch._foreach_lerp_(exp_avgs, grads, 1 - beta1)
    torch._foreach_mul_(exp_avg_sqs, beta2)
    torch._foreach_addcmul_(exp_avg_sqs, grads, grads, 1 - beta2)
    correction1, correction2 = _correction_ref(beta1, step), _correction_ref(beta2, step)
    denominators = torch._foreach_sqrt(exp_avg_sqs)
    torch._foreach_div_(denominators, correction2**0.5)
    torch._foreach_add_(denominators, eps)
    torch._foreach_div_(denominators, -lr / correction1)
    torch._foreach_addcdiv_(params, exp_avgs, denominators)


def _scalar_ref(value):
    """A one-element tensor without dimensions, as torch's foreach functions want it."""
    return value.reshape(()) if isinstance(value, torch.Tensor) else value


def _log(beta) -> float:
    return math.log(beta) if beta else -1e30


def _correction_ref(beta, step):
    """1 - βᵗ; of a step that is a float32 tensor by expm1, since the difference would cancel."""
    return -torch.expm1(step * _log(beta)) if isinstance(step, torch.Tensor) else 1 - beta**step


def _decayed_ref(params, grads, weight_decay, maximize):
    if maximize:
        grads = torch._foreach_neg(grads)
    return torch._foreach_add(grads, params, alpha=weight_decay) if weight_decay else grads


@triton.jit
def scalar(value, IS_TENSOR: tl.constexpr):
    """A hyperparameter that is a number, or a pointer to one."""
    if IS_TENSOR:
        value = tl.load(value).to(tl.float32)
    return value


@triton.jit
def sgd_update(
    p,
    g,
    v,
    lr,
    momentum,
    dampening,
    weight_decay,
    MOMENTUM: tl.constexpr,
    NESTEROV: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    FIRST: tl.constexpr,
):
    """(p, v) after one step, elementwise in float32; v is ignored without MOMENTUM."""
    if MAXIMIZE:
        g = -g
    g += weight_decay * p
    if MOMENTUM:
        if FIRST:
            v = g
        else:
            v = momentum * v + (1.0 - dampening) * g
        if NESTEROV:
            g += momentum * v
        else:
            g = v
    return p - lr * g, v


@triton.jit
def sgd_kernel(
    p_ptrs,
    g_ptrs,
    v_ptrs,
    sizes,
    lr,
    momentum,
    dampening,
    weight_decay,
    LR_TENSOR: tl.constexpr,
    MOMENTUM: tl.constexpr,
    NESTEROV: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One block of one of the tensors: programs count through the blocks of p_ptrs[0], then of
    p_ptrs[1], …
    """
    lr = scalar(lr, LR_TENSOR)
    block = tl.program_id(0)
    for i in tl.static_range(len(p_ptrs)):
        blocks = tl.cdiv(sizes[i], BLOCK)
        if (block >= 0) & (block < blocks):
            offs = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
            mask = offs < sizes[i]
            p = tl.load(p_ptrs[i] + offs, mask=mask, other=0.0).to(tl.float32)
            g = tl.load(g_ptrs[i] + offs, mask=mask, other=0.0).to(tl.float32)
            v = p
            if MOMENTUM and not FIRST:
                v = tl.load(v_ptrs[i] + offs, mask=mask, other=0.0).to(tl.float32)
            p, v = sgd_update(
                p, g, v, lr, momentum, dampening, weight_decay, MOMENTUM, NESTEROV, MAXIMIZE, FIRST
            )
            if MOMENTUM:
                tl.store(v_ptrs[i] + offs, cast(v, v_ptrs[i].dtype.element_ty), mask=mask)
            tl.store(p_ptrs[i] + offs, cast(p, p_ptrs[i].dtype.element_ty), mask=mask)
        block -= blocks


@triton.jit
def bias_correction(step, log_beta):
    """1 - βᵗ = -expm1(t log β) in float32, by its series near 0, where the difference would
    cancel.
    """
    u = step * log_beta
    series = u * (1.0 + u * (0.5 + u * (0.16666666666 + u * (0.04166666666 + u * 0.00833333333))))
    return -tl.where(u > -0.1, series, tl.exp(u) - 1.0)


@triton.jit
def adam_update(
    p,
    g,
    m,
    v,
    lr,
    correction1,
    correction2,
    rate1,
    rate2,
    eps,
    weight_decay,
    DECOUPLED: tl.constexpr,
    MAXIMIZE: tl.constexpr,
):
    """(p, m, v) after one step, elementwise in float32; rates are 1 - β, which float32's β would
    give to 1e-5 only.
    """
    if MAXIMIZE:
        g = -g
    if DECOUPLED:
        p *= 1.0 - lr * weight_decay
    else:
        g += weight_decay * p
    m = (1.0 - rate1) * m + rate1 * g
    v = (1.0 - rate2) * v + rate2 * g * g
    denominator = tl.sqrt(v) / tl.sqrt(correction2) + eps
    return p - lr / correction1 * (m / denominator), m, v


@triton.jit
def adam_kernel(
    p_ptrs,
    g_ptrs,
    m_ptrs,
    v_ptrs,
    sizes,
    step,
    lr,
    log_beta1,
    log_beta2,
    rate1,
    rate2,
    eps,
    weight_decay,
    STEP_TENSOR: tl.constexpr,
    LR_TENSOR: tl.constexpr,
    DECOUPLED: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One block of one of the tensors, counted as in `sgd_kernel`."""
    lr = scalar(lr, LR_TENSOR)
    step = scalar(step, STEP_TENSOR)
    correction1 = bias_correction(step, log_beta1)
    correction2 = bias_correction(step, log_beta2)
    block = tl.program_id(0)
    for i in tl.static_range(len(p_ptrs)):
        blocks = tl.cdiv(sizes[i], BLOCK)
        if (block >= 0) & (block < blocks):
            offs = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
            mask = offs < sizes[i]
            p = tl.load(p_ptrs[i] + offs, mask=mask, other=0.0).to(tl.float32)
            g = tl.load(g_ptrs[i] + offs, mask=mask, other=0.0).to(tl.float32)
            m = tl.load(m_ptrs[i] + offs, mask=mask, other=0.0).to(tl.float32)
            v = tl.load(v_ptrs[i] + offs, mask=mask, other=0.0).to(tl.float32)
            p, m, v = adam_update(
                p,
                g,
                m,
                v,
                lr,
                correction1,
                correction2,
                rate1,
                rate2,
                eps,
                weight_decay,
                DECOUPLED,
                MAXIMIZE,
            )
            tl.store(m_ptrs[i] + offs, cast(m, m_ptrs[i].dtype.element_ty), mask=mask)
            tl.store(v_ptrs[i] + offs, cast(v, v_ptrs[i].dtype.element_ty), mask=mask)
            tl.store(p_ptrs[i] + offs, cast(p, p_ptrs[i].dtype.element_ty), mask=mask)
        block -= blocks


def check_update(op: str, params, grads) -> None:
    """As many gradients as parameters, pairwise of one shape, dense and real; else a ValueError
    that names both.
    """
    if len(params) != len(grads):
        raise ValueError(f"{op}: {len(params)} parameters but {len(grads)} gradients")
    for i, (p, g) in enumerate(zip(params, grads)):
        if p.shape != g.shape:
            raise ValueError(
                f"{op}: gradient {i} must be {tuple(p.shape)} as its parameter is, got "
                f"{tuple(g.shape)}"
            )
        if g.layout != torch.strided or not g.is_floating_point():
            raise ValueError(
                f"{op}: gradient {i} must be dense and real, got {g.layout}, {g.dtype}; use "
                "torch.optim for it"
            )


def _dense(t) -> bool:
    """Whether the elements fill one gapless stretch of memory, in whatever order."""
    return (
        t.is_contiguous()
        or t.permute(sorted(range(t.dim()), key=t.stride, reverse=True)).is_contiguous()
    )


def _on_kernels(params, *states) -> bool:
    return launch.backend(*params, *(t for s in states for t in s)) == "triton" and all(
        _dense(p) for p in params
    )


def _launch(kernel, lists, *scalars, **constexprs) -> None:
    """Launch over at most MAX_TENSORS tensors at a time. lists: params, grads, states; copied where
    not laid out alike.
    """
    laid = [
        [
            t if t.stride() == p.stride() else torch.empty_like(p).copy_(t)
            for t, p in zip(ts, lists[0])
        ]
        for ts in lists
    ]
    for start in range(0, len(lists[0]), MAX_TENSORS):
        chunk = [tuple(ts[start : start + MAX_TENSORS]) for ts in laid]
        sizes = tuple(p.numel() for p in chunk[0])
        grid = (sum(triton.cdiv(size, _BLOCK) for size in sizes),)
        launch.run(kernel, grid, *chunk, sizes, *scalars, **constexprs, BLOCK=_BLOCK)
    for given, used in zip(lists[2:], laid[2:]):
        for t, copy in zip(given, used):
            if t is not copy:
                t.copy_(copy)


def sgd(
    params,
    grads,
    buffers,
    lr,
    momentum=0.0,
    dampening=0.0,
    weight_decay=0.0,
    nesterov=False,
    maximize=False,
    first=False,
):
    """One SGD step on lists of tensors, in place. See the module's formulas; `torch.optim.SGD` for
    the arguments.

    buffers: momentum buffers shaped like params (ignored without momentum), filled at the first
    step. lr: a number, or a one-element tensor on the parameters' device. Arithmetic in float32;
    reads p, g (and v) and writes p (and v) once.
    """
    check_update("sgd", params, grads)
    if torch.compiler.is_compiling():
        options = momentum, dampening, weight_decay, nesterov, maximize, first
        return launch.operators["sgd"](params, grads, buffers, lr, *options)
    buffers = buffers if momentum else params
    if not _on_kernels(params, grads, buffers):
        return sgd_ref(
            params, grads, buffers, lr, momentum, dampening, weight_decay, nesterov, maximize, first
        )
    lr_tensor = isinstance(lr, torch.Tensor)
    return _launch(
        sgd_kernel,
        [params, grads, buffers],
        lr if lr_tensor else float(lr),
        float(momentum),
        float(dampening),
        float(weight_decay),
        LR_TENSOR=lr_tensor,
        MOMENTUM=bool(momentum),
        NESTEROV=nesterov,
        MAXIMIZE=maximize,
        FIRST=first,
    )


def adam(
    params,
    grads,
    exp_avgs,
    exp_avg_sqs,
    step,
    lr,
    betas=(0.9, 0.999),
    eps=1e-8,
    weight_decay=0.0,
    decoupled=False,
    maximize=False,
):
    """One Adam step (AdamW if `decoupled`) on lists of tensors, in place. See the module's
    formulas.

    step: the count of this step, 1 at the first: a number, or a one-element tensor on the
    parameters' device; lr likewise.
    """
    check_update("adam", params, grads)
    options = lr, betas, eps, weight_decay, decoupled, maximize
    if torch.compiler.is_compiling():
        return launch.operators["adam"](params, grads, exp_avgs, exp_avg_sqs, step, *options)
    if not _on_kernels(params, grads, exp_avgs, exp_avg_sqs):
        return adam_ref(params, grads, exp_avgs, exp_avg_sqs, step, *options)
    step_tensor, lr_tensor = isinstance(step, torch.Tensor), isinstance(lr, torch.Tensor)
    return _launch(
        adam_kernel,
        [params, grads, exp_avgs, exp_avg_sqs],
        step if step_tensor else float(step),
        lr if lr_tensor else float(lr),
        *map(_log, betas),
        *(1.0 - b for b in betas),
        float(eps),
        float(weight_decay),
        STEP_TENSOR=step_tensor,
        LR_TENSOR=lr_tensor,
        DECOUPLED=decoupled,
        MAXIMIZE=maximize,
    )
