"""The operations as torch.library operators: what `torch.compile` sees of them, one opaque node each way.

An operator calls the launchers that eager mode calls, so a compiled network has the gradients of an eager one, bit for bit.
Its fake implementation, which tells shapes to the compiler, is the same function by the reference, run on fake tensors.
Eager mode does not come through here: the wrapper of an operator costs tens of µs a call.

An operator may return neither its inputs nor None. So a forward returns y and only what it computed beside it, a backward
only the gradients that `needs` asks for; what the launchers know as `saved` is put together in between.
"""

import torch

from . import activations, launch
from .conv import conv2d_fwd
from .conv_bwd import conv2d_bwd
from .cross_entropy import cross_entropy_bwd, cross_entropy_fwd
from .linear_cross_entropy import linear_cross_entropy_bwd, linear_cross_entropy_fwd
from .mlp import mlp_bwd, mlp_fwd
from .mse import mse_bwd, mse_fwd
from .optim import adam, sgd
from .patches import Geometry, geometry

ops = torch.ops.handgrad


def operator(schema: str, mutates=()):
    """Register the function below as the operator of this schema, and by the reference as its fake implementation."""

    def register(function):
        def fake(*args):
            with launch.use("torch"):
                return function(*args)

        op = torch.library.custom_op("handgrad::" + schema.split("(")[0], function, mutates_args=mutates, schema=schema)
        op.register_fake((lambda *args: None) if mutates else fake)
        return op

    return register


def differentiable(op, bwd, saved, count) -> None:
    """Give an operator its gradient, by `bwd(dy, *saved(inputs, outputs), needs)`, for its first `count` inputs."""

    def setup_context(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        launch.remember(ctx, inputs, saved(inputs, output))

    def backward(ctx, dys):
        needs = list(ctx.needs_input_grad[:count])
        inputs, saved = launch.recall(ctx)
        return *spread(bwd(dys[0], *saved, needs), needs), *(None,) * (len(inputs) - count)

    op.register_autograd(backward, setup_context=setup_context)


def dense(*tensors) -> list:
    """The tensors that are not None, contiguous, as the fake implementation says."""
    return [t.contiguous() for t in tensors if t is not None]


def spread(tensors, present) -> list:
    """The tensors, one after the other, where `present`; None elsewhere."""
    tensors = iter(tensors)
    return [next(tensors) if here else None for here in present]


# mlp and linear. Parameters: all weights, then the biases that `bias` says there are. Outputs: y, the outputs of the hidden
# layers, the pre-activations of the layers whose derivative needs them.


def _needed(layers, activation, output_activation) -> list[str]:
    return [activations.get(a, "mlp").needs for a in [activation] * (layers - 1) + [output_activation]]


@operator("mlp(Tensor x, Tensor[] parameters, bool[] bias, str activation, str output_activation) -> Tensor[]")
def mlp_op(x, parameters, bias, *acts):
    layers = len(bias)
    y, saved = mlp_fwd(x, parameters[:layers], spread(parameters[layers:], bias), *acts)
    hidden, kept = saved[5 + layers : 4 + 2 * layers], saved[4 + 2 * layers :]
    return dense(y, *hidden, *(s for s, what in zip(kept, _needed(layers, *acts)) if what == "z"))


@operator(
    "mlp_bwd(Tensor dy, Tensor?[] saved, bool[] bias, str activation, str output_activation, bool[] needs) -> Tensor[]"
)
def mlp_bwd_op(dy, saved, bias, activation, output_activation, needs):
    dx, dws, dbs = mlp_bwd(dy, len(bias), bias, activation, output_activation, *saved, needs=needs)
    return dense(dx, *dws, *dbs)


def _mlp_save(ctx, inputs, outputs):
    x, parameters, ctx.bias, *ctx.acts = inputs
    layers = len(ctx.bias)
    (y, *hidden), zs = outputs[:layers], iter(outputs[layers:])
    kept = [{"y": s, "z": None}.get(what) for s, what in zip([*hidden, y], _needed(layers, *ctx.acts))]
    kept = [next(zs) if what == "z" else s for s, what in zip(kept, _needed(layers, *ctx.acts))]
    launch.remember(ctx, (), (*parameters[:layers], x, *hidden, *kept))


def _mlp_backward(ctx, dy):
    _, saved = launch.recall(ctx)
    needs_x, needs_parameters = ctx.needs_input_grad[:2]
    present = [True] * (1 + len(ctx.bias)) + ctx.bias
    needs = [bool(n) for n in spread([needs_x, *needs_parameters], present)]
    grads = spread(ops.mlp_bwd(dy, saved, ctx.bias, *ctx.acts, needs), needs)
    dx, *dparameters = (g for g, here in zip(grads, present) if here)
    return dx, dparameters, None, None, None


differentiable(mlp_op, _mlp_save, _mlp_backward)


# The losses. Outputs: the loss, ∂ℓ/∂z, ∂ℓ/∂t if the target wants it, and the mean's denominator, always a tensor here.


def _loss_outputs(loss, grad, dtarget, denominator, reduction):
    if reduction != "mean":
        denominator = None
    elif not isinstance(denominator, torch.Tensor):
        denominator = torch.full((), denominator, dtype=torch.promote_types(loss.dtype, torch.float32), device=loss.device)
    return dense(loss, grad, dtarget, denominator)


def _loss_saved(outputs, target_grad, reduction):
    return (*spread(outputs[1:], (True, target_grad, reduction == "mean")), reduction)


@operator(
    "cross_entropy(Tensor logits, Tensor target, Tensor? weight, int ignore_index, str reduction, float label_smoothing, "
    "bool target_grad) -> Tensor[]"
)
def cross_entropy_op(logits, target, weight, ignore_index, reduction, label_smoothing, target_grad):
    options = (weight, ignore_index, reduction, label_smoothing)
    loss, saved = cross_entropy_fwd(logits, target, *options, target_grad=target_grad)
    return _loss_outputs(loss, *saved)


@operator(
    "cross_entropy_bwd(Tensor dy, Tensor grad, Tensor? dtarget, Tensor? denominator, str reduction, bool[] needs) -> Tensor[]"
)
def cross_entropy_bwd_op(dy, grad, dtarget, denominator, reduction, needs):
    grads = cross_entropy_bwd(dy, grad, dtarget, denominator, reduction, needs=needs)
    return dense(*(g if n else None for g, n in zip(grads, needs)))


def _cross_entropy_save(ctx, inputs, outputs):
    launch.remember(ctx, (), _loss_saved(outputs, inputs[6], inputs[4]))


def _cross_entropy_backward(ctx, dy):
    _, saved = launch.recall(ctx)
    needs = list(ctx.needs_input_grad[:2])
    return *spread(ops.cross_entropy_bwd(dy, *saved, needs), needs), *(None,) * 5


differentiable(cross_entropy_op, _cross_entropy_save, _cross_entropy_backward)


@operator(
    "linear_cross_entropy(Tensor x, Tensor w, Tensor? b, Tensor target, Tensor? weight, int ignore_index, str reduction, "
    "float label_smoothing) -> Tensor[]"
)
def linear_cross_entropy_op(*args):
    loss, saved = linear_cross_entropy_fwd(*args)
    return _loss_outputs(loss, *saved[3:])


@operator(
    "linear_cross_entropy_bwd(Tensor dy, Tensor x, Tensor w, bool bias, Tensor grad, Tensor? dtarget, Tensor? denominator, "
    "str reduction, bool[] needs) -> Tensor[]"
)
def linear_cross_entropy_bwd_op(*args):
    return dense(*linear_cross_entropy_bwd(*args[:-1], needs=args[-1]))


def _linear_cross_entropy_save(ctx, inputs, outputs):
    x, w, b = inputs[:3]
    launch.remember(ctx, (), (x, w, b is not None, *_loss_saved(outputs, False, inputs[6])))


def _linear_cross_entropy_backward(ctx, dy):
    _, saved = launch.recall(ctx)
    needs = list(ctx.needs_input_grad[:3])
    return *spread(ops.linear_cross_entropy_bwd(dy, *saved, needs), needs), *(None,) * 5


differentiable(linear_cross_entropy_op, _linear_cross_entropy_save, _linear_cross_entropy_backward)


@operator("mse_loss(Tensor x, Tensor t, str reduction) -> Tensor[]")
def mse_op(x, t, reduction):
    return dense(mse_fwd(x, t, reduction)[0])


@operator("mse_loss_bwd(Tensor dy, Tensor x, Tensor t, str reduction, bool[] needs) -> Tensor[]")
def mse_bwd_op(dy, x, t, reduction, needs):
    return dense(*mse_bwd(dy, x.contiguous(), t.contiguous(), reduction, needs=needs))


def _mse_backward(ctx, dy):
    inputs, _ = launch.recall(ctx)
    needs = list(ctx.needs_input_grad[:2])
    return *spread(ops.mse_loss_bwd(dy, *inputs, needs), needs), None


differentiable(mse_op, lambda ctx, inputs, outputs: launch.remember(ctx, inputs, ()), _mse_backward)


# conv2d. Padding is two numbers, or none and a name. Outputs: y, z if the derivative needs it, the winners if it pools.

_CONV = "int[] stride, int[] padding, str named_padding, str activation, int[] max_pool, int[] dilation"


@operator(f"conv2d(Tensor x, Tensor w, Tensor? b, {_CONV}, int groups) -> Tensor[]")
def conv2d_op(x, w, b, stride, padding, named_padding, activation, max_pool, dilation, groups):
    y, saved = conv2d_fwd(x, w, b, stride, padding or named_padding, activation, max_pool, dilation, groups)
    _, _, s, winner, *_ = saved
    return dense(y, s if activations.get(activation).needs == "z" else None, winner if winner is None else winner.int())


@operator(
    "conv2d_bwd(Tensor dy, Tensor x, Tensor w, Tensor? s, Tensor? winner, bool bias, str activation, int[] geometry, "
    "bool[] needs) -> Tensor[]"
)
def conv2d_bwd_op(dy, x, w, s, winner, bias, activation, g, needs):
    return dense(*conv2d_bwd(dy, x, w, s, winner, bias, activation, Geometry(*g), needs=needs))


def _conv2d_save(ctx, inputs, outputs):
    x, w, b, stride, padding, named_padding, activation, max_pool, dilation, _ = inputs
    g = geometry(w.shape[2:], stride, padding or named_padding, dilation, max_pool)
    needs = activations.get(activation).needs
    y, z, winner = spread(outputs, (True, needs == "z", g.pooled))
    s = {"nothing": None, "y": y, "z": z}[needs]
    launch.remember(ctx, (), (x, w, s, winner, b is not None, activation, list(g)))


def _conv2d_backward(ctx, dy):
    _, saved = launch.recall(ctx)
    needs = list(ctx.needs_input_grad[:3])
    return *spread(ops.conv2d_bwd(dy, *saved, needs), needs), *(None,) * 7


differentiable(conv2d_op, _conv2d_save, _conv2d_backward)
