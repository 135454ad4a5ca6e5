"""What the training kernels train, and its loss and gradients in plain torch.

One description holds the network, the loss and the rule. The limits of the kernels are here too.

    y_0 = x,  y_l = act_l(y_{l-1} w_lᵀ + b_l)  for l = 1 … L
    loss = s · Σ_m ℓ(y_L, t)
    dz_L = ∂loss/∂y_L ⊙ act_L',  dz_{l-1} = (dz_l w_l) ⊙ act'
    dw_l = dz_lᵀ y_{l-1},  db_l = Σ_m dz_l

Hidden layers share one activation. The last layer has its own. ℓ is a row of `losses`, summed over
outputs. s is loss_scale, divided by the batch's rows if loss_mean. For example, torch's mean of
squared error has s = 1/C. ½ Σ over the batch has s = ½ and no mean. The sigmoid recipe's
cross-entropy is also averaged over classes, with s = 1/C.

Then every parameter takes its update by `rule`, see `rules`. Numbers that a run may change
(learning rate, momentum, …) are not part of the description. They are in a device tensor, see
`hyperparameters`.

`parameters` is a list [w_1, b_1, w_2, b_2, …], or [w_1, w_2, …] without biases. `states` holds one
list of the same shapes for each of the rule's states. All states start as zeros.
"""

import dataclasses

import torch

from .. import activations, configs, launch, losses, rules
from ..configs import padded
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

MAX_WIDTH, MAX_CLASSES = 256, 64


@dataclasses.dataclass(frozen=True)
class Spec:
    """A network, its loss and its update rule. The module has the formulas.

    sizes: (features, hidden …, classes). activation: of the hidden layers; output_activation: of
    the last. bias: True if the layers have biases. loss: a row of `losses`, or its name.
    loss_scale, loss_mean: s of the formulas. loss_parameter: the loss's number, or one for each
    output. rule: a row of `rules`, or its name. ValueError: an unknown loss or rule.
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
        """The loss's checked parameter: one number, or one for each output. (1.0,) if it has none.

        ValueError: see `Loss.numbers`.
        """
        return self.loss.numbers(self.loss_parameter) or (1.0,)

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Shapes of the parameters, in order."""
        pairs = zip(self.sizes[1:], self.sizes[:-1])
        return [shape for n, k in pairs for shape in (((n, k), (n,)) if self.bias else ((n, k),))]


def refusal(spec: Spec, batch: int, engine: str = "epoch") -> str | None:
    """Why the training kernels do not serve this network, in one line, or None if they do.

    The line names the limit, both values, and what else to use. What fits in registers depends on
    the precision of float32 products. batch: rows of a step. engine: a name for the line.
    """
    precision = launch.dot_precision()
    instead = "use engine 'graph' or 'manual'" if engine == "epoch" else "use engine 'manual'"
    if len(spec.sizes) < 2 or min(spec.sizes) < 1 or batch < 1:
        return (
            f"{engine}: sizes must be (features, …, classes) and batch a number, all at least 1, "
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


def outgrown(spec: Spec, batch: int, engine: str = "epoch") -> str | None:
    """Why separate products would be faster than the training kernels, in one line, or None.

    Each program of these kernels repeats the layers above the first. batch: rows of a step. engine:
    a name for the line.
    """
    widths = spec.sizes[1:]
    products = 3 * batch * sum(n * k for n, k in zip(widths[1:], widths))
    if products <= configs.MOST_REPEATED:
        return None
    return (
        f"{engine}: {products:,} multiply-adds a step above the first layer exceed "
        f"{configs.MOST_REPEATED:,}, so separate products are faster"
    )


def loss_ref(
    spec: Spec, y: torch.Tensor, target: torch.Tensor, weights: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss (…,), ∂loss/∂y (…, M, C)) of outputs y (…, M, C).

    target: labels (…, M), or numbers (…, M, C). weights: (…, M) factors of the rows' losses, or
    None. IndexError: a label that is no class.
    """
    row, t = spec.loss, target
    rows: int | torch.Tensor = y.shape[-2]
    if not target.is_floating_point():
        check_range(target, y.shape[-1], row.ignored, row.function)
        t = target.unsqueeze(-1) == torch.arange(y.shape[-1], device=y.device)
        counted = target.long() != row.ignored
        t, rows = t.to(torch.int8), counted.sum(-1)
        weights = None if weights is None else weights * counted
    parameter = torch.tensor(spec.loss_numbers, dtype=y.dtype, device=y.device)
    factor = torch.as_tensor(spec.loss_scale, dtype=y.dtype, device=y.device)
    rows = rows if weights is None else weights.sum(-1)
    factor = factor / rows if spec.loss_mean else factor
    loss, grad = row.value_ref(y, t, parameter), row.gradient_ref(y, t, parameter)
    if weights is not None:
        loss, grad = loss * weights[..., None], grad * weights[..., None]
    scale = factor.masked_fill(factor.isinf(), 0)  # no gradient if every row is ignored, as torch
    return loss.sum((-2, -1)) * factor, grad * scale[..., None, None]


def correct_ref(spec: Spec, y: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """How many rows of outputs (…, M, C) are right.

    With labels, a row is right if its largest output is at the label. Else the loss decides.
    """
    if target.is_floating_point():
        return spec.loss.correct_ref(y, target).sum(-1)
    return (y.argmax(-1) == target).sum(-1)


def gradients_ref(
    spec: Spec,
    parameters: list[torch.Tensor],
    x: torch.Tensor,
    target: torch.Tensor,
    row_weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """(loss, correct, gradients in the parameters' order) of inputs x (M, features).

    row_weights: (M,) factors of the rows' losses, or None. For R stacked networks, x is (R, M,
    features), and there are R losses and counts.
    """
    weights = parameters[:: 1 + spec.bias]
    biases = parameters[1::2] if spec.bias else [None] * len(weights)
    fwd, *bwd = _ALONE if x.dim() == 2 else _STACKED
    acts = spec.activation, spec.output_activation
    y, saved = stack_forward(x, weights, biases, *acts, None, fwd)
    loss, dy = loss_ref(spec, y, target, row_weights)
    needs = (False, *(True,) * 2 * len(weights))
    _, dws, dbs = stack_backward(dy, saved, needs, None, *bwd)
    grads = [g for pair in zip(dws, dbs) for g in pair if g is not None]
    return loss, correct_ref(spec, y, target), grads


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
