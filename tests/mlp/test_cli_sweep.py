"""`handgrad sweep`: what it prints and writes, and what it refuses before it trains."""

import json
import os
import re

import pytest

import mlp
from mlp.__main__ import main
from mlp.cli import sweeping
from mlp.runs.disk import LOCK

QUICK = "sweep digits --device cpu --hidden 8 --batch-size 128"


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def call(argv):
        status = main(argv.split())
        out, err = capsys.readouterr()
        return status, out, err

    return call


def test_sweep(run):
    """It prints what is trained and a table, best first. It writes a file for every network."""
    status, out, err = run(f"{QUICK} --replicas 3 --epochs 3 --lr 0.01:1e30 --seed 4 --out all")
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == (
        "digits (train): 1,438 samples; 3 networks 64-8-10 relu; cross_entropy by sgd; "
        "batches of 128; learning rate 0.01:1e30; cpu"
    )
    assert [line.split()[1] for line in lines[3:6]][-1] == "6" and lines[5].endswith("diverged")
    assert re.fullmatch(
        r"mean of all networks' probabilities, without the \d that diverged: test accuracy [\d.]+%",
        lines[6],
    )
    written = [name for name in sorted(os.listdir("all")) if name != LOCK]
    assert written == [*(f"00{i}.safetensors" for i in range(3)), "sweep.jsonl"]
    with open("all/sweep.jsonl") as file:
        rows = [json.loads(line) for line in file]
    assert [row["diverged"] for row in rows][-1] and {row["seed"] for row in rows} == {4, 5, 6}
    assert mlp.load("all/000.safetensors").config()["sizes"] == [64, 8, 10]
    status, _, err = run(f"{QUICK} --out all")
    assert status == 2 and err == "handgrad: all is not empty; choose another --out\n"


def test_all_combinations_of_lists_are_trained_and_ranked_by_validation_rows(run):
    lists = "sweep digits --device cpu --hidden 8/4,3 --activation relu/tanh --batch-size 128"
    argv = f"{lists} --replicas 2 --epochs 2 --lr 0.1:0.2 --out all"
    status, out, err = run(f"{argv} --validation 0.2 --class-weight balanced --schedule cosine")
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert "8 networks of 4 settings; learning rate 0.1:0.2" in lines[0]
    header = next(line for line in lines if line.split()[:2] == ["network", "seed"])
    assert header.endswith("validation accuracy")
    with open("all/sweep.jsonl") as file:
        rows = [json.loads(line) for line in file]
    accuracies = [row["validation_accuracy"] for row in rows]
    assert accuracies == sorted(accuracies, reverse=True) and len(rows) == 8
    plain = mlp.packs.Settings()
    tried = {
        (*row["settings"].get("hidden", plain.hidden), row["settings"].get("activation", "relu"))
        for row in rows
    }
    assert tried == {(8, "relu"), (8, "tanh"), (4, 3, "relu"), (4, 3, "tanh")}
    assert {row["lr"] for row in rows} == {0.1, 0.2} and all(row["epochs"] == 2 for row in rows)
    best = rows[0]["replica"]
    assert mlp.load(f"all/00{best}.safetensors").config()["sizes"][1:-1] == list(
        rows[0]["settings"]["hidden"]
    )


BAD = {
    "optimizer": ("--optimizer lion2", "unknown optimizer 'lion2'; known: sgd, adam"),
    "activation": ("--activation swish", "unknown activation 'swish'"),
    "loss": ("--loss hinge", "unknown loss 'hinge'"),
    "batch": ("--batch-size 0", "--batch-size must be at least 1, got 0"),
    "epochs": ("--epochs 0", "--epochs must be at least 1, got 0"),
    "replicas": ("--replicas 0", "--replicas must be at least 1, got 0"),
    "rate": ("--lr fast", "--lr must be a number, or LOW:HIGH"),
    "momentum": ("--optimizer adam --momentum 0.9", "--momentum belongs to the optimizer sgd"),
    "out": ("--out file/all", "cannot write the run folder file/all"),
    "width": ("--hidden 10,0", "positive integers"),
    "size": ("--hidden 1000000000000", "parameters need .* GB, but this machine has"),
    "list": ("--momentum 0.1/high", "--momentum"),
    "share": ("--validation 0.9", "--validation 0.9: leaves nothing to train on"),
    "weights": ("--class-weight heavy", "unknown class weight 'heavy'; known: balanced"),
    "seed": ("--seed 9223372036854775809", "--seed must be a whole number from 0 to 2⁶³"),
    "device": ("--device abacus", "unknown device 'abacus'"),
}


@pytest.mark.parametrize("case", BAD)
def test_nothing_is_trained_before_all_is_checked(case, run, monkeypatch, tmp_path):
    argv, message = BAD[case]
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(sweeping, "_train", lambda *args: pytest.fail("the sweep trains"))
    status, out, err = run(f"sweep digits {argv}")
    assert (status, out) == (2, "") and err.count("\n") == 1 and re.search(message, err), err
    assert os.listdir() == ["file"]


def test_large_seeds(run):
    """Seeds may be up to 2⁶³. Each network's own seed is stored."""
    seed = 2**63
    assert run(f"{QUICK} --replicas 2 --epochs 1 --seed {seed} --out all")[0] == 0
    with open("all/sweep.jsonl") as file:
        assert {json.loads(line)["seed"] for line in file} == {seed, seed + 1}
