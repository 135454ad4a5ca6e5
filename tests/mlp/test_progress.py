"""A progress bar is a line in a terminal and a widget in a notebook. A log file gets none."""

import contextlib

import pytest
import torch

import mlp
from mlp import progress

tqdm = pytest.importorskip("tqdm.auto", reason="needs tqdm: pip install 'handgrad[train]'")


def fit(**options):
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    trainer = mlp.Trainer(mlp.MLP([6, 4, 3]), engine="manual", verbose=False)
    return trainer.fit((x, x[:, :3].argmax(1)), 3, 8, **options)


def test_a_bar_has_the_loss_and_leaves_the_callbacks(capsys):
    rows, steps = [], []
    history = fit(progress=True, on_epoch=rows.append, on_step=lambda *count: steps.append(count))
    err = capsys.readouterr().err
    assert "0/15 [" in err and "step/s" in err and "\n" not in err.rstrip("\n")
    assert rows == history and len(steps) == 15
    assert len(fit(progress=True, on_epoch=lambda row: row["epoch"] < 2)) == 2
    assert len(fit(progress=True, on_step=lambda: False)) == 1


def test_a_file_gets_no_bar(capsys):
    assert len(fit(progress=None)) == len(fit()) == 3
    assert capsys.readouterr() == ("", "")


def test_a_notebook_gets_its_own_bar(monkeypatch):
    """tqdm.auto chooses the widget. The widget gets the number of steps and the loss."""
    made = []

    class Widget:
        disable = False

        def __init__(self, **settings):
            self.settings, self.steps, self.said = settings, 0, []
            made.append(self)

        def update(self, count=1):
            self.steps += count

        def set_postfix_str(self, text, refresh):
            self.said.append(text)

    monkeypatch.setattr(tqdm, "tqdm", lambda **s: contextlib.nullcontext(Widget(**s)))
    history = fit(progress=None)
    assert made[0].steps == made[0].settings["total"] == 15 and made[0].settings["unit"] == "step"
    assert made[0].said == [f"loss {row['train_loss']:.4f}" for row in history]
    with progress.bar(7, "fit", False):
        assert made[1].settings["disable"] is True
