"""What the training kernels train: one description of network, loss and optimizer, its limits, and
one step in plain torch.

    y_0 = x,  y_l = act_l(y_{l-1} w_lᵀ + b_l)  for l = 1 … L           hidden layers share an
        activation, the last has its own
    loss = s · Σ_m ℓ(y_L, t)                                           ℓ: a row of `losses`, summed
        over outputs; s = loss_scale, over the batch's rows if loss_mean. torch's mean of squared
        error: s = 1/C; ½ Σ over the batch: s = ½, no mean; the sigmoid recipe's cross-entropy
        averages over classes too: s = 1/C
    dz_L = ∂loss/∂y_L ⊙ act_L',  dz_{l-1} = (dz_l w_l) ⊙ act',  dw_l = dz_lᵀ y_{l-1},  db_l = Σ_m
        dz_l

then every parameter takes its update by `rule`, as in `optim`. Numbers that a run may change
(learning rate, momentum, …) are no part of the description: they live in a device tensor, see
`hyperparameters`.

`parameters` is a list [w_1, b_1, w_2, b_2, …], or [w_1, w_2, …] without biases; `states` holds
lists of the same shapes: none for plain sgd, momentum buffers, or Adam's two averages. All start as
zeros.
"""

import dataclasses
import functools
import math
from typing import Any

import torch
import triton

from . import activations, configs, launch, losses, rules
from .cross_entropy import check_range
from .mlp import mlp_bwd_ref, mlp_fwd_ref
from .rules import Rule

MAX_WIDTH, MAX_CLASSES, MAX_BATCH = 256, 64, 128


@dataclasses.dataclass(frozen=True)
class Spec:
    """A network, its loss and its optimizer: see the module's formulas. `sizes` = (features, hidden
    …, classes). loss: a row of `losses`, or its name; loss_parameter: its number, or one for each
    output. rule: a row of `rules`, or its name.
    """

    sizes: tuple[int, ...]
    activation: str = "relu"
    output_activation: str = "identity"
    bias: bool = True
    loss: losses.Loss = losses.LOSSES["cross_entropy"]
    loss_scale: float = 1.0
    loss_mean: bool = True
    rule: Rule = rules.RULES["sgd"]
    loss_parameter: float | tuple[float, ...] | None = None

    def __post_init__(self):
        if isinstance(self.loss, str):
            object.__setattr__(self, "loss", losses.get(self.loss))
        object.__setattr__(self, "rule", rules.get(self.rule, "Spec"))

    @property
    def loss_numbers(self) -> tuple[float, ...]:
        """The loss's parameter, checked: one number or one for each output; (1,) if it has none."""
        return self.loss.numbers(self.loss_parameter) or (1.0,)

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Shapes of the parameters, in order."""
        pairs = zip(self.sizes[1:], self.sizes[:-1])
        return [shape for n, k in pairs for shape in (((n, k), (n,)) if self.bias else ((n, k),))]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a training kernel knows at compile time: a Spec's facts, its functions and the tiles, as
    one hashable constexpr.
    """

    sizes: tuple[int, ...]
    tiles: tuple[int, ...]  # columns of a layer that are computed at once
    bias: int
    columns: tuple[str, ...]  # of a row of hyperparameters
    at: Any  # of the rule, as `update`: see `rules`
    update: Any
    loss: losses.Loss
    loss_numbers: tuple[float, ...]
    loss_scale: float
    loss_mean: bool
    soft: bool  # targets are (n, classes) numbers, not labels
    precision: str
    block_m: int  # batch rows, padded
    block_k: int  # input features read at once
    block_r: int  # terms of a sum over a hidden layer's units taken at once
    pitch: int  # row length of the scratch that holds y_l and dz_l
    threads: int  # of a program: several hold an element of a tile that is smaller

    @functools.cached_property
    def cache_key(self) -> str:
        """What Triton's cache on disk knows of it: functions by their source."""
        return rules.key_of(*(getattr(self, field.name) for field in dataclasses.fields(self)))


def plan(spec: Spec, batch: int, targets, kernel: str) -> tuple[Plan, int, dict]:
    """For `kernel` on the targets' device: its Plan, the rows of w_1 that a program owns, and its
    options and constexprs.
    """
    block_m = max(16, triton.next_power_of_2(batch))
    precision, arch = launch.dot_precision(), launch.arch(targets.device)
    states = len(spec.rule.states)
    config = configs.training(kernel, arch, precision, states, spec.sizes, block_m)
    padded = [max(16, triton.next_power_of_2(size)) for size in spec.sizes]
    tiles = (*(min(p, config.columns) for p in padded[:-1]), padded[-1])
    made = Plan(
        tuple(spec.sizes),
        tiles,
        int(spec.bias),
        spec.rule.columns,
        spec.rule.at,
        spec.rule.update,
        spec.loss,
        spec.loss_numbers,
        float(spec.loss_scale),
        spec.loss_mean,
        targets.is_floating_point(),
        precision,
        block_m,
        config.block_k,
        config.block_r,
        max(padded[1:]),
        config.num_warps * launch.lanes(arch),
    )
    options = dict(acts(spec), NET=made, num_warps=config.num_warps, num_stages=config.num_stages)
    if arch.startswith("sm_"):
        options["maxnreg"] = min(
            255, 2048 // config.num_warps
        )  # else ptxas may stop at 128 for a second block, and spill
    return made, min(config.rows, padded[1]), options


def acts(spec: Spec) -> dict:
    """The jit scalars of hidden and output activation, as the kernels' constexpr arguments."""
    hidden, output = activations.get(spec.activation), activations.get(spec.output_activation)
    return dict(
        ACT=hidden.forward, ACT_BWD=hidden.backward, OUT=output.forward, OUT_BWD=output.backward
    )


def refusal(spec: Spec, batch: int, engine: str = "epoch") -> str | None:
    """None where the training kernels serve this network; else one line: the limit, both values,
    and what would do it.
    """
    instead = "use engine 'graph' or 'manual'" if engine == "epoch" else "use engine 'manual'"
    for name in (spec.activation, spec.output_activation):
        if activations.get(name, engine).needs == "z":
            return (
                f"{engine}: the derivative of {name!r} needs the pre-activation, which these "
                f"kernels do not keep; {instead}"
            )
    if len(spec.sizes) < 2 or min(spec.sizes) < 1 or batch < 1:
        return (
            f"{engine}: sizes must be (features, …, classes), all at least 1, and so the batch, "
            f"got {spec.sizes} and {batch}"
        )
    if len(spec.loss_numbers) not in (1, spec.sizes[-1]):
        return (
            f"{engine}: {spec.loss.parameter} must be one number or one for each of "
            f"{spec.sizes[-1]} outputs, got {len(spec.loss_numbers)}"
        )
    limits = [
        ("hidden width", max(spec.sizes[1:-1], default=1), MAX_WIDTH),
        ("classes", spec.sizes[-1], MAX_CLASSES),
        ("batch", batch, MAX_BATCH),
    ]
    for what, value, limit in limits:
        if value > limit:
            return f"{engine}: {what} {value} exceeds {limit}; {instead}"
    return None


def check_training(
    op: str, spec: Spec, parameters, states, data, targets, batch: int, replicas: int | None = None
) -> None:
    """Limits, shapes and dtypes of a training run; a ValueError that names both values."""
    reason = refusal(spec, batch, op)
    if reason:
        raise ValueError(reason)
    if len(states) != (needed := len(spec.rule.states)):
        raise ValueError(
            f"{op}: rule {spec.rule.name!r} needs {needed} lists of states, got {len(states)}"
        )
    lead = () if replicas is None else (replicas,)
    for name, tensors in (
        ("parameters", parameters),
        *((f"states[{i}]", s) for i, s in enumerate(states)),
    ):
        got = [tuple(t.shape) for t in tensors]
        if got != (want := [(*lead, *shape) for shape in spec.shapes]):
            raise ValueError(
                f"{op}: {name} must have shapes {want} for sizes {spec.sizes}, got {got}"
            )
        if bad := [i for i, t in enumerate(tensors) if not t.is_contiguous()]:
            raise ValueError(
                f"{op}: {name}[{bad[0]}] must be contiguous; pass .contiguous() and copy back"
            )
    if data.dim() != 2 or data.shape[1] != spec.sizes[0] or not data.is_contiguous():
        raise ValueError(
            f"{op}: data must be contiguous (n, {spec.sizes[0]}), got {tuple(data.shape)}; "
            "flatten it"
        )
    if reason := spec.loss.refusal(spec.sizes[-1], targets):
        raise ValueError(reason)
    want = (len(data), spec.sizes[-1]) if targets.is_floating_point() else (len(data),)
    if tuple(targets.shape) != want or not targets.is_contiguous():
        raise ValueError(f"{op}: targets must be contiguous {want}, got {tuple(targets.shape)}")


def loss_ref(spec: Spec, y, target):
    """(loss (…,), ∂loss/∂y (…, M, C)) of outputs y (…, M, C) and labels (…, M) or targets
    (…, M, C).
    """
    row, t, rows = spec.loss, target, y.shape[-2]
    if not target.is_floating_point():
        check_range(target, y.shape[-1], row.ignored, row.function)
        t = target.unsqueeze(-1) == torch.arange(y.shape[-1], device=y.device)
        t, rows = t.to(torch.int8), (target.long() != row.ignored).sum(-1)
    parameter = torch.tensor(spec.loss_numbers, dtype=y.dtype, device=y.device)
    factor = torch.as_tensor(spec.loss_scale, dtype=y.dtype, device=y.device)
    factor = factor / rows if spec.loss_mean else factor
    loss, grad = row.value_ref(y, t, parameter), row.gradient_ref(y, t, parameter)
    scale = factor.masked_fill(factor.isinf(), 0)  # every row ignored: no gradient, as torch
    return loss.sum((-2, -1)) * factor, grad * scale[..., None, None]


def correct_ref(spec: Spec, y, target):
    """How many rows of outputs (…, M, C) are right, as the loss counts it; of labels: how many
    have their largest output where the label is.
    """
    if target.is_floating_point():
        return spec.loss.correct_ref(y, target).sum(-1)
    return (y.argmax(-1) == target).sum(-1)


def step_ref(spec: Spec, parameters, states, x, target, hyper, step: int):
    """One training step in place, by the references: (loss, correct). hyper: a row's numbers; step:
    1 at the first.
    """
    weights = parameters[:: 1 + spec.bias]
    biases = parameters[1::2] if spec.bias else [None] * len(weights)
    y, saved = mlp_fwd_ref(x, weights, biases, spec.activation, spec.output_activation)
    loss, dy = loss_ref(spec, y, target)
    _, dws, dbs = mlp_bwd_ref(dy, *saved, needs=(False, *(True,) * 2 * len(weights)))
    grads = [g for pair in zip(dws, dbs) for g in pair if g is not None]
    rules.apply_ref(spec.rule, parameters, grads, states, hyper, step)
    return loss, correct_ref(spec, y, target)


def inputs_ref(data, rows, scale: float, shift: float, dtype):
    """Rows of the data as the kernels see them: data · scale + shift, in the parameters' dtype."""
    x = data[rows].to(dtype)
    return x if (scale, shift) == (1.0, 0.0) else x * scale + shift


def steps_of(n: int, batch: int) -> int:
    """Steps of an epoch over n rows; the last may be smaller."""
    return math.ceil(n / batch)
