"""Models of torch's quantisation. `mlp.fuse` leaves them alone, and a Trainer trains those with
parameters.
"""

import copy

import pytest
import torch
from torch import nn
from torch.ao import quantization

import mlp

# torch 2.10 and later warn that torch.ao.quantization moves to torchao.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


def model():
    return nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))


def data():
    x = torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
    return x, x[:, :3].argmax(1)


def test_dynamic():
    x, _ = data()
    quantised = quantization.quantize_dynamic(model().eval(), {nn.Linear}, torch.qint8)
    expected = quantised(x)
    fused = mlp.fuse(quantised)
    assert torch.equal(fused(x), expected) and "DynamicQuantizedLinear" in str(fused)
    with pytest.raises(ValueError, match="Trainer: Sequential has no parameters to train"):
        mlp.Trainer(quantised)


@pytest.mark.parametrize("fuse", [False, True])
def test_while_training(fuse):
    """A Trainer trains a model with fake quantisation as torch's loop does."""
    x, y = data()
    torch.manual_seed(0)
    twin = model().train()
    twin.qconfig = quantization.get_default_qat_qconfig("x86")
    quantization.prepare_qat(twin, inplace=True)
    made = copy.deepcopy(twin)
    if fuse:
        made = mlp.fuse(made)
    trainer = mlp.Trainer(made, optimizer=lambda p: torch.optim.SGD(p, lr=0.1), verbose=False)
    trainer.fit((x, y), 2, 10)
    assert trainer.engine.name == "autograd"
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    for epoch in (1, 2):
        for rows in mlp.data.permutation(20, 0, epoch).split(10):
            optimizer.zero_grad()
            nn.functional.cross_entropy(twin(x[rows]), y[rows]).backward()
            optimizer.step()
    for p, q in zip(made.parameters(), twin.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
