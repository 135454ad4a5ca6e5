"""Every sample and error input of torch's optim_db for the optimizers that we have, over five
steps from the same weights.
"""

import copy
import inspect

import pytest
import torch

import kernels
import mlp
from tests.databases import torchs

OPTIMIZERS = {
    torch.optim.SGD: mlp.SGD,
    torch.optim.Adam: mlp.Adam,
    torch.optim.AdamW: mlp.AdamW,
    torch.optim.RMSprop: mlp.RMSprop,
    torch.optim.Adagrad: mlp.Adagrad,
}
REFUSED = {
    "amsgrad": "Adam's maxima of its second moments",
    "differentiable": "steps that are part of a graph",
    "centered": "RMSprop's variance of the gradient",
}
EACH = pytest.mark.parametrize("kind", OPTIMIZERS, ids=lambda kind: kind.__name__)


def parameters(device, dtype):
    torch.manual_seed(0)
    return [
        torch.nn.Parameter(torch.randn(shape).to(device, dtype))
        for shape in ((3, 5), (5,), (), (2, 0))
    ]


def trained(cls, device, dtype, keywords):
    """(weights, state_dict) after five steps. In the third, the first parameter has no gradient."""
    params = parameters(device, dtype)
    optimizer = cls(params, **copy.deepcopy(keywords))
    for step in range(5):
        for i, p in enumerate(params):
            p.grad = (
                None
                if (step, i) == (2, 0)
                else torch.cos(step + torch.arange(p.numel())).view(p.shape).to(p)
            )
        optimizer.step()
    return params, optimizer.state_dict()["state"]


def samples(kind):
    """The database's keywords, alone and with the flags that choose an implementation in torch."""
    known = inspect.signature(kind.__init__).parameters
    flags = [{}, *({name: True} for name in ("foreach", "fused") if name in known)]
    for sample in torchs.optimizer(kind).optim_inputs_func("cpu"):
        for flag in flags:
            if not (
                flag and isinstance(sample.kwargs.get("lr"), torch.Tensor)
            ):  # torch refuses a tensor with foreach
                yield sample.desc, {**sample.kwargs, **flag}


def compare(kind, device, dtype):
    served, refused = 0, []
    for desc, keywords in samples(kind):
        if any(keywords.get(name) for name in REFUSED):
            with pytest.raises(ValueError, match=r"=True is not supported; use torch\.optim\."):
                OPTIMIZERS[kind](parameters(device, dtype), **keywords)
            refused.append(f"{desc}, {keywords}")
            continue
        ours, theirs = (trained(cls, device, dtype, keywords) for cls in (OPTIMIZERS[kind], kind))
        torch.testing.assert_close(ours, theirs, msg=lambda m, d=desc, k=keywords: f"{d}, {k}: {m}")
        served += 1
    print(
        f"{kind.__name__}: {served} samples served, and not {len(refused)}:",
        *refused,
        sep="\n  ",
    )
    # amsgrad is refused with each of torch's three flags, centered in three samples with two each.
    expected = {torch.optim.Adam: 3, torch.optim.AdamW: 3, torch.optim.RMSprop: 6}
    assert len(refused) == expected.get(kind, 0)


@EACH
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_by_the_reference(kind, dtype):
    with kernels.use("torch"):
        compare(kind, "cpu", dtype)


@EACH
def test_by_the_kernels(kind, device):
    compare(kind, device, torch.float32)


@EACH
def test_error_inputs(kind):
    """torch's errors and warnings, at construction or at a step, are errors here too."""
    for case in torchs.optimizer(kind).optim_error_inputs_func("cpu", torch.float32):
        given = case.optimizer_error_input
        params = parameters("cpu", torch.float32) if given.params is None else given.params
        with pytest.raises((case.error_type, FutureWarning), match=case.error_regex):
            OPTIMIZERS[kind](params, **given.kwargs).step()


@EACH
@pytest.mark.parametrize("option", REFUSED)
def test_a_refused_option_of_a_single_group(kind, option):
    """Such an option is refused. torch's own constructor checks only the options of all groups."""
    ours, group = (
        OPTIMIZERS[kind],
        {"params": parameters("cpu", torch.float32), option: True},
    )
    refused = pytest.raises(
        ValueError, match=rf"{option}=True is not supported; use torch\.optim\.{ours.__name__}"
    )
    with refused:
        ours([group], lr=0.1)
    optimizer = ours(parameters("cpu", torch.float32), lr=0.1)
    with refused:
        optimizer.add_param_group(group)
