"""What a network holds: parameters and buffers by name, copies of them, and its modes."""

import contextlib
from collections.abc import Iterator

import torch

from .net import Net


def parameters_of(model: Net | torch.nn.Module) -> dict[str, torch.Tensor]:
    """Name -> parameter, of a Net or a module. A shared parameter is listed once."""
    return model.parameters if isinstance(model, Net) else dict(model.named_parameters())


def state_of(model: Net | torch.nn.Module) -> dict[str, torch.Tensor]:
    """Name -> tensor of everything that a checkpoint must hold: parameters and buffers, detached.

    The names are those of `model.state_dict()`: a shared parameter stands under each of its names,
    and buffers that the module does not want saved are left out.
    """
    if isinstance(model, Net):
        return dict(model.parameters)
    return {name: t for name, t in model.state_dict().items() if isinstance(t, torch.Tensor)}


@torch.no_grad()
def load_state(model: Net | torch.nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Copy what `state_of` gave into a network; ValueError for another one, before any change."""
    found, expected = (
        {name: tuple(t.shape) for name, t in tensors.items()}
        for tensors in (state, state_of(model))
    )
    if found != expected:
        raise ValueError(f"the state of another network: has {found}, needs {expected}")
    for name, tensor in state_of(model).items():
        tensor.copy_(state[name])


class Snapshot:
    """Copies of all parameters and buffers of a network, to go back to after a failed epoch."""

    def __init__(self, model: Net | torch.nn.Module):
        self.model = model
        self.copies = {name: t.detach().clone() for name, t in self._tensors().items()}

    def _tensors(self) -> dict[str, torch.Tensor]:
        buffers = {} if isinstance(self.model, Net) else dict(self.model.named_buffers())
        return {**parameters_of(self.model), **buffers}

    @torch.no_grad()
    def restore(self) -> None:
        """Copy the values back into the tensors that now have these names."""
        for name, tensor in self._tensors().items():
            if name in self.copies and tensor.shape == self.copies[name].shape:
                tensor.copy_(self.copies[name])


@contextlib.contextmanager
def in_mode(model: Net | torch.nn.Module, training: bool) -> Iterator[None]:
    """The network in training or evaluation mode; afterwards each submodule has its mode back."""
    before = [] if isinstance(model, Net) else [(m, m.training) for m in model.modules()]
    if not isinstance(model, Net):
        model.train(training)
    try:
        yield
    finally:
        for module, was_training in before:
            module.training = was_training
