"""A network's parameters and buffers by name, copies of them, and its modes."""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch

from .net import Net


def parameters_of(model: Net | torch.nn.Module) -> dict[str, torch.Tensor]:
    """The parameters of a Net or a module by name. A shared parameter is listed once."""
    return model.parameters if isinstance(model, Net) else dict(model.named_parameters())


def state_of(model: Net | torch.nn.Module) -> dict[str, torch.Tensor]:
    """All tensors that a checkpoint must hold, by name: parameters and buffers, detached.

    The names are those of `model.state_dict()`. A shared parameter is listed under each of its
    names. Buffers with persistent=False are left out.
    """
    if isinstance(model, Net):
        return dict(model.parameters)
    return {name: t for name, t in model.state_dict().items() if isinstance(t, torch.Tensor)}


@torch.no_grad()
def load_state(model: Net | torch.nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Copy the tensors of a `state_of` into a network.

    ValueError if names or shapes differ. Then nothing is changed.
    """
    found, expected = (
        {name: tuple(t.shape) for name, t in tensors.items()}
        for tensors in (state, state_of(model))
    )
    if found != expected:
        raise ValueError(
            f"the state is of another network: it has {found}, but {expected} is needed"
        )
    for name, tensor in state_of(model).items():
        tensor.copy_(state[name])


def copied(value: Any) -> Any:
    """A copy of an optimizer's state, with its tensors detached: as `copy.deepcopy`, which takes
    longer than a small network's epoch may.
    """
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if type(value) is dict:
        return {key: copied(inner) for key, inner in value.items()}
    if type(value) in (list, tuple):
        return type(value)(copied(inner) for inner in value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return copy.deepcopy(value)


class Snapshot:
    """Copies of all parameters and buffers of a network. `restore` undoes a failed epoch."""

    def __init__(self, model: Net | torch.nn.Module):
        self.model = model
        self.copies = {name: t.detach().clone() for name, t in self._tensors().items()}

    def _tensors(self) -> dict[str, torch.Tensor]:
        buffers = {} if isinstance(self.model, Net) else dict(self.model.named_buffers())
        return {**parameters_of(self.model), **buffers}

    @torch.no_grad()
    def restore(self) -> None:
        """Copy the values back into the tensors that have these names now."""
        for name, tensor in self._tensors().items():
            if name in self.copies and tensor.shape == self.copies[name].shape:
                tensor.copy_(self.copies[name])


@contextlib.contextmanager
def in_mode(model: Net | torch.nn.Module, training: bool) -> Iterator[None]:
    """Set training or evaluation mode. At the end each submodule gets its earlier mode back."""
    before = [] if isinstance(model, Net) else [(m, m.training) for m in model.modules()]
    if not isinstance(model, Net):
        model.train(training)
    try:
        yield
    finally:
        for module, was_training in before:
            module.training = was_training
