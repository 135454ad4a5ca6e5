"""The benchmarks' own machinery: nothing here is timed to pass."""

import json
import subprocess
import sys

import pytest
import torch

from bench import harness
from bench.__main__ import NAMES


def test_a_provider_that_is_wrong_gets_no_time():
    x = torch.arange(1.0, 5.0)
    providers = {"right": lambda: [x * 2], "also": lambda: [x + x], "wrong": lambda: [x * 3], "short": lambda: []}
    times = harness.compare(providers, 1e-6)
    assert times["right"] > 0 and times["also"] > 0 and times["wrong"] is None and times["short"] is None


def test_every_provider_has_its_turn_in_every_round():
    calls = []
    harness.measure({name: lambda n=name: calls.append(n) for name in "ab"}, rounds=3)
    turns = [name for i, name in enumerate(calls) if i == 0 or calls[i - 1] != name]
    assert turns[-6:] == list("ababab")


def test_a_table_names_command_machine_and_versions(tmp_path):
    table = harness.Table("Title", "python -m bench thing", [{"a": 1, "b": 2.345}, {"a": None, "c": 123.4}])
    text = table.markdown()
    assert "| a | b | c |" in text and "| – | – | 123 |" in text and f"torch {torch.__version__}" in text
    table.write(tmp_path)
    assert json.loads((tmp_path / "thing.json").read_text())["rows"] == table.rows
    assert (tmp_path / "thing.md").read_text().strip() == text


def test_launches_are_counted():
    from bench import bench_launches

    rows = {row["engine"]: row["launches a step"] for row in bench_launches.run().rows}
    assert rows["graph (step kernels)"] == 2 and rows["epoch"] == f"1/{bench_launches.STEPS}"
    assert 20 <= rows["eager"] <= 30


def test_the_command_lists_its_names():
    done = subprocess.run([sys.executable, "-m", "bench", "nonsense"], capture_output=True, text=True)
    assert done.returncode == 2 and all(name in done.stderr for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_name_has_its_file(name):
    module = __import__(f"bench.bench_{name}", fromlist=["run"])
    assert callable(module.run) and module.__doc__
