"""The manual API: a network as two functions, forward and backward, and its arrays.

It uses no tape, no requires_grad and no modules.

    net = Net([784, 100, 10])
    logits = net.forward(x)                 # (batch, 10)
    value = loss.forward(logits, target)
    net.backward(loss.backward())           # fills net.grads
    optimizer.step(grads=net.grads)

All parameters are views of one flat tensor, all gradients of another.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch

import kernels
from kernels import activations
from kernels.ops.linear import as_matrix
from kernels.ops.mlp import backward_into, check_mlp, forward_checked

from .init import initialise
from .modules import check_activations, check_sizes, conv_layers
from .views import Views

_ALIGNMENT = 128  # bytes. Each view starts on a cache line, so loads from it can be vectorised.


class Stack:
    """The linear layers of a network as one operation. Net runs it forward and backward."""

    def __init__(
        self,
        sizes: Sequence[int],
        activation: str = "relu",
        output_activation: str = "identity",
        bias: bool = True,
        prefix: str = "",
    ):
        self.sizes = check_sizes(sizes, "Net")
        self.activation, self.output_activation = activation, output_activation
        check_activations("Net", activation, output_activation)
        self.layers = len(self.sizes) - 1
        self.shapes: dict[str, tuple[int, ...]] = {}
        for i, (k, n) in enumerate(itertools.pairwise(self.sizes)):
            self.shapes[f"{prefix}{i}.weight"] = (n, k)
            if bias:
                self.shapes[f"{prefix}{i}.bias"] = (n,)
        self.bias = bias
        self._buffers: dict = {}
        # shape, dtype, device and layout of the latest input that was checked
        self._checked: tuple | None = None
        # True if the backward computes the last derivative from the outputs
        self.keeps_output = activations.get(output_activation).needs == "y"
        each = (True,) * self.layers, (bias,) * self.layers
        self._needs = [(first, *each[0], *each[1]) for first in (False, True)]  # see `mlp_bwd`

    def bind(self, parameters: list[torch.Tensor]) -> None:
        """Set the parameters: views that only this stack uses, in the order of `shapes`."""
        step = 2 if self.bias else 1
        self.bound, self.weights = parameters, parameters[::step]
        self.biases = parameters[1::step] if self.bias else [None] * self.layers
        self._buffers.clear()
        self._checked = None

    def bind_grads(self, grads: list[torch.Tensor]) -> None:
        """Set the tensors that `backward` fills, in the order of `shapes`."""
        step = 2 if self.bias else 1
        self.grads = list(zip(grads[::step], grads[1::step] if self.bias else [None] * self.layers))

    def _buffers_for(self, rows):
        """(outputs (y, z), dz) of every layer for a batch of `rows`, and a dict for notes on them.

        The buffers of the two latest sizes are kept. They are ordinary tensors even in inference
        mode, because training uses them again.
        """
        made = self._buffers.get(rows)
        if made is not None:
            return made
        with torch.inference_mode(False):
            return self._made_for(rows)

    def _made_for(self, rows):
        while len(self._buffers) > 1:
            self._buffers.pop(next(iter(self._buffers)))
        like = self.weights[0]
        names = [self.activation] * (self.layers - 1) + [self.output_activation]
        outputs = [
            (
                like.new_empty(rows, n),
                like.new_empty(rows, n) if activations.get(name).needs == "z" else None,
            )
            for n, name in zip(self.sizes[1:], names)
        ]
        self._buffers[rows] = outputs, self._gradient_buffers(like, rows, names), {}
        return self._buffers[rows]

    def _gradient_buffers(self, like, rows, names):
        """dz of every layer.

        A layer's dz is needed until dz of the layer below is computed. So layers 0, 2, 4, … share
        one memory, and layers 1, 3, 5, … another. The last layer needs no buffer if its dz is the
        gradient of the output itself.
        """
        count = self.layers - (activations.get(names[-1]).needs == "nothing")
        widths = self.sizes[1 : count + 1]
        memory = [like.new_empty(rows * max(widths[i::2], default=0)) for i in range(2)]
        made = [memory[i % 2][: rows * n].view(rows, n) for i, n in enumerate(widths)]
        return made + [None] * (self.layers - count)

    def forward(self, x: torch.Tensor, keep: bool = True) -> torch.Tensor:
        """(rows, sizes[0]) -> (rows, sizes[-1]).

        keep: write into this stack's buffers and prepare `backward`.
        """
        kind = x.shape, x.dtype, x.device, x.layout
        if kind != self._checked:
            check_mlp(x, self.weights, self.biases)
            self._checked = kind
        out, _, memo = self._buffers_for(x.shape[0]) if keep else (None, None, None)
        acts = self.activation, self.output_activation
        y, saved = forward_checked(x, self.weights, self.biases, *acts, out, memo)
        if keep:
            self._saved = saved
        return y

    def backward(self, dy: torch.Tensor, input_grad: bool = False) -> torch.Tensor | None:
        """Fill the gradients from dy (rows, sizes[-1]).

        Returns dx (rows, sizes[0]) if `input_grad`, else None.
        """
        _, dz, memo = self._buffers_for(dy.shape[0])
        needs = self._needs[input_grad]
        return backward_into(dy, self._saved, needs, (dz, self.grads), memo)

    def update(
        self,
        dy: torch.Tensor,
        states: list,
        hyper: torch.Tensor | tuple,
        step: float | torch.Tensor,
        rule: kernels.Rule,
    ) -> None:
        """The backward, with an optimizer's step on the parameters. See `kernels.mlp_update`."""
        out = self._buffers_for(dy.shape[0])[1]
        kernels.mlp_update(dy, self._saved, self.bound, states, hyper, step, rule, out=out)


class Convolution:
    """A convolution with its activation and max-pool. Each row in and out is a flattened image."""

    def __init__(
        self,
        image_shape: Sequence[int],
        channels: int,
        kernel_size: int,
        max_pool: int,
        activation: str,
        prefix: str,
    ):
        self.image_shape, self.options = image_shape, (1, 0, activation, max_pool)
        self.features = math.prod(image_shape)
        self.shapes = {
            f"{prefix}weight": (channels, image_shape[0], kernel_size, kernel_size),
            f"{prefix}bias": (channels,),
        }
        self.out_shape = (
            channels,
            *((side - kernel_size + 1) // max_pool for side in image_shape[1:]),
        )

    def bind(self, parameters: list[torch.Tensor]) -> None:
        """Set the parameters, in the order of `shapes`."""
        self.bound = parameters
        self.weight, self.bias = parameters

    def bind_grads(self, grads: list[torch.Tensor]) -> None:
        """Set the tensors that `backward` fills, in the order of `shapes`."""
        self.grads = grads

    def forward(self, x: torch.Tensor, keep: bool = True) -> torch.Tensor:
        """(rows, C·H·W) -> (rows, features of the pooled images)."""
        if x.shape[1] != self.features:  # else two halves of an image would become one
            raise ValueError(
                f"Net: input has {x.shape[1]} features, but images {tuple(self.image_shape)} have "
                f"{self.features}"
            )
        y, saved = kernels.conv2d_fwd(
            x.view(-1, *self.image_shape), self.weight, self.bias, *self.options
        )
        if keep:
            self._saved = saved
        return y.flatten(1)

    def backward(self, dy: torch.Tensor, input_grad: bool = False) -> torch.Tensor | None:
        """Fill the gradients from dy. Returns dx (rows, C·H·W) if `input_grad`, else None."""
        dy = dy.view(-1, *self.out_shape)
        dx, *grads = kernels.conv2d_bwd(dy, *self._saved, needs=(input_grad, True, True))
        for kept, grad in zip(self.grads, grads):
            assert grad is not None  # `needs` asks for it
            kept.copy_(grad)
        return None if dx is None else dx.flatten(1)


class Net:
    """A network whose gradients are written by hand.

    `parameters` and `grads` map names such as "0.weight" to views of the one-dimensional tensors
    `flat` and `flat_grad`. A weight is (out, in), a bias (out,). The gradients are allocated at the
    first access, because a training that updates in the backward needs none.

    sizes: widths from input to output, at least two. activation, output_activation: names in
    `kernels.ACTIVATIONS`. init: see `mlp.initialise`. seed: of the initial weights, or None for
    torch's global generator. dtype: None is torch's default. float32, float16 and bfloat16 run in
    the kernels, float64 on the reference. ValueError for sizes that are not positive integers, and
    for unknown names.
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
        seed: int | None = 0,
    ):
        sizes = list(check_sizes(sizes, "Net"))
        config = {"kind": "mlp", "sizes": sizes, "activation": activation}
        self._build({**config, "output_activation": output_activation, "bias": bias}, device, dtype)
        initialise(self.parameters, init, seed)

    @classmethod
    def of(cls, module: Any) -> "Net":
        """A net that shares its parameters with an `mlp.MLP` or `mlp.ConvNet`.

        The module's parameters become views of the net's flat tensor. ValueError for other modules.
        """
        net = cls.__new__(cls)
        first = next(iter(module.parameters()))
        net._build(_config_of(module), first.device, first.dtype)
        for name, parameter in module.named_parameters():
            net.parameters[name].copy_(parameter.detach())
            parameter.data = net.parameters[name]
        return net

    @classmethod
    def over(cls, module: Any) -> "Net":
        """A net that works on a module's parameters in place. The module is not changed.

        Such a net has no flat tensor of parameters, so `flat` is None.
        """
        net = cls.__new__(cls)
        parameters = {name: p.detach() for name, p in module.named_parameters()}
        net._describe(_config_of(module))
        net.flat, net.parameters = None, {name: parameters[name] for name in net._shapes}
        net._bind()
        return net

    def _build(self, config, device, dtype, given=None):
        self._describe(config)
        self.parameters = self._views(device, dtype, given=given)
        self.flat = self.parameters.flat
        self._bind()

    def _describe(self, config):
        self._config, self._shape, self._grads = config, None, None
        # (name, tensor, its version) of what `backward` needs of the latest call, see `_rows`
        self._kept: list[tuple[str, torch.Tensor, int]] = []
        self.stages = stages(config)
        self._shapes = {
            name: shape for stage in self.stages for name, shape in stage.shapes.items()
        }

    def _views(self, device, dtype, beside=None, given=None):
        """Views of a flat tensor, each of its parameter's shape. beside: see `Views`.

        given: tensors by name. If they are such views, theirs is the flat tensor, else it is new
        and zero.
        """
        dtype = dtype or torch.get_default_dtype()
        unit = _ALIGNMENT // torch.empty((), dtype=dtype).element_size()
        sizes = [torch.Size(shape).numel() for shape in self._shapes.values()]
        offsets = [0, *itertools.accumulate(-(-size // unit) * unit for size in sizes)]
        flat = None if given is None else _flat_of([given[name] for name in self._shapes], offsets)
        if flat is None:
            flat = torch.zeros(offsets[-1], device=device, dtype=dtype)
        named = {
            name: flat[start : start + size].view(shape)
            for (name, shape), start, size in zip(self._shapes.items(), offsets, sizes)
        }
        return Views(flat, named, beside)

    def _bind(self):
        for stage in self.stages:
            stage.bind([self.parameters[n] for n in stage.shapes])
        if self._grads is not None:
            self._bind_grads(self._grads)

    def _bind_grads(self, grads):
        for stage in self.stages:
            stage.bind_grads([grads[n] for n in stage.shapes])

    def _with_grads(self):
        """The gradients by name. They are allocated at the first call."""
        if self._grads is None:
            first = next(iter(self.parameters.values()))
            with torch.inference_mode(False):
                self._grads = self._views(first.device, first.dtype, self.parameters)
            self._bind_grads(self._grads)
        return self._grads

    @property
    def flat_grad(self) -> torch.Tensor:
        """All gradients as one tensor."""
        return self._with_grads().flat

    @property
    def grads(self) -> dict[str, torch.Tensor]:
        """Gradients by name, such as "0.weight". Each `backward` overwrites them."""
        return self._with_grads()

    def __getstate__(self):
        # The state holds the tensors themselves. An optimizer that is copied or pickled with the
        # net then still shares its parameters.
        made = ("_config", "_shape", "_kept", "_shapes", "stages", "flat", "_grads")
        return {name: value for name, value in vars(self).items() if name not in made} | {
            "config": self._config,
            "grads": self._grads,
        }

    @torch.no_grad()
    def __setstate__(self, state):
        parameters, grads = state.pop("parameters"), state.pop("grads")
        first = next(iter(parameters.values()))
        # Parameters stay in their memory, which other processes may share.
        self._build(state.pop("config"), first.device, first.dtype, parameters)
        vars(self).update(state)
        pairs = [(self.parameters, parameters)]
        if grads is not None:
            # Each process has gradients of its own.
            shared = any(tensor.is_shared() for tensor in grads.values())
            self._grads = self._views(
                first.device, first.dtype, self.parameters, None if shared else grads
            )
            pairs.append((self._grads, grads))
        for made, kept in pairs:
            for name, tensor in kept.items():
                if made[name].data_ptr() != tensor.data_ptr():
                    made[name].copy_(tensor)
                tensor.data = made[name]
            made.update(kept)
        self._bind()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Outputs (…, outputs) for x (…, features), of the network's dtype.

        They are kept for `backward`, in a buffer that the next `forward` overwrites. x is kept too,
        not a copy. So change neither x nor the outputs in place before `backward`.
        """
        _check_tensor("input", x)
        self._kept.clear()
        self._keep("input", x)
        y = x if x.dim() == 2 else _as_rows(x)
        for stage in self.stages:
            y = stage.forward(y)
        if self.stages[-1].keeps_output:
            self._keep("output", y)
        if x.dim() != 2:
            y = y.view(*x.shape[:-1], y.shape[-1])
        self._shape = y.shape
        return y

    def predict(self, x: torch.Tensor) -> torch.Tensor:
        """The outputs of `forward`, in new memory. Nothing is kept for `backward`."""
        _check_tensor("input", x)
        y = _as_rows(x)
        for stage in self.stages:
            y = stage.forward(y, keep=False)
        return y.view(*x.shape[:-1], y.shape[-1])

    def backward(self, doutput: torch.Tensor, input_grad: bool = False) -> torch.Tensor | None:
        """Overwrite `grads` from the gradient of the latest forward's outputs.

        doutput has the outputs' shape, else ValueError. RuntimeError before the first `forward`.
        The same if its input was changed in place since then, or its output where the gradient is
        computed from it. Returns the gradient of the inputs, in their shape, if `input_grad`, else
        None.
        """
        dy = self._rows(doutput)
        self._with_grads()
        for i in range(len(self.stages) - 1, -1, -1):
            dy = self.stages[i].backward(dy, input_grad=input_grad or i > 0)
        return None if dy is None else dy.view(*doutput.shape[:-1], dy.shape[-1])

    def update(
        self,
        doutput: torch.Tensor,
        states: list,
        hyper: torch.Tensor | tuple,
        step: float | torch.Tensor,
        rule: kernels.Rule,
    ) -> None:
        """`backward` and an optimizer's step in one, see `kernels.mlp_update`.

        `grads` are not changed. The network must consist of linear layers only (one stage). states:
        one list for each of the rule's states, in the order of `parameters`.
        """
        (stack,) = self.stages
        stack.update(self._rows(doutput), states, hyper, step, rule)

    def _keep(self, name: str, tensor: torch.Tensor) -> None:
        """Note the version of a tensor that `backward` needs as it is now."""
        if not tensor.is_inference():  # tensors of inference mode count no changes
            self._kept.append((name, tensor, tensor._version))

    def _rows(self, doutput):
        """The gradient of the latest outputs as a matrix (rows, outputs)."""
        _check_tensor("the gradient", doutput)
        if self._shape is None:
            raise RuntimeError("Net: backward was called before forward; call forward first")
        for name, tensor, version in self._kept:
            if tensor._version != version:
                raise RuntimeError(
                    f"Net: the {name} was changed in place between forward and backward, which "
                    f"needs it (version {tensor._version}, expected {version}); change a copy"
                )
        if doutput.shape != self._shape:
            raise ValueError(
                f"Net: the gradient must be {tuple(self._shape)}, as the latest outputs were, got "
                f"{tuple(doutput.shape)}"
            )
        return doutput if doutput.dim() == 2 else doutput.reshape(-1, doutput.shape[-1])

    def config(self) -> dict:
        """The network's description, as a module's `config()` gives it."""
        return self._config

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Copies of the parameters by name."""
        return {name: p.clone() for name, p in self.parameters.items()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Copy parameters from a `state_dict`, also from that of an `mlp.MLP` of the same sizes.

        ValueError if names or shapes differ.
        """
        shapes = {name: tuple(t.shape) for name, t in state.items()}
        expected = {name: tuple(p.shape) for name, p in self.parameters.items()}
        if shapes != expected:
            raise ValueError(f"Net: parameters must be {expected}, got {shapes}")
        for name, p in self.parameters.items():
            p.copy_(state[name])


def _flat_of(tensors: list[torch.Tensor], offsets: list[int]) -> torch.Tensor | None:
    """The flat tensor that these tensors are views of at these offsets, or None.

    The last offset is its length.
    """
    first = tensors[0]
    memory, start = first.untyped_storage(), first.storage_offset()
    for tensor, offset in zip(tensors, offsets):
        if tensor.untyped_storage().data_ptr() != memory.data_ptr():
            return None
        if tensor.storage_offset() != start + offset or not tensor.is_contiguous():
            return None
    if memory.nbytes() < (start + offsets[-1]) * first.element_size():
        return None
    return first.as_strided((offsets[-1],), (1,), start)


def _check_tensor(name: str, given: object) -> None:
    if not isinstance(given, torch.Tensor):
        raise TypeError(
            f"Net: {name} must be a torch.Tensor, got {type(given).__name__}; convert it with "
            "torch.as_tensor"
        )


def _as_rows(x: torch.Tensor) -> torch.Tensor:
    """An input (…, features) as a matrix (rows, features). ValueError without dimensions."""
    if not x.dim():
        raise ValueError("Net: input must be (…, features), got a tensor without dimensions")
    return as_matrix(x)


def _config_of(module: Any) -> dict:
    describe: Any = getattr(module, "config", None)
    if describe is None:
        raise ValueError(f"Net: needs an mlp.MLP or mlp.ConvNet, got {type(module).__name__}")
    return describe()


def stages(config: dict) -> list:
    """The stages, in order, of the network that a module's `config()` describes."""
    if config["kind"] == "mlp":
        return [
            Stack(
                config["sizes"], config["activation"], config["output_activation"], config["bias"]
            )
        ]
    layers, features = conv_layers(config)
    found: list = []
    shape = tuple(config["image_shape"])
    for i, (_, channels) in enumerate(layers):
        stage = Convolution(
            shape,
            channels,
            config["kernel_size"],
            config["max_pool"],
            config["activation"],
            f"conv.{i}.",
        )
        found, shape = [*found, stage], stage.out_shape
    return [
        *found,
        Stack(
            (features, *config["hidden"], config["classes"]), config["activation"], prefix="mlp."
        ),
    ]
