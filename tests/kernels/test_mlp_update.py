"""mlp_update, a backward that also takes the optimizer's step, trains as torch's network with
torch.optim does.
"""

import functools
import itertools
import sys

import pytest
import torch

from kernels import RULES, hyperparameters, launch, mlp_fwd, mlp_update
from kernels.operations import OPERATIONS, flatten
from kernels.ops.linear import DwPlan
from kernels.ops.mlp_update import linear_update
from tests.checks import Draw, assert_as_accurate, double
from tests.lion import Lion

SIZES = (17, 9, 12, 5)
# rule -> torch's optimizer, its options, and ours.
TORCH = {
    "sgd": (torch.optim.SGD, {"weight_decay": 0.1}, {"weight_decay": 0.1}),
    "momentum": (
        torch.optim.SGD,
        {"momentum": 0.9, "dampening": 0.2},
        {"momentum": 0.9, "dampening": 0.2},
    ),
    "nesterov": (
        torch.optim.SGD,
        {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
        {"momentum": 0.9, "weight_decay": 0.1},
    ),
    "adam": (torch.optim.Adam, {"weight_decay": 0.1}, {"betas": (0.9, 0.999), "weight_decay": 0.1}),
    "adamw": (
        torch.optim.AdamW,
        {"betas": (0.5, 0.7)},
        {"betas": (0.5, 0.7), "weight_decay": 0.01},
    ),
    "lion": (Lion, {"weight_decay": 0.1}, {"weight_decay": 0.1}),
    "rmsprop": (torch.optim.RMSprop, {"alpha": 0.9}, {"alpha": 0.9}),
    "rmsprop_momentum": (
        torch.optim.RMSprop,
        {"momentum": 0.5, "alpha": 0.5, "eps": 1e-3, "weight_decay": 0.1},
        {"momentum": 0.5, "alpha": 0.5, "eps": 1e-3, "weight_decay": 0.1},
    ),
    "adagrad": (
        torch.optim.Adagrad,
        {"lr_decay": 0.1, "weight_decay": 0.1},
        {"lr_decay": 0.1, "weight_decay": 0.1},
    ),
}


def network(bias=True, dtype=torch.float64):
    """torch's network with seeded weights, and (inputs, targets) of six steps. The last batch is
    smaller.
    """
    torch.manual_seed(0)
    layers = [torch.nn.Linear(k, n, bias, dtype=dtype) for k, n in itertools.pairwise(SIZES)]
    modules = [m for layer in layers for m in (layer, torch.nn.Tanh())][:-1]
    batches = [
        (torch.randn(rows, SIZES[0], dtype=dtype), torch.randn(rows, SIZES[-1], dtype=dtype))
        for rows in (7,) * 5 + (3,)
    ]
    return torch.nn.Sequential(*modules), batches


def train_by_us(parameters, batches, rule, hyper, bias, step_of=int):
    """Takes a step of ½ Σ (y - t)² for each batch. The parameters change in place."""
    states = [[torch.zeros_like(p) for p in parameters] for _ in RULES[rule].states]
    weights, biases = (
        parameters[:: 1 + bias],
        parameters[1::2] if bias else [None] * (len(SIZES) - 1),
    )
    for step, (x, t) in enumerate(batches, 1):
        y, saved = mlp_fwd(x, weights, biases, "tanh")
        mlp_update(y - t, saved, parameters, states, hyper, step_of(step), rule)


def test_every_rule_is_compared():
    assert list(TORCH) == list(RULES)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("rule", TORCH)
def test_reference_trains_as_torch(rule, bias):
    model, batches = network(bias)
    ours = [p.detach().clone() for p in model.parameters()]
    make, options, numbers = TORCH[rule]
    optimizer = make(model.parameters(), lr=0.05, **options)
    for x, t in batches:
        optimizer.zero_grad()
        ((model(x) - t) ** 2).sum().div(2).backward()
        optimizer.step()
    train_by_us(
        ours, batches, rule, hyperparameters(rule, lr=0.05, **numbers, dtype=torch.float64), bias
    )
    for a, b in zip(ours, model.parameters()):  # in float64 only the order of sums differs
        torch.testing.assert_close(a, b.detach(), rtol=1e-9, atol=1e-12)


@pytest.mark.interpreter
@pytest.mark.parametrize("rule", TORCH)
def test_kernels_train_as_the_reference(rule, device):
    """Whole trainings are as accurate as the reference's. The step is counted on the device."""
    model, batches = network(dtype=torch.float32)
    start, hyper = (
        [p.detach() for p in model.parameters()],
        hyperparameters(rule, lr=0.05, **TORCH[rule][2]),
    )

    def trained(on, backend, dtype=torch.float32):
        parameters = [p.to(on, dtype, copy=True) for p in start]
        with launch.use(backend):
            train_by_us(
                parameters,
                [(x.to(on, dtype), t.to(on, dtype)) for x, t in batches],
                rule,
                hyper.to(on, dtype),
                True,
                lambda step: torch.tensor([float(step)], device=on, dtype=dtype),
            )
        return [p.cpu() for p in parameters]

    assert_as_accurate(
        trained(device, "triton"),
        trained("cpu", "torch"),
        lambda: trained("cpu", "torch", torch.float64),
        rule,
    )


@pytest.mark.interpreter
def test_split_batch(device, monkeypatch):
    """Where the batch is split, its parts are added before the step is taken."""
    monkeypatch.setattr(launch, "sm_count", lambda device: 8)
    op = OPERATIONS["mlp_update"]
    launched = []
    for label, args in op.cases(Draw(device), 700, 9, 5):
        with launch.observe(lambda kernel, *_: launched.append(kernel.__name__)):
            ours = op.results(args)
        torchs, exact = (
            functools.partial(op.results, each, reference=True) for each in (args, double(args))
        )
        assert_as_accurate(ours, torchs(), exact, label)
    assert "linear_update_reduce_kernel" in launched and "linear_update_kernel" not in launched


def test_many_tiles(device):
    """In a layer wider than a tile, only the first column of tiles updates the bias."""
    op = OPERATIONS["mlp_update"]
    for label, args in op.cases(Draw(device), 5, 150, 9):
        torchs, exact = (
            functools.partial(op.results, each, reference=True) for each in (args, double(args))
        )
        assert_as_accurate(op.results(args), torchs(), exact, label)


def test_gradient_is_not_stored(device):
    """No tensor that a step allocates is as large as the widest layer's gradient."""
    x, w = torch.randn(2, 512, device=device), torch.randn(512, 512, device=device)
    hyper = hyperparameters(lr=0.1, device=device)
    allocated = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            allocated.extend(t.numel() for t in flatten(result) if t.data_ptr() != w.data_ptr())
            return result

    y, saved = mlp_fwd(x, [w], [None])
    with Sizes():
        mlp_update(torch.ones_like(y), saved, [w], [], hyper, 1, "sgd")
    assert allocated and max(allocated) < w.numel()


@pytest.mark.parametrize(
    "wrong, message",
    [
        (
            {"rule": "rprop"},
            "unknown rule 'rprop'; known: sgd, momentum, nesterov, adam, adamw",
        ),
        (
            {"rule": "adam", "hyper": hyperparameters("adam")},
            "rule 'adam' needs 2 lists of states, got 0",
        ),
        (
            {"hyper": (0.1,)},
            r"hyper must be a row of 2 numbers \(lr, weight_decay\), see hyperparameters, got 1",
        ),
        (
            {"parameters": [torch.zeros(5, 17)]},
            r"2 parameters and as many of each state, got \[1\]",
        ),
        (
            {"parameters": [torch.zeros(5, 16), torch.zeros(5)]},
            r"parameter 0 and its states must be \(5, 17\) as in the forward, got \(5, 16\)",
        ),
        (
            {
                "rule": "momentum",
                "hyper": hyperparameters("momentum"),
                "states": [[torch.zeros(5, 17), torch.zeros(4)]],
            },
            r"parameter 1 and its states must be \(5,\) as in the forward, got \(4,\)",
        ),
        (
            {"parameters": [torch.zeros(17, 5).t(), torch.zeros(5)]},
            r"must be contiguous, got a tensor of shape \(5, 17\) that is not",
        ),
    ],
)
def test_bad_arguments(wrong, message):
    parameters = [torch.randn(5, 17), torch.randn(5)]
    y, saved = mlp_fwd(torch.randn(3, 17), parameters[:1], parameters[1:])
    given = {
        "parameters": parameters,
        "states": [],
        "hyper": hyperparameters(lr=0.1),
        "step": 1,
        "rule": "sgd",
    } | wrong
    with pytest.raises(ValueError, match=message):
        mlp_update(y, saved, **given)


@pytest.mark.parametrize(("tile", "shared"), [((16, 16), False), ((8, 8), True)])
def test_warps_share_small_tiles(tile, shared, monkeypatch):
    """Where a tile has fewer elements than a program has threads, several warps hold the same
    elements. All of them must read before one writes.
    """
    sizes = dict(zip(("BLOCK_M", "BLOCK_N"), tile))
    options = {**sizes, "BLOCK_K": 16, "PRECISION": "ieee", "num_warps": 8, "num_stages": 2}
    plan = DwPlan(options, (1, 1), splits=1, rows=9, library=False, blocks=None)
    monkeypatch.setattr(sys.modules[linear_update.__module__], "dw_plan", lambda *a, **k: plan)
    seen = []
    x, w = torch.empty(9, 5, device="meta"), torch.empty(7, 5, device="meta")
    with launch.dry_run("sm_90", 132), launch.observe(lambda *launched: seen.append(launched[3])):
        linear_update(
            torch.empty(9, 7, device="meta"), x, [w], [], hyperparameters().to("meta"), 1, "sgd"
        )
    assert [options["SHARED"] for options in seen] == [shared]
