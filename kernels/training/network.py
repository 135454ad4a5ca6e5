"""What the training kernels train, and one step of it in plain torch.

One description holds the network, the loss and the optimizer. Its limits are here.

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
from typing import TYPE_CHECKING, Any

import torch
import triton

from .. import activations, configs, launch, losses, rules
from ..ops.cross_entropy import check_range
from ..ops.linear import (
    kept,
    layer_ref,
    linear_bwd_dw_ref,
    linear_bwd_dx_ref,
    linear_bwd_dz_ref,
)
from ..ops.mlp import stack_backward, stack_forward
from ..rules import Rule

if TYPE_CHECKING:
    from .run import Run

MAX_WIDTH, MAX_CLASSES = 256, 64


@dataclasses.dataclass(frozen=True)
class Spec:
    """A network, its loss and its optimizer; the formulas are the module's.

    sizes: (features, hidden …, classes). loss: a row of `losses`, or its name. loss_parameter: its
    number, or one for each output. rule: a row of `rules`, or its name.
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
    """What a training kernel knows at compile time, as one hashable constexpr.

    A Spec's facts, its functions, and the tiles.
    """

    sizes: tuple[int, ...]
    tiles: tuple[int, ...]  # columns of a layer that are computed at once
    bias: int
    act: Any  # jit scalars, see `activations`: of the hidden layers
    act_bwd: Any
    out: Any  # and of the last
    out_bwd: Any
    keeps_z: bool  # whether act_bwd needs z, and out_bwd
    out_needs_z: bool
    columns: tuple[str, ...]  # of a row of hyperparameters
    scheduled: bool  # whether there is such a row for each step
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


def plan(run: "Run", kernel: str) -> tuple[Plan, int, dict]:
    """For `kernel` on the run's device: (Plan, rows of w_1 of each program, launch options)."""
    spec, block_m = run.spec, padded(run.batch)
    precision, arch = launch.dot_precision(), launch.arch(run.device)
    hidden, output = activations.get(spec.activation), activations.get(spec.output_activation)
    states = len(spec.rule.states)
    config = configs.training(kernel, arch, precision, states, spec.sizes, block_m)
    sides = [padded(size) for size in spec.sizes]
    planned = Plan(
        sizes=tuple(spec.sizes),
        tiles=(*(min(side, config.columns) for side in sides[:-1]), sides[-1]),
        bias=int(spec.bias),
        act=hidden.forward,
        act_bwd=hidden.backward,
        out=output.forward,
        out_bwd=output.backward,
        keeps_z=hidden.needs_z and len(spec.sizes) > 2,
        out_needs_z=output.needs_z,
        columns=spec.rule.columns,
        scheduled=run.scheduled,
        at=spec.rule.at,
        update=spec.rule.update,
        loss=spec.loss,
        loss_numbers=spec.loss_numbers,
        loss_scale=float(spec.loss_scale),
        loss_mean=spec.loss_mean,
        soft=run.targets.is_floating_point(),
        precision=precision,
        block_m=block_m,
        block_k=config.block_k,
        block_r=config.block_r,
        pitch=max(sides[1:]),
        threads=config.num_warps * launch.lanes(arch),
    )
    options = dict(NET=planned, num_warps=config.num_warps, num_stages=config.num_stages)
    if arch.startswith("sm_"):
        # Else ptxas may stop at 128 registers, for a second block, and spill.
        options["maxnreg"] = min(255, 2048 // config.num_warps)
    return planned, min(config.rows, sides[1]), options


def refusal(spec: Spec, batch: int, engine: str = "epoch") -> str | None:
    """None where the training kernels serve this network; else one line that says why.

    The line names the limit, both values, and what would do it. What fits in registers depends on
    the precision of float32 products.
    """
    precision = launch.dot_precision()
    instead = "use engine 'graph' or 'manual'" if engine == "epoch" else "use engine 'manual'"
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
        ("batch", batch, max(configs.MOST_ROWS.values())),
        (f"at float32 precision {precision}, batch", batch, configs.MOST_ROWS[precision]),
        (
            f"at float32 precision {precision}, batch times classes, both padded to powers of two,",
            padded(batch) * padded(spec.sizes[-1]),
            configs.MOST_OUTPUTS[precision],
        ),
    ]
    for what, value, limit in limits:
        if value > limit:
            return f"{engine}: {what} {value} exceeds {limit}; {instead}"
    return None


def padded(size: int) -> int:
    """A tile's side for so many elements: a power of two, at least 16."""
    return max(16, triton.next_power_of_2(size))


def outgrown(spec: Spec, batch: int, engine: str = "epoch") -> str | None:
    """Why a chain of products would be faster than the training kernels, or None.

    Each of their programs repeats the layers above the first.
    """
    widths = spec.sizes[1:]
    products = 3 * batch * sum(n * k for n, k in zip(widths[1:], widths))
    if products <= configs.MOST_REPEATED:
        return None
    return (
        f"{engine}: {products:,} multiply-adds a step above the first layer exceed "
        f"{configs.MOST_REPEATED:,}, so separate products are faster"
    )


def refuse(run: "Run", engine: str) -> None:
    """A ValueError where `refusal` has a reason."""
    if reason := refusal(run.spec, run.batch, engine):
        raise ValueError(reason)


def loss_ref(
    spec: Spec, y: torch.Tensor, target: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss (…,), ∂loss/∂y (…, M, C)) of outputs y (…, M, C).

    The target is labels (…, M), or numbers (…, M, C).
    """
    row, t = spec.loss, target
    rows: int | torch.Tensor = y.shape[-2]
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


def correct_ref(spec: Spec, y: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """How many rows of outputs (…, M, C) are right, as the loss counts it.

    With labels: how many rows have their largest output at the label.
    """
    if target.is_floating_point():
        return spec.loss.correct_ref(y, target).sum(-1)
    return (y.argmax(-1) == target).sum(-1)


def gradients_ref(
    spec: Spec, parameters: list[torch.Tensor], x: torch.Tensor, target: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """(loss, correct, gradients in the parameters' order) of inputs (M, features).

    Of R stacked networks, with inputs (R, M, features): R losses and counts.
    """
    weights = parameters[:: 1 + spec.bias]
    biases = parameters[1::2] if spec.bias else [None] * len(weights)
    fwd, *bwd = _ALONE if x.dim() == 2 else _STACKED
    acts = spec.activation, spec.output_activation
    y, saved = stack_forward(x, weights, biases, *acts, None, fwd)
    loss, dy = loss_ref(spec, y, target)
    needs = (False, *(True,) * 2 * len(weights))
    _, dws, dbs = stack_backward(dy, saved, needs, None, *bwd)
    grads = [g for pair in zip(dws, dbs) for g in pair if g is not None]
    return loss, correct_ref(spec, y, target), grads


def step_ref(
    run: "Run", rows: torch.Tensor, row: Any, step: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """One training step in place, by the references: (loss, correct).

    rows: of the data, (M,) or (R, M). row: the numbers of run.hyper, or of several networks the
    tensor. step: 1 at the first.
    """
    x, target = run.inputs(rows), run.targets[rows]
    loss, correct, grads = gradients_ref(run.spec, run.parameters, x, target)
    rules.apply_ref(run.spec.rule, run.parameters, grads, run.states, row, step)
    return loss, correct


def _stacked_fwd(x, w, b, activation, *, out=None):
    """`layer_ref` of R networks: x (R, M, K), w (R, N, K), b (R, N)."""
    act = activations.get(activation)
    z = torch.bmm(x, w.mT) if b is None else torch.baddbmm(b.unsqueeze(1), x, w.mT)
    y = act.forward_ref(z)
    return y, kept(act, y, z)


def _stacked_bwd_dz(dy, s, activation, *, out=None):
    return dy if s is None else activations.get(activation).backward_ref(dy, s)


def _stacked_bwd_dx(dz, w, s_below=None, activation_below="identity", *, out=None):
    return _stacked_bwd_dz(torch.bmm(dz, w), s_below, activation_below)


def _stacked_bwd_dw(dz, x, bias=True, *, out=None):
    return torch.bmm(dz.mT, x), dz.sum(1) if bias else None


# How a stack of layers computes: forward, and the three parts of the backward.
_ALONE = layer_ref, linear_bwd_dz_ref, linear_bwd_dx_ref, linear_bwd_dw_ref
_STACKED = _stacked_fwd, _stacked_bwd_dz, _stacked_bwd_dx, _stacked_bwd_dw
