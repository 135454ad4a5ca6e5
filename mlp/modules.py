"""The autograd API: each nn.Module holds parameters and makes one call to `kernels`."""

import contextlib
import itertools
import math
import operator
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook
from torch.overrides import has_torch_function_unary

import kernels
from kernels import activations

from . import loss as losses
from .init import initialise

Window = int | tuple[int, int]  # sides of a pooling window in pixels: one, or (height, width)

_thread = threading.local()  # .blank is True inside `blank`


@contextlib.contextmanager
def blank() -> Iterator[None]:
    """Layers of this module that are made inside this block have no initial weights.

    Use it where other weights replace them at once. It takes less time, and leaves torch's global
    random generator as it was.
    """
    before, _thread.blank = getattr(_thread, "blank", False), True
    try:
        yield
    finally:
        _thread.blank = before


class _Drawn:
    """The base of our layers: their initial weights are torch's, except in `blank`."""

    def reset_parameters(self) -> None:
        """Draw new weights, as torch does."""
        if not getattr(_thread, "blank", False):
            super().reset_parameters()  # type: ignore[misc]


def check_activations(op: str, *names: str) -> None:
    """ValueError for an unknown activation, also if no layer uses it. It lists the known ones."""
    for name in names:
        activations.get(name, op)


class Linear(_Drawn, nn.Linear):
    """`nn.Linear` with its activation fused in: act(x weightᵀ + bias).

    weight is (out_features, in_features), bias (out_features,). Parameters, initial weights and
    state_dict are those of `nn.Linear`. The arguments are nn.Linear's, and after them `activation`,
    a name in `kernels.ACTIVATIONS`. ValueError for an unknown one.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        activation: str = "identity",
    ) -> None:
        check_activations("Linear", activation)
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.activation = activation

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(…, in_features) -> (…, out_features)."""
        return self.fused(input)

    def fused(self, input: torch.Tensor, activation: str | None = None) -> torch.Tensor:
        """`forward`, with this activation if one is given instead of the layer's own."""
        weight, bias = _weight_and_bias(self)
        if _is_foreign(input, weight, bias):
            row = activations.get(activation or self.activation)
            return row.torch(nn.functional.linear(input, weight, bias))
        return kernels.linear(input, weight, bias, activation or self.activation)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation}"


def check_sizes(sizes: Sequence[int], op: str = "MLP") -> tuple[int, ...]:
    """The sizes as a tuple of ints. Integers of numpy are accepted.

    ValueError unless there are at least two, an input and an output width, and all are positive.
    """
    try:
        found = tuple(operator.index(size) for size in sizes)
    except TypeError:  # not a sequence, or not of integers
        found = ()
    if len(found) < 2 or min(found) < 1:
        raise ValueError(
            f"{op}: sizes must be at least two positive integers, such as (784, 100, 10), got "
            f"{tuple(sizes) if isinstance(sizes, Iterable) else sizes}"
        )
    return found


class MLP(nn.Module):
    """A stack of linear layers, run as one operation.

    Layer i is `mlp[i]`. Its parameters are "i.weight", of shape (sizes[i + 1], sizes[i]), and
    "i.bias", of shape (sizes[i + 1],).

    sizes: widths from input to output, at least two. activation, output_activation: names in
    `kernels.ACTIVATIONS`. init: see `mlp.initialise`. ValueError for sizes that are not positive
    integers, and for unknown names.

    The whole stack is one node in autograd's graph while its layers are unchanged. If one of them
    was replaced, hooked, pruned or re-parametrised, `forward` calls the layers one by one.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        activation: str = "relu",
        output_activation: str = "identity",
        bias: bool = True,
        init: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.sizes = check_sizes(sizes)
        check_activations("MLP", activation, output_activation)
        self.activation, self.output_activation = activation, output_activation
        last = len(self.sizes) - 2
        for i, (k, n) in enumerate(itertools.pairwise(self.sizes)):
            layer = Linear(
                k,
                n,
                bias,
                device,
                dtype,
                output_activation if i == last else activation,
            )
            self.add_module(str(i), layer)
        if init is not None:
            initialise(dict(self.named_parameters()), init)

    def __len__(self):
        return len(self.layers())

    def __getitem__(self, index):
        return self.layers()[index]

    def layers(self) -> list[nn.Module]:
        """The layers in order: the submodules "0", "1", … Other submodules are not called."""
        found: list[nn.Module] = []
        count = len(self.sizes) - 1
        while (layer := self._modules.get(str(len(found)))) is not None:
            found.append(layer)
        if len(found) < count:
            raise AttributeError(
                f"MLP: layer {len(found)} is missing; the network was made with {count} layers"
            )
        return found

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(…, sizes[0]) -> (…, sizes[-1])."""
        last, weights, biases = len(self.sizes) - 2, [], []
        if _is_foreign(input):
            return self._one_by_one(input)
        modules, activation = self._modules, self.activation
        for i in range(last + 1):
            layer: Any = modules.get(str(i))
            expected = self.output_activation if i == last else activation
            if type(layer) is not Linear or layer.activation != expected:
                return self._one_by_one(input)
            if not runs_forward(layer):
                return self._one_by_one(input)
            weight, bias = _weight_and_bias(layer)
            if _is_foreign(weight, bias):
                return self._one_by_one(input)
            weights.append(weight)
            biases.append(bias)
        if str(last + 1) in modules or _has_any_global_hook():
            return self._one_by_one(input)
        return kernels.mlp(input, weights, biases, self.activation, self.output_activation)

    def _one_by_one(self, input: torch.Tensor) -> torch.Tensor:
        for layer in self.layers():
            input = layer(input)
        return input

    def config(self) -> dict:
        """The arguments that build this network again. They can be stored as JSON."""
        return {
            "kind": "mlp",
            "sizes": list(self.sizes),
            "activation": self.activation,
            "output_activation": self.output_activation,
            "bias": self[0].bias is not None,
        }


def run_stack(
    input: torch.Tensor, layers: Sequence[Any], activation: str, output_activation: str
) -> torch.Tensor | None:
    """The output of linear layers one after the other, as one operation, with these activations.

    It is None if a tensor is of a class for which torch's functions compute something else.
    """
    if _is_foreign(input):
        return None
    weights, biases = [], []
    for layer in layers:
        weight, bias = _weight_and_bias(layer)
        if _is_foreign(weight, bias):
            return None
        weights.append(weight)
        biases.append(bias)
    return kernels.mlp(input, weights, biases, activation, output_activation)


def runs_forward(module: nn.Module) -> bool:
    """True if a call of this object runs its class's forward and nothing else.

    False with a hook, a forward of the object's own, or a compiled call. Hooks on all modules are
    not seen here.
    """
    hooks = module._forward_pre_hooks or module._forward_hooks
    if hooks or module._backward_pre_hooks or module._backward_hooks:
        return False
    return "forward" not in module.__dict__ and module._compiled_call_impl is None


def _weight_and_bias(layer: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """layer.weight and layer.bias.

    For a parameter `layer.weight` runs nn.Module.__getattr__, which costs as much as a small
    operation.
    """
    own, made = layer.__dict__, layer._parameters
    if "weight" in made and "bias" in made and not ("weight" in own or "bias" in own):
        return made["weight"], made["bias"]
    return layer.weight, layer.bias


_PLAIN = (torch.Tensor, nn.Parameter, type(None))


def _is_foreign(*tensors: torch.Tensor | None) -> bool:
    """True if torch's functions compute something else with one of these tensors.

    Such a tensor is of a subclass with a `__torch_function__`, as some quantised ones are. A proxy
    of torch.fx is no tensor.
    """
    for tensor in tensors:
        is_own = type(tensor) not in _PLAIN and isinstance(tensor, torch.Tensor)
        if is_own and has_torch_function_unary(tensor):
            return True
    return False


class Conv2d(_Drawn, nn.Conv2d):
    """`nn.Conv2d` with its activation and max-pool fused in.

    Parameters, initial weights and state_dict are those of `nn.Conv2d`. The arguments are
    nn.Conv2d's, and after them ours. activation: a name in `kernels.ACTIVATIONS`. max_pool: the
    side of the pooling window, in pixels; 1 pools nothing. ValueError for an unknown activation,
    and unless groups is 1 and padding_mode "zeros".
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        activation: str = "identity",
        max_pool: int = 1,
    ):
        check_activations("Conv2d", activation)
        if (groups, padding_mode) != (1, "zeros"):
            raise ValueError(
                f"Conv2d: takes groups=1 and padding_mode='zeros', got {groups} and "
                f"{padding_mode!r}; use nn.Conv2d"
            )
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            bias=bias,
            device=device,
            dtype=dtype,
        )
        self.activation, self.max_pool = activation, max_pool

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(N, in, H, W) or (in, H, W) -> (N, out, H', W') or (out, H', W').

        H' and W' are the sides that nn.Conv2d gives, divided by max_pool and rounded down.
        """
        return self.fused(input)

    def fused(
        self, input: torch.Tensor, activation: str | None = None, max_pool: Window | None = None
    ) -> torch.Tensor:
        """`forward`, with these if they are given instead of the layer's own."""
        if _is_foreign(input, self.weight, self.bias):
            y = activations.get(activation or self.activation).torch(super().forward(input))
            return nn.functional.max_pool2d(y, max_pool or self.max_pool)
        return kernels.conv2d(
            input,
            self.weight,
            self.bias,
            self.stride,
            self.padding,
            activation or self.activation,
            max_pool or self.max_pool,
            self.dilation,
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation}, max_pool={self.max_pool}"


def _are_images(input: torch.Tensor, shape: Sequence[int]) -> bool:
    """True if the last dimensions are an image (C, H, W), flattened or with rows of C·H·W or H·W.

    The 1 of one channel may be left out. torch.fx passes a proxy, whose shape is not known.
    """
    if not isinstance(input, torch.Tensor):
        return True
    c, h, w = shape
    # The shortest first. A longer one would be compared with the number of images, which
    # torch.export then takes for a constant.
    for form in ((c * h * w,), *[(h, w)] * (c == 1), (c, h * w), (c, h, w)):
        if tuple(input.shape[-len(form) :]) == form:
            return True
    return False


class ConvNet(nn.Module):
    """Convolutions, each with activation and max-pool, then a multilayer perceptron.

    image_shape: (C, H, W). channels: outputs of each convolution. kernel_size, max_pool: sides of
    the convolutions' windows in pixels. hidden: widths of the perceptron's hidden layers. classes:
    outputs. init: see `mlp.initialise`. The parameters are "conv.0.weight", …, "mlp.0.weight", …
    The defaults make the LeNet-like network of the recipe `convnet`: 1 → 6 → 12 channels,
    192-120-60-10. ValueError for an argument that is no positive integer, an unknown name, or
    images that are too small for the convolutions.
    """

    def __init__(
        self,
        image_shape: Sequence[int] = (1, 28, 28),
        channels: Sequence[int] = (6, 12),
        kernel_size: int = 5,
        max_pool: int = 2,
        hidden: Sequence[int] = (120, 60),
        classes: int = 10,
        activation: str = "relu",
        init: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_activations("ConvNet", activation)
        self.arguments: dict[str, Any] = {
            "image_shape": [whole("ConvNet: image_shape", size) for size in image_shape],
            "channels": [whole("ConvNet: channels", size) for size in channels],
            "kernel_size": whole(
                "ConvNet: kernel_size", kernel_size, "one whole number for both sides"
            ),
            "max_pool": whole("ConvNet: max_pool", max_pool, "one whole number for both sides"),
            "hidden": [whole("ConvNet: hidden", size) for size in hidden],
            "classes": whole("ConvNet: classes", classes),
            "activation": activation,
        }
        layers, features = conv_layers(self.arguments)
        self.conv = nn.ModuleList(
            Conv2d(
                c,
                o,
                kernel_size,
                activation=activation,
                max_pool=max_pool,
                device=device,
                dtype=dtype,
            )
            for c, o in layers
        )
        self.mlp = MLP((features, *hidden, classes), activation, device=device, dtype=dtype)
        if init is not None:
            initialise(dict(self.named_parameters()), init)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W), or flattened (N, C·H·W), -> (N, classes). ValueError: other rows."""
        shape = self.arguments["image_shape"]
        if not _are_images(input, shape):
            raise ValueError(  # else two halves of an image would become one
                f"ConvNet: input is {tuple(input.shape)}, but images are {tuple(shape)}, or "
                f"rows of {math.prod(shape)} numbers"
            )
        y = input.reshape(-1, *shape)
        for layer in self.conv:
            y = layer(y)
        return self.mlp(y.flatten(1))

    def config(self) -> dict:
        """The arguments that build this network again. They can be stored as JSON."""
        return {"kind": "convnet", **self.arguments}


def whole(name: str, value: object, what: str = "a whole number", least: int | None = 1) -> int:
    """An integer, also of numpy, as an int.

    ValueError that names the argument if it is something else or below `least`.
    """
    try:
        found = operator.index(value)  # type: ignore[arg-type]
        if least is None or found >= least:
            return found
    except TypeError:
        pass
    limit = "" if least is None else f", at least {least}"
    raise ValueError(f"{name} must be {what}{limit}, got {value!r}")


def check_rate(name: str, value: object) -> None:
    """ValueError that names the argument unless it is a finite number, at least 0."""
    try:
        is_rate = 0 <= float(value) < math.inf  # type: ignore[arg-type]
    except (TypeError, ValueError):
        is_rate = False
    if not is_rate:
        raise ValueError(f"{name} must be a finite number, at least 0, got {value!r}")


def conv_layers(arguments: dict) -> tuple[list[tuple[int, int]], int]:
    """((in, out) channels of each convolution of a ConvNet, features after the last one).

    ValueError if an image is too small.
    """
    channels = [arguments["image_shape"][0], *arguments["channels"]]
    size, k, pool = (
        list(arguments["image_shape"][1:]),
        arguments["kernel_size"],
        arguments["max_pool"],
    )
    for layer in range(len(channels) - 1):
        reduced = [(side - k + 1) // pool for side in size]
        if min(reduced) < 1:
            raise ValueError(
                f"ConvNet: convolution {layer} needs images of at least {k + pool - 1} × "
                f"{k + pool - 1}, "
                f"got {size[0]} × {size[1]} (image_shape {tuple(arguments['image_shape'])})"
            )
        size = reduced
    return list(itertools.pairwise(channels)), channels[-1] * size[0] * size[1]


def ends(config: dict) -> tuple[int, int]:
    """(input features, outputs) of the network that a `config()` describes."""
    if config["kind"] == "convnet":
        return math.prod(config["image_shape"]), config["classes"]
    return config["sizes"][0], config["sizes"][-1]


class LayerNorm(nn.LayerNorm):
    """`nn.LayerNorm` in one kernel forward and one backward.

    Arguments, parameters and state_dict are those of `nn.LayerNorm`. Shapes and errors: see
    `kernels.layer_norm`.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """See `kernels.layer_norm`."""
        if _is_foreign(input, self.weight, self.bias):
            return super().forward(input)
        return kernels.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """`nn.CrossEntropyLoss`, with loss and gradient in one pass over the logits.

    The arguments are torch's. Shapes and errors: see `kernels.cross_entropy`.
    """

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """See `kernels.cross_entropy`."""
        if _is_foreign(input, target):
            return super().forward(input, target)
        return kernels.cross_entropy(
            input, target, self.weight, self.ignore_index, self.reduction, self.label_smoothing
        )


class MSELoss(nn.MSELoss):
    """`nn.MSELoss`. Input and target must have the same shape, else ValueError."""

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """See `kernels.mse_loss`."""
        if _is_foreign(input, target):
            return super().forward(input, target)
        return kernels.mse_loss(input, target, self.reduction)


class BCEWithLogitsLoss(nn.BCEWithLogitsLoss):
    """`nn.BCEWithLogitsLoss` in one pass over the logits.

    weight and pos_weight get no gradient. Shapes and errors: see
    `kernels.binary_cross_entropy_with_logits`.
    """

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """See `kernels.binary_cross_entropy_with_logits`."""
        if _is_foreign(input, target):
            return super().forward(input, target)
        return kernels.binary_cross_entropy_with_logits(
            input, target, self.weight, self.reduction, self.pos_weight
        )


class HuberLoss(nn.HuberLoss):
    """`nn.HuberLoss`. Input and target must have the same shape, else ValueError."""

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """See `kernels.huber_loss`."""
        if _is_foreign(input, target):
            return super().forward(input, target)
        return kernels.huber_loss(input, target, self.reduction, self.delta)


class PinballLoss(nn.Module):
    """The loss of quantile regression.

    quantile: a number between 0 and 1, or one for each column of input (N, C). With one for each
    column, a target (N,) or (N, 1) serves all columns. Other shapes and errors: see
    `kernels.pinball_loss`.
    """

    def __init__(self, quantile: float | Sequence[float] = 0.5, reduction: str = "mean"):
        super().__init__()
        self.loss, self.reduction = losses.Pinball(quantile, reduction), reduction
        self.quantile = self.loss.parameter
        each = torch.tensor(self.quantile) if isinstance(self.quantile, tuple) else None
        self.register_buffer("_each", each, persistent=False)

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """See `kernels.pinball_loss`."""
        if target.shape != input.shape:
            target = self.loss.columns(target, input.shape[-1])
        quantile: Any = self.quantile
        if self._each is not None:  # float32, because not every device has float64
            is_double = input.dtype == torch.float64
            quantile = self.loss._options(input)[1] if is_double else self._each.to(input.device)
        return kernels.pinball_loss(input, target, quantile, self.reduction)

    def extra_repr(self) -> str:
        return f"quantile={self.quantile}, reduction={self.reduction!r}"


def _cross_entropy(m):
    return losses.SoftmaxCrossEntropy(m.weight, m.ignore_index, m.reduction, m.label_smoothing)


def _mse(m):
    return losses.MeanSquaredError(m.reduction)


def _bce(m):
    wide = m.weight is not None or (m.pos_weight is not None and m.pos_weight.dim() > 1)
    return None if wide else losses.BinaryCrossEntropy(m.reduction, m.pos_weight)


def _huber(m):
    return losses.Huber(m.reduction, m.delta)


# Loss module, ours or torch's -> function that makes the same loss of `mlp.loss`, or returns None.
_MANUAL = {
    nn.CrossEntropyLoss: _cross_entropy,
    CrossEntropyLoss: _cross_entropy,
    nn.MSELoss: _mse,
    MSELoss: _mse,
    nn.BCEWithLogitsLoss: _bce,
    BCEWithLogitsLoss: _bce,
    nn.HuberLoss: _huber,
    HuberLoss: _huber,
    PinballLoss: lambda m: m.loss,
}


def loss_of(loss: losses.LossFunction | str | None) -> Any:
    """The loss of `mlp.loss` that computes the same as `loss`. Every engine can train it.

    loss: a name, a module of ours or of torch's, or None for softmax cross-entropy. Anything else,
    such as a subclass or a module with hooks, is returned unchanged.
    """
    if loss is None or isinstance(loss, str):
        return losses.get(loss or "cross_entropy")
    if type(loss) not in _MANUAL or "forward" in vars(loss) or _has_hooks(loss):
        return loss
    return _MANUAL[type(loss)](loss) or loss


def _has_hooks(module):
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, name) for name in hooks)


def build(
    config: dict, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> torch.nn.Module:
    """The network that a `config()` describes. The caller fills its weights, see `blank`.

    ValueError for an unknown kind of network.
    """
    arguments = {key: value for key, value in config.items() if key != "kind"}
    kinds = {"mlp": MLP, "convnet": ConvNet}
    if config.get("kind") not in kinds:
        raise ValueError(
            f"build: unknown kind of network {config.get('kind')!r}; known: {', '.join(kinds)}"
        )
    with blank():
        return kinds[config["kind"]](**arguments, device=device, dtype=dtype)
