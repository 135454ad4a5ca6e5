"""Steps of two launches: short trainings, and the state that stays on the device between steps."""

import functools

import pytest
import torch

from kernels import Spec, StepState, flush, launch, train_epoch_ref, train_step
from tests.checks import assert_equal
from tests.kernels.trainings import CASES, SOFT, Training, assert_agrees


def by_steps(run, extra=1):
    """An epoch by steps, and `extra` steps past its end. The first of these completes the last
    update.
    """
    run.losses.fill_(float("nan"))
    state = StepState(run)
    for _ in range(run.steps + extra):
        train_step(state)
    return run.losses, run.correct


def make_state(training, n=None):
    return StepState(training.run(n))


@pytest.mark.parametrize("name", CASES)
def test_steps_agree_with_reference(name, device):
    spec, hyper = CASES[name]
    assert_agrees(
        Training(spec, device, soft=name in SOFT, **hyper),
        by_steps,
        train_epoch_ref,
        lrs=(None, 0.02),
    )


def test_uint8_pixels_by_kernels_and_reference(device):
    run = Training(Spec((18, 5, 3), "sigmoid"), device, uint8=True)
    assert_agrees(run, by_steps, train_epoch_ref)
    with launch.use("torch"):
        assert_agrees(run, by_steps, train_epoch_ref)


@pytest.mark.parametrize(("label", "correct"), [(0, 5), (1, 0), (2, 0)])
def test_the_first_of_equal_outputs_is_predicted(label, correct, device):
    """torch.argmax does the same. With zero weights all outputs are equal."""
    run = Training(Spec((12, 7, 3)), device)
    run.parameters = [torch.zeros_like(p) for p in run.parameters]
    run.targets.fill_(label)
    state = make_state(run)
    train_step(state)
    assert state.run.correct[0] == correct


@pytest.mark.parametrize("extra", [1, 2, 5])
def test_overrunning_the_epoch_changes_nothing(extra, device):
    run = Training(
        *CASES["wider than a tile, momentum"][:1], device, momentum=0.9, weight_decay=0.1
    )
    assert_equal(run.train(functools.partial(by_steps, extra=extra)), run.train(by_steps))


def test_flush_completes_weights_in_mid_epoch_and_may_be_repeated(device):
    run = Training(
        Spec((17, 9, 3), "tanh", rule="adam"), device, betas=(0.9, 0.999), weight_decay=0.1
    )
    state, ended = make_state(run), make_state(run, n=10)
    for _ in range(2):
        train_step(state)
        train_step(ended)
    assert not torch.equal(state.run.parameters[0], run.parameters[0])  # the first step's update
    flush(state)
    flush(state)
    train_step(ended)
    assert_equal(state.run.parameters, ended.run.parameters)
    for _ in range(5):
        train_step(state)
    whole = make_state(run)
    for _ in range(6):
        train_step(whole)
    assert_equal(
        [state.run.parameters, state.run.states, state.run.losses],
        [whole.run.parameters, whole.run.states, whole.run.losses],
    )


def test_hyperparameters_and_permutation_are_read_from_the_device(device):
    """The same launches see new contents of the same tensors. A captured graph relies on this."""
    run = Training(Spec((17, 9, 3), "sigmoid"), device)
    state = make_state(run)
    before = []
    for lr, order in ((0.1, run.order), (0.02, run.order.flip(0))):
        state.run.hyper[0] = lr
        state.run.order.copy_(order.clone())
        state.position.zero_()
        for _ in range(6):
            train_step(state)
        before.append(state.run.losses.clone())
    other = Training(Spec((17, 9, 3), "sigmoid"), device)
    for lr, order, losses in (
        (0.1, other.order, before[0]),
        (0.02, other.order.flip(0), before[1]),
    ):
        again = make_state(other)
        again.run.hyper[0] = lr
        again.run.order.copy_(order.clone())
        for _ in range(6):
            train_step(again)
        other.parameters = again.run.parameters
        assert_equal(again.run.losses, losses)


def test_two_launches_a_step_and_no_gradient_tensors():
    run = Training(Spec((784, 100, 50, 10), "sigmoid"), "meta", n=64, batch=32)
    names = []
    with (
        launch.dry_run("sm_90", 132),
        launch.observe(lambda kernel, grid, *_: names.append((kernel.__name__, grid))),
    ):
        train_step(make_state(run))
    assert names == [("step_input_kernel", (7,)), ("step_head_kernel", (1,))]


@pytest.mark.parametrize(
    "sizes, message",
    [
        ((12, 300, 3), "graph: hidden width 300 exceeds 256; use engine 'manual'"),
        ((11, 9, 3), r"training: data must be contiguous \(n, 11\), got \(23, 12\)"),
    ],
)
def test_states_that_no_kernel_serves_are_refused(sizes, message, device):
    run = Training(Spec((12, 9, 3)), device)
    run.spec = Spec(sizes)
    run.parameters = [torch.zeros(s, device=device) for s in run.spec.shapes]
    with pytest.raises(ValueError, match=message):
        make_state(run)
