"""Exported networks compute what ours compute, as plain torch modules and as ONNX."""

import sys

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import mlp
from kernels.activations import ACTIVATIONS
from mlp import export

MODELS = {
    "mlp": lambda: mlp.MLP([12, 7, 3], activation="gelu", output_activation="tanh"),
    "no bias": lambda: mlp.MLP([12, 3], bias=False),
    "net": lambda: mlp.Net([12, 7, 3], activation="leaky_relu"),
    "linear": lambda: mlp.Linear(12, 3, activation="sigmoid"),
    "convnet": lambda: mlp.ConvNet((3, 2, 2), (2,), 1, 2, (7,), 3),
}


def outputs(model, x):
    return model.predict(x) if isinstance(model, mlp.Net) else model(x).detach()


@pytest.mark.parametrize("kind", MODELS)
def test_plain_modules(kind):
    model = MODELS[kind]()
    plain, x = export.plain(model), torch.randn(5, 12)
    torch.testing.assert_close(plain(x).detach(), outputs(model, x))
    ours = [m for m in plain.modules() if type(m).__module__.startswith(("mlp", "kernels"))]
    assert ours == []


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation):
    model = mlp.MLP([4, 3, 2], activation=activation)
    x = torch.randn(6, 4)
    torch.testing.assert_close(export.plain(model)(x), model(x))


def test_weights_are_copies():
    model = mlp.MLP([4, 3, 2])
    plain = export.plain(model)
    with torch.no_grad():
        plain[0].weight.zero_()
    assert model[0].weight.abs().sum() > 0


def test_other_classes_are_refused():
    class Wider(mlp.MLP):
        pass

    with pytest.raises(TypeError, match="takes Linear, Conv2d, MLP, ConvNet, Net, got Wider"):
        export.plain(Wider([4, 2]))


@pytest.mark.parametrize("model", [mlp.MLP([4, 2]).half(), mlp.MLP([4, 2]).double()])
def test_dtypes_stay(model):
    assert export.plain(model)[0].weight.dtype == model[0].weight.dtype


def test_torch_file_is_a_plain_state_dict(tmp_path):
    model = mlp.MLP([12, 7, 3])
    export.to_torch(model, tmp_path / "plain.pth")
    state = torch.load(tmp_path / "plain.pth", weights_only=True)
    plain = nn.Sequential(nn.Linear(12, 7), nn.ReLU(), nn.Linear(7, 3))
    plain.load_state_dict(state)
    x = torch.randn(5, 12)
    torch.testing.assert_close(plain(x), model(x))


@pytest.mark.filterwarnings("ignore")  # torch's exporter warns about its own deprecations
def test_onnx_agrees(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, loss = mlp.MLP([12, 7, 3], activation="gelu"), mlp.SoftmaxCrossEntropy()
    pixels = torch.randint(0, 256, (5, 12), dtype=torch.uint8)
    shift = torch.linspace(-1, 1, 12)
    pipeline = export.Pipeline(model, 1 / 255, shift, loss.probabilities)
    export.to_onnx(pipeline, tmp_path / "model.onnx", pixels)
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    expected = torch.softmax(model(pixels / 255 + shift), 1).detach()
    for rows in (1, 2, 5):
        (found,) = session.run(None, {"inputs": pixels[:rows].numpy()})
        torch.testing.assert_close(torch.from_numpy(found), expected[:rows], rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mean", [0.0, 2.0])
def test_onnx_of_bfloat16_computes_in_float32(mean, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, x = mlp.MLP([6, 5, 2], dtype=torch.bfloat16), torch.randn(4, 6)
    pipeline = export.Pipeline(model, 0.5, 1.0, mean=mean)
    export.to_onnx(pipeline, tmp_path / "model.onnx", x)
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    (found,) = session.run(None, {"inputs": x.numpy()})
    expected = model.float()((x - mean) * 0.5 + 1).detach()
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=0, atol=1e-5)
    assert pipeline(x).dtype == torch.bfloat16  # the caller's is as it was


def test_missing_packages_are_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    pipeline = export.Pipeline(mlp.MLP([4, 2]))
    with pytest.raises(mlp.data.DataError, match=r"pip install 'handgrad\[export\]'"):
        export.to_onnx(pipeline, tmp_path / "model.onnx", torch.zeros(1, 4))
    assert list(tmp_path.iterdir()) == []


def hooked(model):
    model[0].register_forward_hook(lambda *call: call[-1] + 1)


def forwarded(model):
    model.forward = lambda x: x


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (hooked, "0 has a hook"),
        (forwarded, "MLP has a forward of its own"),
        (lambda model: prune.l1_unstructured(model[0], "weight", 1), "0 has "),
        (lambda model: model.add_module("2", nn.ReLU()), "its layers are 0, 1, 2, not 0 to 1"),
    ],
    ids=["hook", "forward", "pruned", "one more layer"],
)
def test_networks_that_compute_something_else_are_refused(change, named):
    model = mlp.MLP([4, 3, 2])
    change(model)
    with pytest.raises(ValueError, match=f"export: {named}.*; save its state_dict"):
        export.plain(model)
