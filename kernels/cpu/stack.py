"""The forward and the backward of a stack of linear layers whose buffers stay the same.

The first call goes layer by layer, as for any tensors, and notes the calls of compiled code. A
later call has the same blocks, except for the addresses of x and of dy. So it checks only what may
have changed.

`memo` is a dict that keeps the notes. Its owner has one for each set of parameters, activations and
buffers.
"""

import array
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from .. import activations, launch
from ..ops import mlp
from . import dense, linear

_address, _is_contiguous = torch.Tensor.data_ptr, torch.Tensor.is_contiguous
_LENGTH = dense.FINISHED + 1  # of a block


class _Noted:
    """Calls of compiled code that can be repeated.

    tensors: parameters and results, which others may change. names: of the activations.
    changed: the results. shape, dtype: of the input that may lie elsewhere in the next call.
    """

    def __init__(
        self,
        calls: list[linear.Call],
        tensors: list[torch.Tensor],
        names: Sequence[str],
        changed: list[torch.Tensor],
        like: torch.Tensor,
    ):
        self.calls = [(i * _LENGTH, call) for i, call in enumerate(calls)]
        self.numbers = array.array("q", [number for call in calls for number in call.block])
        self.tensors, self.facts = tensors, _facts(tensors)
        self.names, self.rows = names, [*map(activations.get, names)]
        self.changed, self.shape, self.dtype = changed, like.shape, like.dtype
        self.results: Any = None

    def address(self, t: torch.Tensor) -> int:
        """The address of a matrix, if the calls can read it in place of the first one, else 0."""
        if t.shape != self.shape or t.dtype is not self.dtype or not launch.takes_loops(t):
            return 0
        at = t.data_ptr() if linear.matrix(t) is t else 0
        return 0 if at & (t.element_size() - 1) else at

    def is_valid(self) -> bool:
        """True if all tensors are where they were, and the activations are the same."""
        return (
            _facts(self.tensors) == self.facts
            and all(map(_is_contiguous, self.tensors))
            and [*map(activations.get, self.names)] == self.rows
        )

    def repeat(self, *moved: tuple[int, int, int]) -> None:
        """Make the calls. moved: places in the blocks, with a new address and pitch for each."""
        numbers = self.numbers[:]
        for place, at, pitch in moved:
            numbers[place], numbers[place + 1] = at, pitch
        for start, call in self.calls:
            linear.run_at(call, numbers, start)
        linear.note_changes(self.changed)


def _facts(tensors: list[torch.Tensor]) -> list:
    return [*map(_address, tensors), *[(t.shape, t.dtype) for t in tensors]]


def forward(
    x: torch.Tensor,
    weights: list[torch.Tensor],
    biases: list[torch.Tensor | None],
    names: tuple[str, str],
    out: Sequence,
    memo: dict[str, Any],
) -> tuple[torch.Tensor, Any] | None:
    """`mlp.stack_forward` into buffers. None if the loops do not take these tensors."""
    noted = memo.get("forward")
    if noted is not None and (at := noted.address(x)) and noted.is_valid():
        noted.repeat((dense.LEFT, at, x.stride(0)))
        y, saved = noted.results
        return y, mlp.MLPSaved(x, *saved)
    if not launch.takes_loops(x, *weights):
        return None
    calls: list = []
    layer = partial(linear.forward, calls=calls)
    y, saved = mlp.stack_forward(x, weights, biases, *names, out, layer)
    tensors = [*weights, *[b for b in biases if b is not None]]
    tensors += [t for pair in out for t in pair if t is not None]
    if None not in calls and all(map(_is_contiguous, tensors)):
        memo["forward"] = noted = _Noted(calls, tensors, names, [y], x)
        noted.results = y, saved[1:]
    return y, saved


def backward(
    dy: torch.Tensor,
    saved: Any,
    needs: Sequence[bool],
    out: tuple[Sequence, Sequence],
    memo: dict[str, Any],
) -> bool:
    """`mlp.stack_backward` into buffers, without dx. False if the loops do not take the tensors."""
    first, noted = memo.get("forward"), memo.get("backward")
    if first is None or saved.hidden is not first.results[1][1]:
        return False
    if noted is not None and noted.results is out[1]:
        at, below = noted.address(dy), first.address(saved.x)
        if at and below and noted.is_valid():
            s, name = saved.kept[-1], saved.output_activation
            dz = linear.dz(dy, s, name, out=out[0][-1])
            moved = [(dense.RIGHT - _LENGTH, below, saved.x.stride(0))]
            for start, _ in noted.calls[:2]:  # dx and dw of the last layer
                moved.append((start + dense.LEFT, dz.data_ptr(), dz.stride(0)))
            noted.repeat(*moved)
            return True
    if not launch.takes_loops(dy, saved.x, *saved.weights):
        return False
    calls: list = []
    bwd_dx, bwd_dw = (partial(function, calls=calls) for function in (linear.dx, linear.dw))
    mlp.stack_backward(dy, saved, needs, out, linear.dz, bwd_dx, bwd_dw)
    grads = [t for pair in out[1] for t in pair if t is not None]
    tensors = [*saved.weights, *grads, *[t for t in saved.kept if t is not None]]
    if None not in calls and all(map(_is_contiguous, tensors)):
        names = saved.activation, saved.output_activation
        memo["backward"] = noted = _Noted(calls, tensors, names, grads, dy)
        noted.results = out[1]
    return True
