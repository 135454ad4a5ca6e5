"""Linear layers by torch's own product and one kernel for the rest, and where `configs` chooses
this.

On a CPU the BLAS computes the product and only the rest is interpreted, so these tests are quick.
"""

import functools
import itertools

import pytest
import torch

import kernels
from kernels import launch, linear_bwd_dw, linear_bwd_dx, linear_fwd
from kernels.activations import ACTIVATIONS
from kernels.operations import OPERATIONS, Make
from kernels.ops.linear import linear_bwd_dx_ref
from kernels.ops.mlp_update import linear_update
from kernels.rules import RULES, hyperparameters
from tests.checks import (
    DTYPES,
    LAYOUTS,
    Draw,
    assert_as_accurate,
    assert_equal,
    compare,
    double,
    snapshot,
)
from tests.kernels.test_compile import compiled
from tests.kernels.test_linear import draw, pair
from tests.pairs import PAIRS, gradients, leaves

EACH_ACTIVATION = pytest.mark.parametrize("activation", ACTIVATIONS)
PRECISIONS = pytest.mark.parametrize("dtype", DTYPES, ids=str)
BY_LIBRARY = ("linear", "mlp", "mlp_update")
library = functools.partial(kernels.use, products="library")


def launched(function, arch=None, processors=132):
    """Names of the kernels that a function launches. With an arch it is a dry run for that arch."""
    seen = []
    with launch.observe(lambda kernel, *_: seen.append(kernel.fn.__name__)):
        if arch is None:
            function()
        else:
            with launch.dry_run(arch, processors):
                function()
    return seen


@EACH_ACTIVATION
@PRECISIONS
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_against_torch(activation, dtype, bias, device):
    ours, torchs = pair(activation)
    tensors = draw(activation, 17, 33, 7, device, dtype)
    if not bias:
        ours, torchs = (functools.partial(lambda f, x, w: f(x, w, None), f) for f in (ours, torchs))
    with library():
        compare(ours, torchs, tensors if bias else tensors[:2])


@pytest.mark.parametrize("layout", LAYOUTS)
@PRECISIONS
def test_layouts(layout, dtype, device):
    """Inputs and incoming gradients may have any strides, also for a dx that multiplies by act'."""
    arrange = LAYOUTS[layout]
    x, w, b = (arrange(t) for t in draw("tanh", 17, 33, 7, device, dtype))
    dy = arrange(torch.randn(17, 7, device=device).to(dtype))

    def results(x, w, b, dy, reference=False):
        op = OPERATIONS["linear"]
        fwd, bwd = (op.fwd_ref, op.bwd_ref) if reference else (op.fwd, op.bwd)
        y, saved = fwd(x, w, b, "tanh")
        dx = linear_bwd_dx_ref if reference else linear_bwd_dx
        return [y, *bwd(dy, *saved), dx(dy, w, x.square(), "sigmoid")]

    with library():
        ours = results(x, w, b, dy)
    exact = functools.partial(results, *double((x, w, b, dy)), reference=True)
    assert_as_accurate(ours, results(x, w, b, dy, reference=True), exact, layout)


@pytest.mark.parametrize("sizes", [(0, 3, 4), (5, 0, 4), (5, 3, 0), (0, 0, 0), (2, 5, 33)], ids=str)
def test_empty_and_leading_dimensions(sizes, device):
    *lead, k, n = sizes if len(sizes) == 3 else (*sizes, 7)
    shapes = (*lead, k), (n, k), (n,)
    with library():
        compare(*pair("sigmoid"), [torch.randn(shape, device=device) for shape in shapes])
        compare(
            *pair("gelu"),
            [torch.randn((2, *shape), device=device) for shape in shapes[:1]]
            + [torch.randn(shape, device=device) for shape in shapes[1:]],
        )


@pytest.mark.parametrize("name", BY_LIBRARY)
def test_accuracy(name, device):
    """Every case of the operations made of linear layers is accurate. Inputs keep their values."""
    op = OPERATIONS[name]
    for dtype in DTYPES:
        for label, args in op.cases(Draw(device, dtype), 33, 17, 20):
            before = snapshot(args)
            with library():
                ours = op.results(args)
            torchs = op.results(args, reference=True)
            exact = functools.partial(op.results, *double((args,)), reference=True)
            assert_as_accurate(ours, torchs, exact, f"{name}, {label}")
            assert_equal(args, before, f"{name}, {label}: inputs changed")


def test_second_derivative(device):
    def penalty(function):
        def of(*tensors):
            y = function(*tensors)
            grads = torch.autograd.grad(y.square().sum(), tensors, create_graph=True)
            return sum(g.square().sum() for g in grads)

        return of

    with library():
        compare(*map(penalty, pair("gelu")), draw("gelu", 17, 16, 17, device, torch.float32))


@pytest.mark.parametrize("name", ["linear", "mlp"])
def test_compiled_as_eager(name, device):
    torch._dynamo.reset()
    every = lambda *arguments: [PAIRS[name][0](*args) for args in arguments]  # noqa: E731
    rows = OPERATIONS[name].cases(Make(device), 4, 6, 5)
    arguments = [leaves(name, args) for _, args in rows]
    with library():
        expected = gradients(every(*arguments), arguments)
        assert_equal(gradients(compiled(every)(*arguments), arguments), expected, name)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_updates(rule, bias, device):
    """The library computes a float32 gradient, and the rule's kernel takes the step with it."""
    make = Draw(device)
    dz, x = make.real(9, 7), make.real(9, 5)
    start = [make.real(7, 5), make.real(7)][: 1 + bias]
    states = [[make.positive(*p.shape) for p in start] for _ in RULES[rule].states]

    def updated(use, dtype=torch.float32):
        lists = [[t.to(dtype, copy=True) for t in ts] for ts in (start, *states)]
        # with a momentum of 0 the references would not use its buffers
        given = {"momentum": 0.9} if "momentum" in RULES[rule].columns else {}
        numbers = hyperparameters(rule, lr=0.05, **given, dtype=dtype).to(device), 3, rule
        with use():
            linear_update(dz.to(dtype), x.to(dtype), lists[0], lists[1:], *numbers)
        return lists

    names = launched(lambda: updated(library))
    assert names == ["linear_update_reduce_kernel"]
    by_reference = functools.partial(kernels.use, "torch")
    exact = functools.partial(updated, by_reference, torch.float64)
    assert_as_accurate(updated(library), updated(by_reference), exact, rule)


def test_a_half_precision_update_keeps_its_float32_gradient(device):
    """The library would round the gradient to half precision, so a kernel computes it."""
    w, dz, x = (torch.randn(s, device=device).bfloat16() for s in ((7, 5), (9, 7), (9, 5)))
    with library():
        update = lambda: linear_update(dz, x, [w], [], hyperparameters(), 1, "sgd")  # noqa: E731
        assert launched(update) == ["linear_update_kernel"]


@EACH_ACTIVATION
def test_one_launch_a_product_at_most(activation, device):
    """Besides the product there is at most one launch, for the activation, as in torch."""
    x, w, b = draw(activation, 5, 3, 4, device, torch.float32)
    identity = ACTIVATIONS[activation].needs == "nothing"
    with library():
        names = launched(lambda: linear_fwd(x, w, b, activation))
        assert names == ([] if identity else ["linear_act_kernel"])
        below = (None, "identity") if identity else (x, activation)
        names = launched(lambda: linear_bwd_dx(torch.ones(5, 4, device=device), w, *below))
        assert names == ([] if identity else ["linear_bwd_dz_kernel"])
        assert launched(lambda: linear_bwd_dw(torch.ones(5, 4, device=device), x)) == []
    with kernels.use(products="fused"):
        names = launched(lambda: linear_fwd(x, w, b, activation))
        assert names == ["linear_fwd_kernel"]


def test_parameters_that_want_a_gradient_may_be_given(device):
    """Launchers record no graph, so a module's parameters can be passed as they are."""
    layer = torch.nn.Linear(3, 4, device=device)
    x = torch.randn(5, 3, device=device)
    with library():
        y, saved = linear_fwd(x, layer.weight, layer.bias, "tanh")
        dx, dw, db = kernels.linear_bwd(torch.ones_like(y), *saved)
    assert not any(t.requires_grad for t in (y, dx, dw, db))


# (batch, in, out), dtype -> True where forward, dx, dw are torch's own products on an H100.
CHOSEN = {
    ((32, 784, 100), torch.float32): (False, False, False),  # one fused launch takes less time
    ((32, 100, 50), torch.float32): (False, False, False),
    ((64, 64, 64), torch.float32): (False, False, False),
    ((256, 784, 256), torch.float32): (True, True, True),
    ((1024, 1024, 1024), torch.float32): (True, True, True),
    ((8192, 4096, 4096), torch.float32): (True, True, True),
    ((32, 4096, 4096), torch.float32): (True, True, True),
    ((8192, 4096, 4096), torch.bfloat16): (True, True, True),
    ((8192, 1024, 1024), torch.float16): (True, True, False),  # dw is small here
    ((8192, 256, 4096), torch.bfloat16): (False, True, False),
    ((256, 784, 128), torch.bfloat16): (False, False, False),
}


def by_library(sizes, dtype, arch="sm_90"):
    """True for each of the three products that is torch's own."""
    m, k, n = sizes
    make = Make("meta", dtype)
    x, w, dy = make.real(m, k), make.real(n, k), make.real(m, n)
    with torch.no_grad():
        functions = (
            lambda: linear_fwd(x, w, None, "relu"),
            lambda: linear_bwd_dx(dy, w, x, "relu"),
            lambda: linear_bwd_dw(dy, x),
        )
        fused = "linear_fwd_kernel", "linear_bwd_dx_kernel", "linear_bwd_dw_kernel"
        return tuple(
            name not in launched(function, arch) for name, function in zip(fused, functions)
        )


@pytest.mark.parametrize(("sizes", "dtype"), CHOSEN, ids=str)
def test_choice_on_an_h100(sizes, dtype):
    assert by_library(sizes, dtype) == CHOSEN[sizes, dtype]


def test_library_is_not_chosen_in_another_precision(monkeypatch):
    """In kernels `high` is tf32x3 and `medium` tf32. Torch's own products would be tf32 in both."""
    for setting, chosen in (("highest", True), ("high", False), ("medium", False)):
        monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda s=setting: s)
        assert by_library((1024, 1024, 1024), torch.float32) == (chosen,) * 3


def test_torch_takes_no_tf32_where_the_library_is_chosen():
    """The library is never chosen while torch would multiply in tf32, in any mixture of its older
    and newer settings.
    """
    matmul = torch.backends.cuda.matmul
    before = torch.get_float32_matmul_precision(), matmul.fp32_precision
    seen = set()
    with getattr(torch.backends, "__allow_nonbracketed_mutation")():
        try:
            for older, newer in itertools.product(("highest", "high"), (None, "ieee", "tf32")):
                torch.set_float32_matmul_precision(older)
                if newer is not None:
                    matmul.fp32_precision = newer
                chosen = by_library((1024, 1024, 1024), torch.float32)[0]
                seen.add((chosen, matmul.fp32_precision == "tf32"))
        finally:
            torch.set_float32_matmul_precision(before[0])
            matmul.fp32_precision = before[1]
    assert (True, False) in seen and (False, True) in seen and (True, True) not in seen


def test_amds_matrix_cores_take_float32():
    assert by_library((8192, 4096, 4096), torch.float32, "gfx942") == (False,) * 3


def test_turing_multiplies_by_the_library():
    """Triton no longer uses Turing's tensor cores, but cuBLAS does."""
    assert by_library((8192, 256, 4096), torch.float16, "sm_75") == (True,) * 3


def test_deterministic_algorithms_are_kernels():
    """cuBLAS is deterministic only with an environment variable, without which torch refuses. So
    kernels run.
    """
    torch.use_deterministic_algorithms(True)
    try:
        assert by_library((1024, 1024, 1024), torch.float32) == (False,) * 3
        with library():
            assert by_library((1024, 1024, 1024), torch.float32) == (True,) * 3
    finally:
        torch.use_deterministic_algorithms(False)


def test_use_forces_either():
    assert launch.products() is None
    with kernels.use("triton", products="fused"):
        assert by_library((8192, 4096, 4096), torch.float32) == (False,) * 3
        with library():
            assert by_library((7, 5, 3), torch.bfloat16) == (True,) * 3
        with kernels.use("torch"):
            assert launch.products() == "fused"
            assert kernels.backend(torch.ones(1)) == "torch"
        assert launch.products() == "fused"
    assert launch.products() is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"products": "cublas"}, 'products must be "fused" or "library", got \'cublas\''),
        ({}, 'use: give a backend, "torch", "triton" or "numba", or products= or tma=, got none'),
    ],
)
def test_use_refuses_other_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        kernels.use(**arguments)
