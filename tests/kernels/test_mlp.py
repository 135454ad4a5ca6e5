"""mlp, a whole stack as one node, against the same stack of torch's functions."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

import kernels
from kernels import linear, mlp_bwd, mlp_fwd, mlp_fwd_ref
from kernels.activations import ACTIVATIONS
from kernels.ops.linear import linear_bwd_dw_ref as bwd_dw
from kernels.ops.linear import linear_bwd_dx_ref as bwd_dx
from kernels.ops.linear import linear_bwd_dz_ref as bwd_dz
from kernels.ops.mlp import stack_backward
from tests.checks import (
    DTYPES,
    assert_equal,
    compare,
    double,
    gradient_penalty,
    snapshot,
    with_gradients,
)

EACH_ACTIVATION = pytest.mark.parametrize("activation", ACTIVATIONS)
WIDTHS = (33, 16, 7, 10)


def draw(widths, batch, device="cpu", dtype=torch.float64, seed=0):
    """x, weights, biases of a stack, scaled so that no layer saturates."""
    torch.manual_seed(seed)
    weights = [torch.randn(o, i) * i**-0.5 for i, o in itertools.pairwise(widths)]
    biases = [torch.randn(w) * 0.5 for w in widths[1:]]
    return [t.to(device, dtype) for t in (torch.randn(batch, widths[0]), *weights, *biases)]


def away_from_kinks(tensors, activation):
    """True if rounding cannot move any pre-activation across a kink."""
    y, *parameters = double(tensors)
    layers = len(parameters) // 2
    margin = []
    for w, b in zip(parameters[:layers], parameters[layers:]):
        z = F.linear(y, w, b)
        y = ACTIVATIONS[activation].torch(z)
        margin += [(z - kink).abs().min() for kink in ACTIVATIONS[activation].kinks]
    return all(m > 1e-4 for m in margin)


def pair(activation, output_activation="identity"):
    """(our function, torch's function) of x, *weights, *biases."""

    def by_kernels(x, *parameters):
        layers = len(parameters) // 2
        return kernels.mlp(
            x, parameters[:layers], parameters[layers:], activation, output_activation
        )

    def by_torch(x, *parameters):
        layers = len(parameters) // 2
        for layer, (w, b) in enumerate(zip(parameters[:layers], parameters[layers:]), 1):
            x = ACTIVATIONS[output_activation if layer == layers else activation].torch(
                F.linear(x, w, b)
            )
        return x

    return by_kernels, by_torch


@EACH_ACTIVATION
def test_gradcheck(activation):
    tensors = [t.requires_grad_() for t in draw((3, 4, 2), 3)]
    assert away_from_kinks(tensors, activation)
    function, _ = pair(activation, "tanh")
    assert gradcheck(function, tensors)
    assert gradgradcheck(function, tensors)


@EACH_ACTIVATION
def test_against_torch(activation, device):
    seeds = (draw(WIDTHS, 17, device, torch.float32, seed) for seed in itertools.count())
    compare(*pair(activation), next(t for t in seeds if away_from_kinks(t, activation)))


@EACH_ACTIVATION
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_a_stack_of_linear(activation, dtype, device):
    """The value equals layers of kernels.linear, bit for bit, and in float32 the gradients too. In
    half precision a stack of linear rounds dy between the layers; mlp does not.
    """
    tensors = draw(WIDTHS, 17, device, dtype)

    def stack(x, *parameters):
        for layer, (w, b) in enumerate(zip(parameters[:3], parameters[3:]), 1):
            x = linear(x, w, b, activation if layer < 3 else "identity")
        return x

    whole = with_gradients(pair(activation)[0], tensors)
    layered = with_gradients(stack, tensors)
    if dtype == torch.float32:
        assert_equal(whole, layered, activation)
    assert_equal(whole[0], layered[0], activation)


def test_second_derivative_through_kernels(device):
    compare(
        *map(gradient_penalty, pair("silu", "sigmoid")),
        draw((16, 17, 7), 16, device, torch.float32),
    )


@pytest.mark.parametrize("shape", [(33,), (2, 3, 33), (0, 33)], ids=str)
def test_leading_dimensions(shape, device):
    _, *parameters = draw(WIDTHS, 1, device, torch.float32)
    compare(*pair("tanh"), (torch.randn(shape, device=device), *parameters))


def test_only_the_gradients_wanted(device):
    """A gradient keeps its bits, whether it is asked for alone or with others."""
    x, *parameters = draw(WIDTHS, 7, device, torch.float32)
    y, saved = mlp_fwd(x, parameters[:3], parameters[3:], "sigmoid")
    flat = lambda dx, dws, dbs: [dx, *dws, *dbs]  # noqa: E731
    whole = flat(*mlp_bwd(torch.ones_like(y), *saved))
    one_hot = [tuple(i == j for j in range(7)) for i in range(7)]
    for needs in [*one_hot, *(tuple(not n for n in row) for row in one_hot), (False,) * 7]:
        for gradient, part, needed in zip(
            whole, flat(*mlp_bwd(torch.ones_like(y), *saved, needs=needs)), needs
        ):
            assert torch.equal(part, gradient) if needed else part is None


@pytest.mark.parametrize(
    ("needed", "parts"),
    [
        ((0,), ["dz", "dx", "dx", "dx"]),  # the inputs
        ((1,), ["dz", "dx", "dx", "dw"]),  # the lowest weight
        ((2, 6), ["dz", "dx", "dw", "dw"]),  # the second weight and the highest bias
        ((6,), ["dz", "dw"]),
        ((), []),
    ],
)
def test_nothing_is_computed_for_frozen_layers(needed, parts):
    """Below the lowest layer that needs a gradient, the backward computes no dz."""
    x, *parameters = draw(WIDTHS, 7)
    dy, saved = mlp_fwd_ref(x, parameters[:3], parameters[3:], "sigmoid")
    done = []

    def counted(name, part):
        return lambda *args, **kwargs: done.append(name) or part(*args, **kwargs)

    bwds = [counted(*part) for part in (("dz", bwd_dz), ("dx", bwd_dx), ("dw", bwd_dw))]
    dx, dws, dbs = stack_backward(dy, saved, [i in needed for i in range(7)], None, *bwds)
    assert sorted(done) == sorted(parts)
    given = {i for i, gradient in enumerate((dx, *dws, *dbs)) if gradient is not None}
    assert given == set(needed)


@pytest.mark.parametrize("activation", ["relu", "gelu"])  # relu keeps y, gelu keeps z
def test_out(activation, device):
    """Given buffers are filled and returned. They hold the same bits as fresh ones."""
    x, *parameters = draw(WIDTHS, 17, device, torch.float32)
    weights, biases = parameters[:3], parameters[3:]
    y, saved = mlp_fwd(x, weights, biases, activation)
    fresh = snapshot((y, mlp_bwd(torch.ones_like(y), *saved)))
    forward_out = [
        (torch.empty(17, w, device=device), torch.empty(17, w, device=device)) for w in WIDTHS[1:]
    ]
    dz_out = [torch.empty(17, w, device=device) for w in WIDTHS[1:]]
    grads_out = [(torch.empty_like(w), torch.empty_like(b)) for w, b in zip(weights, biases)]
    y, saved = mlp_fwd(x, weights, biases, activation, out=forward_out)
    _, dws, dbs = grads = mlp_bwd(torch.ones_like(y), *saved, out=(dz_out, grads_out))
    assert_equal((y, grads), fresh, activation)
    assert y.data_ptr() == forward_out[-1][0].data_ptr()
    assert all(dw is given[0] and db is given[1] for dw, db, given in zip(dws, dbs, grads_out))
