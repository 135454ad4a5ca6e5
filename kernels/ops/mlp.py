"""A stack of linear layers as one operation: y_0 = x, y_l = act_l(y_{l-1} w_lᵀ + b_l), l = 1 … L.

    x (…, n_0)   w_l (n_l, n_{l-1})   b_l (n_l,)   y_L (…, n_L)

Hidden layers share one activation. The last layer has its own.

Backward, from dy (…, n_L), with s_l the output or the pre-activation of layer l, for l = L … 1:
    dz_L = dy ⊙ act_L'(s_L)
    dw_l = dz_lᵀ y_{l-1},  db_l = Σ_m dz_l
    dz_{l-1} = (dz_l w_l) ⊙ act'(s_{l-1})
    dx = dz_1 w_1

The kernels are those of `linear`. The kernel of dx also multiplies by act', so dy_{l-1} is never
stored.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from .. import activations, launch, tape
from .linear import (
    Buffers,
    as_matrix,
    check_linear,
    fits,
    layer_on_tape,
    layer_ref,
    linear_bwd_dw,
    linear_bwd_dw_ref,
    linear_bwd_dx,
    linear_bwd_dx_ref,
    linear_bwd_dz,
    linear_bwd_dz_ref,
    linear_fwd,
    loops,
)


@functools.cache
def stack_loops() -> Any:
    """The module of compiled loops. numba is slow to import, so it is imported where it is used."""
    from ..cpu import stack

    return stack


class MLPSaved(NamedTuple):
    """What the forward keeps for the backward. The tuples have one item for each layer l."""

    x: torch.Tensor  # (…, n_0)
    weights: tuple[torch.Tensor, ...]  # (n_l, n_{l-1})
    hidden: tuple[torch.Tensor, ...]  # (…, n_l), y of every layer except the last
    # What act' of each layer is computed from: y, z or None. None also stands for a hidden y.
    kept: tuple[torch.Tensor | None, ...]
    bias: tuple[bool, ...]
    activation: str
    output_activation: str


def _layer(x, w, b, activation, *, out=None):
    """`layer_ref`, by the kernel."""
    y, saved = linear_fwd(x, w, b, activation, out=out)
    return y, saved.s


def stack_forward(x, weights, biases, activation, output_activation, out, layer_fwd):
    """`mlp_fwd` with `layer_fwd` for each layer, which is `layer_ref` or a function like it."""
    last = len(weights) - 1
    out = (None,) * (last + 1) if out is None else out
    y, hidden, kept = x, [], []
    for layer in range(last):
        y, s = layer_fwd(y, weights[layer], biases[layer], activation, out=out[layer])
        hidden.append(y)
        kept.append(None if s is y else s)
    y, s = layer_fwd(y, weights[last], biases[last], output_activation, out=out[last])
    kept.append(s)
    bias = tuple([b is not None for b in biases])
    layers = tuple(weights), tuple(hidden), tuple(kept), bias
    return y, MLPSaved(x, *layers, activation, output_activation)


def stack_backward(dy, saved, needs, out, bwd_dz, bwd_dx, bwd_dw):
    """The gradient of a stack as in `mlp_bwd`, by the given implementations of dz, dx and dw.

    A layer's dx is computed before `bwd_dw` is called, so `bwd_dw` may change the weights.
    """
    x, weights, hidden, kept, bias, activation, output_activation = saved
    if activations.get(activation, "mlp").needs == "y":
        kept = (*hidden, kept[-1])
    layers = len(weights)
    nothing = (None,) * layers
    needs = needs or (True,) * (2 * layers + 1)
    needs_dw, needs_db = needs[1 : layers + 1], needs[layers + 1 :]
    # No gradient is needed below this layer, where the lower layers are frozen.
    lowest = next((i for i in range(layers) if needs[0] or needs_dw[i] or needs_db[i]), layers)
    dws, dbs = [*nothing], [*nothing]
    dz_out, grads_out = out or (None, None)
    dz_out, grads_out = dz_out or nothing, grads_out or nothing
    dz = bwd_dz(dy, kept[-1], output_activation, out=dz_out[-1]) if lowest < layers else None
    for layer in range(layers - 1, lowest - 1, -1):
        above, dz = dz, None
        if layer > lowest:
            below = layer - 1
            dz = bwd_dx(above, weights[layer], kept[below], activation, out=dz_out[below])
        elif needs[0]:
            dz = bwd_dx(above, weights[0]).view(x.shape)
        if needs_dw[layer] or needs_db[layer]:
            given = hidden[layer - 1] if layer else x
            dw, db = bwd_dw(above, given, bias[layer], out=grads_out[layer])
            dws[layer] = dw if needs_dw[layer] else None
            dbs[layer] = db if needs_db[layer] else None
    return dz, dws, dbs


def mlp_fwd_ref(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    activation: str = "relu",
    output_activation: str = "identity",
    *,
    out: Sequence[Buffers] | None = None,
) -> tuple[torch.Tensor, MLPSaved]:
    """The reference of `mlp_fwd`: same arguments, same results, plain torch."""
    return stack_forward(x, weights, biases, activation, output_activation, out, layer_ref)


def mlp_bwd_ref(
    dy: torch.Tensor,
    *saved: Any,
    needs: Sequence[bool] | None = None,
    out: tuple[Sequence | None, Sequence | None] | None = None,
) -> tuple[torch.Tensor | None, list[torch.Tensor | None], list[torch.Tensor | None]]:
    """The reference of `mlp_bwd`: same arguments, same results, plain torch."""
    parts = linear_bwd_dz_ref, linear_bwd_dx_ref, linear_bwd_dw_ref
    return stack_backward(dy, saved, needs, out, *parts)


def check_mlp(x, weights, biases) -> None:
    """Raises a ValueError unless the layers fit together.

    There must be at least one layer, and as many biases (or None) as weights. Each layer's input
    must be as wide as the output of the layer before. All tensors have one floating-point dtype.
    """
    if not weights or len(weights) != len(biases):
        raise ValueError(
            "mlp: there must be as many biases (or None) as weights, at least one, got "
            f"{len(weights)} weights and {len(biases)} biases"
        )
    check_linear(x, weights[0], biases[0], "mlp")
    for layer in range(1, len(weights)):
        wide, narrow = weights[layer - 1].shape, weights[layer].shape
        if len(narrow) != 2 or narrow[1] != wide[0]:
            raise ValueError(
                f"mlp: weight {layer} must be (out, {wide[0]}) after weight {layer - 1} "
                f"{tuple(wide)}, "
                f"got {tuple(narrow)}"
            )
        check_linear(x.new_empty(0, wide[0]), weights[layer], biases[layer], f"mlp, layer {layer}")


def mlp_fwd(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    activation: str = "relu",
    output_activation: str = "identity",
    *,
    out: Sequence[Buffers] | None = None,
) -> tuple[torch.Tensor, MLPSaved]:
    """y_L (…, n_L) of the stack, and the MLPSaved that `mlp_bwd` takes after dy.

    x (…, n_0), weights (n_l, n_{l-1}), biases (n_l,) or None, of one floating-point dtype. out: for
    each layer the (y, z) buffers of `linear_fwd`. The forward saves the input of every layer, and z
    only for activations whose derivative needs it. One launch for each layer, accumulation in
    float32, deterministic. ValueError: layers that do not fit together, or what `linear_fwd`
    raises.
    """
    if not fits(x, weights, biases):
        check_mlp(x, weights, biases)
    return forward_checked(x, weights, biases, activation, output_activation, out)


def forward_checked(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    activation: str,
    output_activation: str,
    out: Sequence[Buffers] | None = None,
    memo: dict[str, Any] | None = None,
) -> tuple[torch.Tensor, MLPSaved]:
    """`mlp_fwd` for a caller that has called `check_mlp` already.

    memo: a dict for notes of the compiled loops. The caller keeps one for each set of parameters,
    activations and buffers `out`, and calls `backward_into` with it.
    """
    if memo is not None and out is not None and launch.takes_loops(x):
        names = activation, output_activation
        found = stack_loops().forward(x, weights, biases, names, out, memo)
        if found is not None:
            return found
    if launch.takes_loops(x, *weights):
        layer = loops().forward
    else:
        layer = layer_ref if launch.backend(x, *weights) != "triton" else _layer
    return stack_forward(x, weights, biases, activation, output_activation, out, layer)


def mlp_bwd(
    dy: torch.Tensor,
    *saved: Any,
    needs: Sequence[bool] | None = None,
    out: tuple[Sequence | None, Sequence | None] | None = None,
) -> tuple[torch.Tensor | None, list[torch.Tensor | None], list[torch.Tensor | None]]:
    """(dx, [dw_1 … dw_L], [db_1 … db_L]) from dy (…, n_L) and what `mlp_fwd` saved.

    needs: one bool for x, then for every weight, then for every bias. None means all. A gradient
    that is not needed is None. out: (for each layer a dz buffer, for each layer the (dw, db)
    buffers). Two launches for each layer, accumulation in float32, deterministic.
    """
    x, weights, *_ = saved
    if launch.takes_loops(dy, x, *weights):
        parts = loops().dz, loops().dx, loops().dw
        return stack_backward(dy, saved, needs, out, *parts)
    if launch.backend(dy, x, *weights) != "triton":
        return mlp_bwd_ref(dy, *saved, needs=needs, out=out)
    return stack_backward(dy, saved, needs, out, linear_bwd_dz, linear_bwd_dx, linear_bwd_dw)


def backward_into(
    dy: torch.Tensor,
    saved: MLPSaved,
    needs: Sequence[bool],
    out: tuple[Sequence, Sequence],
    memo: dict[str, Any],
) -> torch.Tensor | None:
    """`mlp_bwd` into buffers that stay the same. Returns dx or None. memo: of the forward."""
    if not needs[0] and launch.takes_loops(dy):  # noqa: SIM102
        if stack_loops().backward(dy, saved, needs, out, memo):
            return None
    return mlp_bwd(dy, *saved, needs=needs, out=out)[0]


def _on_tape(x, weights, biases, activation, output_activation):
    """The output of the stack by `layer_on_tape`, or None if that does not serve each layer."""
    last = len(weights) - 1
    if last < 0 or len(biases) != last + 1:
        return None
    y = matrix = x if x.dim() == 2 else as_matrix(x) if x.dim() else x
    for i in range(last):
        y = layer_on_tape(y, weights[i], biases[i], activation)
        if y is None:
            return None
    y = layer_on_tape(y, weights[last], biases[last], output_activation)
    if y is None or matrix is x:
        return y
    return tape.reshaped(y, (*x.shape[:-1], y.shape[-1]))


MLP = tape.Differentiable(
    name="mlp",
    fwd=mlp_fwd,
    fwd_ref=mlp_fwd_ref,
    bwd=mlp_bwd,
    bwd_ref=mlp_bwd_ref,
    saved=MLPSaved,
    inputs=3,
    derived={"bias": lambda given: tuple(b is not None for b in given["biases"])},
    on_tape=_on_tape,
)


@tape.traceable
def mlp(
    input: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None] | None = None,
    activation: str = "relu",
    output_activation: str = "identity",
) -> torch.Tensor:
    """A multilayer perceptron as one operation, (…, n_L). The module has the formulas.

    input (…, n_0). weights: a sequence of (n_l, n_{l-1}). biases: a sequence of (n_l,) or None, or
    None for no biases. All have one floating-point dtype. activation: of the hidden layers;
    output_activation: of the last. Differentiable twice. No Triton kernel takes float64.
    ValueError: layers that do not fit together, mixed dtypes or devices, an unknown activation.
    """
    biases = (None,) * len(weights) if biases is None else biases
    return tape.call(MLP, input, tuple(weights), tuple(biases), activation, output_activation)
