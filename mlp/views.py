"""Tensors by name that are views of one flat tensor."""

from collections.abc import Iterable, Mapping

import torch

# As functions for `map`, because a loop in Python costs twice as much. Every step calls them.
_address, _is_contiguous = torch.Tensor.data_ptr, torch.Tensor.is_contiguous


class Views(dict[str, torch.Tensor]):
    """A dict of tensors that are contiguous views of `flat`. Copies and pickles are plain dicts.

    beside: for gradients, their parameters by name, else None.
    """

    def __init__(
        self,
        flat: torch.Tensor,
        named: Mapping[str, torch.Tensor],
        beside: Mapping[str, torch.Tensor] | None = None,
    ):
        super().__init__(named)
        self.flat, self.beside = flat, beside
        self._places = [*map(_address, named.values())]

    def __reduce__(self):
        return dict, (dict(self),)

    def are_whole(self) -> bool:
        """True if each tensor still is the view that it was at first."""
        tensors = [*self.values()]
        try:
            places = [*map(_address, tensors)]
        except TypeError:  # one of them is no tensor now, such as a gradient that was set to None
            return False
        return places == self._places and all(map(_is_contiguous, tensors))

    def fit(self, parameters: Iterable[torch.Tensor]) -> bool:
        """True if these are the gradients of exactly these parameters, in their order."""
        named = self.beside
        return named is not None and list(map(id, named.values())) == list(map(id, parameters))

    def are_of(self, parameters: Iterable[torch.Tensor]) -> bool:
        """True if these are the gradients of exactly these parameters, in flat tensors alike.

        One step on the flat tensors is then a step on each parameter.
        """
        if not isinstance(self.beside, Views) or not self.fit(parameters):
            return False
        return self.are_whole() and self.beside.are_whole()


def are_plain(tensors: Iterable[torch.Tensor]) -> bool:
    """True if torch's tape fills no tensor's .grad, and none is a module's frozen parameter."""
    return not any([t.requires_grad or isinstance(t, torch.nn.Parameter) for t in tensors])
