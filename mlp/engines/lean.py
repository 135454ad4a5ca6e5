"""The engine `lean`: a step in little memory, for wide layers and large batches.

Apart from the weights and the optimizer's states, it holds two activations of one layer, the
gradient of one layer's weights, and pieces of the batch:

    forward     The batch goes through all layers in pieces. Only the last layer's input is kept.
    loss        It is computed in pieces too. Only the gradient of the outputs is kept.
    backward    For each layer, from the last to the first: compute dw, write dz of the layer below
                over that layer's output, and update the layer. Then compute the input of the next
                layer again from the data. The layers below have not been updated yet.

So hidden layers are computed several times. L layers take (L - 1) (L - 2) / 2 products more than
the 3 L - 1 of a usual step. For four layers these are three more than eleven.
"""

from typing import Any

import torch

import kernels
from kernels import activations

from ..net import Net
from ..state import parameters_of
from . import means, takeover, updates
from .stepwise import Demands, Manual

_PIECES = 16  # the most pieces of a batch
_ROWS = 32  # the fewest rows of a piece


class Lean(Manual):
    """Trains a Net of linear layers, one layer at a time. Activations are computed again."""

    name = "lean"

    @classmethod
    def refuses(
        cls, model: Any, loss: Any, optimizer: torch.optim.Optimizer, batch_size: int = 1
    ) -> str | None:
        reason = super().refuses(model, loss, optimizer, batch_size)
        if reason is not None:
            return reason.replace("manual", cls.name, 1)
        config = model.config()
        if config["kind"] != "mlp":
            return f"lean: trains multilayer perceptrons, got {config['kind']}"
        if activations.get(config["activation"]).needs == "z" and len(config["sizes"]) > 2:
            return (
                f"lean: keeps a layer's output, but the gradient of {config['activation']} needs "
                "its input; use engine 'manual'"
            )
        if not hasattr(loss, "reduction"):
            return f"lean: needs one of mlp's losses, got {type(loss).__name__}"
        foreign = takeover.optimizer(optimizer) is not None
        if foreign or updates.whole(optimizer, parameters_of(model).values()) is None:
            return (
                "lean: updates a layer at a time, so it needs one parameter group of mlp's "
                "optimizers, all of them after as many steps; use engine 'manual'"
            )
        return None

    @classmethod
    def cannot(
        cls,
        demands: Demands,
        model: Net | torch.nn.Module | None = None,
        loss: Any = None,
    ) -> str | None:
        if demands.clip_norm is not None:
            return (
                "lean: updates a layer before the others have gradients, so it cannot clip the "
                "norm of them all"
            )
        return super().cannot(demands, model, loss)

    def _bind(self) -> None:
        named = parameters_of(self.model)
        if any(p.data_ptr() != self.net.parameters[name].data_ptr() for name, p in named.items()):
            self.net = Net.over(self.model)

    def step(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Train on a batch. Returns (the predicted labels (rows,), the loss)."""
        (stack,) = self.net.stages
        step = _Step(stack, x, self._memory(stack, len(x)))
        result = step.forward(self.loss, y, self._labels_valid, self.demands.ignored)
        part = updates.whole(self.optimizer, parameters_of(self.model).values())
        assert part is not None  # `refuses` would have said so
        count, rule, numbers = part.advance(), part.rule, part.numbers
        bound, width = [stack.bound, *part.states()], 1 + stack.bias
        for layer in reversed(range(stack.layers)):
            grads = step.gradients(layer)
            parameters, *states = [ts[width * layer :][:width] for ts in bound]
            kernels.apply_rule(rule, parameters, grads, states, numbers, count)
            del grads  # frees them before the next layer's are made
        return result

    def _memory(self, stack: Any, rows: int) -> list[torch.Tensor]:
        """Two flat buffers, each as large as the widest layer. They are kept between steps."""
        size = rows * max(stack.sizes[1:])
        like, made = stack.weights[0], self.__dict__.get("_kept")
        if made is None or made[0].numel() < size or made[0].dtype != like.dtype:
            with torch.inference_mode(False):
                self._kept = [like.new_empty(size) for _ in range(2)]
        return self._kept


class _Step:
    """One step of a stack. memory: two flat buffers. at: the index of the one that holds dz."""

    def __init__(self, stack: Any, x: torch.Tensor, memory: list[torch.Tensor]):
        self.stack, self.x, self.memory, self.at = stack, x, memory, 1
        rows = max(_ROWS, -(-len(x) // _PIECES))
        self.pieces = [slice(i, i + rows) for i in range(0, len(x), rows)]

    def forward(
        self, loss: Any, y: torch.Tensor, labels_valid: bool, ignored: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(predicted labels (rows,), loss).

        Afterwards one buffer holds the last layer's dz, the other its input. ignored: True if the
        loss may ignore some labels.
        """
        stack, last = self.stack, self.stack.layers - 1
        end, act = (stack.weights[last], stack.biases[last]), stack.output_activation
        top, self.dz = self._input(last), self._view(self.at, stack.sizes[-1])
        labels = []
        value = torch.zeros((), dtype=torch.promote_types(self.x.dtype, torch.float32))
        value = value.to(self.x.device)
        for piece in self.pieces:
            share = means.share(loss, y[piece], y, ignored)
            output, saved = kernels.linear_fwd(top[piece], *end, act)
            labels.append(output.argmax(1))
            if share == 0:  # the loss ignores all labels of this piece
                self.dz[piece].zero_()
                continue
            target = means.aligned(y[piece], output)
            value += loss.forward(output, target, labels_valid=labels_valid) * share
            dz = kernels.linear_bwd_dz(loss.backward(), saved.s, act)
            torch.mul(dz, share, out=self.dz[piece])
        self.top = top
        return torch.cat(labels), value

    def gradients(self, layer: int) -> list[torch.Tensor]:
        """[dw] or [dw, db] of a layer. Afterwards a buffer holds dz of the layer below."""
        stack, dz = self.stack, self.dz
        top = self.top if layer == stack.layers - 1 else self._input(layer)
        grads = kernels.linear_bwd_dw(dz, top, stack.bias)
        if layer:
            weight = stack.weights[layer]
            for piece in self.pieces:
                below = kernels.linear_bwd_dx(dz[piece], weight, top[piece], stack.activation)
                top[piece].copy_(below)  # the output of that layer is not needed any more
            self.dz, self.at = top, 1 - self.at
        return [grad for grad in grads if grad is not None]

    def _input(self, layer: int) -> torch.Tensor:
        """The input of a layer, in the buffer without dz. For the first layer it is the data."""
        if layer == 0:
            return self.x
        stack = self.stack
        found = self._view(1 - self.at, stack.sizes[layer])
        for piece in self.pieces:
            y = self.x[piece]
            for i in range(layer):
                out = (found[piece], None) if i == layer - 1 else None
                layer_of = stack.weights[i], stack.biases[i], stack.activation
                y = kernels.linear_fwd(y, *layer_of, out=out)[0]
        return found

    def _view(self, place: int, width: int) -> torch.Tensor:
        rows = len(self.x)
        return self.memory[place][: rows * width].view(rows, width)
