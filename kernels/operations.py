"""The table of operations, each with cases to run it on and torch's own function for comparison.

`handgrad info`, the tests and the compile checks iterate over it.

A new operation needs one `tape.Differentiable` and one row here. The file that defines it registers
its operators for torch.compile, and every test of operations takes the row.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .activations import ACTIVATIONS
from .losses import LOSSES
from .ops.conv import CONV2D, conv2d
from .ops.cross_entropy import CROSS_ENTROPY, cross_entropy
from .ops.elementwise_loss import ELEMENTWISE_LOSS, elementwise_loss
from .ops.layer_norm import LAYER_NORM, layer_norm
from .ops.linear import LINEAR, linear
from .ops.linear_cross_entropy import LINEAR_CROSS_ENTROPY, linear_cross_entropy
from .ops.mlp import MLP, mlp, mlp_fwd, mlp_fwd_ref
from .ops.mlp_update import mlp_update, mlp_update_ref
from .ops.optim import adam, adam_ref, sgd, sgd_ref
from .rules import RULES, hyperparameters
from .tape import Differentiable


class Make:
    """Seeded random arguments on one device in one dtype. On the meta device they have no values.

    device, dtype: of the arguments. seed: of the generator.
    """

    def __init__(self, device="cpu", dtype=torch.float32, seed=0):
        self.device, self.dtype = torch.device(device), dtype
        self.generator = torch.Generator().manual_seed(seed)

    def real(self, *shape):
        """A tensor of this shape with standard normal numbers."""
        if self.device.type == "meta":
            return torch.empty(shape, dtype=self.dtype, device="meta")
        return torch.randn(shape, generator=self.generator).to(self.device, self.dtype)

    def whole(self, *shape):
        """A tensor of this shape with the numbers -1, 0 and 1.

        Sums of their products are exact in every precision, whatever the order of the terms. So two
        computations agree on the sign before a kink and on the largest number of a window.
        """
        if self.device.type == "meta":
            return self.real(*shape)
        whole = torch.randint(-1, 2, shape, generator=self.generator)
        return whole.to(self.device, self.dtype)

    def positive(self, *shape):
        """A tensor of this shape with uniform numbers in [0.1, 1.1)."""
        if self.device.type == "meta":
            return self.real(*shape)
        return (torch.rand(shape, generator=self.generator) + 0.1).to(self.device, self.dtype)

    def labels(self, classes, *shape):
        """A tensor of this shape with int64 numbers in [0, classes)."""
        if self.device.type == "meta":
            return torch.empty(shape, dtype=torch.int64, device="meta")
        return torch.randint(0, classes, shape, generator=self.generator).to(self.device)


class Operation(NamedTuple):
    """One row: an operation's cases, launchers and references.

    `cases(make, m, k, n)` yields (label, arguments of fwd) for a batch of m, k features in and n
    out.

    Differentiable operations have the other fields too. `function` is what users call with these
    arguments. `oracle` is the same in torch's functions. `definition` is the operation's
    `tape.Differentiable`.
    """

    cases: Callable[[Make, int, int, int], Iterator[tuple[str, tuple]]]
    fwd: Callable
    fwd_ref: Callable
    bwd: Callable | None = None
    bwd_ref: Callable | None = None
    function: Callable | None = None
    oracle: Callable | None = None
    definition: Differentiable | None = None

    @classmethod
    def of(
        cls, op: Differentiable, function: Callable, oracle: Callable, cases: Callable
    ) -> "Operation":
        """The row of an operation with a gradient."""
        return cls(cases, op.fwd, op.fwd_ref, op.bwd, op.bwd_ref, function, oracle, op)

    def results(self, args: tuple, dy=None, *, reference: bool = False) -> list[torch.Tensor]:
        """The forward's output and every gradient, as one flat list.

        They come from the launchers, or with `reference` from the reference. dy: the gradient of
        the output, ones if None.
        """
        y, saved = (self.fwd_ref if reference else self.fwd)(*args)
        outputs = flatten(y)
        if self.bwd is not None and self.bwd_ref is not None:
            dy = torch.ones_like(y) if dy is None else dy
            outputs += flatten((self.bwd_ref if reference else self.bwd)(dy, *saved))
        return outputs


def flatten(value) -> list[torch.Tensor]:
    """The tensors in nested tuples and lists, in order. Everything else is dropped."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for item in value for t in flatten(item)] if isinstance(value, (tuple, list)) else []


def _linear_cases(make, m, k, n):
    for activation, row in ACTIVATIONS.items():
        draw = make.whole if row.kinks else make.real
        yield activation, (draw(m, k), draw(n, k), make.real(n), activation)
    yield "no bias", (make.real(m, k), make.real(n, k), None, "sigmoid")


def _linear_torch(x, w, b, activation):
    return ACTIVATIONS[activation].torch(F.linear(x, w, b))


def _mlp_cases(make, m, k, n):
    widths = (k, n + 3, n, 10)
    weights = [make.real(o, i) for i, o in itertools.pairwise(widths)]
    for activation, output in (("sigmoid", "identity"), ("gelu", "tanh")):
        yield (
            f"{activation}, {output}",
            (make.real(m, k), weights, [make.real(w) for w in widths[1:]], activation, output),
        )
    weights = [make.whole(*w.shape) for w in weights]
    yield "no biases", (make.whole(m, k), weights, [None] * 3, "relu", "identity")


def _mlp_torch(x, weights, biases, activation, output_activation):
    for layer, (w, b) in enumerate(zip(weights, biases), 1):
        x = _linear_torch(x, w, b, activation if layer < len(weights) else output_activation)
    return x


def _cross_entropy_cases(make, m, k, n):
    logits, labels = make.real(m, n), make.labels(n, m)
    for reduction in ("mean", "sum", "none"):
        yield reduction, (logits, labels, None, -100, reduction)
    yield "weight, smoothing", (logits, labels, make.positive(n), -100, "mean", 0.1)
    yield "ignore_index", (logits, labels, None, 0, "sum", 0.1)
    yield "probabilities", (logits, make.positive(m, n), None, -100, "mean", 0.1)
    yield "(N, C, d1, d2)", (make.real(m, n, 2, 3), make.labels(n, m, 2, 3))


def _cross_entropy_torch(
    input, target, weight=None, ignore_index=-100, reduction="mean", label_smoothing=0.0
):
    options = {"ignore_index": ignore_index, "reduction": reduction}
    return F.cross_entropy(input, target, weight, **options, label_smoothing=label_smoothing)


def _linear_cross_entropy_cases(make, m, k, n):
    x, w, b = make.real(m, k), make.real(n, k), make.real(n)
    yield "mean", (x, w, b, make.labels(n, m))
    yield "no bias, none", (x, w, None, make.labels(n, m), make.positive(n), -100, "none", 0.1)
    yield "probabilities", (x, w, b, make.positive(m, n))


def _linear_cross_entropy_torch(x, w, b, *options):
    return _cross_entropy_torch(F.linear(x, w, b), *options)


def _elementwise_loss_cases(make, m, k, n):
    for row in LOSSES.values():
        if row.scalar is not None:
            x, t = make.real(m, n), make.positive(m, n)
            for reduction in ("mean", "sum", "none"):
                yield f"{row.name}, {reduction}", (x, t, row.name, None, None, reduction)
            weight = make.positive(n) if row.vector else None
            yield f"{row.name}, weights", (x, t, row.name, weight, make.positive(m, 1), "mean")


def _elementwise_loss_torch(x, t, loss, parameter, weight, reduction):
    # torch has no pinball loss that would cast by itself.
    if torch.is_autocast_enabled(x.device.type):
        x, t = (v if v.dtype == torch.float64 else v.float() for v in (x, t))
    row = LOSSES[loss]
    value = row.torch(x, t, row.default if parameter is None else parameter, "none")
    value = value if weight is None else value * weight
    return {"none": value, "sum": value.sum(), "mean": value.mean()}[reduction]


def _conv2d_cases(make, m, k, n):
    """Cases of k channels in and n out.

    On the meta device, images have the size of MNIST's. On others they are small enough for the
    interpreter. Where a window has a largest number, images and weights are whole.
    """
    small = make.device.type != "meta"
    m, k, n = (min(m, 3), min(k, 2), min(n, 5)) if small else (m, k, n)
    h, w, kernel = (8, 7, 3) if small else (28, 28, 5)
    x, b, whole = make.real(m, k, h, w), make.real(n), make.whole(m, k, h, w)
    yield "pool", (whole, make.whole(n, k, kernel, kernel), b, 1, 0, "relu", 2)
    halves = whole / 2  # gelu of numbers below -5 is nearly 0, so these would be ties
    yield "same, no bias", (halves, make.whole(n, k, 2, 3), None, 1, "same", "gelu", (1, 2))
    yield "stride, dilation", (x, make.real(n, k, 3, 2), b, (2, 1), (1, 2), "sigmoid", 1, (1, 2))
    yield "one image", (make.whole(k, h, w), make.whole(n, k, 1, 1), b, 1, 0, "identity", 2)


def _conv2d_torch(x, w, b, stride, padding, activation, max_pool, *options):
    y = F.conv2d(x, w, b, stride, padding, *options)
    return F.max_pool2d(ACTIVATIONS[activation].torch(y), max_pool)


def _layer_norm_cases(make, m, k, n):
    yield "rows", (make.real(m, k), make.real(k), make.real(k), (k,), 1e-5)
    shape = (n, 3)
    yield "(N, …, S, S)", (make.real(m, 2, *shape), make.real(*shape), make.real(*shape), shape)
    yield "no bias", (make.real(m, n), make.real(n), None, (n,), 0.1)
    if make.device.type == "meta":
        # Without weight, a row's sum is 0 for every x. Its gradient is 0, which gives no scale for
        # errors.
        yield "no weight", (make.real(m, n), None, None, (n,))
        # This case is wider than a tile, and takes long in the interpreter.
        yield "wide", (make.real(m, 4099), make.real(4099), make.real(4099), (4099,))


def _layer_norm(x, w, b, normalized_shape, *eps):
    return layer_norm(x, normalized_shape, w, b, *eps)


def _layer_norm_torch(x, w, b, normalized_shape, *eps):
    return F.layer_norm(x, normalized_shape, w, b, *eps)


def _updates(update):
    """An optimizer's update as a forward. It works on copies and returns everything it changed."""

    def forward(lists, *options):
        lists = [[t.clone() for t in tensors] for tensors in lists]
        update(*lists, *options)
        return lists, ()

    return forward


def _parameters(make, k, n, copies):
    """`copies` lists of tensors shaped like a small network's parameters.

    The numbers of the last list are positive.
    """
    shapes = ((n, k), (n,), (10, n), (10,))
    return [
        [(make.positive if i == copies - 1 else make.real)(*shape) for shape in shapes]
        for i in range(copies)
    ]


def _sgd_cases(make, m, k, n):
    lists = _parameters(make, k, n, 3)
    yield "plain", (lists, 0.1)
    yield "momentum", (lists, 0.1, 0.9, 0.1, 0.01)
    yield "Nesterov, first", (lists, 0.1, 0.9, 0.0, 0.01, True, True, True)


def _adam_cases(make, m, k, n):
    lists = _parameters(make, k, n, 4)
    yield "Adam", (lists, 3, 0.01, (0.9, 0.999), 1e-8, 0.1)
    yield "AdamW", (lists, 1, 0.01, (0.9, 0.999), 1e-8, 0.1, True)


def _mlp_update(fwd, update):
    """A stack's training step as a forward: forward, then update, on copies.

    It returns everything it changed.
    """

    def forward(x, dy, parameters, states, hyper, step, rule, bias):
        parameters, *states = [[t.clone() for t in ts] for ts in (parameters, *states)]
        weights = parameters[:: 1 + bias]
        _, saved = fwd(x, weights, parameters[1::2] if bias else [None] * len(weights), "sigmoid")
        update(dy, saved, parameters, states, hyper, step, rule)
        return [parameters, states], ()

    return forward


def _mlp_update_cases(make, m, k, n):
    varied = {"momentum": 0.9, "dampening": 0.2}
    for i, rule in enumerate(RULES.values()):
        for step, bias, decay in ((2, True, 0.01), (1 + i % 3, False, 0.0)):
            shapes = [shape for shape in ((n, k), (n,), (10, n), (10,)) if bias or len(shape) == 2]
            states = [[make.positive(*shape) for shape in shapes] for _ in rule.states]
            known = {name: varied[name] for name, _ in rule.hyperparameters if name in varied}
            hyper = hyperparameters(rule, lr=0.1, weight_decay=decay, **known, device=make.device)
            yield (
                f"{rule.name}, decay {decay}",
                (
                    make.real(m, k),
                    make.real(m, 10),
                    [make.real(*shape) for shape in shapes],
                    states,
                    hyper,
                    step,
                    rule,
                    bias,
                ),
            )


OPERATIONS: dict[str, Operation] = {
    "linear": Operation.of(LINEAR, linear, _linear_torch, _linear_cases),
    "mlp": Operation.of(MLP, mlp, _mlp_torch, _mlp_cases),
    "cross_entropy": Operation.of(
        CROSS_ENTROPY, cross_entropy, _cross_entropy_torch, _cross_entropy_cases
    ),
    "linear_cross_entropy": Operation.of(
        LINEAR_CROSS_ENTROPY,
        linear_cross_entropy,
        _linear_cross_entropy_torch,
        _linear_cross_entropy_cases,
    ),
    "elementwise_loss": Operation.of(
        ELEMENTWISE_LOSS, elementwise_loss, _elementwise_loss_torch, _elementwise_loss_cases
    ),
    "layer_norm": Operation.of(LAYER_NORM, _layer_norm, _layer_norm_torch, _layer_norm_cases),
    "conv2d": Operation.of(CONV2D, conv2d, _conv2d_torch, _conv2d_cases),
    "mlp_update": Operation(
        _mlp_update_cases,
        _mlp_update(mlp_fwd, mlp_update),
        _mlp_update(mlp_fwd_ref, mlp_update_ref),
    ),
    "sgd": Operation(_sgd_cases, _updates(sgd), _updates(sgd_ref)),
    "adam": Operation(_adam_cases, _updates(adam), _updates(adam_ref)),
}
