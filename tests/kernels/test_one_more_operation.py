"""Adds an operation as CONTRIBUTING.md says, then runs the tests of every operation on it.

It is a gated linear unit, because torch has its function, module and gradient.
"""

from collections.abc import Sequence
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

import kernels
import mlp
from kernels import launch, tape
from kernels.language import tl, triton
from kernels.operations import OPERATIONS, Operation
from kernels.tiles import cast
from mlp import fusing
from tests import pairs, test_structure
from tests.checks import DTYPES, assert_equal
from tests.kernels import test_compile, test_operations, test_smoke

# The numbers are those of the list in CONTRIBUTING.md.
# 1. kernels/ops/glu.py would hold this.


class GluSaved(NamedTuple):
    """What the forward keeps for the backward."""

    x: torch.Tensor  # (…, 2 N)


def glu_fwd_ref(x: torch.Tensor) -> tuple[torch.Tensor, tuple]:
    """The reference of `glu_fwd`."""
    a, b = x.chunk(2, -1)
    return a * torch.sigmoid(b), GluSaved(x)


def glu_bwd_ref(
    dy: torch.Tensor, x: torch.Tensor, *, needs: Sequence[bool] = (True,)
) -> tuple[torch.Tensor | None]:
    """The reference of `glu_bwd`."""
    a, b = x.chunk(2, -1)
    gate = torch.sigmoid(b)
    return (torch.cat([dy * gate, dy * a * gate * (1 - gate)], -1) if needs[0] else None,)


@triton.jit
def glu_fwd_kernel(
    y_ptr,  # [M, N]
    x_ptr,  # [M, 2 N]
    size,
    N,
    BLOCK: tl.constexpr,
):
    """y = a σ(b), where a row of x is a, then b."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size
    first = offs + offs // N * N
    a = tl.load(x_ptr + first, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(x_ptr + first + N, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + offs, cast(a / (1.0 + tl.exp(-b)), y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def glu_bwd_kernel(
    dx_ptr,  # [M, 2 N]
    dy_ptr,  # [M, N]
    x_ptr,  # [M, 2 N]
    size,
    N,
    BLOCK: tl.constexpr,
):
    """Forward was y = a σ(b), so da = dy σ(b) and db = dy a σ(b) (1 - σ(b))."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size
    first = offs + offs // N * N
    a = tl.load(x_ptr + first, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(x_ptr + first + N, mask=mask, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    gate = 1.0 / (1.0 + tl.exp(-b))
    kind = dx_ptr.dtype.element_ty
    tl.store(dx_ptr + first, cast(dy * gate, kind), mask=mask)
    tl.store(dx_ptr + first + N, cast(dy * a * gate * (1.0 - gate), kind), mask=mask)


def glu_fwd(x: torch.Tensor) -> tuple[torch.Tensor, tuple]:
    """y (…, N) of x (…, 2 N), and what `glu_bwd` takes after dy."""
    if x.dim() == 0 or x.shape[-1] % 2:
        raise ValueError(f"glu: input must end with an even size, got {tuple(x.shape)}")
    if launch.backend(x) == "torch" or x.numel() == 0:
        return glu_fwd_ref(x)
    y = x.new_empty(*x.shape[:-1], x.shape[-1] // 2)
    grid = (triton.cdiv(y.numel(), 256),)
    launch.run(glu_fwd_kernel, grid, y, x.contiguous(), y.numel(), y.shape[-1], BLOCK=256)
    return y, GluSaved(x)


def glu_bwd(
    dy: torch.Tensor, x: torch.Tensor, *, needs: Sequence[bool] = (True,)
) -> tuple[torch.Tensor | None]:
    """(dx,) from dy and what `glu_fwd` saved."""
    if launch.backend(dy, x) == "torch" or x.numel() == 0 or not needs[0]:
        return glu_bwd_ref(dy, x, needs=needs)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    grid = (triton.cdiv(dy.numel(), 256),)
    tensors = dx, dy.contiguous(), x.contiguous()
    launch.run(glu_bwd_kernel, grid, *tensors, dy.numel(), dy.shape[-1], BLOCK=256)
    return (dx,)


GLU = tape.Differentiable(
    name="glu",
    fwd=glu_fwd,
    fwd_ref=glu_fwd_ref,
    bwd=glu_bwd,
    bwd_ref=glu_bwd_ref,
    saved=GluSaved,
    inputs=1,
)


@tape.traceable
def glu(input: torch.Tensor) -> torch.Tensor:
    """`torch.nn.functional.glu` over the last dimension."""
    return tape.call(GLU, input)


def glu_cases(make, m, k, n):
    """3. Cases to try it on, from kernels/operations.py."""
    yield "rows", (make.real(m, 2 * n),)
    yield "more dimensions", (make.real(2, m, 2 * k),)


class Gated(torch.nn.GLU):
    """4. The module."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return glu(input)


@pytest.fixture(autouse=True)
def listed(monkeypatch):
    """2. Adds the five public names, 3. the row, 4. torch's module to the twins."""
    names = {
        function.__name__: function for function in (glu_fwd, glu_fwd_ref, glu_bwd, glu_bwd_ref)
    }
    for name, function in {"glu": glu, **names}.items():
        monkeypatch.setattr(kernels, name, function, raising=False)
    monkeypatch.setattr(kernels, "__all__", [*kernels.__all__, "glu", *names])
    monkeypatch.setitem(OPERATIONS, "glu", Operation.of(GLU, glu, F.glu, glu_cases))
    monkeypatch.setitem(pairs.PAIRS, "glu", (glu, F.glu, 1))
    monkeypatch.setitem(fusing.TWINS, torch.nn.GLU, Gated)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernels(dtype, device):
    for shape in ((7, 33, 16), (0, 7, 17)):
        test_operations.test_accuracy("glu", shape, dtype, device)
    test_operations.test_repeats_bitwise("glu", device)
    test_operations.test_backward_leaves_what_forward_saved("glu", device)
    test_smoke.test_every_operation("glu", device)


def test_gradients():
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    assert gradcheck(kernels.glu, x) and gradgradcheck(kernels.glu, x)
    with pytest.raises(ValueError, match=r"even size, got \(5, 3\)"):
        kernels.glu(x[:, :3])


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_compiles(backend, device):
    test_compile.test_as_eager("glu", backend, device)


def test_is_whole():
    test_structure.test_operation_is_whole("glu")


def test_fuses(device):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.GLU()).to(device)
    x = torch.randn(3, 4, device=device)
    with kernels.use("torch"):
        expected = model(x)
        fused = mlp.fuse(model)
        assert type(fused[1]) is Gated
        assert_equal(fused(x), expected)
