"""Whole steps and epochs of training in a launch: one network, many programs on one, many networks.

run        what a training takes: one object, made once, checked once
network    the description of a network, loss and rule; its limits; a step in plain torch
layers     a step as pieces of a kernel
step epoch exchange replicas      the kernels and what launches them
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
