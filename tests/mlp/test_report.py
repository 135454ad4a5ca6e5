"""Pictures of unusual runs: one epoch, a huge first loss, regressions, odd class names."""

import pytest
import torch

import mlp
from mlp.runs import report

pyplot = pytest.importorskip("matplotlib.pyplot")


@pytest.fixture
def figures(monkeypatch):
    """A list of the figures that are saved. They stay open until the test ends."""
    found = []

    def keep(figure, path):
        found.append(figure)
        figure.savefig(path, dpi=40)

    monkeypatch.setattr(report, "_save", keep)
    yield found
    for figure in found:
        pyplot.close(figure)


def history(*losses, accuracy=0.5):
    return [
        {"epoch": i, "train_loss": loss, "test_loss": loss, "train_accuracy": accuracy}
        for i, loss in enumerate(losses, 1)
    ]


def test_one_epoch(figures, tmp_path):
    """The axis shows one whole number, the epoch."""
    report.curves(history(0.5), tmp_path / "c.png")
    for axis in figures[0].axes:
        low, high = axis.get_xlim()
        assert [t for t in axis.get_xticks() if low <= t <= high] == [1]


def test_a_loss_that_starts_at_900(figures, tmp_path):
    """Such a loss has a logarithmic scale, one that falls less or reaches 0 a linear scale."""
    for losses, scale in (((900, 3, 0.5), "log"), ((2.3, 0.5), "linear"), ((900, 0.0), "linear")):
        report.curves(history(*losses), tmp_path / "c.png")
        assert figures[-1].axes[0].get_yscale() == scale
        assert figures[-1].axes[1].get_yscale() == "linear"
    report.curves(history(float("inf"), 3.0), tmp_path / "c.png")
    assert list(figures[-1].axes[0].lines[0].get_xdata()) == [2]


def test_regression_has_no_accuracy(figures, tmp_path):
    report.curves(history(3.0, 2.0, accuracy=None), tmp_path / "c.png")
    assert [axis.get_ylabel() for axis in figures[0].axes] == ["loss"]


def test_class_names_are_drawn_as_they_are(figures, tmp_path):
    """A dollar sign starts no formula, and a line end becomes a space."""
    names = ("$x^$", "a$b$c", "new\nline")
    images = mlp.Dataset(
        torch.zeros(3, 4, dtype=torch.uint8), torch.arange(3), names, image_shape=(1, 2, 2)
    )
    report.samples(torch.eye(3), images, tmp_path / "s.png")
    report.confusion([[1, 0, 0], [0, 1, 0], [0, 0, 1]], names, tmp_path / "m.png")
    drawn = [axis.get_title() for axis in figures[0].axes[:3]]
    labels = [text.get_text() for text in figures[1].axes[0].get_yticklabels()]
    assert drawn == labels == [r"\$x^\$", r"a\$b\$c", "new line"]


def test_pictures_are_whole_or_not_there(tmp_path, monkeypatch):
    """A picture that fails leaves the old file, as every file of a run does."""
    path = tmp_path / "c.png"
    report.curves(history(0.5), path)
    before = path.read_bytes()
    assert before.startswith(b"\x89PNG")
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda self, part, **_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        report.curves(history(0.5), path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["c.png"]
    pyplot.close("all")


def test_characters_that_the_font_lacks_get_one_note(tmp_path, capsys):
    report.confusion([[1, 0], [0, 1]], ["東京", "Zürich"], tmp_path / "confusion.png")
    err = capsys.readouterr().err
    assert err == "note: confusion.png: the font lacks 2 characters, such as 京東\n"
