"""The loss table: every loss of the library, once.

Most losses are a sum over elements, ℓ = Σ_c ℓ(y_c, t_c). Such a row holds one scalar `@triton.jit`
function, (y, t, parameter) -> (ℓ, ∂ℓ/∂y). It consists of plain `tl` calls on elements, so compilers
other than Triton can take the same source. Softmax cross-entropy needs all classes of a row at
once, so it has a tile function instead of a scalar.

Each row also holds the loss in plain torch, which is the CPU implementation, and torch's own
function, which is the oracle of the tests. Where torch has operators for a loss and its gradient, a
row holds these too: on a CPU they take a sixth to a half of the time.

    cross_entropy   Σ_c q_c (lse - y_c)   q: the target's weight on each class, lse = log Σ exp y
    mse             (y - t)²
    bce             (1 - t) softplus(y) + pos_weight · t · softplus(-y)   binary, on logits
    huber           ½ d² where |d| ≤ delta, else delta (|d| - ½ delta)    d = y - t
    pinball         quantile · (t - y) where t > y, else (1 - quantile) (y - t)

A loss has at most one parameter: a number, or one number for each output. No other code in kernels/
branches on a loss's name.

To add one, write a jit function, two torch functions, a row at the bottom, and its class in
mlp/loss.py.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .activations import sigmoid
from .language import tl, triton

# The output of a column that does not exist. It is finite, so 0 times it is 0.
LOWEST = tl.constexpr(-3.0e38)
NEVER = tl.constexpr(-(1 << 62))  # the ignored label of losses that ignore no label
_aten: Any = torch.ops.aten


class Classes(NamedTuple):
    """The facts about classes that the kernels of cross-entropy need.

    count: how many classes there are. weight_ptr: their weights (count,) or None, with their
    stride. ignored: the label that counts for nothing. smoothing: of labels, in [0, 1].
    """

    count: Any
    weight_ptr: Any
    stride_weight: Any
    ignored: Any
    smoothing: Any


@triton.jit
def target_tile(
    t_ptrs,  # [BLOCK_R]
    stride_tc,
    label,  # [BLOCK_R]
    offs_c,  # [BLOCK_C]
    mask,  # [BLOCK_R, BLOCK_C]
    classes,  # Classes
    SOFT: tl.constexpr,
):
    """(q, counted) of one tile: q of cross-entropy's formula, and which classes the loss reads.

    q is 0 outside the mask.
    """
    if SOFT:
        t_ptrs = t_ptrs[:, None] + offs_c[None, :] * stride_tc
        t = tl.load(t_ptrs, mask=mask, other=0.0).to(tl.float32)
    else:
        t = tl.where(offs_c[None, :] == label[:, None], 1.0, 0.0)
        mask = mask & (label != classes.ignored)[:, None]
    q = t * (1.0 - classes.smoothing) + classes.smoothing / classes.count
    counted = mask & (SOFT | (q != 0))
    if classes.weight_ptr is not None:
        w_ptrs = classes.weight_ptr + offs_c * classes.stride_weight
        q *= tl.load(w_ptrs, mask=offs_c < classes.count, other=0.0).to(tl.float32)[None, :]
    return tl.where(mask, q, 0.0), counted


@triton.jit
def label_weight(label, valid, classes):
    """What a row adds to the mean's denominator: w_y, or 0 if the row is ignored.

    It is NaN for a label that is no class, so that the loss shows the mistake.
    """
    known = (label >= 0) & (label < classes.count)
    counted = valid & (label != classes.ignored)
    weight = tl.where(counted, 1.0, 0.0)
    if classes.weight_ptr is not None:
        w_ptrs = classes.weight_ptr + label * classes.stride_weight
        weight = tl.load(w_ptrs, mask=counted & known, other=0.0).to(tl.float32)
    return tl.where(counted & (known == 0), float("nan"), weight)


@triton.jit
def softmax_loss_tile(z, m, s, q, counted, total):
    """(Σ_c q (lse - z), Q p - q) of one tile: each row's loss, and the gradient.

    m is each row's maximum, s is Σ exp(z - m), and total is Q.
    """
    shifted = z - m[:, None]
    # 0 · inf is NaN, as in torch.
    loss = tl.sum(tl.where(counted, q * (tl.log(s)[:, None] - shifted), 0.0), axis=1)
    return loss, tl.exp(shifted) / s[:, None] * total[:, None] - q


@triton.jit
def softmax_tile(y, q, mask, counted, parameter, NET: tl.constexpr):
    """(loss of each row, gradient [rows, classes]) of softmax cross-entropy.

    All classes are in the tile.
    """
    z = tl.where(mask, y, LOWEST)
    m = tl.max(z, axis=1)
    s = tl.sum(tl.exp(z - m[:, None]), axis=1)
    return softmax_loss_tile(z, m, s, q, counted, tl.sum(q, axis=1))


@triton.jit
def elementwise_tile(y, q, mask, counted, parameter, NET: tl.constexpr):
    """(loss of each row, gradient [rows, outputs]) of NET.loss, a row with a scalar."""
    loss, dy = NET.loss.scalar(y, q, parameter)
    return tl.sum(tl.where(mask, loss, 0.0), axis=1), tl.where(mask, dy, 0.0)


@triton.jit
def first_largest(z, offs_c):
    """The first column of each row's maximum, as torch.argmax gives it.

    It is a large number if the row holds a NaN and has no maximum.
    """
    return tl.min(tl.where(z == tl.max(z, axis=1)[:, None], offs_c[None, :], 1 << 30), axis=1)


@triton.jit
def same_class(y, q, mask, offs_c):
    """True for rows whose largest output and largest target are in the same column."""
    z = first_largest(tl.where(mask, y, LOWEST), offs_c)
    return z == first_largest(tl.where(mask, q, LOWEST), offs_c)


@triton.jit
def same_signs(y, q, mask, offs_c):
    """True for rows whose outputs are positive exactly where the target is above one half.

    A NaN output is wrong.
    """
    right = tl.where(q > 0.5, y > 0, y <= 0)
    return tl.min(tl.where(mask, right.to(tl.int32), 1), axis=1) == 1


@triton.jit
def squared_error(y, t, parameter):
    d = y - t
    return d * d, 2.0 * d


@triton.jit
def log1p(x):
    """log(1 + x) for x in [0, 1]. The quotient x / d corrects the rounding of 1 + x.

    Source: Goldberg (1991), "What every computer scientist should know about floating-point
    arithmetic", theorem 4.
    """
    u = 1.0 + x
    d = u - 1.0
    return tl.where(d == 0, x, tl.log(u) * (x / tl.where(d == 0, 1.0, d)))


@triton.jit
def binary_cross_entropy(y, t, pos_weight):
    s = log1p(tl.exp(-tl.abs(y))) + tl.where(y < 0, -y, 0.0)  # softplus(-y)
    loss = (1.0 - t) * y + (1.0 + (pos_weight - 1.0) * t) * s
    return loss, (1.0 - t) * sigmoid(y) - pos_weight * t * sigmoid(-y)


@triton.jit
def huber(y, t, delta):
    d = y - t
    a = tl.abs(d)
    g = tl.where(d > delta, delta, tl.where(d < -delta, -delta, d))  # NaN stays NaN
    return tl.where(a > delta, delta * (a - 0.5 * delta), 0.5 * d * d), g


@triton.jit
def pinball(y, t, quantile):
    d = t - y
    loss = tl.where(d > 0, quantile * d, (quantile - 1.0) * d)
    g = tl.where(d > 0, -quantile, tl.where(d < 0, 1.0 - quantile, 0.5 - quantile))
    return loss, tl.where(d == d, g, d)  # at 0 it is the mean of both sides; NaN stays NaN


def cross_entropy_ref(
    y: torch.Tensor, q: torch.Tensor, parameter: float | torch.Tensor | None = None
) -> torch.Tensor:
    terms = -(torch.log_softmax(y, -1) * q)
    # With labels, an output that is not the label's may be -inf. With probabilities, 0 · inf is
    # NaN, as in torch.
    return terms if q.is_floating_point() else torch.where(q == 0, 0, terms)


def cross_entropy_gradient_ref(
    y: torch.Tensor, q: torch.Tensor, parameter: float | torch.Tensor | None = None
) -> torch.Tensor:
    return torch.softmax(y, -1) * q.sum(-1, keepdim=True) - q


def squared_error_ref(
    y: torch.Tensor, t: torch.Tensor, parameter: float | torch.Tensor | None = None
) -> torch.Tensor:
    d = y - t
    return d * d


def squared_error_gradient_ref(
    y: torch.Tensor, t: torch.Tensor, parameter: float | torch.Tensor | None = None
) -> torch.Tensor:
    return 2 * (y - t)


def binary_cross_entropy_ref(
    y: torch.Tensor, t: torch.Tensor, pos_weight: float | torch.Tensor
) -> torch.Tensor:
    s = F.logsigmoid(y)
    if isinstance(pos_weight, torch.Tensor) or pos_weight != 1:
        s = (1 + (pos_weight - 1) * t) * s
    return (1 - t) * y - s


def binary_cross_entropy_gradient_ref(
    y: torch.Tensor, t: torch.Tensor, pos_weight: float | torch.Tensor
) -> torch.Tensor:
    # σ(y) - t would be shorter, but it cancels where y predicts t well.
    g, s = (1 - t) * torch.sigmoid(y), y.neg().sigmoid_()
    if isinstance(pos_weight, torch.Tensor):
        return g - pos_weight * t * s
    return torch.addcmul(g, t, s, value=-pos_weight)


def binary_cross_entropy_target_ref(
    y: torch.Tensor, t: torch.Tensor, pos_weight: float | torch.Tensor
) -> torch.Tensor:
    return F.logsigmoid(-y) - pos_weight * F.logsigmoid(y)


def huber_ref(y: torch.Tensor, t: torch.Tensor, delta: float | torch.Tensor) -> torch.Tensor:
    # m (a - m / 2) with m = min(a, delta) is ½ a² up to delta, and the line beyond. A torch.where
    # takes up to 60 times as long on a CPU.
    a = (y - t).abs()
    m = a.clamp(max=delta)
    return torch.sub(a, m, alpha=0.5) * m


def huber_gradient_ref(
    y: torch.Tensor, t: torch.Tensor, delta: float | torch.Tensor
) -> torch.Tensor:
    limit: Any = delta  # clamp takes numbers or tensors, but its type knows no mixture
    return (y - t).clamp(-limit, limit)


def pinball_ref(y: torch.Tensor, t: torch.Tensor, quantile: float | torch.Tensor) -> torch.Tensor:
    d = t - y
    return torch.maximum(quantile * d, (quantile - 1) * d)


def pinball_gradient_ref(
    y: torch.Tensor, t: torch.Tensor, quantile: float | torch.Tensor
) -> torch.Tensor:
    d = t - y
    sign = torch.add(d.sign(), d.clamp(-1, 1), alpha=0)  # NaN stays NaN, which sign makes 0
    return torch.rsub(sign, 1).mul_(0.5) - quantile  # at d = 0 the mean of both sides


def same_class_ref(y: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """(…,) True where the largest output and the largest target are in the same column."""
    return y.argmax(-1) == t.argmax(-1)


def same_signs_ref(y: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """(…,) True where outputs are positive exactly where the target is above one half."""
    return torch.where(t > 0.5, y > 0, y <= 0).all(-1)


def softmax(output: torch.Tensor) -> torch.Tensor:
    """(…, C) logits as probabilities of C classes."""
    return torch.softmax(output, -1)


def unchanged(output: torch.Tensor) -> torch.Tensor:
    """Outputs that are values in the targets' own units."""
    return output


def shares(output: torch.Tensor) -> torch.Tensor:
    """(…, C) outputs as shares of their sum. Negative outputs count as 0."""
    positive = output.clamp_min(0)
    return positive / positive.sum(-1, keepdim=True).clamp_min(torch.finfo(output.dtype).tiny)


def _positive(op: str, delta: float) -> None:
    if not delta > 0:
        raise RuntimeError(f"{op}: delta must be positive, got {delta}")  # torch's type of error


def _inside(op: str, quantile: float) -> None:
    if not 0 < quantile < 1:
        raise ValueError(f"{op}: quantile must be between 0 and 1, both excluded, got {quantile}")


def _any(op: str, parameter: float) -> None:
    pass


def _torchs_cross_entropy(y, t, parameter=None, reduction="mean"):
    return F.cross_entropy(y, t, reduction=reduction)


def _torchs_squared_error(y, t, parameter=None, reduction="mean"):
    return F.mse_loss(y, t, reduction=reduction)


def _torchs_binary_cross_entropy(y, t, parameter=1.0, reduction="mean"):
    weight = torch.as_tensor(parameter, dtype=y.dtype, device=y.device)
    return F.binary_cross_entropy_with_logits(y, t, reduction=reduction, pos_weight=weight)


def _torchs_huber(y, t, parameter=1.0, reduction="mean"):
    return F.huber_loss(y, t, reduction=reduction, delta=parameter)


def _torchs_pinball(y, t, parameter=0.5, reduction="mean"):
    """The larger of two lines, because torch has no pinball loss."""
    q = torch.as_tensor(parameter, dtype=y.dtype, device=y.device)
    loss = torch.maximum(q * (t - y), (q - 1) * (t - y))
    return {"none": loss, "sum": loss.sum(), "mean": loss.mean()}[reduction]


class Operators(NamedTuple):
    """torch's operators for a reduced loss and its gradient.

    Each is one pass over the elements, where the functions of a row take several. forward: (y, t,
    reduction, *parameter) -> loss. backward: (dy, y, t, reduction, *parameter) -> ∂/∂y. reduction:
    its place in `REDUCTIONS`. parameter: one number, if the loss has one.
    """

    forward: Callable
    backward: Callable


REDUCTIONS = ("none", "mean", "sum")


@dataclasses.dataclass(frozen=True, repr=False)
class Loss:
    """One row. t stands for targets of y's shape: numbers, or labels as integer rows of 0 and 1.

    A row is part of a constexpr of kernels. `cache_key` makes Triton's caches follow its functions.
    """

    name: str
    function: str  # the public function of `kernels` that computes it
    scalar: Any  # jit (y, t, parameter) -> (loss, gradient) of elements; None if there is none
    value_ref: Callable  # (y, t, parameter) -> terms of y's shape; their sum is the loss
    gradient_ref: Callable  # (y, t, parameter) -> ∂(sum of the terms)/∂y
    torch: Callable  # (y, t, parameter, reduction): torch's function or formula, an oracle
    targets: str  # "classes": labels or probabilities; "numbers": also rows of 0 and 1
    predict: Callable  # outputs -> predictions in the targets' units
    probabilities: Callable  # outputs -> the probability of each class, where targets are labels
    parameter: str | None = None  # name of the parameter
    default: float = 1.0  # the parameter's value, if none is given
    check: Callable = _any  # (operation, number): raises if the parameter cannot be this number
    vector: bool = False  # True if the parameter may be one number for each output
    target_gradient_ref: Callable | None = None  # ∂/∂t, or None if it is -∂/∂y
    operators: Operators | None = None  # torch's own, for references of the whole loss
    tile: Any = elementwise_tile  # jit (y, t, mask, counted, parameter, NET) -> (loss, gradient)
    correct: Any = same_class  # jit (y, t, mask, columns) -> which rows are right
    correct_ref: Callable = same_class_ref  # (y, t) -> which rows are right
    ignored: int = NEVER.value  # the label that counts for nothing

    def __repr__(self) -> str:
        return f"Loss({self.name!r})"

    def __reduce__(self) -> tuple:
        """A copy, or an unpickled row, is the row of this name. jit functions cannot be copied."""
        return get, (self.name,)

    @property
    def cache_key(self) -> str:
        """A key that changes whenever the source of one of the row's jit functions changes."""
        return "-".join(f.cache_key for f in (self.tile, self.scalar, self.correct) if f)

    @property
    def per_element(self) -> bool:
        """True if the mean is over all elements, as for losses with a scalar. Else over rows."""
        return self.scalar is not None

    @property
    def reads_values(self) -> bool:
        """True if outputs are values of the targets. False if `predict` makes probabilities."""
        return self.predict is unchanged

    def refusal(self, outputs: int, target: Tensor) -> str | None:
        """The reason why these targets cannot train so many outputs, or None if they can."""
        if outputs > 1 or not target.is_floating_point() or self.targets != "classes":
            return None
        return (
            f"{self.function}: a single output is probability 1 of the only class, so numbers "
            "train nothing; use MeanSquaredError (loss 'mse') for numbers, BinaryCrossEntropy "
            "(loss 'bce') for yes or no"
        )

    def numbers(self, parameter: float | Sequence[float] | None) -> tuple[float, ...]:
        """The checked parameter: one number, one for each output, or () if the loss has none.

        ValueError: a parameter for a loss that has none, too many numbers, or a number that the
        row's `check` refuses.
        """
        if self.parameter is None:
            if parameter is not None:
                raise ValueError(
                    f"{self.function}: this loss has no parameter, got {parameter}; leave it out"
                )
            return ()
        if parameter is None:
            return (self.default,)
        values = parameter if isinstance(parameter, Sequence) else (parameter,)
        values = tuple(float(value) for value in values)
        if not values or (len(values) > 1 and not self.vector):
            raise ValueError(
                f"{self.function}: {self.parameter} must be one number, got {len(values)}"
            )
        for value in values:
            self.check(self.function, value)
        return values


ROWS = (
    Loss(
        "cross_entropy",
        "cross_entropy",
        None,
        cross_entropy_ref,
        cross_entropy_gradient_ref,
        _torchs_cross_entropy,
        "classes",
        softmax,
        softmax,
        tile=softmax_tile,
        ignored=-100,
    ),
    Loss(
        "mse",
        "mse_loss",
        squared_error,
        squared_error_ref,
        squared_error_gradient_ref,
        _torchs_squared_error,
        "numbers",
        unchanged,
        shares,
        operators=Operators(_aten.mse_loss.default, _aten.mse_loss_backward.default),
    ),
    Loss(
        "bce",
        "binary_cross_entropy_with_logits",
        binary_cross_entropy,
        binary_cross_entropy_ref,
        binary_cross_entropy_gradient_ref,
        _torchs_binary_cross_entropy,
        "numbers",
        torch.sigmoid,
        torch.sigmoid,
        "pos_weight",
        vector=True,
        target_gradient_ref=binary_cross_entropy_target_ref,
        correct=same_signs,
        correct_ref=same_signs_ref,
    ),
    Loss(
        "huber",
        "huber_loss",
        huber,
        huber_ref,
        huber_gradient_ref,
        _torchs_huber,
        "numbers",
        unchanged,
        shares,
        "delta",
        check=_positive,
        operators=Operators(_aten.huber_loss.default, _aten.huber_loss_backward.default),
    ),
    Loss(
        "pinball",
        "pinball_loss",
        pinball,
        pinball_ref,
        pinball_gradient_ref,
        _torchs_pinball,
        "numbers",
        unchanged,
        shares,
        "quantile",
        0.5,
        _inside,
        vector=True,
    ),
)
LOSSES: dict[str, Loss] = {row.name: row for row in ROWS}


def get(name: str, op: str = "loss") -> Loss:
    """The row called `name`. If there is none, a ValueError lists the known names."""
    if name not in LOSSES:
        raise ValueError(f"{op}: unknown loss {name!r}; known: {', '.join(LOSSES)}")
    return LOSSES[name]
