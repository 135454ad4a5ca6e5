"""A trained network for other programs: plain torch modules, or an ONNX file.

A program that loads them does not need handgrad.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils import skip_init

from kernels import activations

from .data import needs_extra
from .engines import takeover
from .modules import MLP, Conv2d, ConvNet, Linear, build
from .net import Net
from .runs.disk import replacing

OPSET = 18


class _Function(nn.Module):
    """A module for an activation of the table that has none in torch.nn."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(…) -> (…), for each element."""
        return self.function(input)


def _activation(name: str) -> list[nn.Module]:
    """The torch modules that compute this activation. The list is empty for the identity."""
    row = activations.get(name, "export")
    made = _Function(row.torch) if row.module is None else row.module()
    return [] if isinstance(made, nn.Identity) else [made]


def _copied(layer: nn.Module, plain: nn.Module) -> nn.Module:
    plain.load_state_dict({name: t.detach().cpu() for name, t in layer.state_dict().items()})
    return plain


def _linear(layer: Any) -> list[nn.Module]:
    plain = skip_init(
        *(nn.Linear, layer.in_features, layer.out_features, layer.bias is not None),
        dtype=layer.weight.dtype,
    )
    return [_copied(layer, plain), *_activation(layer.activation)]


def _conv2d(layer: Any) -> list[nn.Module]:
    plain = skip_init(
        nn.Conv2d,
        layer.in_channels,
        layer.out_channels,
        layer.kernel_size,
        layer.stride,
        layer.padding,
        layer.dilation,
        bias=layer.bias is not None,
        dtype=layer.weight.dtype,
    )
    pool = [] if layer.max_pool == 1 else [nn.MaxPool2d(layer.max_pool)]
    return [_copied(layer, plain), *_activation(layer.activation), *pool]


def _mlp(model: MLP) -> list[nn.Module]:
    return [module for layer in model.children() for module in _linear(layer)]


def _convnet(model: ConvNet) -> list[nn.Module]:
    unflatten = nn.Unflatten(1, tuple(model.arguments["image_shape"]))
    convolutions = [module for layer in model.conv for module in _conv2d(layer)]
    return [nn.Flatten(), unflatten, *convolutions, nn.Flatten(), *_mlp(model.mlp)]


def _net(model: Net) -> list[nn.Module]:
    first = next(iter(model.parameters.values()))
    module = build(model.config(), first.device, first.dtype)
    module.load_state_dict(model.state_dict())
    return PLAIN[type(module)](module)


# Class -> function that makes the same of torch's modules. Subclasses may compute something else,
# so they are refused.
PLAIN: dict[type, Callable] = {
    Linear: _linear,
    Conv2d: _conv2d,
    MLP: _mlp,
    ConvNet: _convnet,
    Net: _net,
}


def plain(model: nn.Module | Net) -> nn.Sequential:
    """The same network, made of torch.nn's modules, with copies of the weights, on the CPU.

    model: an `mlp.MLP`, `mlp.ConvNet`, `mlp.Linear`, `mlp.Conv2d` or `mlp.Net`. TypeError for other
    classes. ValueError if a call of the model computes something else than its layers, as with a
    hook or a pruned weight. Each layer is followed by its activation, so the weights are named
    "0.weight", "2.weight", …
    """
    if type(model) not in PLAIN:
        known = ", ".join(kind.__name__ for kind in PLAIN)
        raise TypeError(f"export: takes {known}, got {type(model).__name__}; save its state_dict")
    if isinstance(model, (MLP, ConvNet, Net)) and (reason := takeover.call(model)):
        raise ValueError(f"export: {reason}; save its state_dict")
    return nn.Sequential(*PLAIN[type(model)](model)).eval()


class Pipeline(nn.Module):
    """A module that maps raw inputs to answers.

    It computes `(inputs - mean) · scale + shift`, the network, and then `head`.

    mean, scale, shift: a number, or one for each feature. With a mean, the formula is computed in
    float64, because a difference of large numbers keeps few digits. head: a function from outputs
    to answers, such as the loss's `probabilities`. None returns the outputs.
    """

    def __init__(
        self,
        model: nn.Module | Net,
        scale: float | torch.Tensor = 1.0,
        shift: float | torch.Tensor = 0.0,
        head: Callable[[torch.Tensor], torch.Tensor] | None = None,
        mean: float | torch.Tensor = 0.0,
    ) -> None:
        super().__init__()
        self.network, self.head = plain(model), head
        self.mean: torch.Tensor
        self.scale: torch.Tensor
        self.shift: torch.Tensor
        self.dtype = next(self.network.parameters()).dtype
        self.centres = isinstance(mean, torch.Tensor) or mean != 0
        dtype = torch.float64 if self.centres else self.dtype
        self.register_buffer("mean", torch.as_tensor(mean, dtype=dtype))
        self.register_buffer("scale", torch.as_tensor(scale, dtype=dtype))
        self.register_buffer("shift", torch.as_tensor(shift, dtype=dtype))

    def in_float32(self) -> None:
        """Store and compute the network in float32. Its weights keep their values."""
        self.network.float()
        self.dtype = torch.float32
        if not self.centres:  # else they are float64
            self.scale, self.shift = self.scale.float(), self.shift.float()

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """(N, features) or (N, C, H, W), any dtype -> (N, outputs)."""
        x = inputs.to(self.scale.dtype)
        if self.centres:
            x = x - self.mean
        x = x * self.scale + self.shift
        outputs = self.network(x.flatten(1).to(self.dtype))
        return outputs if self.head is None else self.head(outputs)


def to_onnx(pipeline: Pipeline, path: str | Path, example: torch.Tensor) -> None:
    """Write an ONNX file with input "inputs" and output "outputs", for any number of rows.

    example: rows (N, features) of the dtype of the file's input, such as uint8 pixels. A bfloat16
    network is written, and computes, in float32, because ONNX Runtime has no products of bfloat16
    on a CPU. DataError, in one line, if the packages onnx and onnxscript are not installed.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError:
        raise needs_extra("onnx and onnxscript", "writing ONNX files", "export") from None
    rows = torch.export.Dim("rows", min=1)
    two = example[:1].cpu().repeat(2, *(1,) * (example.dim() - 1))  # one row would be a constant
    written = copy.deepcopy(pipeline).cpu().eval()
    if written.dtype == torch.bfloat16:
        written.in_float32()
    program = torch.onnx.export(
        written,
        (two,),
        input_names=["inputs"],
        output_names=["outputs"],
        dynamic_shapes={"inputs": {0: rows}},
        opset_version=OPSET,
        dynamo=True,
        verbose=False,
    )
    with replacing(Path(path)) as part:
        assert program is not None  # with dynamo=True, torch returns a program
        program.save(part)


def to_torch(model: nn.Module | Net, path: str | Path) -> None:
    """Write the state_dict of `plain(model)`. It holds only tensors, so `torch.load` is safe."""
    with replacing(Path(path)) as part:
        torch.save(plain(model).state_dict(), part)
