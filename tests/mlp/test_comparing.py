"""Comparing runs: `runs`, `report` of several, `--seeds`, and a run's page in HTML."""

import html.parser
import json
import re
import statistics
from pathlib import Path

import pytest

from mlp.__main__ import main

QUICK = ("--hidden", "8", "--epochs", "2", "--device", "cpu", "--engine", "manual")


@pytest.fixture(autouse=True)
def a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def rows(run):
    return [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]


def last(run):
    return rows(run)[-1]


class Page(html.parser.HTMLParser):
    """The tags of a page, its references (src, href), and the titles of its images."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.titles, self.sources = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.sources += [v for k, v in attributes if k in ("src", "href")]
        self.titles += [v for k, v in attributes if k == "alt"]


def test_runs_side_by_side(capsys):
    """--seeds prints mean and deviation, `runs` lists the runs, and `report` draws several."""
    assert main(["train", "digits", *QUICK, "--seeds", "3", "--seed", "5", "--out", "s"]) == 0
    out = capsys.readouterr().out
    paths = ["s/seed-5", "s/seed-6", "s/seed-7"]
    scores = [last(path)["test_accuracy"] for path in paths]
    assert len({last(path)["train_loss"] for path in paths}) == 3
    mean, deviation = statistics.mean(scores), statistics.stdev(scores)
    assert f"3 seeds: test accuracy {mean:.2%} ± {deviation:.2%}, test loss" in out
    assert "one seed after another: engine manual trains one network\n" in out
    (Path("s") / "bad").mkdir()
    Path("s/bad/config.json").write_text("{")
    assert main(["runs", "s"]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert "test loss  test accuracy" in lines[0]
    assert len(lines) == 4 and "s/bad/config.json: not JSON" in err
    for line, path, score in zip(lines[1:], paths, scores):
        assert line.startswith(path) and f"{score:.2%}" in line
        assert "default: 8 relu" in line and "sgd lr 0.05 momentum 0.9" in line
    assert main(["report", *paths]) == 0
    assert capsys.readouterr().out.splitlines()[:4] == lines
    assert Path("s/compare.png").read_bytes().startswith(b"\x89PNG")  # beside the first run
    assert main(["report", *paths, "--html"]) == 2
    assert main(["runs", "nowhere"]) == 2
    assert main(["train", "--seeds", "2", "--out", "s/seed-5", "--resume"]) == 2


def test_seeds_together(capsys):
    """Seeds train together where engine `epoch` serves. Each run equals that of its seed alone."""
    pytest.importorskip("numba", reason="needs numba: pip install 'handgrad[cpu]'")
    words = ["train", "digits", *QUICK[:-1], "epoch", "--schedule", "onecycle"]
    assert main([*words, "--seeds", "2", "--seed", "5", "--out", "s"]) == 0
    out = capsys.readouterr().out
    assert out.count("digits (train)") == 1 and "cpu; seeds 5 to 6 together\n" in out
    assert "seed 6: epoch   2  loss" in out and "\ntrained 2 networks in " in out
    assert "\n2 seeds: test accuracy " in out
    assert main([*words, "--seed", "6", "--out", "one"]) == 0
    for row, alone in zip(rows("s/seed-6"), rows("one"), strict=True):
        for key in alone.keys() - {"seconds", "samples_per_second"}:
            assert row[key] == pytest.approx(alone[key], rel=1e-5)
    assert main(["train", "--out", "s/seed-6", "--resume"]) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert main([*words, "--augment", "1", "--seeds", "2", "--out", "other"]) == 0
    said = "one seed after another: --augment moves the images of each seed in another way\n"
    assert said in capsys.readouterr().out


def test_score_is_of_the_weights_that_are_kept(capsys):
    """Early stopping by the validation loss keeps the weights of an earlier epoch. `runs` and
    `evaluate` give that epoch's accuracy.
    """
    words = ["--epochs", "9", "--lr", "3", "--early-stopping", "2", "--validation", "0.2"]
    assert main(["train", "digits", *QUICK, *words, "--out", "run"]) == 0
    history = rows("run")
    best = min(history, key=lambda row: row["validation_loss"])
    assert best["epoch"] < len(history)
    said = f"best validation loss {best['validation_loss']:.4f} at epoch {best['epoch']}: its"
    assert said in capsys.readouterr().out
    assert main(["runs", "."]) == 0
    assert f"{best['test_accuracy']:.2%}" in capsys.readouterr().out.splitlines()[1]
    assert main(["evaluate", "run"]) == 0
    assert f"accuracy {best['test_accuracy']:.2%}" in capsys.readouterr().out


def test_what_a_run_stores(monkeypatch):
    monkeypatch.setenv("GIT_DIR", "nowhere")
    words = ["train", "digits", *QUICK, "--out", "run"]
    assert main(words) == 0
    config = json.loads(Path("run/config.json").read_text())
    assert config["command"] == ["handgrad", *words] and config["git"] is None
    assert len(config["data"]["train"]["hash"]) == 32
    times = json.loads(Path("run/times.json").read_text())
    phases = ["load", "steps", "evaluate", "write", "rest of the training", "draw"]
    assert list(times) == phases and min(times.values()) >= 0
    assert times["steps"] <= sum(row["seconds"] for row in rows("run"))


def test_page_refers_to_no_other_file(capsys):
    assert main(["train", "digits", *QUICK, "--out", "run"]) == 0
    assert main(["report", "run", "--html"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "run/report.html"
    text = Path("run/report.html").read_text()
    page = Page(text)
    assert page.titles == ["curves", "confusion", "samples", "weights", "times"]
    assert all(source.startswith("data:image/svg+xml;base64,") for source in page.sources)
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert re.search(f"test_accuracy</td><td>{last('run')['test_accuracy']:.6g}<", text)
    assert "64-8-10 relu" in text and not list(Path("run").glob("*.svg"))
