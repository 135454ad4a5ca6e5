"""Bad input gives one line on stderr and exit status 2, and changes no file."""

import re
import shlex
import urllib.error

import numpy as np
import pytest
import torch

from kernels.activations import ACTIVATIONS
from mlp import ENGINES, data
from mlp.__main__ import main
from mlp.cli.setup import PRECISIONS
from mlp.recipes import LOSSES, OPTIMIZERS, RECIPES
from mlp.runs.disk import LOCK

CUDA_COUNT = torch.cuda.device_count()


def lists(names):
    return ".*".join(map(re.escape, names))


BAD = {
    "data set": ("train mnits", f"unknown data set 'mnits': known are {lists(data.NAMES)}"),
    "activation": ("train --activation swish", f"unknown activation 'swish'.*{lists(ACTIVATIONS)}"),
    "engine": ("train --engine fast", f"unknown engine 'fast'; known: auto, {lists(ENGINES)}"),
    "recipe": ("train --recipe gan", f"unknown recipe 'gan'; known: {lists(RECIPES)}"),
    "loss": ("train --loss hinge", f"unknown loss 'hinge'; known: {lists(LOSSES)}"),
    "optimizer": (
        "train --optimizer lamb",
        f"unknown optimizer 'lamb'; known: {lists(OPTIMIZERS)}",
    ),
    "precision": ("train --precision fp8", f"unknown precision 'fp8'; known: {lists(PRECISIONS)}"),
    "device": ("train --device abacus", "unknown device 'abacus'; known: cpu, cuda"),
    "no such GPU": (
        "train --device cuda:99",
        f"asked for, but this machine has {CUDA_COUNT} CUDA devices; use device cpu",
    ),
    "widths": (
        "train --hidden 100,wide",
        "--hidden must be widths with commas, such as 100,50, got '100,wide'",
    ),
    "no width": (
        "train --hidden 10,,5",
        "--hidden must be widths with commas, such as 100,50, got '10,,5'",
    ),
    "width 0": ("train --hidden 100,0", r"at least two positive integers.*got \(64, 100, 0, 10\)"),
    "batch": ("train --batch-size 0", "--batch-size must be at least 1, got 0"),
    "smoothing": ("train --label-smoothing 2", "--label-smoothing must be at most 1, got 2"),
    "clip": ("train --clip-norm 0", "--clip-norm must be a positive number, got '0'"),
    "epochs": ("train --epochs -1", "--epochs must be at least 1, got -1"),
    "rate": ("train --lr fast", "--lr must be a number, got 'fast'"),
    "part of an epoch": ("train --epochs 1.5", "--epochs must be a whole number, got '1.5'"),
    "no file": ("predict run", r"Missing argument 'FILE'\. Image files .*, else one file of rows"),
    "no run": ("evaluate", r"Missing argument 'RUN'\. A run folder"),
    "negative rate": ("train --lr -0.1", "--lr must be at least 0, got -0.1"),
    "momentum of adam": ("train --optimizer adam --momentum 0.9", "momentum"),
    "option": ("train --lerning-rate 0.1", "No such option.*--lerning-rate"),
    "command": ("trian", "No such command 'trian'"),
    "resume what": ("train --resume", "--resume needs --out"),
    "resume nothing": (
        "train --resume --out none",
        "none is not a run folder: it has no config.json",
    ),
    "evaluate nothing": ("evaluate none", "none is not a run folder"),
    "predict nothing": ("predict none image.png", "none is not a run folder"),
    "folder in a file": ("train --out file/run --epochs 1", "cannot write the run folder file/run"),
    "data in a file": (
        "train kmnist --data-dir file/data",
        "kmnist: cannot write the data folder file/data",
    ),
    "no network": (
        "train fashion-mnist --data-dir new",
        "cannot be downloaded into new .*by hand, or train on digits",
    ),
    "negative label": (
        "train negative.npz",
        "negative: label -1 of sample 3 is not one of the 3 classes",
    ),
    "empty": ("train empty.npz", "empty: it has no samples"),
    "damaged": ("train damaged.npz", "damaged.npz: not a readable .npz file"),
    "not images": (
        "train rows.npz --recipe convnet",
        "convolutions needs images, but rows .* has rows of 5 numbers",
    ),
    "not a rate": ("train --lr nan", "--lr must be at least 0, got nan"),
    "an infinite rate": ("train --lr inf", "--lr must be a finite number, got 'inf'"),
    "infinite rates": ("sweep --lr 0.1:inf", "--lr must be a number, .* got '0.1:inf'"),
    "momentum above 1": ("train --momentum 2", "--momentum must be at most 1, got 2"),
    "an empty path": ("train --out ''", "--out must be a path; . is the current folder, got ''"),
    "shifts above an image": (
        "train --augment 100 --epochs 1 --out d",
        "a shift must be smaller than an image of 8 × 8 pixels, got 100",
    ),
    "not a number": (
        "train nan.npz --out d",
        "nan: inputs must be finite, got nan in row 0, column 0, and 47 more",
    ),
    "diverged": (
        "train --device cpu --lr 1e30 --out d",
        r"(nan|inf) at step \d+ of epoch 1 with learning rate 1e\+30",
    ),
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with data sets that are wrong in some way. Downloads fail."""
    datasets = pytest.importorskip("torchvision.datasets")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        datasets.MNIST,
        "download",
        lambda self: (_ for _ in ()).throw(urllib.error.URLError("down")),
    )
    labels = np.arange(12) % 3
    np.savez(
        "negative.npz",
        x_train=np.zeros((12, 4), np.uint8),
        y_train=np.where(np.arange(12) == 3, -1, labels),
    )
    np.savez("empty.npz", x_train=np.zeros((0, 4), np.uint8), y_train=labels[:0])
    np.savez("nan.npz", x_train=np.full((12, 4), np.nan, np.float32), y_train=labels)
    np.savez("rows.npz", x_train=np.zeros((12, 5), np.float32), y_train=labels)
    (tmp_path / "damaged.npz").write_bytes((tmp_path / "rows.npz").read_bytes()[:300])
    (tmp_path / "file").write_text("")
    return tmp_path


@pytest.mark.parametrize("case", BAD)
def test_one_line_and_status_2(case, folder, capsys):
    argv, message = BAD[case]
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    status = main(shlex.split(argv))
    out, err = capsys.readouterr()
    assert status == 2
    assert err.startswith("handgrad: ") and err.count("\n") == 1 and re.search(message, err), err
    after = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    if case == "diverged":  # the run had started
        assert {p.name for p in after.keys() - before.keys()} == {LOCK, "config.json"}
    else:
        assert after == before and out == "" and not (folder / "d").exists()


def test_resume_refuses_changed_options(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert (
        main(
            [
                "train",
                "--hidden",
                "4",
                "--epochs",
                "2",
                "--engine",
                "manual",
                "--device",
                "cpu",
                "--out",
                "run",
            ]
        )
        == 0
    )
    config = (tmp_path / "run" / "config.json").read_text()
    capsys.readouterr()
    for argv in ("--lr 0.5", "--batch-size 8", "--hidden 7"):
        assert main(f"train --out run --resume --epochs 3 {argv}".split()) == 2
        said = (
            f"handgrad: {argv.split()[0]} cannot be changed by --resume.*run/config.json .*; leave "
            "it out, or train into another"
        )
        assert re.match(said, capsys.readouterr().err)
    assert main(["train", "mnist", "--out", "run", "--resume"]) == 2
    assert main(["train", "--out", "run", "--resume", "--epochs", "1"]) == 0
    assert "nothing to do: run has 2 epochs" in capsys.readouterr().out
    assert (tmp_path / "run" / "config.json").read_text() == config


@pytest.mark.skipif(CUDA_COUNT > 0, reason="needs a machine without a GPU")
@pytest.mark.parametrize(
    "argv", ["train --device cuda", "train --engine graph", "evaluate run --device cuda"]
)
def test_no_gpu(argv, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if argv.startswith("evaluate"):
        assert main(["train", "--epochs", "1", "--engine", "manual", "--out", "run"]) == 0
        capsys.readouterr()
    assert main(argv.split()) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and re.search(
        "0 CUDA devices; use device cpu|needs a CUDA GPU", err
    )
    assert not (tmp_path / "runs").exists()
