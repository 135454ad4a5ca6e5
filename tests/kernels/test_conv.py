"""conv2d against torch's conv2d, activation and max_pool2d in every geometry, with ties, second
derivatives and errors.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

import kernels
from kernels import conv2d, conv2d_fwd
from kernels.activations import ACTIVATIONS
from kernels.ops.conv_bwd import NARROW
from tests.checks import DTYPES, assert_equal, compare, double, gradient_penalty

# name -> (input's shape, weight's shape, options). Each option varies alone, and in "all" together
# with a pooling window that does not divide the output.
GEOMETRIES = {
    "1 × 1": ((2, 3, 4, 3), (2, 3, 1, 1), {}),
    "kernel as large as the image": ((2, 2, 4, 3), (3, 2, 4, 3), {}),
    "stride, pixels left over": ((2, 2, 8, 7), (3, 2, 3, 2), {"stride": (3, 2)}),
    "padding beyond the kernel": ((2, 1, 4, 5), (2, 1, 2, 2), {"padding": (2, 3)}),
    "dilation": ((1, 2, 7, 8), (2, 2, 3, 2), {"dilation": (2, 3)}),
    "same, longer at the end": ((2, 2, 5, 4), (2, 2, 2, 4), {"padding": "same", "max_pool": 2}),
    "valid": ((2, 1, 6, 6), (2, 1, 3, 3), {"padding": "valid", "max_pool": 2}),
    "window that does not divide": ((2, 2, 8, 9), (3, 2, 3, 3), {"max_pool": (2, 3)}),
    "all": (
        (2, 2, 9, 8),
        (3, 2, 2, 3),
        {"stride": (1, 2), "padding": (1, 2), "dilation": (2, 1), "max_pool": (3, 2)},
    ),
    "one image": ((2, 6, 5), (3, 2, 3, 2), {"max_pool": 2}),
    "no images": ((0, 2, 6, 5), (3, 2, 3, 2), {"max_pool": 2}),
    "wide": ((2, 17, 5, 5), (20, 17, 3, 3), {"max_pool": 2}),
}
EACH_GEOMETRY = pytest.mark.parametrize("name", GEOMETRIES)
# torch warns that it pads a copy where "same" padding is one longer at the end.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")


def by_torch(x, w, b, activation="identity", max_pool=1, **options):
    return F.max_pool2d(ACTIVATIONS[activation].torch(F.conv2d(x, w, b, **options)), max_pool)


def draw(name, activation="identity", device="cpu", dtype=torch.float64, seed=0):
    """x, w, b such that rounding cannot move z across a kink or change a window's maximum.

    In half precision x and w are whole numbers and quarters. Their sums are exact, so the same
    numbers of a window are equal in every computation.
    """
    x_shape, w_shape, options = GEOMETRIES[name]
    pool, options = (
        options.get("max_pool", 1),
        {k: v for k, v in options.items() if k != "max_pool"},
    )
    pool = (pool, pool) if isinstance(pool, int) else pool
    eps = torch.finfo(dtype).eps
    for attempt in itertools.count(seed * 1000):
        torch.manual_seed(attempt)
        x, w, b = (torch.randn(*shape) for shape in (x_shape, w_shape, w_shape[:1]))
        w = w * w[0].numel() ** -0.5
        if eps > 1e-4:
            x, w = x.round(), (4 * w).round() / 4
        x, w, b = (t.to(device, dtype) for t in (x, w, b))
        z = F.conv2d(*double((x, w, b)), **options)
        windows = (
            ACTIVATIONS[activation]
            .torch(z)
            .unfold(-2, pool[0], pool[0])
            .unfold(-2, pool[1], pool[1])
            .flatten(-2)
        )
        first, *second = windows.topk(min(2, windows.shape[-1])).values.unbind(-1)
        margin = 1e-4 + 2 * eps * first.abs()
        won = all(((first - s > margin) | (first == s)).all() for s in second)
        if won and all(((z - kink).abs() > 1e-4).all() for kink in ACTIVATIONS[activation].kinks):
            return x, w, b


def pair(name, activation="identity"):
    """(our function, torch's function) of x, w, b."""
    options = {"activation": activation, **GEOMETRIES[name][2]}
    return lambda *args: conv2d(*args, **options), lambda *args: by_torch(*args, **options)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation, bias):
    x, w, b = (t.requires_grad_() for t in draw("valid", activation))
    args = (x, w, b if bias else None)
    assert gradcheck(pair("valid", activation)[0], args)
    assert gradgradcheck(pair("valid", activation)[0], args)


@EACH_GEOMETRY
def test_reference(name, monkeypatch):
    """The reference agrees with torch, also differentiated twice, with both formulas for dw."""
    for narrow in (0, NARROW):
        monkeypatch.setattr(kernels.ops.conv_bwd, "NARROW", narrow)
        with kernels.use("torch"):
            compare(*pair(name, "tanh"), draw(name, "tanh", dtype=torch.float32))
        if GEOMETRIES[name][0][0] and name != "wide":  # "wide" would take too long
            assert gradgradcheck(
                pair(name, "tanh")[0], [t.requires_grad_() for t in draw(name, "tanh")]
            )


@EACH_GEOMETRY
def test_geometries(name, device):
    # sigmoid is flat, so a difference comes from a wrong place in memory, not from rounding
    compare(
        *pair(name, "sigmoid"),
        draw(name, "sigmoid", device, torch.float32),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation, dtype, device):
    name = "window that does not divide"
    compare(*pair(name, activation), draw(name, activation, device, dtype))


def test_second_derivative_through_kernels(device):
    """With create_graph=True the kernels give torch's gradient of a gradient penalty."""
    compare(
        *map(gradient_penalty, pair("valid", "gelu")), draw("valid", "gelu", device, torch.float32)
    )


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("max_pool", [2, (1, 3), (3, 2)], ids=str)
def test_ties(max_pool, backend, device):
    """Among equal maxima the first gets the gradient. NaN counts as largest, and the last NaN gets
    it. Torch does exactly the same.
    """
    torch.manual_seed(0)
    x = torch.randint(-1, 2, (3, 2, 6, 7), device=device).float()
    x[1] = float("-inf")
    x[2, 0, :3, :3], x[2, 1, 2, 2], x[2, 1, 3, 3] = float("nan"), float("nan"), float("inf")
    w = torch.ones(1, 1, 1, 1, device=device)
    with kernels.use(backend):
        y, saved = conv2d_fwd(x.view(6, 1, 6, 7), w, max_pool=max_pool)
    expected, winner = F.max_pool2d(x.view(6, 1, 6, 7), max_pool, return_indices=True)
    assert_equal((y, saved[3].long()), (expected, winner))


X, W = torch.zeros(2, 3, 8, 8), torch.zeros(4, 3, 3, 3)
ERRORS = {
    "groups must be 1, got 3": ((X, W), {"groups": 3}),
    r"input must be images \(N, C, H, W\), or one \(C, H, W\), got \(8, 8\)": ((X[0, 0], W), {}),
    r"in = 3 \(input is \(2, 3, 8, 8\)\), got \(4, 2, 3, 3\)": ((X, W[:, :2]), {}),
    r"bias must be \(4,\) as weight is \(4, 3, 3, 3\), got \(3,\)": ((X, W, X[0, :, 0, 0]), {}),
    "weight must be torch.float32 as input is, got torch.float64": ((X, W.double()), {}),
    "floating point, got torch.int64": ((X.long(), W.long()), {}),
    "weight of 3 × 3 at dilation .4, 4. must fit in the padded image of 8 × 8": (
        (X, W),
        {"dilation": 4},
    ),
    "max_pool of 7 × 7 must fit in the convolution's output of 6 × 6": ((X, W), {"max_pool": 7}),
    "stride must be an integer of at least 1, or two .*, got 0": ((X, W), {"stride": 0}),
    'padding must be integers, "same" or "valid", got \'full\'': ((X, W), {"padding": "full"}),
    '"same" needs stride 1, as in torch, got stride .2, 2.': (
        (X, W),
        {"padding": "same", "stride": 2},
    ),
    "unknown activation 'step'; known: identity, ": ((X, W), {"activation": "step"}),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(message):
    args, options = ERRORS[message]
    with pytest.raises(ValueError, match="conv2d: .*" + message):
        conv2d(*args, **options)
