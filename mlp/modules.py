"""The autograd API: nn.Modules that hold parameters and make one `kernels` call each."""

import itertools
from collections.abc import Sequence

import torch
from torch import nn

import kernels
from kernels import activations

from .init import initialise


class Linear(nn.Linear):
    """`nn.Linear` with its activation fused in: act(x weightᵀ + bias). Same parameters, initial weights and state_dict."""

    def __init__(self, in_features, out_features, bias=True, activation="identity", device=None, dtype=None):
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
        raise ValueError(f"{op}: sizes must be at least two positive integers, such as (784, 100, 10), got {sizes}")
    return sizes


class MLP(nn.Module):
    """A stack of linear layers run as one operation; layer i is `mlp[i]`, its parameters are "i.weight" and "i.bias".

    sizes: widths from input to output. init: see `mlp.init`. The whole stack is one node of the tape, so forward hooks of
    single layers do not fire.
    """

    def __init__(self, sizes, activation="relu", output_activation="identity", bias=True, init=None, device=None, dtype=None):
        super().__init__()
        self.sizes = check_sizes(sizes)
        self.activation, self.output_activation = activation, output_activation
        last = len(self.sizes) - 2
        for i, (k, n) in enumerate(itertools.pairwise(self.sizes)):
            layer = Linear(k, n, bias, output_activation if i == last else activation, device=device, dtype=dtype)
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


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """`nn.CrossEntropyLoss`, loss and gradient in one pass over the logits."""

    def forward(self, input, target):
        """See `kernels.cross_entropy`."""
        return kernels.cross_entropy(input, target, self.weight, self.ignore_index, self.reduction, self.label_smoothing)


class MSELoss(nn.MSELoss):
    """`nn.MSELoss` for input and target of one shape."""

    def forward(self, input, target):
        """See `kernels.mse_loss`."""
        return kernels.mse_loss(input, target, self.reduction)


def build(config: dict, device=None, dtype=None) -> torch.nn.Module:
    """The network that a `config()` describes, with fresh weights."""
    arguments = {key: value for key, value in config.items() if key != "kind"}
    kinds = {"mlp": MLP}
    if config.get("kind") not in kinds:
        raise ValueError(f"build: unknown kind of network {config.get('kind')!r}; known: {', '.join(kinds)}")
    return kinds[config["kind"]](**arguments, device=device, dtype=dtype)
