"""The autograd API: nn.Modules that hold parameters and make one `kernels` call each."""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import nn

import kernels
from kernels import activations

from .init import initialise


class Linear(nn.Linear):
    """`nn.Linear` with its activation fused in: act(x weightᵀ + bias). Same parameters, initial
    weights and state_dict.
    """

    def __init__(
        self, in_features, out_features, bias=True, activation="identity", device=None, dtype=None
    ):
        activations.get(activation, "Linear")
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.activation = activation

    def forward(self, input):
        """(…, in_features) -> (…, out_features)."""
        return kernels.linear(input, self.weight, self.bias, self.activation)

    def extra_repr(self):
        return f"{super().extra_repr()}, activation={self.activation}"


def check_sizes(sizes: Sequence[int], op: str = "MLP") -> tuple[int, ...]:
    """At least an input and an output width, all positive; returned as a tuple."""
    sizes = tuple(sizes)
    if len(sizes) < 2 or not all(isinstance(s, int) and s > 0 for s in sizes):
        raise ValueError(
            f"{op}: sizes must be at least two positive integers, such as (784, 100, 10), got "
            f"{sizes}"
        )
    return sizes


class MLP(nn.Module):
    """A stack of linear layers run as one operation; layer i is `mlp[i]`, its parameters are
    "i.weight" and "i.bias".

    sizes: widths from input to output. init: see `mlp.init`. The whole stack is one node of the
    tape, so forward hooks of single layers do not fire.
    """

    def __init__(
        self,
        sizes,
        activation="relu",
        output_activation="identity",
        bias=True,
        init=None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.sizes = check_sizes(sizes)
        self.activation, self.output_activation = activation, output_activation
        last = len(self.sizes) - 2
        for i, (k, n) in enumerate(itertools.pairwise(self.sizes)):
            layer = Linear(
                k,
                n,
                bias,
                output_activation if i == last else activation,
                device=device,
                dtype=dtype,
            )
            self.add_module(str(i), layer)
        if init is not None:
            initialise(dict(self.named_parameters()), init)

    def __len__(self):
        return len(self.sizes) - 1

    def __getitem__(self, index):
        return list(self.children())[index]

    def forward(self, input):
        """(…, sizes[0]) -> (…, sizes[-1])."""
        layers = list(self.children())
        weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
        return kernels.mlp(input, weights, biases, self.activation, self.output_activation)

    def config(self) -> dict:
        """The arguments that build this network again, as JSON can hold them."""
        return {
            "kind": "mlp",
            "sizes": list(self.sizes),
            "activation": self.activation,
            "output_activation": self.output_activation,
            "bias": self[0].bias is not None,
        }


class Conv2d(nn.Conv2d):
    """`nn.Conv2d` with its activation and max-pool fused in. Same parameters, initial weights and
    state_dict.

    The arguments are nn.Conv2d's, of which groups must be 1 and padding_mode "zeros", else
    ValueError; then ours.
    """

    def __init__(
        self,
        in_channels,
        out_channels,
        kernel_size,
        stride=1,
        padding=0,
        dilation=1,
        groups=1,
        bias=True,
        padding_mode="zeros",
        device=None,
        dtype=None,
        activation="identity",
        max_pool=1,
    ):
        activations.get(activation, "Conv2d")
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

    def forward(self, input):
        """(N, in, H, W) or (in, H, W) -> images of the convolution's size over max_pool."""
        return kernels.conv2d(
            input,
            self.weight,
            self.bias,
            self.stride,
            self.padding,
            self.activation,
            self.max_pool,
            self.dilation,
        )

    def extra_repr(self):
        return f"{super().extra_repr()}, activation={self.activation}, max_pool={self.max_pool}"


class ConvNet(nn.Module):
    """Convolutions, each with activation and max-pool, then a multilayer perceptron on the
    flattened result.

    image_shape (C, H, W); channels, kernel_size, max_pool of the convolutions; hidden: widths of
    the perceptron's hidden layers; classes: outputs. Parameters: "conv.0.weight", …,
    "mlp.0.weight", … The defaults are the LeNet-like network of the recipe `convnet`: 1 → 6 → 12
    channels, 192-120-60-10.
    """

    def __init__(
        self,
        image_shape=(1, 28, 28),
        channels=(6, 12),
        kernel_size=5,
        max_pool=2,
        hidden=(120, 60),
        classes=10,
        activation="relu",
        init=None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.arguments = {
            "image_shape": list(image_shape),
            "channels": list(channels),
            "kernel_size": kernel_size,
            "max_pool": max_pool,
            "hidden": list(hidden),
            "classes": classes,
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

    def forward(self, input):
        """(N, C, H, W), or flattened (N, C·H·W), -> (N, classes)."""
        y = input.reshape(-1, *self.arguments["image_shape"])
        for layer in self.conv:
            y = layer(y)
        return self.mlp(y.flatten(1))

    def config(self) -> dict:
        """The arguments that build this network again, as JSON can hold them."""
        return {"kind": "convnet", **self.arguments}


def conv_layers(arguments: dict) -> tuple[list[tuple[int, int]], int]:
    """(in, out) channels of each convolution of a ConvNet, and the features left; a ValueError
    where an image is too small.
    """
    channels = [arguments["image_shape"][0], *arguments["channels"]]
    size, k, pool = (
        list(arguments["image_shape"][1:]),
        arguments["kernel_size"],
        arguments["max_pool"],
    )
    for name, value in (("kernel_size", k), ("max_pool", pool)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(
                f"ConvNet: {name} must be one whole number for both sides, at least 1, got "
                f"{value!r}"
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
    """Features in and outputs of the network that a `config()` describes."""
    if config["kind"] == "convnet":
        return math.prod(config["image_shape"]), config["classes"]
    return config["sizes"][0], config["sizes"][-1]


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """`nn.CrossEntropyLoss`, loss and gradient in one pass over the logits."""

    def forward(self, input, target):
        """See `kernels.cross_entropy`."""
        return kernels.cross_entropy(
            input, target, self.weight, self.ignore_index, self.reduction, self.label_smoothing
        )


class MSELoss(nn.MSELoss):
    """`nn.MSELoss` for input and target of one shape."""

    def forward(self, input, target):
        """See `kernels.mse_loss`."""
        return kernels.mse_loss(input, target, self.reduction)


def build(config: dict, device=None, dtype=None) -> torch.nn.Module:
    """The network that a `config()` describes, with fresh weights."""
    arguments = {key: value for key, value in config.items() if key != "kind"}
    kinds = {"mlp": MLP, "convnet": ConvNet}
    if config.get("kind") not in kinds:
        raise ValueError(
            f"build: unknown kind of network {config.get('kind')!r}; known: {', '.join(kinds)}"
        )
    return kinds[config["kind"]](**arguments, device=device, dtype=dtype)
