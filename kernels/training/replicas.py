"""Hundreds of independent networks at once.

`epoch_kernel` with a program for each, or products of stacks.

Everything of a network is stacked along a first dimension: parameters (R, out, in) and (R, out),
states, permutations (R, n), `hyperparameters(…, replicas=R)`. Data and targets are shared. Network
r comes out as if trained alone. The reference runs on any device and serves networks that the
kernel does not; there, a step of all networks is a few batched products: with the formulas of
`network`,

    z_l = y_{l-1} w_lᵀ + b_l     (R, M, n_l)      dz_{l-1} = (dz_l w_l) ⊙ act'
    dw_l = dz_lᵀ y_{l-1}         (R, n_l, n_{l-1})     db_l = Σ_m dz_l
"""

import torch

from .. import launch
from .epoch import run_epoch_kernel
from .network import refuse, step_ref
from .run import Run


def train_replicas_ref(run: Run) -> tuple[torch.Tensor, torch.Tensor]:
    """The reference of `train_replicas`, by batched products: any width, batch and activation."""
    step, (losses, correct) = int(run.count), run.results()
    numbers = run.rows()
    for t, rows in enumerate(run.order.long().split(run.batch, 1)):
        losses[:, t], correct[:, t] = step_ref(run, rows, numbers[:, t], step + t + 1)
    run.count += run.steps
    return losses, correct


def train_replicas(run: Run) -> tuple[torch.Tensor, torch.Tensor]:
    """Trains a run's R networks in place, in one launch: (losses, correct), each (R, steps).

    Each network has a permutation of its own. The results are the run's buffers.

    ValueError where the kernel does not serve the network (`refusal`), or the run has one network.
    """
    if not run.lead:
        raise ValueError("replicas: order must be (replicas, n), got one permutation; use epoch")
    refuse(run, "replicas")
    if launch.backend(*run.parameters) == "torch":
        return train_replicas_ref(run)
    run_epoch_kernel(run)
    return run.results()
