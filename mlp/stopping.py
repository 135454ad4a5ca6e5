"""Early stopping: end a training whose loss no longer falls, and keep the best epoch's weights.

The loss is that of the validation data, else of the test data, else of the training data. Weights
that were chosen by a data set look better on it than on new data: for an honest number of the test
data give `validation` as well.
"""

import math
from typing import Any

import torch

from .net import Net
from .state import load_state, state_of

_Weights = list[dict[str, torch.Tensor]]  # of the network, and of a loss that has some


def watched(row: dict, quantity: str = "loss") -> tuple[str, float | None]:
    """The data whose loss or accuracy decides, and its value in a row of the history.

    These are validation, test or train: the first of them that was measured.
    """
    for part in ("validation", "test"):
        value = row.get(f"{part}_{quantity}")
        if value is not None:
            return part, value
    return "train", row[f"train_{quantity}"]


def kept_row(history: list[dict], patience: int | None, epochs: int) -> dict:
    """The row of the epoch whose weights a training of so many epochs has at its end.

    It is the last one without early stopping, and in a training that has not ended.
    """
    if patience is None:
        return history[-1]
    stopping = EarlyStopping(patience)
    for row in history:
        stopping.judge(row)
    ended = stopping.is_over or len(history) >= epochs
    return history[stopping.epoch - 1] if ended and stopping.epoch else history[-1]


class EarlyStopping:
    """The best epoch so far, its weights, and for how many epochs no other was better.

    patience: so many epochs in a row without a lower loss end the training.
    """

    FIELDS = ("patience", "part", "best", "epoch", "waited", "weights", "last")

    def __init__(self, patience: int):
        if patience < 1:
            raise ValueError(f"fit: early_stopping must be at least 1 epoch, got {patience}")
        self.patience, self.best, self.epoch, self.waited = patience, math.inf, 0, 0
        self.part: str | None = None  # the data whose loss is watched
        self.weights: _Weights | None = None  # of the best epoch
        self.last: _Weights | None = None  # of the last one, while the network has the best

    @classmethod
    def of(cls, state: dict[str, Any]) -> "EarlyStopping":
        """What `state_dict` described."""
        made = cls(state["patience"])
        for name in cls.FIELDS:
            setattr(made, name, state[name])
        return made

    @property
    def is_over(self) -> bool:
        """Whether the training should end."""
        return self.waited >= self.patience

    def judge(self, row: dict) -> bool:
        """Whether an epoch is the best so far, by its row of the history. Losses of other data
        than before begin anew.
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
        """Judge an epoch, and keep the weights if it is the best."""
        if self.judge(row):
            self.weights = _copies(parts)

    def take_best(self, parts: list[Net | torch.nn.Module]) -> None:
        """Give the network its best weights. The last ones are kept, to go on from."""
        if self.weights is not None and self.last is None:
            self.last = _copies(parts)
            _load(parts, self.weights)

    def go_on(self, parts: list[Net | torch.nn.Module]) -> None:
        """Give the network its last weights again."""
        if self.last is not None:
            _load(parts, self.last)
            self.last = None

    def state_dict(self) -> dict[str, Any]:
        """What resuming needs."""
        return {name: getattr(self, name) for name in self.FIELDS}


def resumed(
    before: EarlyStopping | None, patience: int | None, parts: list[Net | torch.nn.Module]
) -> EarlyStopping | None:
    """The early stopping of a call of `fit`: the one before, with its best epoch, if there was one.
    A larger patience lets a training that had ended go on.
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
