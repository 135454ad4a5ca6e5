"""Hundreds of independent networks at once, by `epoch_kernel` with one program for each.

Everything of a network is stacked along a first dimension: parameters (R, out, in) and (R, out),
states, permutations (R, n), `hyperparameters(…, replicas=R)`. Data and targets are shared. The
result for network r is the same as if it were trained alone.

The reference runs on any device. It also serves networks that the kernel refuses. There, a step of
all networks is a few batched products, with the formulas of `network`:

    z_l = y_{l-1} w_lᵀ + b_l     (R, M, n_l)      dz_{l-1} = (dz_l w_l) ⊙ act'
    dw_l = dz_lᵀ y_{l-1}         (R, n_l, n_{l-1})     db_l = Σ_m dz_l
"""

import torch

from .. import launch
from .epoch import run_epoch_kernel
from .plan import refuse
from .run import Run, step_ref


def train_replicas_ref(run: Run) -> tuple[torch.Tensor, torch.Tensor]:
    """The reference of `train_replicas`, by batched products. It has no limits on sizes."""
    step, (losses, correct) = int(run.count), run.results()
    numbers = run.rows()
    for t, rows in enumerate(run.order.long().split(run.batch, 1)):
        losses[:, t], correct[:, t] = step_ref(run, rows, numbers[:, t], step + t + 1)
    run.count += run.steps
    return losses, correct


def train_replicas(run: Run) -> tuple[torch.Tensor, torch.Tensor]:
    """Trains a run's R networks in place, in one launch. Returns (losses, correct), (R, steps).

    Each network has its own permutation. The results are the run's buffers. The run's count is
    advanced by the number of steps. Deterministic.

    ValueError: the kernel does not serve the network (`refusal`), or the run has only one network.
    """
    if not run.lead:
        raise ValueError(
            f"replicas: order must be (replicas, n), got one permutation {tuple(run.order.shape)}; "
            "use train_epoch"
        )
    refuse(run, "replicas")
    if launch.backend(*run.parameters) != "triton":
        return train_replicas_ref(run)
    run_epoch_kernel(run)
    return run.results()
