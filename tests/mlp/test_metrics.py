"""Metrics against counts by hand, and `handgrad evaluate`, `report` and `predict` on a run."""

import numpy as np
import pytest
import torch

import kernels
from mlp import MLP, Dataset, Net, scoring
from mlp.__main__ import main
from mlp.loss import LOSSES
from mlp.metrics import classification, probabilities

Image = pytest.importorskip("PIL.Image")
sklearn_metrics = pytest.importorskip("sklearn.metrics")
pytest.importorskip("matplotlib")


def data(labels, classes=("ant", "bee", "cat")):
    return Dataset(torch.zeros(len(labels), 4), torch.tensor(labels), classes)


def test_counted_by_hand():
    scores = torch.tensor([[5, 3, 1], [1, 5, 3], [5, 3, 1], [3, 5, 1], [3, 1, 5]]) / 9
    found = classification(scores, data([0, 1, 1, 0, 0]), 2)
    assert found["accuracy"] == 2 / 5 and found["top_k"] == pytest.approx(5 / 5) and found["k"] == 2
    assert found["confusion"] == [[1, 1, 1], [1, 1, 0], [0, 0, 0]]
    assert found["per_class"] == {"ant": 1 / 3, "bee": 1 / 2, "cat": None}
    assert classification(scores, data([0, 1, 1, 0, 0]), 1)["top_k"] == pytest.approx(2 / 5)
    for k in (0, 4):
        with pytest.raises(
            ValueError, match=f"top-k: k must be 1 to 3, the number of classes, got {k}"
        ):
            classification(scores, data([0, 1, 1, 0, 0]), k)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("kind", [MLP, Net])
def test_probabilities(kind, loss, device):
    """Every sample has its probabilities, on the CPU, in the outputs' order. They add up to one."""
    torch.manual_seed(0)
    inputs = torch.randn(5000, 4)
    model = kind((4, 6, 3), "relu", "sigmoid", device=device)
    scores = probabilities(model, LOSSES[loss](), Dataset(inputs, torch.arange(5000) % 3))
    assert (
        scores.shape == (5000, 3) and scores.dtype == torch.float32 and scores.device.type == "cpu"
    )
    if loss != "bce":  # its classes have separate probabilities
        torch.testing.assert_close(scores.sum(1), torch.ones(5000))
    with torch.no_grad():
        outputs = (model.predict if kind is Net else model)(inputs.to(device)).cpu()
    assert torch.equal(scores.argmax(1), outputs.argmax(1))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on images of 6 × 6 in two classes, dark and bright."""
    folder = tmp_path_factory.mktemp("images")
    for name, low in (("bright", 160), ("dark", 20)):
        (folder / "set" / name).mkdir(parents=True)
        for i in range(12):
            Image.new("L", (6, 6), low + 5 * i).save(folder / "set" / name / f"{i}.png")
    argv = [
        "train",
        folder / "set",
        "--hidden",
        "4",
        "--epochs",
        "20",
        "--batch-size",
        "4",
        "--out",
        folder / "run",
        "--plots",
    ]
    with kernels.use("torch"):  # conftest chooses the backend only after a module's fixtures
        assert main([str(a) for a in (*argv, "--engine", "manual", "--device", "cpu")]) == 0
    return folder / "run"


def test_evaluate_and_report(run, capsys):
    assert main(["evaluate", str(run), "--top", "2"]) == 0
    out = capsys.readouterr().out
    assert "accuracy 100.00%, top-2 100.00%" in out and "bright" in out and "dark" in out
    pictures = {"curves.png", "samples.png", "confusion.png", "weights.png"}
    for name in pictures:
        with Image.open(run / name) as image:
            assert image.format == "PNG" and min(image.size) > 100
        (run / name).unlink()
    assert main(["report", str(run)]) == 0
    assert {line.rpartition("/")[2] for line in capsys.readouterr().out.split()} == pictures
    assert all((run / name).stat().st_size > 1000 for name in pictures)
    assert main(["evaluate", str(run), "--top", "3"]) == 2
    assert (
        capsys.readouterr().err
        == "handgrad: --top must be at most 2, the number of classes, got 3\n"
    )


def test_predict(run, tmp_path, capsys):
    """`predict` takes PNG and JPEG, grey and colour. It resizes an image of another size, with a
    note. A file that is no image is refused.
    """
    files = {
        "a.png": ("L", (6, 6), 200),
        "b.jpg": ("RGB", (6, 6), (30, 30, 30)),
        "c.png": ("L", (12, 9), 210),
    }
    for name, arguments in files.items():
        Image.new(*arguments).save(tmp_path / name)
    assert main(["predict", str(run), *(str(tmp_path / name) for name in files)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[1].split()[0] for line in lines] == ["bright", "dark", "bright"]
    assert (
        all("%)" in line for line in lines)
        and lines[2].endswith("resized from 12×9 to 6×6")
        and "resized" not in lines[0]
    )
    (tmp_path / "d.png").write_text("not that at all")
    for name, message in (
        ("d.png", "d.png: not a readable image"),
        ("none.png", "none.png: no such file"),
    ):
        assert main(["predict", str(run), str(tmp_path / name)]) == 2
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1


def test_scores_without_a_class():
    """F1 is scikit-learn's macro F1. AUC of a class without a row is not defined, and said so."""
    labels = np.array([0, 0, 1, 1])
    shares = np.array([[0.8, 0.1, 0.1], [0.4, 0.5, 0.1], [0.1, 0.8, 0.1], [0.3, 0.6, 0.1]])
    found = scoring.classes(shares, labels)
    assert found["f1"] == sklearn_metrics.f1_score(labels, shares.argmax(1), average="macro")
    assert "AUC not defined" in scoring.line(found) and "nan" not in scoring.line(found)
    # A network that was trained by mse may give no positive output, so no class is probable.
    found = scoring.classes(np.array([[0.0, 0.0], [0.25, 0.75]]), np.array([0, 1]))
    assert found["log_loss"] == pytest.approx(-(np.log(0.5) + np.log(0.75)) / 2)
