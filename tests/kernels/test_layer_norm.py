"""Layer normalisation against torch's: layouts, wide rows, split sums, dtypes, derivatives."""

import pytest
import torch
import torch.nn.functional as F

import kernels
from kernels import launch, layer_norm_bwd, layer_norm_fwd
from tests.checks import (
    LAYOUTS,
    assert_as_accurate,
    assert_equal,
    compare,
    double,
    gradient_penalty,
    with_gradients,
)


def inputs(shape, normalized, device, dtype=torch.float32):
    """x, w, b. x has mean 3, so a variance from a difference of large sums would show its error."""
    x = (3 + torch.randn(shape)).to(device, dtype)
    return x, *(torch.randn(normalized).to(device, dtype) for _ in range(2))


@pytest.mark.interpreter
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("shape", "normalized"),
    [((5, 7), (7,)), ((2, 3, 4, 2), (4, 2)), ((9,), (9,)), ((2, 3), (2, 3))],
)
def test_layouts(shape, normalized, layout, device):
    """Inputs and incoming gradients may have any layout, with any number of normalised
    dimensions.
    """
    given = [LAYOUTS[layout](t) for t in inputs(shape, normalized, device)]
    ours = lambda x, w, b: kernels.layer_norm(x, normalized, w, b)  # noqa: E731
    torchs = lambda x, w, b: F.layer_norm(x, normalized, w, b)  # noqa: E731
    compare(ours, torchs, given, what=layout)
    _, saved = layer_norm_fwd(*given, normalized)
    dy = LAYOUTS[layout](torch.randn(shape, device=device))
    assert_equal(layer_norm_bwd(dy, *saved), layer_norm_bwd(dy.contiguous(), *saved))


@pytest.mark.parametrize("given", [(True, False), (False, True), (False, False)])
def test_without_weight_or_bias(given, device):
    x, *both = inputs((6, 5), (5,), device)
    parameters = [t if here else None for t, here in zip(both, given)]
    functions = [
        lambda *t, f=f: f(t[0], (5,), *t[1:]).square() for f in (kernels.layer_norm, F.layer_norm)
    ]
    compare(*functions, (x, *parameters))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_wider_than_a_tile(dtype, device):
    """Statistics of a row come from several tiles, the last partly empty. The values range far from
    0.
    """
    x, w, b = inputs((2, 5000), (5000,), device, dtype)
    x = x * 4 + torch.linspace(-40, 40, 5000, device=device, dtype=dtype)
    ours = lambda *t: kernels.layer_norm(t[0], 5000, *t[1:])  # noqa: E731
    torchs = lambda *t: F.layer_norm(t[0], (5000,), *t[1:])  # noqa: E731
    compare(ours, torchs, (x, w, b))


@pytest.mark.interpreter
def test_sums_over_split_rows(device, monkeypatch):
    """dw and db are as accurate from several programs as from one, and repeat to the bit."""
    x, w, b = inputs((201, 3), (3,), device)
    dy = torch.randn_like(x)
    _, saved = layer_norm_fwd(x, w, b, (3,))
    grids = []
    with launch.observe(lambda kernel, grid, args, options: grids.append(grid)):
        whole = layer_norm_bwd(dy, *saved)
        monkeypatch.setattr(launch, "sm_count", lambda device: 8)
        split = layer_norm_bwd(dy, *saved)
    assert (1, 3) in grids
    assert_equal(split, layer_norm_bwd(dy, *saved))
    exact = layer_norm_bwd(dy.double(), *double(tuple(saved[:5])), (3,))
    assert_as_accurate(split, whole, exact)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
def test_parameters_in_float32_beside_half_precision(half, device):
    """y has the input's dtype, and each gradient its own tensor's, as in torch."""
    x, w, b = inputs((4, 6), (6,), device)
    x = x.to(half).requires_grad_()
    w, b = w.requires_grad_(), b.requires_grad_()
    y = kernels.layer_norm(x, 6, w, b)
    y.float().square().sum().backward()
    assert [t.dtype for t in (y, x.grad, w.grad, b.grad)] == [half, half, *[torch.float32] * 2]
    exact = F.layer_norm(x.double(), (6,), w.double(), b.double())
    assert (y.double() - exact).abs().max() <= torch.finfo(half).eps * exact.abs().max()


@pytest.mark.parametrize(
    ("shape", "normalized"), [((0, 3), (3,)), ((2, 0), (0,)), ((0, 2, 0), (2, 0)), ((3, 0), (3, 0))]
)
def test_empty(shape, normalized, device):
    given = inputs(shape, normalized, device)
    results = [
        with_gradients(lambda *t, f=f: f(t[0], normalized, *t[1:]), given)
        for f in (kernels.layer_norm, F.layer_norm)
    ]
    assert_equal(*results)


def test_derivatives(device):
    """First and second derivatives are right in float64, and in kernels with create_graph."""
    x, w, b = (t.double().requires_grad_() for t in inputs((3, 2, 3), (2, 3), device))
    function = lambda *t: kernels.layer_norm(t[0], (2, 3), *t[1:], 0.1)  # noqa: E731
    assert torch.autograd.gradcheck(function, (x, w, b))
    assert torch.autograd.gradgradcheck(function, (x, w, b))
    functions = [
        lambda *t, f=f: f(t[0], (2, 3), *t[1:]) for f in (kernels.layer_norm, F.layer_norm)
    ]
    compare(*map(gradient_penalty, functions), [t.detach().float() for t in (x, w, b)])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((torch.ones(2, 3), (4,)), r"must end with normalized_shape \(4,\), .*got \(2, 3\)"),
        ((torch.ones(2, 3), ()), r"normalized_shape \(\), at least one dimension"),
        ((torch.ones(2, 3), 3, torch.ones(2)), r"weight must be \(3,\) .*got \(2,\)"),
        ((torch.ones(2, 3), 3, None, torch.ones(1, 3)), r"bias must be \(3,\) .*got \(1, 3\)"),
        ((torch.ones(2, 3), 3, torch.ones(3).half()), "weight must be torch.float32 as input"),
        ((torch.ones(2, 3).double(), 3, torch.ones(3)), "weight must be torch.float64 as input"),
        ((torch.ones(2, 3).int(), 3), "must be floating point, got torch.int32"),
    ],
)
def test_errors(args, message):
    with pytest.raises(ValueError, match=f"layer_norm: .*{message}"):
        kernels.layer_norm(*args)
