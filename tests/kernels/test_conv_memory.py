"""conv2d's launchers take any strides, compute only the gradients asked for, and repeat to the
bit.
"""

import itertools

import pytest
import torch

import kernels
from kernels import conv2d_bwd, conv2d_fwd, launch
from kernels.ops.conv_bwd import conv2d_bwd_dw, conv2d_bwd_dw_ref
from kernels.ops.patches import geometry
from tests.checks import DTYPES, LAYOUTS, assert_as_accurate, assert_equal, double
from tests.kernels.test_conv import draw


@pytest.mark.parametrize(
    "layouts", list(itertools.product([*LAYOUTS, "channels_last"], repeat=2)), ids="-".join
)
def test_layouts(layouts, device):
    """Input, weight, bias and incoming gradient may have any strides. The gaps hold NaN."""
    choices = LAYOUTS | {
        "channels_last": lambda t: t.to(memory_format=torch.channels_last) if t.dim() == 4 else t
    }
    first, second = (choices[name] for name in layouts)
    x, w, b = draw("valid", "silu", device, torch.float32)
    x, w, b = first(x), second(w), second(b)

    def results(backend, dtype=torch.float32):
        with kernels.use(backend):
            y, saved = conv2d_fwd(
                x.to(dtype), w.to(dtype), b.to(dtype), activation="silu", max_pool=2
            )
            dy = first(torch.linspace(0.5, 2, y.numel(), device=device).view(y.shape)).to(dtype)
            return y, conv2d_bwd(dy, *saved)

    assert_as_accurate(results("triton"), results("torch"), lambda: results("torch", torch.float64))


@pytest.mark.parametrize("needs", list(itertools.product([True, False], repeat=3)), ids=str)
def test_needs(needs, device):
    """An unwanted gradient is None. The others keep their bits."""
    y, saved = conv2d_fwd(
        *draw("valid", "relu", device, torch.float32), activation="relu", max_pool=2
    )
    whole, parts = (conv2d_bwd(torch.ones_like(y), *saved, needs=n) for n in ((True,) * 3, needs))
    for gradient, part, needed in zip(whole, parts, needs):
        assert torch.equal(part, gradient) if needed else part is None


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_split_batch(dtype, device, monkeypatch):
    """dw's positions are split over processors, also within an image. Their sums are added in a
    fixed order, so a second run gives the same bits.
    """
    monkeypatch.setattr(launch, "sm_count", lambda device: 3)
    x, dz, launched = (
        torch.randn(11, 2, 9, 10, device=device),
        torch.randn(11, 3, 9, 10, device=device),
        [],
    )
    args = dz.to(dtype), x.to(dtype), geometry((3, 3), padding=1)
    with launch.observe(lambda kernel, grid, args, options: launched.append(grid)):
        ours = conv2d_bwd_dw(*args)
    assert launched[0][2] == 3, "the positions were not split"
    assert_as_accurate(
        ours, conv2d_bwd_dw_ref(*args), lambda: conv2d_bwd_dw_ref(*double(args[:2]), args[2])
    )
    assert_equal(conv2d_bwd_dw(*args), ours, "second run")
