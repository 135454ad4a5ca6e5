"""The operations as torch.library operators: what `torch.compile` sees of them, one opaque node
each way.

An operator calls the launchers that eager mode calls, so a compiled network has the gradients of an
eager one, bit for bit. Its fake implementation, which tells shapes to the compiler, is the same
function by the reference, run on fake tensors. Eager mode does not come through here: the wrapper
of an operator costs tens of µs a call.

An operator may return neither its inputs nor None. So a forward returns y and only what it computed
beside it, a backward only the gradients that `needs` asks for; what the launchers know as `saved`
is put together in between.
"""

import torch

from . import activations, launch
from .conv import conv2d_fwd
from .conv_bwd import conv2d_bwd
from .cross_entropy import cross_entropy_bwd, cross_entropy_fwd
from .linear_cross_entropy import linear_cross_entropy_bwd, linear_cross_entropy_fwd
from .mlp import mlp_bwd, mlp_fwd
from .mse import mse_bwd, mse_fwd
from .patches import Geometry, check_conv, geometry

ops = torch.ops.handgrad


def operator(schema: str, fake=None):
    """Register the function below as the operator of this schema, and as its fake implementation
    unless there is another.
    """

    def register(function):
        name, _, rest = schema.partition("(")
        op = torch.library.custom_op(
            f"handgrad::{name}", function, mutates_args=(), schema=f"({rest}"
        )
        op.register_fake(fake or function)
        return op

    return register


def differentiable(op, bwd, saved, count) -> None:
    """Give an operator its gradient: `bwd(dy, *saved(inputs, outputs), needs)`, those of its first
    `count` inputs.
    """

    def setup_context(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        ctx.others = len(inputs) - count
        launch.remember(ctx, (), saved(inputs, output))

    def backward(ctx, dys):
        needs = list(ctx.needs_input_grad[:count])
        return *spread(bwd(dys[0], *launch.recall(ctx)[1], needs), needs), *(None,) * ctx.others

    op.register_autograd(backward, setup_context=setup_context)


def dense(*tensors) -> list:
    """The tensors that are not None, contiguous, as the fake implementation says."""
    return [t.contiguous() for t in tensors if t is not None]


def spread(tensors, present) -> list:
    """The tensors, one after the other, where `present`; None elsewhere."""
    tensors = iter(tensors)
    return [next(tensors) if here else None for here in present]


# mlp, and linear as a stack of one. Parameters: all weights, then the biases that `bias` says there
# are. Outputs: y, the outputs of the hidden layers, the pre-activations of the layers whose
# derivative needs them.


def _needed(layers, activation, output_activation) -> list[str]:
    return [
        activations.get(a, "mlp").needs for a in [activation] * (layers - 1) + [output_activation]
    ]


@operator(
    "mlp(Tensor x, Tensor[] parameters, bool[] bias, str activation, str output_activation) -> "
    "Tensor[]"
)
def mlp_op(x, parameters, bias, *acts):
    layers = len(bias)
    y, saved = mlp_fwd(x, parameters[:layers], spread(parameters[layers:], bias), *acts)
    hidden, kept = saved[5 + layers : 4 + 2 * layers], saved[4 + 2 * layers :]
    return dense(y, *hidden, *(s for s, needs in zip(kept, _needed(layers, *acts)) if needs == "z"))


@operator(
    "mlp_bwd(Tensor dy, Tensor?[] saved, bool[] bias, str activation, str output_activation, "
    "bool[] needs) -> Tensor[]"
)
def mlp_bwd_op(dy, saved, bias, activation, output_activation, needs):
    dx, dws, dbs = mlp_bwd(dy, len(bias), bias, activation, output_activation, *saved, needs=needs)
    return dense(dx, *dws, *dbs)


def _mlp_setup(ctx, inputs, output):
    x, parameters, ctx.bias, *ctx.acts = inputs
    layers = len(ctx.bias)
    (y, *hidden), zs = output[:layers], iter(output[layers:])
    choices = zip([*hidden, y], _needed(layers, *ctx.acts))
    kept = [next(zs) if needs == "z" else y if needs == "y" else None for y, needs in choices]
    ctx.set_materialize_grads(False)
    launch.remember(ctx, (), (*parameters[:layers], x, *hidden, *kept))


def _mlp_backward(ctx, dys):
    """As in `differentiable`, but the gradients of parameters are a list, and of biases that are
    absent there is none.
    """
    needs_x, needs_parameters = ctx.needs_input_grad[:2]
    present = [True] * (1 + len(ctx.bias)) + ctx.bias
    needs = [bool(n) for n in spread([needs_x, *needs_parameters], present)]
    grads = spread(ops.mlp_bwd(dys[0], launch.recall(ctx)[1], ctx.bias, *ctx.acts, needs), needs)
    dx, *dparameters = (g for g, here in zip(grads, present) if here)
    return dx, dparameters, None, None, None


mlp_op.register_autograd(_mlp_backward, setup_context=_mlp_setup)


# The losses. Outputs: the loss, ∂ℓ/∂z, ∂ℓ/∂t if the target wants it, and the mean's denominator,
# always a tensor here.


def _loss_outputs(loss, grad, dtarget, denominator, reduction):
    if reduction != "mean":
        denominator = None
    elif not isinstance(denominator, torch.Tensor):
        denominator = torch.full(
            (),
            denominator,
            dtype=torch.promote_types(loss.dtype, torch.float32),
            device=loss.device,
        )
    return dense(loss, grad, dtarget, denominator)


def _loss_saved(outputs, target_grad, reduction):
    return *spread(outputs[1:], (True, target_grad, reduction == "mean")), reduction


@operator(
    "cross_entropy(Tensor logits, Tensor target, Tensor? weight, int ignore_index, str "
    "reduction, float label_smoothing, "
    "bool target_grad) -> Tensor[]"
)
def cross_entropy_op(*args):
    loss, saved = cross_entropy_fwd(*args[:-1], target_grad=args[-1])
    return _loss_outputs(loss, *saved)


@operator(
    "cross_entropy_bwd(Tensor dy, Tensor grad, Tensor? dtarget, Tensor? denominator, str "
    "reduction, bool[] needs) -> Tensor[]"
)
def cross_entropy_bwd_op(*args):
    grads = cross_entropy_bwd(*args[:-1], needs=args[-1])
    return dense(*(g if needed else None for g, needed in zip(grads, args[-1])))


differentiable(
    cross_entropy_op,
    ops.cross_entropy_bwd,
    lambda inputs, outputs: _loss_saved(outputs, inputs[6], inputs[4]),
    2,
)


@operator(
    "linear_cross_entropy(Tensor x, Tensor w, Tensor? b, Tensor target, Tensor? weight, int "
    "ignore_index, str reduction, "
    "float label_smoothing) -> Tensor[]"
)
def linear_cross_entropy_op(*args):
    loss, saved = linear_cross_entropy_fwd(*args)
    return _loss_outputs(loss, *saved[3:])


@operator(
    "linear_cross_entropy_bwd(Tensor dy, Tensor x, Tensor w, bool bias, Tensor grad, Tensor? "
    "dtarget, Tensor? denominator, "
    "str reduction, bool[] needs) -> Tensor[]"
)
def linear_cross_entropy_bwd_op(*args):
    return dense(*linear_cross_entropy_bwd(*args[:-1], needs=args[-1]))


def _linear_cross_entropy_saved(inputs, outputs):
    x, w, b = inputs[:3]
    return x, w, b is not None, *_loss_saved(outputs, False, inputs[6])


differentiable(
    linear_cross_entropy_op, ops.linear_cross_entropy_bwd, _linear_cross_entropy_saved, 3
)


@operator("mse_loss(Tensor x, Tensor t, str reduction) -> Tensor[]")
def mse_op(x, t, reduction):
    return dense(mse_fwd(x, t, reduction)[0])


@operator("mse_loss_bwd(Tensor dy, Tensor x, Tensor t, str reduction, bool[] needs) -> Tensor[]")
def mse_bwd_op(dy, x, t, reduction, needs):
    return dense(*mse_bwd(dy, x.contiguous(), t.contiguous(), reduction, needs=needs))


differentiable(mse_op, ops.mse_loss_bwd, lambda inputs, outputs: inputs, 2)


# conv2d. Padding is two numbers unless it has a name. Outputs: y, z if the derivative needs it, the
# winners if it pools. The fakes make shapes alone: torch's convolution asks how large the batch is,
# and another answer would compile anew.


def _conv2d_fake(x, w, b, stride, padding, named_padding, activation, max_pool, dilation, groups):
    g = check_conv(x, w, b, stride, named_padding or padding, dilation, max_pool, groups)
    oh, ow = g.conv_size(*x.shape[-2:])
    images = (x.shape[0] if x.dim() == 4 else 1, w.shape[0], oh // g.PH, ow // g.PW)
    z = x.new_empty(images) if activations.get(activation, "conv2d").needs == "z" else None
    winner = x.new_empty(images, dtype=torch.int32) if g.pooled else None
    return dense(x.new_empty(images if x.dim() == 4 else images[1:]), z, winner)


def _conv2d_bwd_fake(dy, x, w, s, winner, bias, activation, g, needs):
    return [
        x.new_empty(shape)
        for shape, needed in zip((x.shape, w.shape, w.shape[:1]), needs)
        if needed
    ]


@operator(
    "conv2d(Tensor x, Tensor w, Tensor? b, int[] stride, int[] padding, str named_padding, str "
    "activation, int[] max_pool, "
    "int[] dilation, int groups) -> Tensor[]",
    _conv2d_fake,
)
def conv2d_op(x, w, b, stride, padding, named_padding, activation, *options):
    y, (_, _, s, winner, *_) = conv2d_fwd(
        x, w, b, stride, named_padding or padding, activation, *options
    )
    return dense(
        y,
        s if activations.get(activation).needs == "z" else None,
        None if winner is None else winner.int(),
    )


@operator(
    "conv2d_bwd(Tensor dy, Tensor x, Tensor w, Tensor? s, Tensor? winner, bool bias, str "
    "activation, int[] geometry, "
    "bool[] needs) -> Tensor[]",
    _conv2d_bwd_fake,
)
def conv2d_bwd_op(dy, x, w, s, winner, bias, activation, g, needs):
    return dense(*conv2d_bwd(dy, x, w, s, winner, bias, activation, Geometry(*g), needs=needs))


def _conv2d_saved(inputs, outputs):
    x, w, b, stride, padding, named_padding, activation, max_pool, dilation, _ = inputs
    g = geometry(w.shape[2:], stride, named_padding or padding, dilation, max_pool)
    needs = activations.get(activation).needs
    y, z, winner = spread(outputs, (True, needs == "z", g.pooled))
    return (
        x,
        w,
        {"nothing": None, "y": y, "z": z}[needs],
        winner,
        b is not None,
        activation,
        list(g),
    )


differentiable(conv2d_op, ops.conv2d_bwd, _conv2d_saved, 3)


# How the public functions, which `launch.call` knows by name, call the operators.


def _mlp(x, activation, output_activation, *parameters):
    layers = len(parameters) // 2
    bias = [b is not None for b in parameters[layers:]]
    return ops.mlp(x, [p for p in parameters if p is not None], bias, activation, output_activation)


def _linear(x, w, b, activation):
    return _mlp(x, activation, activation, w, b)


def _cross_entropy(logits, target, *options):
    return ops.cross_entropy(logits, target, *options, target.requires_grad)


def _conv2d(x, w, b, stride, padding, activation, max_pool, dilation, groups):
    stride, max_pool, dilation = (
        [v, v] if isinstance(v, int) else list(v) for v in (stride, max_pool, dilation)
    )
    named = padding if isinstance(padding, str) else ""
    padding = [0, 0] if named else [padding, padding] if isinstance(padding, int) else list(padding)
    return ops.conv2d(x, w, b, stride, padding, named, activation, max_pool, dilation, groups)


launch.operators.update(
    mlp=_mlp,
    linear=_linear,
    cross_entropy=_cross_entropy,
    linear_cross_entropy=ops.linear_cross_entropy,
    mse_loss=ops.mse_loss,
    conv2d=_conv2d,
)
