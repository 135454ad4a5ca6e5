"""A check of a machine and its versions of torch and triton in one minute. It runs every operation
once, and shows that the tests can fail.
"""

import functools

import pytest
import torch

from kernels import launch
from kernels.operations import OPERATIONS
from tests.checks import LAYOUTS, Draw, assert_as_accurate, double


@pytest.mark.interpreter
@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation(name, device):
    op, launched = OPERATIONS[name], []
    with launch.observe(lambda kernel, *_: launched.append(kernel)):
        for label, args in op.cases(Draw(device), 7, 33, 17):
            torchs, exact = (
                functools.partial(op.results, each, reference=True) for each in (args, double(args))
            )
            assert_as_accurate(op.results(args), torchs(), exact, f"{name}, {label}")
    assert launched, "the reference was compared with itself"


def test_fresh_buffers_are_poisoned(device):
    x = torch.ones(2, device=device)
    for fresh in (
        torch.empty(3, device=device),
        torch.empty_like(x),
        x.new_empty(3),
        torch.empty_strided((2,), (1,)),
    ):
        assert fresh.isnan().all()
    assert torch.empty(3, dtype=torch.int64).dtype == torch.int64


def test_tolerance_is_not_loose():
    exact = torch.linspace(1, 2, 10, dtype=torch.float64)
    torchs = exact.float()
    ulp = torch.finfo(torch.float32).eps
    assert_as_accurate(torchs + ulp, torchs, exact)
    for wrong in (
        torchs + 4 * ulp,
        torchs.clone().index_fill_(0, torch.tensor(3), float("nan")),
        -torchs,
        torchs.double(),
    ):
        with pytest.raises(AssertionError):
            assert_as_accurate(wrong, torchs, exact)
    overflown = torchs.clone().index_fill_(0, torch.tensor(3), float("inf"))
    assert_as_accurate(overflown, overflown, exact)  # where torch overflows, we may too


def test_tolerance_knows_the_terms_of_a_sum():
    """Where terms cancel, the limit follows from the size of the terms, for any order of the sum. A
    missing term still fails.
    """
    terms = torch.cos(torch.arange(64.0))
    x, ones = torch.cat([terms, -terms.flip(0)])[None], torch.ones(128, 1)
    exact = lambda: x.double() @ ones.double()  # noqa: E731
    right = exact().float()  # a BLAS may happen to have no error at all
    ours = functools.reduce(torch.add, x.split(1, 1))
    assert (ours - right).abs() > 1e-7
    assert_as_accurate(ours, right, exact)
    for wrong in (ours + 2e-5, x[:, 1:] @ ones[1:]):
        with pytest.raises(AssertionError):
            assert_as_accurate(wrong, right, exact)


def test_tolerance_follows_rounding_through_a_computation():
    """For a saturated tanh, y is rounded first, so 1 - y² has few correct digits. The limit allows
    for that.
    """
    z = torch.linspace(3, 5, 50)
    exact = lambda: 1 - z.double().tanh() ** 2  # noqa: E731
    right, ours = exact().float(), 1 - z.tanh() ** 2
    assert (ours - right).abs().max() > 3 * torch.finfo(torch.float32).eps * right.max()
    assert_as_accurate(ours, right, exact)
    with pytest.raises(AssertionError):
        assert_as_accurate(ours + 1e-6, right, exact)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "expanded"])
def test_layouts_keep_values(layout):
    for t in (torch.randn(3, 4, 5), torch.randn(3, 4), torch.randn(3)):
        assert torch.equal(LAYOUTS[layout](t), t)
        assert LAYOUTS[layout](t).is_contiguous() == (layout == "contiguous")
