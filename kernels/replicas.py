"""Hundreds of independent networks at once: `epoch_kernel` with a program for each, or products of
stacks.

Everything of a network is stacked along a first dimension: parameters (R, out, in) and (R, out),
states, permutations (R, n), `hyperparameters(…, replicas=R)`. Data and targets are shared. Network
r comes out as if trained alone. The reference runs on any device and serves networks that the
kernel does not; there, a step of all networks is a few batched products: with the formulas of
`network`,

    z_l = y_{l-1} w_lᵀ + b_l     (R, M, n_l)      dz_{l-1} = (dz_l w_l) ⊙ act'
    dw_l = dz_lᵀ y_{l-1}         (R, n_l, n_{l-1})     db_l = Σ_m dz_l
"""

import torch

from . import activations, launch, rules
from .epoch import results, run_epoch_kernel
from .network import Spec, check_training, correct_ref, inputs_ref, loss_ref, steps_of


def _gradients_ref(spec: Spec, parameters, x, target):
    """(losses (R,), correct (R,), gradients in the parameters' order) of inputs (R, M,
    features).
    """
    weights, biases = parameters[:: 1 + spec.bias], parameters[1::2] if spec.bias else None
    hidden, output = activations.get(spec.activation), activations.get(spec.output_activation)
    acts = [hidden] * (len(weights) - 1) + [output]
    ys, kept = [x], []
    for l, (w, act) in enumerate(zip(weights, acts)):
        z = (
            torch.bmm(ys[-1], w.mT)
            if biases is None
            else torch.baddbmm(biases[l].unsqueeze(1), ys[-1], w.mT)
        )
        ys.append(act.forward_ref(z))
        kept.append(z if act.needs == "z" else ys[-1])
    loss, dy = loss_ref(spec, ys[-1], target)
    grads = []
    for l in reversed(range(len(weights))):
        dz = acts[l].backward_ref(dy, kept[l])
        grads[:0] = [torch.bmm(dz.mT, ys[l])] + ([dz.sum(1)] if spec.bias else [])
        dy = torch.bmm(dz, weights[l]) if l else None
    return loss, correct_ref(spec, ys[-1], target), grads


def train_replicas_ref(
    spec: Spec,
    parameters,
    states,
    data,
    targets,
    indices,
    batch,
    hyper,
    count,
    *,
    scale=1.0,
    shift=0.0,
    losses=None,
    correct=None,
):
    """The reference of `train_replicas`, by batched products: any width, batch and activation."""
    replicas, n = indices.shape
    losses, correct = results(
        data, (replicas, steps_of(n, batch)), losses, correct, parameters[0].dtype
    )
    step = int(count)
    for t, rows in enumerate(indices.long().split(batch, 1)):
        x = inputs_ref(data, rows, scale, shift, parameters[0].dtype)
        losses[:, t], correct[:, t], grads = _gradients_ref(spec, parameters, x, targets[rows])
        rules.apply_ref(spec.rule, parameters, grads, states, hyper, step + t + 1)
    count += losses.shape[1]
    return losses, correct


def train_replicas(
    spec: Spec,
    parameters,
    states,
    data,
    targets,
    indices,
    batch,
    hyper,
    count,
    *,
    scale=1.0,
    shift=0.0,
    losses=None,
    correct=None,
):
    """Train R networks in place, each on the batches of its own permutation, in one launch:
    (losses, correct), (R, steps).

    As `train_epoch`, with parameters, states, indices and hyper stacked along a first dimension of
    R; data, targets and count (steps taken so far, by all) are shared. ValueError where the kernel
    does not serve the network (`refusal`).
    """
    replicas = len(indices)
    check_training("replicas", spec, parameters, states, data, targets, batch, replicas)
    if (
        indices.dim() != 2
        or tuple(hyper.shape) != (replicas, hyper.shape[-1])
        or not indices.is_contiguous()
    ):
        raise ValueError(
            "replicas: indices must be contiguous (replicas, n) and hyper have a row for each, "
            "got "
            f"{tuple(indices.shape)} and {tuple(hyper.shape)}"
        )
    if launch.backend(*parameters) == "torch":
        return train_replicas_ref(
            spec,
            parameters,
            states,
            data,
            targets,
            indices,
            batch,
            hyper,
            count,
            scale=scale,
            shift=shift,
            losses=losses,
            correct=correct,
        )
    losses, correct = results(data, (replicas, steps_of(indices.shape[1], batch)), losses, correct)
    run_epoch_kernel(
        spec,
        parameters,
        states,
        data,
        targets,
        indices,
        batch,
        hyper,
        count,
        scale,
        shift,
        losses,
        correct,
        replicas,
    )
    return losses, correct
