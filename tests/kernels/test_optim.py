"""sgd and adam against torch.optim over several steps, parameters and every state."""

import functools

import pytest
import torch

import kernels
from kernels import launch
from kernels.ops import optim
from kernels.rules import apply_ref
from tests.checks import DTYPES, assert_as_accurate, assert_equal, double, snapshot

SHAPES = [(33, 17), (1100,), (1,), (), (0, 3), (2, 3, 4)]
SGD = {
    "plain": {},
    "decay": {"weight_decay": 0.1},
    "momentum": {"momentum": 0.9},
    "dampening": {"momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1},
    "Nesterov": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    "maximize": {"momentum": 0.5, "maximize": True, "weight_decay": 0.1},
}
ADAM = {
    "Adam": {},
    "decay": {"weight_decay": 0.1, "betas": (0.8, 0.99), "eps": 1e-3},
    "AdamW": {"decoupled": True, "weight_decay": 0.1},
    "maximize": {"maximize": True, "weight_decay": 0.1},
    "no memory": {"betas": (0.0, 0.0)},
}
STEPS = 4
PRECISIONS = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def draw(device, dtype, shapes=SHAPES):
    """(parameters, a list of gradients for each step)."""
    torch.manual_seed(0)
    first, *rest = (
        [torch.randn(shape).to(device, dtype) for shape in shapes] for _ in range(STEPS + 1)
    )
    return first, rest


def together(*lists):
    """Each list of tensors as one tensor. In a tensor of one element, torch's error may be 0 by
    luck, so no limit can follow from it.
    """
    return [torch.cat([t.detach().flatten() for t in tensors]) for tensors in lists]


def by_torch(optimizer, params, grads, lr, **options):
    """Parameters, then states, after a step of torch.optim for each entry of `grads`."""
    params = [p.detach().clone().requires_grad_() for p in params]
    optimizer = optimizer(params, lr=lr, foreach=False, **options)
    for step in grads:
        for p, g in zip(params, step):
            p.grad = g.clone()
        optimizer.step()
    states = [optimizer.state[p] for p in params]
    names = [
        n
        for n in ("momentum_buffer", "exp_avg", "exp_avg_sq")
        if n in states[0] and states[0][n] is not None
    ]
    return together(params, *([s[n] for s in states] for n in names))


def sgd(params, grads, lr, *, update=kernels.sgd, **options):
    params, buffers = snapshot(params), [torch.full_like(p, float("nan")) for p in params]
    for i, step in enumerate(grads):
        update(params, step, buffers, lr, **options, first=i == 0)
    return together(params, *([buffers] if options.get("momentum") else []))


def adam(params, grads, lr, *, update=kernels.adam, counter=int, **options):
    params, m, v = (
        snapshot(params),
        [torch.zeros_like(p) for p in params],
        [torch.zeros_like(p) for p in params],
    )
    for i, step in enumerate(grads):
        update(params, step, m, v, counter(i + 1), lr, **options)
    return together(params, m, v)


def torch_adam(params, grads, lr, decoupled=False, **options):
    return by_torch(
        torch.optim.AdamW if decoupled else torch.optim.Adam,
        params,
        grads,
        lr,
        **{"weight_decay": 0, **options},
    )


@pytest.mark.parametrize("backend", ["triton", "torch"])
@PRECISIONS
@pytest.mark.parametrize("options", SGD.values(), ids=SGD)
def test_sgd(options, dtype, backend, device):
    params, grads = draw(device, dtype)
    with kernels.use(backend):
        ours = sgd(params, grads, 0.1, **options)
    torchs = by_torch(torch.optim.SGD, params, grads, 0.1, **options)
    assert_as_accurate(
        ours, torchs, lambda: by_torch(torch.optim.SGD, *double((params, grads)), 0.1, **options)
    )


@pytest.mark.parametrize("backend", ["triton", "torch"])
@PRECISIONS
@pytest.mark.parametrize("options", ADAM.values(), ids=ADAM)
def test_adam(options, dtype, backend, device):
    params, grads = draw(device, dtype)
    with kernels.use(backend):
        ours = adam(params, grads, 0.01, **options)
    torchs = torch_adam(params, grads, 0.01, **options)
    exact = functools.partial(torch_adam, *double((params, grads)), 0.01, **options)
    assert_as_accurate(ours, torchs, exact)


@pytest.mark.parametrize("step", [1, 2, 10, 100, 1000, 100_000])
def test_bias_correction(step, device):
    """The step is accurate early, where 1 - βᵗ could cancel in float32, and late, where it is 1."""
    params, grads = draw(device, torch.float32, [(33,)])

    def updated(update, cast=torch.Tensor.clone, step=step):
        p, g, m, v = (
            [cast(t) for t in ts]
            for ts in (params, grads[0], grads[1], [g.abs() for g in grads[2]])
        )
        update(p, g, m, v, step, 1.0)
        return p

    assert_as_accurate(
        updated(kernels.adam),
        updated(kernels.adam_ref),
        # The step is a tensor, so simulated rounding reaches 1 - βᵗ. Kernels round it too.
        lambda: updated(kernels.adam_ref, double, torch.tensor(float(step), dtype=torch.float64)),
        f"step {step}",
    )


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_rate_and_step_as_tensors(backend, device):
    """Rate and step may be tensors, whose new values are seen, as a captured graph needs. sgd gives
    the bits of plain numbers.
    """
    params, grads = draw(device, torch.float32)
    lr, step = torch.tensor(0.25, device=device), torch.zeros((), device=device)
    with kernels.use(backend):
        assert_equal(
            sgd(params, grads, lr, momentum=0.5), sgd(params, grads, 0.25, momentum=0.5), "sgd"
        )
        ours = adam(params, grads, lr, counter=lambda i: step.fill_(i))
        assert_as_accurate(
            ours,
            adam(params, grads, 0.25),
            lambda: torch_adam(*double((params, grads)), 0.25),
            "adam",
        )


@pytest.mark.interpreter
@pytest.mark.parametrize("count", [1, 2, 3])
def test_more_tensors_than_one_launch_takes(count, device, monkeypatch):
    params, grads = draw(device, torch.float32)
    whole = sgd(params, grads, 0.1, momentum=0.9), adam(params, grads, 0.1)
    monkeypatch.setattr(optim, "MAX_TENSORS", count)
    launches = []
    with launch.observe(lambda kernel, grid, args, options: launches.append(len(args[1]))):
        parts = sgd(params, grads, 0.1, momentum=0.9), adam(params, grads, 0.1)
    assert_equal(parts, whole)
    assert max(launches) == count


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_layouts(name, device):
    """Parameters, gradients and states may each be transposed or have gaps. All are updated in
    place.
    """
    (p,), grads = draw(device, torch.float32, [(7, 5)])
    optimizer, options = (
        (torch.optim.SGD, {"momentum": 0.9}) if name == "sgd" else (torch.optim.Adam, {})
    )
    expected = by_torch(optimizer, [p], grads, 0.1, **options)
    exact = functools.partial(by_torch, optimizer, *double(([p], grads)), 0.1, **options)
    turn = lambda t: t.mT.contiguous().mT  # noqa: E731
    gap = lambda t: t.new_zeros(7, 10)[:, ::2].copy_(t)  # noqa: E731
    keep = lambda t: t.clone()  # noqa: E731
    for layouts in [
        (turn, keep, turn),
        (turn, turn, keep),
        (keep, turn, turn),
        (keep, gap, keep),
        (gap, keep, gap),
    ]:
        of_p, of_g, of_state = layouts
        params, states = (
            [of_p(p)],
            [[of_state(torch.zeros_like(p))] for _ in range(len(expected) - 1)],
        )
        for i, (g,) in enumerate(grads, 1):
            if name == "sgd":
                kernels.sgd(params, [of_g(g)], *states, 0.1, 0.9, first=i == 1)
            else:
                kernels.adam(params, [of_g(g)], *states, i, 0.1)
        assert_as_accurate(together(params, *states), expected, exact)


def test_no_parameters(device):
    """Without parameters there is no launch and no error."""
    launches = []
    with launch.observe(lambda *launched: launches.append(launched)):
        kernels.sgd([], [], [], 0.1)
        kernels.adam([], [], [], [], 1, 0.1)
    assert launches == []


def by_kernel(rule, params, grads, states, row, step):
    with kernels.use("triton"):
        kernels.apply_rule(rule, params, grads, states, row, step)


def by_rows(rule, params, grads, states, row, step):
    """Updates two stacked networks, each with its own row."""
    rows = torch.tensor([row, row], device=params[0].device)
    apply_ref(rule, params, grads, states, rows, step)


@pytest.mark.parametrize("update", [by_kernel, apply_ref, by_rows])
@pytest.mark.parametrize(
    ("rule", "momentum"),
    [
        (rule, m)
        for rule in kernels.RULES.values()
        if "momentum" in rule.columns
        for m in (0.0, 0.9)
    ],
    ids=str,
)
def test_momentum_that_is_0_or_not(rule, momentum, update, device):
    """Parameters as torch's. With momentum 0, torch has no buffer; here it holds the last term."""
    params, grads = draw(device, torch.float32, [(2, 33)])
    kind, options = rule.torch()
    theirs = torch.nn.Parameter(params[0].clone())
    optimizer = kind([theirs], **{**options, "lr": 0.1, "momentum": 0.9, "weight_decay": 0.1})
    optimizer.param_groups[0]["momentum"] = momentum  # with Nesterov, torch's constructor refuses 0
    states = [[torch.zeros_like(params[0])] for _ in rule.states]
    row = kernels.row_of(
        rule, **{name: optimizer.param_groups[0][name] for name, _ in rule.hyperparameters}
    )
    for step, g in enumerate(grads, 1):
        before = params[0].clone()
        update(rule, params, g, states, row, step)
        theirs.grad = g[0].clone()
        optimizer.step()
        torch.testing.assert_close(params[0], theirs.detach())
    if momentum == 0:
        (buffer,) = states[rule.states.index("momentum_buffer")]
        torch.testing.assert_close(buffer, (before - params[0]) / 0.1, rtol=1e-5, atol=1e-5)
