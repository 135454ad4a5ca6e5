"""The optimizers' updates as torch.library operators that mutate their tensors, see `compiled`."""

import torch

from . import launch
from .ops.optim import adam, apply_rule, apply_rule_ref, sgd

ops = torch.ops.handgrad


def mutating(schema: str):
    """A decorator that registers a function as the operator of this schema. It returns nothing."""

    def register(function):
        name, _, rest = schema.partition("(")
        mutated = [argument.split()[-1] for argument in rest.split(",") if "!" in argument]
        op = torch.library.custom_op(
            f"handgrad::{name}", function, mutates_args=mutated, schema=f"({rest}"
        )
        op.register_fake(lambda *args: None)
        return op

    return register


# A learning rate or step may be a tensor. It is passed in its own argument, and the number beside
# it is then ignored. Without momentum, `buffers` is empty. sgd's own convention passes the
# parameters in its place, but an operator may not mutate one tensor under two names.


@mutating(
    "sgd(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] buffers, Tensor? lr_tensor, float lr, "
    "float momentum, "
    "float dampening, float weight_decay, bool nesterov, bool maximize, bool first) -> ()"
)
def sgd_op(params, grads, buffers, lr_tensor, lr, *options):
    sgd(params, grads, buffers or params, lr if lr_tensor is None else lr_tensor, *options)


@mutating(
    "adam(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor? step_tensor, "
    "float step, Tensor? lr_tensor, float lr, float[] betas, float eps, float weight_decay, bool "
    "decoupled, bool maximize) -> ()"
)
def adam_op(params, grads, exp_avgs, exp_avg_sqs, step_tensor, step, lr_tensor, lr, *options):
    step, lr = step if step_tensor is None else step_tensor, lr if lr_tensor is None else lr_tensor
    adam(params, grads, exp_avgs, exp_avg_sqs, step, lr, *options)


@mutating(
    "apply_rule(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] states, str rule, Tensor? "
    "lr_tensor, float[] row, Tensor? step_tensor, float step, bool maximize, bool first) -> ()"
)
def apply_rule_op(params, grads, states, rule, lr_tensor, row, step_tensor, step, *flags):
    row = row if lr_tensor is None else (lr_tensor, *row[1:])
    step = step if step_tensor is None else step_tensor
    count = len(params)
    lists = [states[i : i + count] for i in range(0, len(states), count)]
    maximize, first = flags
    apply_rule(rule, params, grads, lists, row, step, maximize=maximize, first=first)


def _number(value) -> tuple[torch.Tensor | None, float]:
    return (value, 0.0) if isinstance(value, torch.Tensor) else (None, float(value))


def _sgd(params, grads, buffers, lr, momentum, *options):
    ops.sgd(params, grads, buffers if momentum else [], *_number(lr), momentum, *options)


def _adam(params, grads, exp_avgs, exp_avg_sqs, step, lr, betas, *options):
    ops.adam(
        params, grads, exp_avgs, exp_avg_sqs, *_number(step), *_number(lr), list(betas), *options
    )


def _apply_rule(rule, params, grads, states, row, *, step, maximize, first):
    if any(isinstance(number, torch.Tensor) for number in row[1:]):
        flags = {"maximize": maximize, "first": first}
        return apply_rule_ref(rule, params, grads, states, row, step, **flags)
    lr, rate = _number(row[0])
    flat = [t for tensors in states for t in tensors]
    numbers = lr, [rate, *row[1:]], *_number(step)
    return ops.apply_rule(params, grads, flat, rule.name, *numbers, maximize, first)


launch.operators.update(sgd=_sgd, adam=_adam, apply_rule=_apply_rule)
