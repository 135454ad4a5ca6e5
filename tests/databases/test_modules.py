"""Every sample and error input of torch's module_db for the modules that we have. Both modules
share their parameters.
"""

import pytest
import torch
from torch import nn

import kernels
import mlp
from tests.databases import torchs

MODULES = {
    nn.Linear: mlp.Linear,
    nn.Conv2d: mlp.Conv2d,
    nn.CrossEntropyLoss: mlp.CrossEntropyLoss,
    nn.MSELoss: mlp.MSELoss,
}
EACH = pytest.mark.parametrize("cls", MODULES, ids=lambda cls: cls.__name__)


def build(cls, constructor, device, dtype):
    kind = (
        {}
        if issubclass(cls, (nn.CrossEntropyLoss, nn.MSELoss))
        else {"device": device, "dtype": dtype}
    )
    return cls(*constructor.args, **constructor.kwargs, **kind)


def compare(cls, device, dtype) -> int:
    info = torchs.module(cls)
    samples = info.module_inputs_func(info, device, dtype, True, True)
    for sample in samples:
        ours, theirs = (
            build(kind, sample.constructor_input, device, dtype) for kind in (MODULES[cls], cls)
        )
        # Both modules use these parameters, so that gradients by them can be compared.
        for name, parameter in theirs.named_parameters():
            setattr(ours, name, parameter)
        given = sample.forward_input
        functions = (lambda m=m, g=given: m(*g.args, **g.kwargs) for m in (ours, theirs))
        torchs.assert_same(
            *functions,
            (given.args, given.kwargs, list(theirs.parameters())),
            f"{info.name} {sample.desc}",
        )
    return len(samples)


@EACH
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_by_the_reference(cls, dtype):
    torch.manual_seed(0)  # fixes the samples: other numbers round otherwise
    with kernels.use("torch"):
        assert compare(cls, "cpu", dtype)


@EACH
def test_by_the_kernels(cls, device):
    torch.manual_seed(0)
    assert compare(cls, device, torch.float32)


@EACH
def test_error_inputs(cls):
    info = torchs.module(cls)
    func = info.module_error_inputs_func
    if func is None:
        pytest.skip("by design: torch lists no error inputs of this module")
    for case in func(info, "cpu", torch.float32, False, True):
        given = case.module_error_input
        with pytest.raises((ValueError, IndexError, TypeError, RuntimeError)) as error:
            module = build(MODULES[cls], given.constructor_input, "cpu", torch.float32)
            module(*given.forward_input.args, **given.forward_input.kwargs)
        torchs.assert_clear(error.value)
