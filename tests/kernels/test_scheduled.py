"""Hyperparameters that change at each step. A kernel that reads a row for each step trains as
launches of single steps do, each with its own row.
"""

import dataclasses

import pytest
import torch

from kernels import (
    RULES,
    Spec,
    StepState,
    flush,
    hyperparameters,
    train_epoch,
    train_epoch_ref,
    train_replicas,
    train_replicas_ref,
    train_step,
)
from kernels.training.exchange import train_programs
from tests.checks import assert_equal
from tests.kernels.trainings import Training

SIZES = (6, 5, 4, 3)
# The values at each of five steps: one cycle of the rate, and of the numbers that torch's
# OneCycleLR moves against it.
MOVED = {
    "lr": (0.01, 0.05, 0.1, 0.02, 0.0),
    "weight_decay": (0.0, 0.1, 0.2, 0.1, 0.0),
    "momentum": (0.95, 0.9, 0.85, 0.9, 0.95),
    "dampening": (0.1, 0.0, 0.2, 0.0, 0.3),
    "betas": ((0.95, 0.85, 0.8, 0.9, 0.95), (0.999, 0.99, 0.9, 0.99, 0.999)),
}


def by_steps(run):
    state = StepState(run)
    for _ in range(run.steps):
        train_step(state)
    flush(state)
    return run.results()


def by_exchange(run):
    """The shared epoch with a single program, which the interpreter can run."""
    train_programs(run)
    return run.results()


WAYS = {
    "epoch": lambda run: train_epoch(run, programs=1),
    "exchange": by_exchange,
    "step": by_steps,
    "reference": train_epoch_ref,
}


def scheduled(rule, device, **options):
    """A training of five steps with a table of hyperparameters."""
    training = Training(Spec(SIZES, "tanh", rule=rule), device, **options)
    known = dict(RULES[rule].hyperparameters)
    moved = {name: values for name, values in MOVED.items() if name in known}
    training.hyper = hyperparameters(rule, replicas=5, device=device, **moved)
    return training


def one_after_the_other(training):
    """(parameters, losses) after a launch for each step, with that step's row."""
    run, losses = training.run(), []
    for row, rows in zip(training.hyper, training.order.split(training.batch)):
        step = dataclasses.replace(run, order=rows, hyper=row, losses=None, correct=None)
        losses.append(train_epoch_ref(step)[0])
    return run.parameters, torch.cat(losses)


@pytest.mark.parametrize(
    ("way", "rule"),
    [
        *(("epoch", rule) for rule in RULES),
        *((way, rule) for way in list(WAYS)[1:] for rule in ("momentum", "adamw")),
    ],
)
def test_each_step_has_its_hyperparameters(way, rule, device):
    """Five steps agree to 1e-5 in float32. With the same row for all steps, weights differ by more
    than 1e-3.
    """
    training = scheduled(rule, device)
    expected, losses = one_after_the_other(training)
    run = training.run()
    values, _ = WAYS[way](run)
    assert (values - losses).abs().max() <= 1e-5 * losses.abs().max()
    for p, q in zip(run.parameters, expected, strict=True):
        assert (p - q).norm() <= 1e-5 * q.norm()
    still = training.run()
    still.hyper = training.hyper[2].clone()
    train_epoch_ref(still)
    assert any((p - q).norm() > 1e-3 * q.norm() for p, q in zip(still.parameters, expected))


@pytest.mark.interpreter
def test_networks_have_their_own_tables(device):
    training = scheduled("adam", device, replicas=3)
    factors = torch.tensor([0.5, 1.0, 2.0], device=device)
    training.hyper = training.hyper.repeat(3, 1, 1)
    training.hyper[..., 0] *= factors[:, None]
    ours, theirs = training.run(), training.run()
    (values, _), (losses, _) = train_replicas(ours), train_replicas_ref(theirs)
    assert (values - losses).abs().max() <= 1e-5 * losses.abs().max()
    for r in range(3):
        single = scheduled("adam", device)
        single.parameters, single.states, single.order, single.hyper = (
            [p[r] for p in training.parameters],
            [[s[r] for s in ss] for ss in training.states],
            training.order[r],
            training.hyper[r].contiguous(),
        )
        single.data, single.targets = training.data, training.targets
        alone = single.run()
        train_epoch(alone, programs=1)
        assert_equal([p[r] for p in ours.parameters], alone.parameters, f"network {r}")


def test_a_table_of_another_length_is_refused():
    training = scheduled("sgd", "cpu")
    training.hyper = training.hyper[:4]
    with pytest.raises(ValueError, match=r"or \(5, 2\) with a row for each step, got \(4, 2\)"):
        training.run()
