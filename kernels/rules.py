"""The table of update rules: the arithmetic of every optimizer, written once.

    g: the gradient, negated to maximise        λ: weight_decay        t: the step, 1 at the first

    sgd        g ← g + λ p                                              p ← p - lr g
    momentum   g ← g + λ p    v ← μ v + (1 - dampening) g  (v ← g at the first step)
               p ← p - lr v         (with μ = 0, v ← g; `mlp.SGD` takes the rule sgd then)
    nesterov   as momentum, but p ← p - lr (g + μ v)
    adam       g ← g + λ p    m ← β1 m + (1 - β1) g    v ← β2 v + (1 - β2) g²
               p ← p - lr / (1 - β1ᵗ) · m / (√v / √(1 - β2ᵗ) + ε)
    adamw      as adam, but the decay is p ← p (1 - lr λ) instead of a term of g
    lion       p ← p (1 - lr λ) - lr sign(β1 m + (1 - β1) g)    m ← β2 m + (1 - β2) g
               (Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms", algorithm 2)
    rmsprop    g ← g + λ p    v ← α v + (1 - α) g²    u ← g / (√v + ε)
               p ← p - lr u
    rmsprop_momentum   as rmsprop, but b ← μ b + u    p ← p - lr b
    adagrad    g ← g + λ p    s ← s + g²
               p ← p - lr / (1 + (t - 1) lr_decay) · g / (√s + ε)

A row holds the names of a rule's states and numbers, and its formula twice. Kernels take the scalar
`@triton.jit` function as a constexpr argument. The other is in plain torch. No other code in
kernels/ branches on a rule's name. To add one, write the functions of its formula, and one `Rule`
at the bottom.

Numbers come in three forms. *Hyperparameters* are what a user gives, by torch's names. A *row*
holds the numbers made from them, one for each column. `hyperparameters` puts it in device memory,
where a run may change it. The *numbers* of a step follow from a row and the step count.
"""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from . import launch
from .language import tl, triton


@triton.jit
def bias_correction(step, log_beta):
    """1 - βᵗ in float32, as -expm1(t log β).

    Near 0 expm1 is a series, because the difference eᵘ - 1 would cancel there.
    """
    u = step * log_beta
    # Σ uⁿ / n!, nested. At -0.5 the first omitted term is below the last bit of a float32.
    tail = 0.00833333333 + u * (0.00138888888 + u * (0.00019841269 + u * 0.00002480158))
    series = u * (1.0 + u * (0.5 + u * (0.16666666666 + u * (0.04166666666 + u * tail))))
    return -tl.where(u > -0.5, series, tl.exp(u) - 1.0)


@triton.jit
def sgd_update(p, g, states, numbers):
    lr, decay = numbers
    g += decay * p
    return p - lr * g, states


@triton.jit
def momentum_at(row, step):
    # With dampening 0 and v = 0, the first step gives v = g. Without momentum there is no
    # dampening.
    lr, decay, momentum, dampening = row
    return lr, decay, momentum, tl.where((step == 1) | (momentum == 0), 0.0, dampening)


@triton.jit
def momentum_update(p, g, states, numbers):
    lr, decay, momentum, dampening = numbers
    g += decay * p
    v = momentum * states[0] + (1.0 - dampening) * g
    return p - lr * v, (v,)


@triton.jit
def nesterov_update(p, g, states, numbers):
    lr, decay, momentum, dampening = numbers
    g += decay * p
    v = momentum * states[0] + (1.0 - dampening) * g
    g += momentum * v
    return p - lr * g, (v,)


@triton.jit
def adam_at(row, step):
    lr, decay, rate1, rate2, eps, log_beta1, log_beta2 = row
    correction1 = bias_correction(step, log_beta1)
    return lr, decay, rate1, rate2, eps, correction1, bias_correction(step, log_beta2)


@triton.jit
def adam_moments(p, g, states, numbers):
    """The part that adam and adamw share.

    The rates are 1 - β, made in float64. From β in float32 they would be exact to 1e-5 only.
    """
    lr, _, rate1, rate2, eps, correction1, correction2 = numbers
    m = (1.0 - rate1) * states[0] + rate1 * g
    v = (1.0 - rate2) * states[1] + rate2 * g * g
    denominator = tl.sqrt(v) / tl.sqrt(correction2) + eps
    return p - lr / correction1 * (m / denominator), (m, v)


@triton.jit
def adam_update(p, g, states, numbers):
    g += numbers[1] * p
    return adam_moments(p, g, states, numbers)


@triton.jit
def adamw_update(p, g, states, numbers):
    p *= 1.0 - numbers[0] * numbers[1]
    return adam_moments(p, g, states, numbers)


@triton.jit
def plain_at(row, step):
    return row


@triton.jit
def lion_update(p, g, states, numbers):
    lr, decay, rate1, rate2 = numbers
    u = (1.0 - rate1) * states[0] + rate1 * g
    sign = tl.where(u > 0, 1.0, tl.where(u < 0, -1.0, u))  # 0 and NaN stay what they are
    m = (1.0 - rate2) * states[0] + rate2 * g
    return p * (1.0 - lr * decay) - lr * sign, (m,)


@triton.jit
def rmsprop_update(p, g, states, numbers):
    lr, decay, rate, eps = numbers
    g += decay * p
    v = (1.0 - rate) * states[0] + rate * g * g
    return p - lr * (g / (tl.sqrt(v) + eps)), (v,)


@triton.jit
def rmsprop_momentum_update(p, g, states, numbers):
    lr, decay, rate, eps, momentum = numbers
    g += decay * p
    v = (1.0 - rate) * states[0] + rate * g * g
    b = momentum * states[1] + g / (tl.sqrt(v) + eps)
    return p - lr * b, (v, b)


@triton.jit
def adagrad_at(row, step):
    lr, decay, lr_decay, eps = row
    return lr / (1.0 + (step - 1.0) * lr_decay), decay, lr_decay, eps


@triton.jit
def adagrad_update(p, g, states, numbers):
    lr, decay, _, eps = numbers
    g += decay * p
    total = states[0] + g * g
    return p - lr * (g / (tl.sqrt(total) + eps)), (total,)


def sgd_ref(
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
    """The reference of `kernels.sgd`: same arguments, same results, a few torch calls in all."""
    if maximize or weight_decay:
        grads = _decayed(params, grads, weight_decay, maximize)
    if momentum:
        if first:
            for buffer, g in zip(buffers, grads):
                buffer.copy_(g)  # a DTensor has no _foreach_copy_
        else:
            torch._foreach_mul_(buffers, momentum)
            torch._foreach_add_(buffers, grads, alpha=1 - dampening)
        ahead = torch._foreach_add(grads, buffers, alpha=momentum) if nesterov else buffers
        grads = list(ahead)
    if isinstance(lr, torch.Tensor):
        torch._foreach_sub_(params, torch._foreach_mul(grads, _without_dimensions(lr)))
    else:
        torch._foreach_add_(params, grads, alpha=-lr)


def adam_ref(
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
    """The reference of `kernels.adam`: same arguments, same results, plain torch."""
    if _one_pass(step, lr, params, grads, exp_avgs, exp_avg_sqs):
        update: Any = torch._fused_adamw_ if decoupled else torch._fused_adam_
        counts = [torch.tensor(float(step), device="cpu")] * len(params)
        numbers = {"lr": lr, "beta1": betas[0], "beta2": betas[1], "eps": eps}
        numbers |= {"weight_decay": weight_decay, "maximize": maximize, "amsgrad": False}
        update(params, grads, exp_avgs, exp_avg_sqs, [], counts, **numbers, **_UNSCALED)
        launch.changed(params, exp_avgs, exp_avg_sqs)
        return
    (beta1, beta2), step, lr = betas, _without_dimensions(step), _without_dimensions(lr)
    if decoupled and weight_decay:
        torch._foreach_mul_(params, 1 - lr * weight_decay)
    grads = _decayed(params, grads, 0.0 if decoupled else weight_decay, maximize)
    torch._foreach_lerp_(exp_avgs, grads, 1 - beta1)
    torch._foreach_mul_(exp_avg_sqs, beta2)
    torch._foreach_addcmul_(exp_avg_sqs, grads, grads, 1 - beta2)
    correction1, correction2 = _correction(beta1, step), _correction(beta2, step)
    denominators = torch._foreach_sqrt(exp_avg_sqs)
    torch._foreach_div_(denominators, correction2**0.5)
    torch._foreach_add_(denominators, eps)
    torch._foreach_div_(denominators, -lr / correction1)
    torch._foreach_addcdiv_(params, exp_avgs, denominators)


_UNSCALED = {"grad_scale": None, "found_inf": None}


def _one_pass(step, lr, *lists) -> bool:
    """True if torch's fused update for CPUs serves. It reads each tensor once, as plain memory."""
    if not lists[0]:
        return False
    first = lists[0][0]
    return (
        first.device.type == "cpu"
        and first.dtype in (torch.float32, torch.float64)
        and not isinstance(step, torch.Tensor)
        and not isinstance(lr, torch.Tensor)
        and not launch.watched()
        and launch.plain(*(t for tensors in lists for t in tensors))
        and all(
            t.is_contiguous() and t.dtype == first.dtype and t.device == first.device
            for tensors in lists
            for t in tensors
        )
    )


def _without_dimensions(value):
    """A one-element tensor without dimensions, as torch's foreach functions need it."""
    return value.reshape(()) if isinstance(value, torch.Tensor) else value


def _correction(beta, step):
    """1 - βᵗ. If step is a float32 tensor, expm1 computes it, because the difference cancels."""
    return -torch.expm1(step * _log(beta)) if isinstance(step, torch.Tensor) else 1 - beta**step


def _log(beta):
    """log β of a number or a tensor. For β = 0 it is so low that βᵗ is 0."""
    if isinstance(beta, torch.Tensor):
        return beta.log().clamp_min(-1e30)
    return math.log(beta) if beta else -1e30


def _decayed(params, grads, weight_decay, maximize):
    if maximize:
        grads = torch._foreach_neg(grads)
    return torch._foreach_add(grads, params, alpha=weight_decay) if weight_decay else grads


def _sgd_lists(params, grads, states, row, step):
    lr, decay = row
    sgd_ref(params, grads, params, lr, weight_decay=decay)


def _momentum_lists(params, grads, states, row, step, nesterov=False):
    lr, decay, momentum, dampening = row
    if not momentum:
        numbers = _momentum_numbers(row, step)
        for p, g, v in zip(params, grads, states[0]):
            _momentum_tensor(p, g, [v], numbers, nesterov)
        return
    first = bool(step == 1)
    if _is_fusible((params, grads, *states), (*row, step)):
        torch._fused_sgd_(
            params,
            grads,
            states[0],
            weight_decay=decay,
            momentum=momentum,
            lr=lr,
            dampening=dampening,
            nesterov=nesterov,
            maximize=False,
            is_first_step=first,
        )
        launch.changed(params, *states)
        return
    sgd_ref(params, grads, states[0], lr, momentum, dampening, decay, nesterov, first=first)


def _adam_lists(params, grads, states, row, step, decoupled=False):
    lr, decay, rate1, rate2, eps, _, _ = row
    if _is_fusible((params, grads, *states), (*row, step)):
        # torch's own loop over the elements passes over memory once. The calls of `adam_ref` pass
        # eight times.
        fused = torch._fused_adamw_ if decoupled else torch._fused_adam_
        fused(
            params,
            grads,
            *states,
            [],
            [torch.tensor(float(step), device="cpu")] * len(params),
            amsgrad=False,
            lr=lr,
            beta1=1 - rate1,
            beta2=1 - rate2,
            weight_decay=decay,
            eps=eps,
            maximize=False,
        )
        launch.changed(params, *states)
        return
    adam_ref(params, grads, *states, step, lr, (1 - rate1, 1 - rate2), eps, decay, decoupled)


def _is_fusible(lists, numbers) -> bool:
    """True if torch's fused updates serve.

    They need contiguous float32 tensors in plain CPU memory, numbers that are no tensors, and
    nothing that follows operations (`launch.watched`).
    """
    tensors = [t for ts in lists for t in ts]
    if not tensors or tensors[0].device.type != "cpu" or launch.watched():
        return False
    if any([isinstance(value, torch.Tensor) for value in numbers]) or not launch.plain(*tensors):
        return False
    return all([t.dtype == torch.float32 and t.is_contiguous() for t in tensors])


def _sgd_product(add, params, states, row, step):
    lr, decay = row
    add(params, 1 - lr * decay, -lr)
    return True


def _momentum_product(add, params, states, row, step):
    lr, decay, momentum, dampening = row
    if decay or step == 1 or not momentum:
        return False
    add(states[0], momentum, 1 - dampening)
    for p, v in zip(params, states[0]):
        p.add_(v, alpha=-lr)
    return True


# These work in place on one tensor. The numbers may be tensors that broadcast against it, with one
# number for each network.


def _plain_numbers(row, step):
    return row


def _momentum_numbers(row, step):
    lr, decay, momentum, dampening = row
    return lr, decay, momentum, dampening * ((momentum != 0) * (step != 1))


def _adam_numbers(row, step):
    *numbers, log_beta1, log_beta2 = row
    return *numbers, -_expm1(step * log_beta1), -_expm1(step * log_beta2)


def _expm1(value):
    return torch.expm1(value) if isinstance(value, torch.Tensor) else math.expm1(value)


def _add(t, other, factor):
    """t ← t + other · factor. The factor is a number or a tensor that broadcasts."""
    if isinstance(factor, torch.Tensor):
        return t.addcmul_(other, factor)
    return t.add_(other, alpha=factor)


def _sgd_tensor(p, g, states, numbers):
    lr, decay = numbers
    _add(p, _add(g.clone(), p, decay), -lr)


def _momentum_tensor(p, g, states, numbers, nesterov=False):
    (v,), (lr, decay, momentum, dampening) = states, numbers
    g = _add(g.clone(), p, decay)
    _add(v.mul_(momentum), g, 1 - dampening)
    _add(p, _add(g, v, momentum) if nesterov else v, -lr)


def _adam_tensor(p, g, states, numbers, decoupled=False):
    (m, v), (lr, decay, rate1, rate2, eps, correction1, correction2) = states, numbers
    if decoupled:
        p.mul_(1 - lr * decay)
    else:
        g = _add(g.clone(), p, decay)
    _add(m.mul_(1 - rate1), g, rate1)
    _add(v.mul_(1 - rate2), g * g, rate2)
    _add(p, m / (v.sqrt().div_(correction2**0.5).add_(eps)), -lr / correction1)


def _lion_tensor(p, g, states, numbers):
    (m,), (lr, decay, rate1, rate2) = states, numbers
    u = _add(m * (1 - rate1), g, rate1)
    p.mul_(1 - lr * decay)
    _add(p, torch.where(u == u, u.sign(), u), -lr)
    _add(m.mul_(1 - rate2), g, rate2)


def _rmsprop_tensor(p, g, states, numbers):
    (v, *buffers), (lr, decay, rate, eps, *momentum) = states, numbers
    g = _add(g.clone(), p, decay)
    _add(v.mul_(1 - rate), g * g, rate)
    u = g / (v.sqrt().add_(eps))
    for b, factor in zip(buffers, momentum):
        u = b.mul_(factor).add_(u)
    _add(p, u, -lr)


def _adagrad_numbers(row, step):
    lr, decay, lr_decay, eps = row
    return lr / (1 + (step - 1) * lr_decay), decay, lr_decay, eps


def _adagrad_tensor(p, g, states, numbers):
    (total,), (lr, decay, _, eps) = states, numbers
    g = _add(g.clone(), p, decay)
    total.add_(g * g)
    _add(p, g / (total.sqrt().add_(eps)), -lr)


def _row_as_given(*hyperparameters):
    return hyperparameters


def _adam_row(lr, weight_decay, beta1, beta2, eps):
    return lr, weight_decay, 1 - beta1, 1 - beta2, eps, _log(beta1), _log(beta2)


def _lion_row(lr, weight_decay, beta1, beta2):
    return lr, weight_decay, 1 - beta1, 1 - beta2


def _rmsprop_row(lr, weight_decay, alpha, eps, *momentum):
    return lr, weight_decay, 1 - alpha, eps, *momentum


@dataclasses.dataclass(frozen=True, eq=False)
class Rule:
    """One row of the table. States are zeros before the first step, and shaped like the parameter.

    A kernel takes the row as a constexpr argument. It uses `update`, `at` and `columns`.
    """

    name: str
    hyperparameters: tuple[tuple[str, Any], ...]  # torch's names and defaults; betas are a pair
    states: tuple[str, ...]  # torch's names of a parameter's states
    columns: tuple[str, ...]  # names of a row's columns
    row: Callable  # hyperparameters in order, pairs spread -> a row: numbers, or tensors of numbers
    at: Any  # jit (row, step) -> the step's numbers, one for each column; step 1 is the first
    update: Any  # jit (p, g, states, numbers) -> (p, states), elementwise in float32
    at_ref: Callable  # `at` for Python numbers or tensors
    update_ref: Callable  # (p, g, states, numbers): updates one tensor and its states in place
    torch: Callable | None  # () -> (torch's class, options that make it this rule): an oracle
    lists_ref: Callable | None = None  # (params, grads, states, row, step): all tensors at once
    # (add, params, states, row, step) -> True if it took the step, with no gradient in memory.
    # add(targets, beta, alpha) computes targets ← beta targets + alpha g in one product.
    product_ref: Callable | None = None

    @functools.cached_property
    def cache_key(self) -> str:
        """The key of this constexpr in Triton's cache on disk: a hash of the functions' source."""
        return key_of(self.name, self.at, self.update)

    def __repr__(self) -> str:
        return f"Rule({self.name})"

    def __reduce__(self) -> tuple:
        """A copy, or an unpickled row, is the row of this name. jit functions cannot be copied."""
        return get, (self.name,)


def key_of(*facts) -> str:
    """A hash of facts. For a jit function it covers its source and all functions that it calls."""
    text = "\n".join(f"{fact!r} {getattr(fact, 'cache_key', '')}" for fact in facts)
    return hashlib.sha256(text.encode()).hexdigest()


_SGD = (("lr", 1e-3), ("weight_decay", 0.0))
_MOMENTUM = (*_SGD, ("momentum", 0.0), ("dampening", 0.0))
_ADAM = (("lr", 1e-3), ("weight_decay", 0.0), ("betas", (0.9, 0.999)), ("eps", 1e-8))
_ADAM_COLUMNS = ("lr", "weight_decay", "rate1", "rate2", "eps", "log_beta1", "log_beta2")
_AS_GIVEN = ("lr", "weight_decay", "momentum", "dampening")
_ADAM_STATES = ("exp_avg", "exp_avg_sq")

_RMSPROP = (("lr", 1e-2), ("weight_decay", 0.0), ("alpha", 0.99), ("eps", 1e-8))
_ADAGRAD = (("lr", 1e-2), ("weight_decay", 0.0), ("lr_decay", 0.0), ("eps", 1e-10))

RULES: dict[str, Rule] = {
    rule.name: rule
    for rule in (
        Rule(
            "sgd",
            _SGD,
            (),
            ("lr", "weight_decay"),
            _row_as_given,
            plain_at,
            sgd_update,
            _plain_numbers,
            _sgd_tensor,
            lambda: (torch.optim.SGD, {}),
            _sgd_lists,
            _sgd_product,
        ),
        Rule(
            "momentum",
            _MOMENTUM,
            ("momentum_buffer",),
            _AS_GIVEN,
            _row_as_given,
            momentum_at,
            momentum_update,
            _momentum_numbers,
            _momentum_tensor,
            lambda: (torch.optim.SGD, {}),
            _momentum_lists,
            _momentum_product,
        ),
        Rule(
            "nesterov",
            _MOMENTUM,
            ("momentum_buffer",),
            _AS_GIVEN,
            _row_as_given,
            momentum_at,
            nesterov_update,
            _momentum_numbers,
            functools.partial(_momentum_tensor, nesterov=True),
            lambda: (torch.optim.SGD, {"nesterov": True}),
            functools.partial(_momentum_lists, nesterov=True),
        ),
        Rule(
            "adam",
            _ADAM,
            _ADAM_STATES,
            _ADAM_COLUMNS,
            _adam_row,
            adam_at,
            adam_update,
            _adam_numbers,
            _adam_tensor,
            lambda: (torch.optim.Adam, {}),
            _adam_lists,
        ),
        Rule(
            "adamw",
            _ADAM,
            _ADAM_STATES,
            _ADAM_COLUMNS,
            _adam_row,
            adam_at,
            adamw_update,
            _adam_numbers,
            functools.partial(_adam_tensor, decoupled=True),
            lambda: (torch.optim.AdamW, {}),
            functools.partial(_adam_lists, decoupled=True),
        ),
        Rule(
            "lion",
            (("lr", 1e-4), ("weight_decay", 0.0), ("betas", (0.9, 0.99))),
            ("exp_avg",),
            ("lr", "weight_decay", "rate1", "rate2"),
            _lion_row,
            plain_at,
            lion_update,
            _plain_numbers,
            _lion_tensor,
            None,
        ),
        Rule(
            "rmsprop",
            _RMSPROP,
            ("square_avg",),
            ("lr", "weight_decay", "rate", "eps"),
            _rmsprop_row,
            plain_at,
            rmsprop_update,
            _plain_numbers,
            _rmsprop_tensor,
            lambda: (torch.optim.RMSprop, {}),
        ),
        Rule(
            "rmsprop_momentum",
            (*_RMSPROP, ("momentum", 0.0)),
            ("square_avg", "momentum_buffer"),
            ("lr", "weight_decay", "rate", "eps", "momentum"),
            _rmsprop_row,
            plain_at,
            rmsprop_momentum_update,
            _plain_numbers,
            _rmsprop_tensor,
            lambda: (torch.optim.RMSprop, {"momentum": 0.9}),
        ),
        Rule(
            "adagrad",
            _ADAGRAD,
            ("sum",),
            ("lr", "weight_decay", "lr_decay", "eps"),
            _row_as_given,
            adagrad_at,
            adagrad_update,
            _adagrad_numbers,
            _adagrad_tensor,
            lambda: (torch.optim.Adagrad, {}),
        ),
    )
}


def get(rule: "str | Rule", op: str = "rule") -> Rule:
    """The row of that name, or the row given. If there is none, a ValueError lists the names."""
    if isinstance(rule, Rule):
        return rule
    if rule not in RULES:
        raise ValueError(f"{op}: unknown rule {rule!r}; known: {', '.join(RULES)}")
    return RULES[rule]


def row_of(rule: "str | Rule", **hyperparameters: Any) -> tuple:
    """The row of a rule's hyperparameters: a tuple with one number for each of `rule.columns`.

    rule: a row of the table, or its name. hyperparameters: by torch's names, `betas` as a pair.
    Those not given have the table's values. A value may be a tensor, such as a learning rate in
    device memory. Its columns are then tensors too. ValueError: an unknown rule or hyperparameter.
    """
    rule = get(rule)
    known = dict(rule.hyperparameters)
    if unknown := [name for name in hyperparameters if name not in known]:
        raise ValueError(
            f"{rule.name}: this rule has no {', '.join(sorted(unknown))}; its hyperparameters are "
            f"{', '.join(known)}"
        )
    spread: list = []
    for name, default in known.items():
        value = hyperparameters.get(name, default)
        spread += value if isinstance(default, tuple) else [value]
    return tuple(rule.row(*spread))


def hyperparameters(
    rule: "str | Rule" = "sgd",
    *,
    replicas: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    **values: Any,
) -> torch.Tensor:
    """The row of numbers that the training kernels read: (columns,), or (replicas, columns).

    values: the rule's hyperparameters by torch's names, see `Rule`. Each is a number (`betas` two
    numbers). With `replicas` it may also be a sequence or tensor of so many numbers. Column 0 is
    the learning rate. `hyper[..., 0] = 0.01` changes it, also for a captured graph. Rates such as
    1 - β are made in float64, because β in float32 is not exact enough. device, dtype: of the
    result. ValueError: an unknown rule, or a name that the rule does not have.
    """

    def as_column(value):
        return torch.as_tensor(value, dtype=torch.float64, device="cpu").expand(replicas or 1)

    rule = get(rule)
    pairs = {name for name, default in rule.hyperparameters if isinstance(default, tuple)}
    filled = {**dict(rule.hyperparameters), **values}
    columns = {
        name: tuple(map(as_column, value)) if name in pairs else as_column(value)
        for name, value in filled.items()
    }
    row = [column.expand(replicas or 1) for column in row_of(rule, **columns)]
    hyper = torch.stack(row, -1).to(device, dtype)
    return hyper if replicas else hyper[0]


def apply_ref(
    rule: Rule,
    params: list[torch.Tensor],
    grads: list[torch.Tensor],
    states: list[list[torch.Tensor]],
    row: Sequence | torch.Tensor,
    step: float | torch.Tensor,
) -> None:
    """One step of a rule in place, in plain torch.

    params, grads: lists of tensors of the same shapes. states: such a list for each of rule.states.
    row: the rule's numbers, as `row_of` gives them. For parameters that are stacked along a first
    dimension, a tensor (replicas, columns). step: the count of this step, 1 at the first.
    """
    if rule.lists_ref is not None and not isinstance(row, torch.Tensor):
        return rule.lists_ref(params, grads, states, row, step)
    for i, (p, g) in enumerate(zip(params, grads)):
        columns = row
        if isinstance(row, torch.Tensor):
            lead = (-1, row.shape[-1], *(1,) * (p.dim() - 1))
            columns = row.to(p.dtype).view(lead).unbind(1)
        rule.update_ref(p, g, [state[i] for state in states], rule.at_ref(columns, step))
