"""Every sample and error input of torch's op_db for the operators that we have, by the reference
and by the kernels.

`operators.REFUSED` lists the samples that torch accepts and we refuse. All others equal torch's.
"""

import contextlib

import pytest
import torch
import torch.nn.functional as F

import kernels
from tests.databases import torchs
from tests.databases.operators import FLOAT64, OPERATORS, REFUSED, groups, other_windows

EACH = pytest.mark.parametrize("name", OPERATORS)
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
quiet = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")


def drawn(name, kind, device, dtype):
    """(torch's function, [(sample, True if we refuse it)])."""
    variant = name.partition(".")[2]
    entries = torchs.operators(OPERATORS[name][0])
    op = next(op for op in entries if op.variant_test_name == variant)
    refused = REFUSED.get(name, (None, lambda *args, **options: False))[1]
    samples = list(getattr(op, kind)(device, dtype, requires_grad=True))
    return OPERATORS[name][2] or op.op, [
        (s, bool(refused(s.input, *s.args, **s.kwargs))) for s in samples
    ]


def compare(name, theirs, sample):
    ours, theirs = (
        lambda f=f: f(sample.input, *sample.args, **sample.kwargs)
        for f in (OPERATORS[name][1], theirs)
    )
    torchs.assert_same(ours, theirs, (sample.input, sample.args, sample.kwargs), name)


@EACH
@DTYPES
@quiet
def test_by_the_reference(name, dtype):
    """The samples of op_db, with those that it has for references. Those that are not too large run
    again with gaps between elements.
    """
    with kernels.use("torch"):
        theirs, samples = drawn(name, "reference_inputs", "cpu", dtype)
        for sample, refused in samples:
            if not refused:
                compare(name, theirs, sample)
                if sample.input.numel() < 100_000:
                    compare(name, theirs, sample.noncontiguous())


@pytest.mark.parametrize("name", [name for name in OPERATORS if name != FLOAT64])
@quiet
def test_by_the_kernels(name, device):
    theirs, samples = drawn(name, "sample_inputs", device, torch.float32)
    for sample, refused in samples:
        if not refused:
            compare(name, theirs, sample)


@EACH
@pytest.mark.parametrize("kind", ["sample_inputs", "reference_inputs"])
@quiet
def test_refused_samples(name, kind):
    """Samples of a refused kind get a clear error. Every other sample is served."""
    _, samples = drawn(name, kind, "cpu", torch.float32)
    reason, _, message = REFUSED.get(name, (None, None, None))
    served = 0
    for sample, refused in samples:
        if refused and not message:
            continue
        with (
            kernels.use("torch"),
            pytest.raises(ValueError, match=message)
            if refused
            else contextlib.nullcontext() as error,
        ):
            OPERATORS[name][1](sample.input, *sample.args, **sample.kwargs)
        if refused:
            torchs.assert_clear(error.value)
        served += not refused
    others = sum(refused for _, refused in samples)
    print(
        f"{name}: {served} of {len(samples) - others} {kind} served",
        *(["and not", others, "of", reason] if others else ()),
    )
    assert bool(others) == (reason is not None) and served == len(samples) - others > 0


@EACH
@pytest.mark.parametrize("backend", ["torch", None], ids=["reference", "kernels"])
def test_error_inputs(name, backend):
    """torch's error inputs are errors here too, with one line that says what is wrong."""
    op = torchs.operators(OPERATORS[name][0])[0]
    if op.error_inputs_func is None or OPERATORS[name][2] is not None:
        pytest.skip("by design: torch lists no error inputs of this operator")
    for case in op.error_inputs("cpu"):
        sample = case.sample_input
        if REFUSED.get(name, (0, groups, "error"))[2] is None and other_windows(
            sample.input, **sample.kwargs
        ):
            continue
        with (
            kernels.use(backend) if backend else contextlib.nullcontext(),
            pytest.raises((ValueError, IndexError, TypeError, RuntimeError)) as error,
        ):
            OPERATORS[name][1](sample.input, *sample.args, **sample.kwargs)
        torchs.assert_clear(error.value)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_linear_with_one_output(bias, device):
    """The weight may have one dimension. op_db tests that only without a bias."""
    inputs = [
        torch.randn(shape, device=device, requires_grad=True)
        for shape in ((3, 2, 5), (5,), ())[: 2 + bias]
    ]
    torchs.assert_same(lambda: kernels.linear(*inputs), lambda: F.linear(*inputs), inputs, "linear")
