"""The activation table: every activation of the library, once.

A row holds the function z -> y and its backward (dy, s) -> dz, the derivative times dy. s is the
output y if the derivative can be computed from y: then z need not be kept. Otherwise s is z.

Each function comes twice. The scalar `@triton.jit` function is a constexpr argument of kernels. The
plain torch function is the CPU implementation and the oracle. No other code in kernels/ branches on
an activation's name.

To add one, write two jit functions, two torch functions and one row at the bottom.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from .language import tl, triton

_aten: Any = torch.ops.aten
_nn: Any = torch._C._nn
# torch's own operators of derivatives. They read and write each element once. For derivatives that
# jump, a torch.where takes up to 60 times as long on a CPU, because it branches for each element.
_threshold_backward, _leaky_relu_backward = _aten.threshold_backward, _aten.leaky_relu_backward
_sigmoid_backward, _tanh_backward = _aten.sigmoid_backward, _aten.tanh_backward
_elu_backward, _silu_backward = _aten.elu_backward, _aten.silu_backward
_leaky_relu, _elu, _silu = _nn.leaky_relu, _nn.elu, _aten.silu

# Keep these on the right of a product with a tensor. On the left, the interpreter would return a
# constexpr instead of a tensor.
LEAKY_SLOPE = tl.constexpr(0.01)  # torch.nn.LeakyReLU's default
SQRT_1_2 = tl.constexpr(0.7071067811865476)
INV_SQRT_2PI = tl.constexpr(0.3989422804014327)
SQRT_2_PI = tl.constexpr(0.7978845608028654)
GELU_CUBIC = tl.constexpr(0.044715)


@triton.jit
def identity(z):
    return z


@triton.jit
def identity_bwd(dy, y):
    return dy


@triton.jit
def relu(z):
    return tl.where(z <= 0, 0.0, z)  # not tl.maximum, because NaN must stay NaN


@triton.jit
def relu_bwd(dy, y):
    return tl.where(y <= 0, 0.0, dy)  # relu'(0) = 0, as in torch


@triton.jit
def sigmoid(z):
    e = tl.exp(-tl.abs(z))  # in (0, 1], so it never overflows
    return tl.where(z >= 0, 1.0 / (1.0 + e), e / (1.0 + e))


@triton.jit
def sigmoid_bwd(dy, y):
    return dy * y * (1.0 - y)  # σ' = σ (1 - σ)


@triton.jit
def tanh(z):
    a = tl.abs(z)
    e = tl.exp(-2.0 * a)
    large = 1.0 - 2.0 * e / (1.0 + e)
    # Near 0 that difference would cancel. There, tanh is an odd polynomial with the coefficients of
    # tanhf in the Cephes library.
    q = z * z
    p = 0.133314422 + q * (-0.0537397156 + q * (0.0206390888 + q * -0.00570498873))
    small = a + a * q * (-0.333332819 + q * p)
    t = tl.where(a < 0.625, small, large)
    return tl.where(z < 0, -t, t)


@triton.jit
def tanh_bwd(dy, y):
    return dy * (1.0 - y * y)  # tanh' = 1 - tanh²


@triton.jit
def leaky_relu(z):
    return tl.where(z > 0, z, z * LEAKY_SLOPE)


@triton.jit
def leaky_relu_bwd(dy, y):
    return tl.where(y > 0, dy, dy * LEAKY_SLOPE)  # the slope is positive, so y has z's sign


@triton.jit
def gelu(z):
    return 0.5 * z * (1.0 + tl.erf(z * SQRT_1_2))  # z Φ(z)


@triton.jit
def gelu_bwd(dy, z):
    cdf = 0.5 * (1.0 + tl.erf(z * SQRT_1_2))
    pdf = tl.exp(-0.5 * z * z) * INV_SQRT_2PI
    return dy * (cdf + z * pdf)  # (z Φ)' = Φ + z φ


@triton.jit
def gelu_tanh(z):
    # (1 + tanh u) / 2 = σ(2u), which keeps its digits for negative u
    return z * sigmoid((z + z * z * z * GELU_CUBIC) * SQRT_2_PI * 2.0)


@triton.jit
def gelu_tanh_bwd(dy, z):
    # y = z s with s = σ(2u), so y' = s + z s σ(-2u) 2u'. σ(-2u) replaces 1 - s, because that
    # difference cancels. Beyond ±16, σ is 0 or 1, and z² may overflow: 0 · inf would be NaN.
    c = tl.where(z > 16.0, 16.0, tl.where(z < -16.0, -16.0, z))
    u2 = (c + c * c * c * GELU_CUBIC) * SQRT_2_PI * 2.0
    du2 = (1.0 + c * c * GELU_CUBIC * 3.0) * SQRT_2_PI * 2.0
    s = sigmoid(u2)
    return dy * (s + z * s * sigmoid(-u2) * du2)


@triton.jit
def silu(z):
    return z * sigmoid(z)


@triton.jit
def silu_bwd(dy, z):
    s = sigmoid(z)
    return dy * s * (1.0 + z * (1.0 - s))  # (z σ)' = σ + z σ (1 - σ)


@triton.jit
def relu_squared(z):
    r = relu(z)
    return r * r


@triton.jit
def relu_squared_bwd(dy, z):
    return dy * 2.0 * relu(z)


@triton.jit
def elu(z):
    t = tanh(0.5 * z)
    return tl.where(z > 0, z, 2.0 * t / (1.0 - t))  # equals eᶻ - 1, without its cancellation at 0


@triton.jit
def elu_bwd(dy, z):
    # (eᶻ - 1)' = eᶻ. In half precision, y + 1 would be 0 below z = -6.
    return dy * tl.exp(tl.minimum(z, 0.0))


def identity_ref(z: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    return z if out is None else out.copy_(z)


def identity_bwd_ref(
    dy: torch.Tensor, y: torch.Tensor, out: torch.Tensor | None = None
) -> torch.Tensor:
    return dy if out is None else out.copy_(dy)


def relu_ref(z: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    return torch.relu(z) if out is None else torch.clamp_min(z, 0, out=out)


def relu_bwd_ref(
    dy: torch.Tensor, y: torch.Tensor, out: torch.Tensor | None = None
) -> torch.Tensor:
    # dy where y > 0, else 0
    if out is None:
        return _threshold_backward.default(dy, y, 0)
    return _threshold_backward.grad_input(dy, y, 0, grad_input=out)


def sigmoid_bwd_ref(
    dy: torch.Tensor, y: torch.Tensor, out: torch.Tensor | None = None
) -> torch.Tensor:
    # dy (1 - y) y
    if out is None:
        return _sigmoid_backward.default(dy, y)
    return _sigmoid_backward.grad_input(dy, y, grad_input=out)


def tanh_bwd_ref(
    dy: torch.Tensor, y: torch.Tensor, out: torch.Tensor | None = None
) -> torch.Tensor:
    # dy (1 - y²)
    if out is None:
        return _tanh_backward.default(dy, y)
    return _tanh_backward.grad_input(dy, y, grad_input=out)


def leaky_relu_ref(z: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    return _leaky_relu(z, LEAKY_SLOPE.value, out=out)


def leaky_relu_bwd_ref(
    dy: torch.Tensor, y: torch.Tensor, out: torch.Tensor | None = None
) -> torch.Tensor:
    # dy where y > 0, else slope · dy
    if out is None:
        return _leaky_relu_backward.default(dy, y, LEAKY_SLOPE.value, True)
    return _leaky_relu_backward.grad_input(dy, y, LEAKY_SLOPE.value, True, grad_input=out)


def gelu_ref(z: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    return _normal_cdf(z, out).mul_(z)


def _normal_cdf(z: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Φ(z) = erfc(-z / √2) / 2, which keeps its digits for negative z."""
    u = torch.mul(z, -SQRT_1_2.value, out=out)
    return (torch.erfc(u) if _is_recorded(u) else u.erfc_()).mul_(0.5)


def _is_recorded(t: torch.Tensor) -> bool:
    """True if a formula may not overwrite t, its own result, where that would save memory.

    For large tensors, fresh memory takes more time than the numbers. But a derivative needs t, and
    torch.jit.trace must see the same operations with and without gradients.
    """
    return t.requires_grad or torch.jit.is_tracing()


def gelu_bwd_ref(
    dy: torch.Tensor, z: torch.Tensor, out: torch.Tensor | None = None
) -> torch.Tensor:
    e = (z * z).mul_(-0.5).exp_()
    slope = _normal_cdf(z).addcmul_(z, e, value=INV_SQRT_2PI.value)  # Φ + z φ
    return torch.mul(dy, slope, out=out)


def gelu_tanh_ref(z: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    # z σ(2u), as in the scalar. On a CPU torch's σ takes a quarter of the time of its tanh.
    u = torch.addcmul(z, z * z, z, value=GELU_CUBIC.value, out=out)
    s = u.mul_(2 * SQRT_2_PI.value).sigmoid_()
    return z * s if _is_recorded(s) else s.mul_(z)


def gelu_tanh_bwd_ref(
    dy: torch.Tensor, z: torch.Tensor, out: torch.Tensor | None = None
) -> torch.Tensor:
    # dy (s + z s σ(-2u) 2u'), as in the scalar
    c, scale = z.clamp(-16, 16), 2 * SQRT_2_PI.value
    squares = c * c
    u2 = torch.addcmul(c, squares, c, value=GELU_CUBIC.value).mul_(scale)
    du2 = torch.rsub(squares, scale, alpha=-3 * GELU_CUBIC.value * scale)
    s = torch.sigmoid(u2)
    slope = (z * s).mul_(u2.neg_().sigmoid_()).mul_(du2).add_(s)
    return torch.mul(dy, slope, out=out)


def silu_ref(z: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    return F.silu(z) if out is None else _silu.out(z, out=out)


def silu_bwd_ref(
    dy: torch.Tensor, z: torch.Tensor, out: torch.Tensor | None = None
) -> torch.Tensor:
    # dy (s + z s (1 - s)), s = σ(z)
    if out is not None:
        return _silu_backward.grad_input(dy, z, grad_input=out)
    if torch.is_grad_enabled() and (z.requires_grad or dy.requires_grad):
        s = torch.sigmoid(z)  # torch's operator has no derivative
        return dy * (s * (1 + z * (1 - s)))
    return _silu_backward.default(dy, z)


def relu_squared_ref(z: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    r = torch.relu(z)
    return torch.mul(r, r, out=out)


def relu_squared_bwd_ref(
    dy: torch.Tensor, z: torch.Tensor, out: torch.Tensor | None = None
) -> torch.Tensor:
    return torch.mul(dy, 2 * torch.relu(z), out=out)


def elu_ref(z: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    return _elu(z, out=out)


def elu_bwd_ref(dy: torch.Tensor, z: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    # dy where z > 0, else dy · eᶻ
    if out is None:
        return _elu_backward.default(dy, 1, 1, 1, False, z)
    return _elu_backward.grad_input(dy, 1, 1, 1, False, z, grad_input=out)


class Activation(NamedTuple):
    """One row of the table: an activation, its derivative, and what the backward needs.

    `forward(z) -> y` and `backward(dy, s) -> dz` are jit scalars. The `_ref` functions compute the
    same in torch, on tensors of any shape. s is the output y or the pre-activation z.
    """

    forward: Any
    backward: Any
    forward_ref: Callable
    backward_ref: Callable
    torch: Callable  # torch's own function, an independent oracle
    needs: str  # what the backward needs: "nothing", "y" (the output) or "z" (the pre-activation)
    kinks: tuple[float, ...] = ()  # where the derivative jumps
    # () -> the torch.nn module that computes it; `mlp.fuse` recognises this module
    module: Callable | None = None
    # z -> y by torch's own differentiable operator, or None if there is no such operator. It may
    # overwrite z if the backward needs y. Its values and derivatives equal those of the `_ref`
    # functions, bit for bit.
    on_tape: Callable | None = None

    @property
    def is_identity(self) -> bool:
        """True if the output is the pre-activation itself, so the backward needs nothing."""
        return self.needs == "nothing"

    @property
    def needs_z(self) -> bool:
        """True if the backward needs the pre-activation."""
        return self.needs == "z"


ACTIVATIONS: dict[str, Activation] = {
    "identity": Activation(
        identity,
        identity_bwd,
        identity_ref,
        identity_bwd_ref,
        lambda z: z,
        "nothing",
        (),
        nn.Identity,
        identity_ref,
    ),
    "relu": Activation(
        relu, relu_bwd, relu_ref, relu_bwd_ref, F.relu, "y", (0.0,), nn.ReLU, torch.relu_
    ),
    "sigmoid": Activation(
        sigmoid,
        sigmoid_bwd,
        torch.sigmoid,
        sigmoid_bwd_ref,
        F.sigmoid,
        "y",
        (),
        nn.Sigmoid,
        torch.sigmoid_,
    ),
    "tanh": Activation(
        tanh, tanh_bwd, torch.tanh, tanh_bwd_ref, F.tanh, "y", (), nn.Tanh, torch.tanh_
    ),
    "leaky_relu": Activation(
        leaky_relu,
        leaky_relu_bwd,
        leaky_relu_ref,
        leaky_relu_bwd_ref,
        F.leaky_relu,
        "y",
        (0.0,),
        nn.LeakyReLU,
        lambda z: _nn.leaky_relu_(z, LEAKY_SLOPE.value),
    ),
    "gelu": Activation(gelu, gelu_bwd, gelu_ref, gelu_bwd_ref, F.gelu, "z", (), nn.GELU),
    "gelu_tanh": Activation(
        gelu_tanh,
        gelu_tanh_bwd,
        gelu_tanh_ref,
        gelu_tanh_bwd_ref,
        lambda z: F.gelu(z, approximate="tanh"),
        "z",
        (),
        lambda: nn.GELU(approximate="tanh"),
    ),
    "silu": Activation(silu, silu_bwd, silu_ref, silu_bwd_ref, F.silu, "z", (), nn.SiLU, _nn.silu),
    "relu_squared": Activation(
        relu_squared,
        relu_squared_bwd,
        relu_squared_ref,
        relu_squared_bwd_ref,
        lambda z: F.relu(z) ** 2,
        "z",
        (0.0,),
    ),
    "elu": Activation(elu, elu_bwd, elu_ref, elu_bwd_ref, F.elu, "z", (0.0,), nn.ELU, _elu),
}


def get(name: str, op: str = "activation") -> Activation:
    """The row called `name`. If there is none, a ValueError lists the known names."""
    row = ACTIVATIONS.get(name)
    if row is None:
        raise ValueError(f"{op}: unknown activation {name!r}; known: {', '.join(ACTIVATIONS)}")
    return row
