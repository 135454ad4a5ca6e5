"""precision="bf16" and "fp16": products in half precision and float32 weights train as fp32."""

import copy
import io
import itertools
import math

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

import mlp
from mlp import ENGINES, MLP, Net, Trainer
from mlp.engines.precision import PRECISIONS
from mlp.optim import OPTIMIZERS


def tensors(rows=96):
    x = torch.randn(rows, 6, generator=torch.Generator().manual_seed(0))
    return x, x[:, :3].argmax(1)


def trained(precision, optimizer, device, epochs=8, **options):
    torch.manual_seed(0)
    model = MLP((6, 16, 3)).to(device)
    make = lambda p: OPTIMIZERS[optimizer](p, lr=0.01)  # noqa: E731
    trainer = Trainer(model, None, make, verbose=False, precision=precision, **options)
    trainer.fit([t.to(device) for t in tensors()], epochs, 16)
    return trainer


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_trains_as_fp32(precision, optimizer, device):
    """Weights stay float32. Losses are those of fp32 to 5%, as the products round."""
    half, full = trained(precision, optimizer, device), trained("fp32", optimizer, device)
    assert half.engine.name == "autograd"
    assert all(p.dtype == torch.float32 for p in half.model.parameters())
    for row, expected in zip(half.history, full.history):
        assert row["train_loss"] == pytest.approx(expected["train_loss"], rel=0.05)
    assert half.history[-1]["train_loss"] < half.history[0]["train_loss"]


def test_small_updates_are_not_lost(device):
    """Steps that are smaller than bfloat16's spacing of the weights still move the weights."""
    torch.manual_seed(0)
    model = MLP((6, 16, 3)).to(device)
    before = copy.deepcopy(model)
    make = lambda p: mlp.SGD(p, lr=1e-5)  # noqa: E731
    Trainer(model, None, make, verbose=False, precision="bf16").fit(tensors(), 2, 16)
    assert all((p != q).any() for p, q in zip(model.parameters(), before.parameters()))
    assert all(
        torch.equal(p.bfloat16(), q.bfloat16()) or (p - q).abs().max() < 1e-3
        for p, q in zip(model.parameters(), before.parameters())
    )


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_overflow_skips_the_step(optimizer, device):
    """The scale is halved until the gradients fit. A skipped step is counted and changes nothing.
    Every other step changes the weights.
    """
    torch.manual_seed(0)
    model = MLP((6, 16, 3)).to(device)
    make = lambda p: OPTIMIZERS[optimizer](p, lr=0.01)  # noqa: E731
    trainer = Trainer(model, None, make, verbose=False, precision="fp16")
    trainer.precision.scaler._init_scale = 2.0**40
    seen = [(0, model[0].weight.detach().clone())]  # before the first step, then after each

    def on_step(n=1):
        seen.append((trainer.precision.skipped, model[0].weight.detach().clone()))

    row = trainer.fit(
        [t.to(device) for t in tensors()],
        8,
        16,
        on_step=on_step,
        scheduler=lambda o: lr_scheduler.StepLR(o, 10),
    )[-1]
    assert len(seen) == 1 + 48 and math.isfinite(row["train_loss"])
    for (skipped, before), (now, after) in itertools.pairwise(seen):
        assert now - skipped in (0, 1)
        assert torch.equal(before, after) == (now > skipped)
    assert 10 < now < 48
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_the_scale_is_resumed(device):
    first = trained("fp16", "adam", device, 2)
    first.precision.scaler.update(2.0**10)
    torch.save(first.state_dict(), buffer := io.BytesIO())
    buffer.seek(0)
    second = trained("fp16", "adam", device, 0)
    second.load_state_dict(torch.load(buffer, weights_only=True))
    assert second.precision.scaler.get_scale() == 2.0**10
    other = trained("bf16", "adam", device, 0)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert other.precision.scaler is None and len(other.history) == 2


def test_any_module(device):
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    trainer = Trainer(model, nn.CrossEntropyLoss(), optimizer, verbose=False, precision="bf16")
    data = [t.to(device) for t in tensors()]
    rows = trainer.fit(data, 12, 16, evaluate=data)
    assert rows[-1]["train_loss"] < 0.9 * rows[0]["train_loss"], "12 epochs fit 70 rows better"
    with torch.no_grad():  # evaluation uses float32 weights, as they are saved
        expected = nn.functional.cross_entropy(model.eval()(data[0]), data[1])
    assert rows[-1]["test_loss"] == pytest.approx(float(expected), rel=1e-5)


def test_refusals(device):
    assert list(PRECISIONS) == ["fp32", "bf16", "fp16"]
    model = MLP((6, 3)).to(device)
    for engine in (e for e in ENGINES if e != "autograd"):
        with pytest.raises(ValueError, match=f"{engine}: ") as error:
            Trainer(model, engine=engine, precision="bf16")
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="manual: computes in the network's own precision, got"):
        Trainer(model, engine="manual", precision="fp16")
    with pytest.raises(ValueError, match=r"autograd: needs an nn.Module, got Net"):
        Trainer(Net((6, 3)), precision="bf16")
    with pytest.raises(ValueError, match="unknown precision 'int8'; known: fp32, bf16, fp16"):
        Trainer(model, precision="int8")
    with pytest.raises(ValueError, match="'bf16' keeps float32 weights, but the network has torch"):
        Trainer(MLP((6, 3), dtype=torch.bfloat16), precision="bf16")
    trainer = Trainer(MLP((6, 3), dtype=torch.bfloat16).to(device), verbose=False)
    assert len(trainer.fit(tensors(), 1, 16)) == 1, "a bfloat16 network trains in bfloat16"
