"""After `handgrad export`, other programs compute from raw inputs what we compute from the data
set.
"""

import re

import numpy as np
import pytest
import torch
from torch import nn

from mlp import metrics
from mlp.__main__ import main
from mlp.cli import exporting, setup
from mlp.runs import RunFolder

QUICK = ("--hidden", "8", "--epochs", "1", "--device", "cpu", "--engine", "manual")


@pytest.fixture(autouse=True)
def a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write_table(targets):
    """Writes data.npz and returns its inputs. Its columns differ a millionfold, so it is
    standardised.
    """
    made = np.random.default_rng(0)
    x = made.normal([1e6, 0.0, 5.0], [10.0, 1.0, 1e-2], (60, 3))
    np.savez("data.npz", X=x, y=targets(x))
    return x


def expected(settings, model):
    """The network's answers for the test data as the run reads them."""
    found = setup.suited(settings, setup.load_run(settings), loss_chosen=True)
    loss, units = settings.recipe.make_loss(), found.facts.units
    outputs = torch.cat([out for out, _ in metrics.outputs(model, found.test)]).detach()
    if found.test.is_classification:
        return loss.probabilities(outputs)
    return outputs if units is None else units.own(outputs)


@pytest.mark.filterwarnings("ignore")  # torch's exporter warns about its own deprecations
@pytest.mark.parametrize("kind", ["digits", "classes", "numbers"])
def test_onnx_agrees_from_raw_inputs(kind, monkeypatch, capsys):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    name = "digits" if kind == "digits" else "data.npz"
    if kind == "classes":
        write_table(lambda x: (x[:, 1] > 0).astype(np.int64))
    if kind == "numbers":
        write_table(lambda x: 1000 + 50 * x[:, 1])
    assert main(["train", name, *QUICK, "--out", "run"]) == 0
    assert main(["export", "run", "model.onnx"]) == 0
    assert "inputs (rows, " in capsys.readouterr().out
    settings = RunFolder("run").settings
    model, _ = RunFolder("run").network("cpu")
    answers = expected(settings, model)
    session = onnxruntime.InferenceSession("model.onnx")
    (entry,) = session.get_inputs()
    raw = raw_test_inputs(settings)
    assert {"uint8": "tensor(uint8)", "float64": "tensor(double)", "float32": "tensor(float)"}[
        settings.data.reading.stored
    ] == entry.type
    (found,) = session.run(None, {"inputs": raw.numpy()})
    torch.testing.assert_close(torch.from_numpy(found).float(), answers, rtol=1e-5, atol=1e-5)


def raw_test_inputs(settings):
    """The test inputs as the data set stores them."""
    from mlp import data

    _, test = data.load(settings.dataset, standardize="no", verbose=False)
    if settings.data.reading.stored == "float64":
        stored = torch.from_numpy(np.load("data.npz")["X"])
        rows = [(stored.float() == row).all(1).nonzero()[0, 0] for row in test.inputs.float()]
        return stored[torch.stack(rows)]
    return test.inputs


def test_torch_weights(capsys):
    assert main(["train", "digits", *QUICK, "--out", "run"]) == 0
    assert main(["export", "run", "plain.pt"]) == 0
    said = capsys.readouterr().out
    assert "nn.Sequential(Linear, ReLU, Linear); its inputs are x · 0.0039215686" in said
    plain = nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10))
    plain.load_state_dict(torch.load("plain.pt", weights_only=True))
    model, _ = RunFolder("run").network("cpu")
    x = torch.rand(5, 64)
    torch.testing.assert_close(plain(x), model(x))


def test_torch_weights_of_scaled_data(capsys):
    """The file holds weights only. The line says how the run scaled inputs and targets."""
    x = write_table(lambda x: 1000 + 50 * x[:, 1])
    assert main(["train", "data.npz", *QUICK, "--out", "run"]) == 0
    assert main(["export", "run", "plain.pt"]) == 0
    said = capsys.readouterr().out
    assert "its inputs are (x - mean) / std, with the data's mean and std of config.json, " in said
    assert "its outputs targets less their mean, over their std, of config.json" in said
    facts = RunFolder("run").settings.data
    plain = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 1))
    plain.load_state_dict(torch.load("plain.pt", weights_only=True))
    mean, std = (
        torch.tensor(v, dtype=torch.float64) for v in (facts.reading.mean, facts.reading.std)
    )
    with torch.no_grad():
        values = plain(((torch.from_numpy(x) - mean) / std).float()) * facts.units.std[0]
    np.save("rows.npy", x)
    assert main(["predict", "run", "rows.npy", "--out", "answers.csv"]) == 0
    answers = np.loadtxt("answers.csv", delimiter=",", skiprows=1, usecols=-1)
    np.testing.assert_allclose(values[:, 0] + facts.units.mean[0], answers, rtol=1e-4)


def test_unknown_format(capsys):
    assert main(["train", "digits", *QUICK, "--out", "run"]) == 0
    assert main(["export", "run", "model.tf", "--format", "tf"]) == 2
    known = ", ".join(exporting.FORMATS)
    assert f"unknown format 'tf'; known: {known}" in capsys.readouterr().err
    assert main(["export", "run", "model.safetensors"]) == 2
    said = r"suffix '.safetensors' does not tell the format; .*onnx \(.onnx\), torch \(.pt, .pth\)"
    assert re.search(said, capsys.readouterr().err)
