"""Under torch.autocast, dtypes are torch's, values agree within half precision, and gradients have
their parameter's dtype.
"""

import contextlib

import pytest
import torch

import kernels
from kernels import tape
from kernels.language import IS_INSTALLED as HAS_TRITON
from kernels.operations import OPERATIONS
from tests.checks import assert_as_accurate, assert_equal
from tests.pairs import PAIRS, cases, gradients, leaves

EACH_OPERATION = pytest.mark.parametrize("name", PAIRS)
EACH_DTYPE = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str
)
HALF = torch.bfloat16


def under(function, device, args, dtype=HALF):
    with torch.autocast(device, dtype=dtype):
        return function(*args)


@EACH_OPERATION
@EACH_DTYPE
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_as_torch(name, dtype, half, device):
    """The output and every gradient have torch's dtypes. They are as accurate as torch's under
    autocast.
    """
    ours, torchs, _ = PAIRS[name]
    for args in cases(name, device, dtype):
        results = []
        for function in (ours, torchs):
            given = leaves(name, args)
            results.append(gradients([under(function, device, given, half)], given))

        def exact(args=args):
            doubled = leaves(name, cast(args, torch.float64))
            return gradients([torchs(*doubled)], doubled)

        assert_as_accurate(*results, exact, name, computed_in=half)


def cast(value, dtype):
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    return type(value)(cast(v, dtype) for v in value) if isinstance(value, (list, tuple)) else value


@EACH_OPERATION
def test_is_the_operation_on_cast_arguments(name, device):
    """Autocast casts the arguments and changes nothing else, bit for bit. Products run in
    autocast's dtype, losses in float32.
    """
    for args in cases(name, device):
        if name == "linear_cross_entropy":
            x, w, b, *options = args
            logits = kernels.linear(*cast((x, w, b), HALF))
            expected = kernels.cross_entropy(*cast((logits, *options), torch.float32))
        else:
            row = OPERATIONS[name].definition
            casts = torch.device(device).type in row.autocast_on
            expected = PAIRS[name][0](*(cast(args, row.autocast or HALF) if casts else args))
        assert_equal(under(PAIRS[name][0], device, args), expected, name)


@EACH_OPERATION
def test_backward_within_autocast(name, device):
    """A backward computes in its forward's precision, whether autocast is on or off by then. The
    same holds for a second derivative. Where torch's own tape serves, torch's rules hold instead.
    """
    for args in cases(name, device)[:1]:
        results = []
        for enabled in (False, True):
            given = leaves(name, args)
            with contextlib.nullcontext() if HAS_TRITON else kernels.use("torch"):
                y = PAIRS[name][0](*given)
            with torch.autocast(device, dtype=HALF, enabled=enabled):
                results.append(gradients([y], given))
        assert_equal(*results)


@pytest.mark.parametrize("inside", [True, False], ids=["inside", "around"])
def test_compiled(inside, device):
    """The compiled function equals eager, with autocast inside it or around it."""
    torch._dynamo.reset()

    def step(x, weights, biases, target):
        return kernels.cross_entropy(kernels.mlp(x, weights, biases, "sigmoid"), target)

    def cast_step(*args):
        return under(step, device, args)

    x, weights, biases, *_ = cases("mlp", device)[0]
    args = leaves("mlp", (x, weights, biases, torch.arange(7, device=device)))
    with kernels.use("torch"):
        run = torch.compile(cast_step if inside else step, fullgraph=True, backend="aot_eager")
        result = run(*args) if inside else under(run, device, args)
        assert_equal(gradients([result], args), gradients([cast_step(*args)], args))


def test_off_for_other_devices_and_inside(device):
    """Autocast for another device than the tensors' changes nothing. An operation leaves autocast
    as it found it.
    """
    (args, *_) = cases("linear", device)
    other = "xpu" if device == "cpu" else "cpu"
    if torch.amp.is_autocast_available(other):
        assert not tape.autocasting(args[0])
    with torch.autocast(device, dtype=HALF):
        kernels.linear(*args)
        assert torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == HALF
    with torch.autocast("cpu", dtype=HALF):
        assert (
            kernels.linear(
                *(a.to("meta") if isinstance(a, torch.Tensor) else a for a in args)
            ).dtype
            == torch.float32
        )
