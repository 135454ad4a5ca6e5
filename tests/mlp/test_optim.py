"""Our optimizers take torch's steps, however gradients arrive, and whether torch or we saved the
state.
"""

import copy
import functools
import io

import pytest
import torch

import kernels
import mlp
from mlp.engines.updates import whole
from mlp.optim import OPTIMIZERS
from tests.checks import assert_equal
from tests.lion import oracle

USUAL = [{"lr": 0.01}, {"lr": 0.01, "maximize": True}]
VARIANTS = dict.fromkeys(OPTIMIZERS, USUAL) | {
    "sgd": [
        {"lr": 0.1},
        {"lr": 0.1, "momentum": 0.9},
        {"lr": 0.1, "momentum": 0.9, "dampening": 0.3},
        {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
        {"lr": 0.01, "weight_decay": 0.1, "maximize": True},
    ],
    "adam": [
        {"lr": 0.01},
        {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-4, "weight_decay": 0.1},
        {"lr": 0.01, "maximize": True},
    ],
    "adamw": [
        {"lr": 0.01},
        {"lr": 0.01, "betas": (0.8, 0.95), "weight_decay": 0.2, "maximize": True},
    ],
    "lion": [
        {"lr": 0.01},
        {"lr": 0.01, "betas": (0.8, 0.95), "weight_decay": 0.2, "maximize": True},
    ],
    "rmsprop": [
        {"lr": 0.01},
        {"lr": 0.003, "alpha": 0.9, "eps": 1e-4, "weight_decay": 0.1},
        {"lr": 0.001, "momentum": 0.5, "weight_decay": 0.1, "maximize": True},
    ],
    "adagrad": [
        {"lr": 0.1},
        {"lr": 0.1, "lr_decay": 0.1, "initial_accumulator_value": 0.5, "weight_decay": 0.1},
        {"lr": 0.1, "eps": 1e-4, "maximize": True},
    ],
}
CASES = [
    pytest.param(n, o, id=f"{n} {i}: {' '.join(o)}")
    for n in OPTIMIZERS
    for i, o in enumerate(VARIANTS[n])
]
EACH = pytest.mark.parametrize("name", OPTIMIZERS)


def torchs(name):
    return oracle(OPTIMIZERS[name])


def problem(device="cpu", dtype=torch.float32):
    """(parameters of a module, a function of i that computes step i's gradients into .grad)."""
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.Linear(5, 3)).to(device, dtype)
    x = torch.randn(100, 11, 7).to(device, dtype)  # the same numbers in every precision

    def gradients(i):
        module.zero_grad()
        # This is a mean of bounded terms, so steps and their rounding stay small for any seed.
        module(x[i % 100]).tanh().square().sum().div(11).backward()

    return list(module.parameters()), gradients


def trajectory(make, device, dtype=torch.float32, steps=100):
    params, gradients = problem(device, dtype)
    optimizer = make(params)
    for i in range(steps):
        gradients(i)
        optimizer.step()
    return [p.detach() for p in params], optimizer


def assert_same_place(ours, theirs, exact):
    """Our error against torch's float64 trajectory is at most 4 times torch's in float32, plus 64
    ulps.

    Both only round, and later steps carry the errors on. In float64 (`exact_ours`) the same factor
    applies to float64's smaller rounding.
    """
    for a, b, c in zip(ours, theirs, exact):
        error, allowed = (a.double() - c).abs().max(), (b.double() - c).abs().max()
        ulp = torch.finfo(a.dtype).eps
        carried = allowed * ulp / torch.finfo(b.dtype).eps
        assert error <= 4 * carried + 64 * ulp * c.abs().max()


@pytest.mark.parametrize("name, options", CASES)
def test_hundred_steps_as_torch(name, options, device):
    ours, _ = trajectory(functools.partial(OPTIMIZERS[name], **options), device)
    theirs, _ = trajectory(functools.partial(torchs(name), **options), device)
    exact, _ = trajectory(functools.partial(torchs(name), **options), device, torch.float64)
    exact_ours, _ = trajectory(
        functools.partial(OPTIMIZERS[name], **options), device, torch.float64
    )
    assert_same_place(ours, theirs, exact)
    assert_same_place(exact_ours, theirs, exact)
    start = problem(device)[0]
    assert max((a - b.detach()).abs().max() for a, b in zip(ours, start)) > 0.1, (
        "the parameters did not move"
    )


@pytest.mark.interpreter
@EACH
def test_steps_in_the_kernel(name, device):
    runs = [
        trajectory(functools.partial(k, **VARIANTS[name][-1]), device, steps=3)[0]
        for k in (OPTIMIZERS[name], torchs(name))
    ]
    for a, b in zip(*runs):
        torch.testing.assert_close(a, b)


@EACH
def test_defaults_are_torchs(name):
    params, _ = problem()
    assert OPTIMIZERS[name](params).defaults == torchs(name)(params).defaults


@pytest.mark.parametrize("name, options", CASES)
def test_gradients_handed_in(name, options, device):
    """step(), step(grads=list) and step(grads=dict) do the same. Only the first uses .grad. No two
    of these gradients have the same shape, so a dict needs no names.
    """
    expected, _ = trajectory(functools.partial(OPTIMIZERS[name], **options), device, steps=5)
    for wrap in (list, lambda grads: dict(enumerate(grads))):
        params, gradients = problem(device)
        optimizer = OPTIMIZERS[name](params, **options)
        for i in range(5):
            gradients(i)
            grads = [p.grad for p in params]
            for p in params:
                p.grad = None
            optimizer.step(grads=wrap(grads))
        assert_equal([p.detach() for p in params], expected)
    with pytest.raises(
        ValueError, match=f"{OPTIMIZERS[name].__name__}: 4 parameters but 3 gradients"
    ):
        optimizer.step(grads=grads[:3])


@EACH
def test_groups_and_missing_gradients(name, device):
    """Groups have their own settings. A parameter without a gradient stays unchanged, and starts
    when it gets one. Also with grads=….
    """
    runs = []
    for kind, handed_in in (
        (OPTIMIZERS[name], False),
        (OPTIMIZERS[name], True),
        (torchs(name), False),
    ):
        params, gradients = problem(device)
        groups = [{"params": params[2:], **VARIANTS[name][1]}, {"params": params[:2], "lr": 0.02}]
        optimizer = kind(groups)
        for i in range(6):
            gradients(i)
            if i < 3:
                params[3].grad = None
            optimizer.step(
                **({"grads": [p.grad for p in (*params[2:], *params[:2])]} if handed_in else {})
            )
            assert i >= 3 or torch.equal(params[3], problem(device)[0][3])
        runs.append([p.detach() for p in params])
    assert_equal(runs[0], runs[1])
    for a, b in zip(*runs[1:]):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name, options", CASES)
def test_state_moves_between_ours_and_torchs(name, options, device):
    """A state saved by one after 3 steps and loaded by the other gives the same later steps."""
    for first, second in ((OPTIMIZERS[name], torchs(name)), (torchs(name), OPTIMIZERS[name])):
        straight, _ = trajectory(functools.partial(first, **options), device, steps=6)
        params, gradients = problem(device)
        before, after = first(params, **options), second(params, lr=123.0)
        for i in range(6):
            if i == 3:
                file = io.BytesIO()
                torch.save(before.state_dict(), file)
                after.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
            gradients(i)
            (before if i < 3 else after).step()
        for a, b in zip(params, straight):
            torch.testing.assert_close(a.detach(), b)
    assert copy.deepcopy(after).state_dict()["param_groups"] == after.state_dict()["param_groups"]


def test_parts_have_equal_counts_of_steps():
    """Parameters with different counts of steps are separate parts, because one launch has one
    count.
    """
    first, second = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(3))
    optimizer = mlp.Adam([first, second])
    part = whole(optimizer, [first, second])
    assert part is not None and part.rule is kernels.RULES["adam"]
    optimizer.update([torch.ones(2), None])
    one, other = optimizer.parts()
    assert (one.parameters, one.taken) == ([first], 1)
    assert (other.parameters, other.taken) == ([second], 0)
    assert whole(optimizer, [first, second]) is None
    assert other.advance(3) == 3
    assert [part.taken for part in optimizer.parts()] == [1, 3]


def test_a_first_step_is_not_taken_with_later_ones():
    """One parameter has momentum, the other none yet, so they are separate parts. Trained together,
    one would lose its momentum or the other its first step.
    """
    first, second = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(3))
    optimizer = mlp.SGD([first, second], lr=0.1, momentum=0.9, dampening=0.5)
    optimizer.update([torch.ones(2), None])
    assert whole(optimizer, [first, second]) is None
    assert [(p.parameters, p.taken) for p in optimizer.parts()] == [([first], 1), ([second], 0)]
    assert [part.advance() for part in optimizer.parts()] == [2, 1]
    assert [s.tolist() for part in optimizer.parts() for s in part.states()[0]] == [[1, 1], [0] * 3]


def test_groups_have_their_own_rules():
    """Each group has the states of its own rule, not of the first group's."""
    first, second = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(3))
    groups = [{"params": [first]}, {"params": [second], "momentum": 0.9}]
    plain, momentum = mlp.SGD(groups, lr=0.1).parts()
    assert (plain.rule.name, plain.states()) == ("sgd", [])
    assert momentum.rule.name == "momentum" and len(momentum.states()) == 1
