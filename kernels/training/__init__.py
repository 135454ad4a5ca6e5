"""Whole steps and epochs of training in one launch.

One program trains one network, several programs share one network, or each program trains its own.

network    the description of a network, its loss and its rule; the limits; its gradients in torch
run        what a training takes, as one object that is checked once; a step in plain torch
plan       what a kernel knows of a run at compile time
layers     the parts of a step that the kernels consist of
objective  the loss of a batch in a kernel
step       a step in two launches
epoch      an epoch in one launch
exchange   an epoch by several programs that share one network
replicas   an epoch of many networks in one launch
"""

from .epoch import train_epoch, train_epoch_ref
from .network import Spec, outgrown, refusal
from .replicas import train_replicas, train_replicas_ref
from .run import Run
from .step import StepState, flush, train_step, train_step_ref

__all__ = [
    "Run",
    "Spec",
    "StepState",
    "flush",
    "outgrown",
    "refusal",
    "train_epoch",
    "train_epoch_ref",
    "train_replicas",
    "train_replicas_ref",
    "train_step",
    "train_step_ref",
]
