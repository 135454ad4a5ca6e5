"""Early stopping: end a training when its loss stops falling, and keep the best epoch's weights.

The loss is that of the validation data, else of the test data, else of the training data. Weights
that were chosen by a data set look better on it than on new data. So for an honest result on the
test data, give `validation` as well.
"""

import math
from typing import Any

import torch

from .net import Net
from .state import load_state, state_of

_Weights = list[dict[str, torch.Tensor]]  # of the network, and of the loss if it has weights


def watched(row: dict, quantity: str = "loss") -> tuple[str, float | None]:
    """(name of the data whose loss or accuracy decides, its value in a row of the history).

    The data are the first measured ones of validation, test and train.
    """
    for part in ("validation", "test"):
        value = row.get(f"{part}_{quantity}")
        if value is not None:
            return part, value
    return "train", row[f"train_{quantity}"]


def kept_row(history: list[dict], patience: int | None, epochs: int) -> dict:
    """The row of the epoch whose weights the network has, in a training of so many epochs.

    Without early stopping, or before the training has ended, this is the last row.
    """
    if patience is None:
        return history[-1]
    stopping = EarlyStopping(patience)
    for row in history:
        stopping.judge(row)
    ended = stopping.is_over or len(history) >= epochs
    return history[stopping.epoch - 1] if ended and stopping.epoch else history[-1]


class EarlyStopping:
    """The best epoch so far, its weights, and the number of epochs since.

    patience: the number of epochs in a row without a lower loss that ends the training. ValueError
    if it is below 1.
    """

    FIELDS = ("patience", "part", "best", "epoch", "waited", "weights", "last")

    def __init__(self, patience: int):
        if patience < 1:
            raise ValueError(f"fit: early_stopping must be at least 1 epoch, got {patience}")
        self.patience, self.best, self.epoch, self.waited = patience, math.inf, 0, 0
        self.part: str | None = None  # the data whose loss is watched
        self.weights: _Weights | None = None  # of the best epoch
        self.last: _Weights | None = None  # of the last epoch, while the network has the best

    @classmethod
    def of(cls, state: dict[str, Any]) -> "EarlyStopping":
        """The early stopping that a `state_dict` describes."""
        made = cls(state["patience"])
        for name in cls.FIELDS:
            setattr(made, name, state[name])
        return made

    @property
    def is_over(self) -> bool:
        """True if the training should end."""
        return self.waited >= self.patience

    def judge(self, row: dict) -> bool:
        """True if an epoch, given by its row of the history, is the best so far.

        If the loss is of other data than before, the comparison starts again.
        """
        part, loss = watched(row)
        if part != self.part:
            self.part, self.best, self.waited = part, math.inf, 0
        if loss is None or not loss < self.best:
            self.waited += 1
            return False
        self.best, self.epoch, self.waited = loss, row["epoch"], 0
        return True

    def after_epoch(self, row: dict, parts: list[Net | torch.nn.Module]) -> None:
        """Judge an epoch, and copy the weights if it is the best."""
        if self.judge(row):
            self.weights = _copies(parts)

    def take_best(self, parts: list[Net | torch.nn.Module]) -> None:
        """Load the best weights into the network. The last ones are kept for `go_on`."""
        if self.weights is not None and self.last is None:
            self.last = _copies(parts)
            _load(parts, self.weights)

    def go_on(self, parts: list[Net | torch.nn.Module]) -> None:
        """Load the last weights into the network again."""
        if self.last is not None:
            _load(parts, self.last)
            self.last = None

    def state_dict(self) -> dict[str, Any]:
        """The state that `of` needs to resume."""
        return {name: getattr(self, name) for name in self.FIELDS}


def resumed(
    before: EarlyStopping | None, patience: int | None, parts: list[Net | torch.nn.Module]
) -> EarlyStopping | None:
    """The early stopping for a call of `fit`.

    It continues `before`, with its best epoch, if given. With a larger patience, a training that
    had ended goes on.
    """
    made = None if patience is None else EarlyStopping(patience)
    if before is None:
        return made
    if made is None:
        before.go_on(parts)
        return None
    before.patience = made.patience
    if not before.is_over:
        before.go_on(parts)
    return before


def _copies(parts: list) -> _Weights:
    return [{name: t.detach().clone() for name, t in state_of(p).items()} for p in parts]


def _load(parts: list, weights: _Weights) -> None:
    for part, kept in zip(parts, weights, strict=True):
        load_state(part, kept)
