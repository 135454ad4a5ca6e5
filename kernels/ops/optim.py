"""Optimizer updates in place, one launch for up to 64 parameters, by any rule of `rules`.

A kernel takes the pointers of all tensors as a tuple. Each program finds its tensor, and its block
of this tensor. The learning rate and the step count may be device tensors. A captured graph then
sees their new values.
"""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from .. import launch, rules
from ..language import tl, triton
from ..rules import Rule, adam_ref, sgd_ref
from ..tiles import cast

_BLOCK = 1024
MAX_TENSORS = 64  # in one launch, because the kernel unrolls its loop over them


class Parameters(NamedTuple):
    """What a kernel updates: pointers of tensors, and as many for each state of the rule."""

    tensors: Any
    states: Any


class Number(NamedTuple):
    """A number for a kernel: its value, or a pointer to it in device memory.

    pointer is None if value is given.
    """

    value: Any
    pointer: Any


def number(value) -> Number:
    """A Python number or a one-element device tensor, as a kernel's Number."""
    if isinstance(value, torch.Tensor):
        return Number(0.0, value)
    return Number(float(value), None)


@triton.jit
def read(given):
    """The value of a `Number`, in float32."""
    if given.pointer is not None:
        value = tl.load(given.pointer).to(tl.float32)
    else:
        value = tl.full((), given.value, tl.float32)
    return value


@triton.jit
def numbers_at(hyper_ptr, step, RULE: tl.constexpr):
    """The numbers of step 1, 2, …, made from a row of `hyperparameters` in device memory."""
    row = ()
    for i in tl.static_range(len(RULE.columns)):
        row += (tl.load(hyper_ptr + i),)
    # Step 0 has no update. Its numbers are unused, but must exist.
    return RULE.at(row, tl.maximum(step, 1.0))


@triton.jit
def update_tile(
    net,
    i: tl.constexpr,
    base,
    offs,
    mask,
    p,
    g,
    numbers,
    RULE: tl.constexpr,
    SHARED: tl.constexpr,
    FIRST: tl.constexpr = False,
):
    """Applies gradient g to a tile p of parameter i, stores p and its states, and returns p.

    SHARED: several warps may hold the same elements, so all read p and its states before one
    writes. FIRST: states count as zeros, and memory is not read.
    """
    states = ()
    for k in tl.static_range(len(net.states)):
        if FIRST:
            states += (tl.zeros(p.shape, dtype=tl.float32),)
        else:
            state = tl.load(net.states[k][i] + base + offs, mask=mask, other=0.0)
            states += (state.to(tl.float32),)
    if SHARED:
        tl.debug_barrier()
    p, states = RULE.update(p, g, states, numbers)
    for k in tl.static_range(len(net.states)):
        ptr = net.states[k][i]
        tl.store(ptr + base + offs, cast(states[k], ptr.dtype.element_ty), mask=mask)
    tl.store(net.tensors[i] + base + offs, cast(p, net.tensors[i].dtype.element_ty), mask=mask)
    return p


@triton.jit
def optimizer_kernel(
    net,  # Parameters
    g_ptrs,
    sizes,
    row,  # tuple of Number
    step,  # Number
    RULE: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Updates one block of one of the tensors.

    Programs are numbered through the blocks of the first tensor, then of the second, and so on.
    """
    values = ()
    for i in tl.static_range(len(RULE.columns)):
        values += (read(row[i]),)
    numbers = RULE.at(values, read(step))
    block = tl.program_id(0)
    for i in tl.static_range(len(net.tensors)):
        blocks = tl.cdiv(sizes[i], BLOCK)
        if (block >= 0) & (block < blocks):
            offs = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
            mask = offs < sizes[i]
            p = tl.load(net.tensors[i] + offs, mask=mask, other=0.0).to(tl.float32)
            g = tl.load(g_ptrs[i] + offs, mask=mask, other=0.0).to(tl.float32)
            if MAXIMIZE:
                g = -g
            update_tile(net, i, 0, offs, mask, p, g, numbers, RULE, False, FIRST)
        block -= blocks


def check_update(
    op: str,
    params: list[torch.Tensor],
    grads: list[torch.Tensor],
    states: Sequence[list[torch.Tensor]] = (),
) -> None:
    """Raises a ValueError unless gradients and states fit the parameters. TypeError for arrays.

    op: a name for the error. There must be as many gradients, and as many tensors of each state, as
    parameters, and of the same shapes. Gradients must be dense and floating point. Parameters and
    states must not be views with a minus sign that torch has not applied yet.
    """
    if not all([len(tensors) == len(params) for tensors in (grads, *states)]):
        counts = [("gradients", grads), *(("tensors of one state", ts) for ts in states)]
        what, wrong = next((w, ts) for w, ts in counts if len(ts) != len(params))
        raise ValueError(
            f"{op}: {len(params)} parameters but {len(wrong)} {what}; give one for each parameter"
        )
    for tensors in states:
        for i, (p, t) in enumerate(zip(params, tensors)):
            if p.shape != t.shape:
                raise ValueError(
                    f"{op}: each state of parameter {i} must be {tuple(p.shape)} as the parameter "
                    f"is, got {tuple(t.shape)}"
                )
    # A kernel would update a copy with the sign applied. torch.compile cannot trace is_neg.
    can_ask = not torch.compiler.is_compiling()
    for what, tensors in (("parameter", params), *(("state of parameter", ts) for ts in states)):
        for i, t in enumerate(tensors):
            if can_ask and t.is_neg():
                raise ValueError(
                    f"{op}: {what} {i} is a view with a minus sign that torch has not applied yet, "
                    "as z.conj().imag is, and cannot be updated in place; give its .resolve_neg()"
                )
    for i, (p, g) in enumerate(zip(params, grads)):
        if not isinstance(g, torch.Tensor):
            raise TypeError(
                f"{op}: gradient {i} must be a torch.Tensor, got {type(g).__name__}; convert it "
                "with torch.as_tensor"
            )
        if p.shape != g.shape:
            raise ValueError(
                f"{op}: gradient {i} must be {tuple(p.shape)} as its parameter is, got "
                f"{tuple(g.shape)}"
            )
        if p.device != g.device:
            raise ValueError(
                f"{op}: gradient {i} is on {g.device}, but its parameter is on {p.device}; move "
                "one of them"
            )
        if g.layout is not torch.strided or not g.is_floating_point():
            raise ValueError(
                f"{op}: gradient {i} must be dense and real, got {g.layout}, {g.dtype}; use "
                "torch.optim for it"
            )


def _dense(t) -> bool:
    """True if the elements fill one stretch of memory without gaps, in any order."""
    return (
        t.is_contiguous()
        or t.permute(sorted(range(t.dim()), key=t.stride, reverse=True)).is_contiguous()
    )


def _on_kernels(params, *others) -> bool:
    if params and not launch.may_take(params[0]):
        return False  # a shortcut, as every step of a training asks
    tensors = itertools.chain(params, *others)
    return launch.backend(*tensors) == "triton" and all(_dense(p) for p in params)


def _launch(params, grads, states, numbers, options) -> None:
    """Launches `optimizer_kernel` for at most MAX_TENSORS tensors at a time.

    A gradient or state whose layout differs from its parameter's is copied. States are copied back.
    """
    laid = [
        [
            t if t.stride() == p.stride() else torch.empty_like(p).copy_(t)
            for t, p in zip(ts, params)
        ]
        for ts in (grads, *states)
    ]
    for start in range(0, len(params), MAX_TENSORS):
        chunk, *others = (tuple(ts[start : start + MAX_TENSORS]) for ts in (params, *laid))
        sizes = tuple(p.numel() for p in chunk)
        grid = (sum(triton.cdiv(size, _BLOCK) for size in sizes),)
        net = Parameters(chunk, tuple(others[1:]))
        launch.run(optimizer_kernel, grid, net, others[0], sizes, *numbers, **options, BLOCK=_BLOCK)
    for given, used in zip(states, laid[1:]):
        for t, copy in zip(given, used):
            if t is not copy:
                t.copy_(copy)
    launch.changed(params, *states)


def apply_rule(
    rule: str | Rule,
    params: list[torch.Tensor],
    grads: list[torch.Tensor],
    states: list[list[torch.Tensor]],
    row: tuple,
    step: float | torch.Tensor = 1,
    *,
    maximize: bool = False,
    first: bool = False,
) -> None:
    """One step of a rule on lists of tensors, in place. The formulas are in `rules`.

    rule: a row of `kernels.RULES`, or its name. params, grads: lists of floating-point tensors.
    states: for each of the rule's states a list of tensors shaped like params, zeros at first. row:
    the rule's numbers, see `kernels.row_of`. step: the count of this step, 1 at the first. Each
    number of row, and step, may be a one-element tensor on the parameters' device. maximize: negate
    the gradients. first: the states count as zeros, whatever they hold.

    One launch for up to 64 tensors, arithmetic in float32. Reads p, g and the states once, and
    writes p and the states once. ValueError: an unknown rule, or lists that do not fit.
    """
    rule = rules.get(rule)
    check_update(rule.name, params, grads, states)
    apply_checked(rule, params, grads, states, row, step, maximize=maximize, first=first)


def apply_checked(
    rule: Rule,
    params: list[torch.Tensor],
    grads: list[torch.Tensor],
    states: list[list[torch.Tensor]],
    row: tuple,
    step: float | torch.Tensor = 1,
    *,
    maximize: bool = False,
    first: bool = False,
) -> None:
    """`apply_rule` for a caller that has called `check_update` already."""
    if torch.compiler.is_compiling():
        options = {"step": step, "maximize": maximize, "first": first}
        return launch.operators["apply_rule"](rule, params, grads, states, row, **options)
    if len(states) != len(rule.states):
        raise ValueError(
            f"{rule.name}: there must be {len(rule.states)} lists of states "
            f"({', '.join(rule.states)}), got {len(states)}"
        )
    if not _on_kernels(params, grads, *states):
        return apply_rule_ref(
            rule, params, grads, states, row, step, maximize=maximize, first=first
        )
    numbers = tuple(map(number, row)), number(step)
    constants = {"RULE": rule, "MAXIMIZE": maximize, "FIRST": first}
    return _launch(params, grads, states, numbers, constants)


def apply_rule_ref(
    rule: str | Rule,
    params: list[torch.Tensor],
    grads: list[torch.Tensor],
    states: list[list[torch.Tensor]],
    row: tuple,
    step: float | torch.Tensor = 1,
    *,
    maximize: bool = False,
    first: bool = False,
) -> None:
    """The reference of `apply_rule`: same arguments, same results, plain torch."""
    if first:
        for ts in states:
            for t in ts:
                t.zero_()
    grads = torch._foreach_neg(grads) if maximize else grads
    rules.apply_ref(rules.get(rule), params, grads, states, row, step)


def sgd(
    params: list[torch.Tensor],
    grads: list[torch.Tensor],
    buffers: list[torch.Tensor],
    lr: float | torch.Tensor,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    first: bool = False,
) -> None:
    """One SGD step on lists of tensors, in place.

    The formulas are in `rules`. The options are those of `torch.optim.SGD`.

    params, grads: lists of floating-point tensors. buffers: momentum buffers shaped like params.
    They are ignored without momentum. lr: a number, or a one-element tensor on the parameters'
    device. first: this is the first step, which sets the buffers to the gradients. One launch for
    up to 64 tensors. ValueError: lists that do not fit.
    """
    states = [buffers] if momentum else []
    check_update("sgd", params, grads, states)
    options = momentum, dampening, weight_decay, nesterov, maximize, first
    if torch.compiler.is_compiling():
        return launch.operators["sgd"](params, grads, buffers, lr, *options)
    if not _on_kernels(params, grads, *states):
        return sgd_ref(params, grads, buffers, lr, *options)
    row = (lr, weight_decay, momentum, dampening) if momentum else (lr, weight_decay)
    rule = rules.RULES[("nesterov" if nesterov else "momentum") if momentum else "sgd"]
    step, flags = 1 if first else 2, {"maximize": maximize, "first": first}
    apply_checked(rule, params, grads, states, row, step, **flags)


def adam(
    params: list[torch.Tensor],
    grads: list[torch.Tensor],
    exp_avgs: list[torch.Tensor],
    exp_avg_sqs: list[torch.Tensor],
    step: float | torch.Tensor,
    lr: float | torch.Tensor,
    betas: tuple[Any, Any] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled: bool = False,
    maximize: bool = False,
) -> None:
    """One Adam step (AdamW if `decoupled`) on lists of tensors, in place.

    The formulas are in `rules`. The options are those of `torch.optim.Adam`.

    params, grads: lists of floating-point tensors. exp_avgs, exp_avg_sqs: lists of tensors shaped
    like params, zeros at first. step: the count of this step, 1 at the first. step and lr are
    numbers, or one-element tensors on the parameters' device. One launch for up to 64 tensors.
    ValueError: lists that do not fit.
    """
    states = [exp_avgs, exp_avg_sqs]
    check_update("adam", params, grads, states)
    options = lr, betas, eps, weight_decay, decoupled, maximize
    if torch.compiler.is_compiling():
        return launch.operators["adam"](params, grads, exp_avgs, exp_avg_sqs, step, *options)
    if not _on_kernels(params, grads, *states):
        return adam_ref(params, grads, exp_avgs, exp_avg_sqs, step, *options)
    rule = rules.RULES["adamw" if decoupled else "adam"]
    row = rules.row_of(rule, lr=lr, weight_decay=weight_decay, betas=betas, eps=eps)
    apply_checked(rule, params, grads, states, row, step, maximize=maximize)
