"""The machinery of the benchmarks. No test depends on a measured time."""

import json
import queue
import sys
from types import SimpleNamespace

import pytest
import torch

from bench import each_kernel, harness, watchdog
from bench.__main__ import NAMES
from bench.parts import TABLES
from bench.table import Table, one_line
from bench.watchdog import watch
from tests import ROOT, run_command


def test_a_provider_that_is_wrong_gets_no_time():
    def raises():
        raise RuntimeError("no such thing\nmore")

    x, wrong = torch.arange(1.0, 5.0), {}
    providers = {
        "right": lambda: [x * 2],
        "also": lambda: [x + x],
        "wrong": lambda: [x * 3],
        "short": lambda: [],
        "nan": lambda: [x / 0 * 0],
        "raises": raises,
    }
    times = harness.compare(providers, 1e-6, wrong)
    assert times["right"] > 0 and times["also"] > 0
    assert (
        {name for name, time in times.items() if time is None}
        == set(wrong)
        == {"wrong", "short", "nan", "raises"}
    )
    assert wrong["raises"] == "RuntimeError: no such thing" and wrong["wrong"].startswith(
        "off by 5.0e-01"
    )


def test_every_provider_has_its_turn_in_every_round():
    calls = []
    harness.measure({name: lambda n=name: calls.append(n) for name in "ab"}, rounds=3)
    turns = [name for i, name in enumerate(calls) if i == 0 or calls[i - 1] != name]
    assert turns[-6:] == list("ababab")


def test_a_table_names_command_machine_and_versions(tmp_path):
    table = Table(
        "Title", "python -m bench thing --epochs 3", [{"a": 1, "b": 2.345}, {"a": None, "c": 123.4}]
    )
    text = table.markdown()
    assert (
        "| a | b | c |" in text
        and "| – | – | 123 |" in text
        and f"torch {torch.__version__}" in text
    )
    table.write(tmp_path)
    assert json.loads((tmp_path / "thing.json").read_text())["rows"] == table.rows
    assert (tmp_path / "thing.md").read_text().strip() == text


def test_a_table_without_rows_says_why():
    text = Table(
        "Title", "python -m bench thing", not_run="needs a GPU", failed="it is wrong"
    ).markdown()
    assert "Not run: needs a GPU." in text and "**Failed: it is wrong**" in text and "|" not in text


def test_an_error_becomes_one_cell():
    assert (
        one_line("\n a | b\nmore") == "a \\| b" and one_line(ValueError("no")) == "ValueError: no"
    )
    assert len(one_line("x" * 500)) == 160


def test_every_kernel_is_launched_once(capsys):
    assert each_kernel.main() == 0, capsys.readouterr().out


def test_launches_are_counted():
    from bench import bench_launches

    rows = {row["engine"]: row["launches a step"] for row in bench_launches.run().rows}
    assert rows["graph (step kernels)"] == 2 and rows["epoch"] == f"1/{bench_launches.STEPS}"
    assert 20 <= rows["eager"] <= 30


class Impatient(queue.Queue):
    """Its time is up as soon as it has given one line, so a slow start of the child is no hang."""

    given = 0

    def get(self, timeout):
        assert timeout == 2
        if self.given:
            raise queue.Empty
        self.given += 1
        return super().get()


def test_a_child_that_shows_no_sign_of_life_is_a_hang(monkeypatch):
    def child(code):
        return [sys.executable, "-c", "print('{\"epochs\": 3}', flush=True)\n" + code]

    assert watch(child(""), patience=600) == ({"epochs": 3}, "")
    assert watch(child("raise SystemExit(3)"), patience=600) == (
        {"epochs": 3},
        "ended with status 3",
    )
    assert watch([sys.executable, "-c", ""], patience=600) == ({}, "")
    monkeypatch.setattr(watchdog, "queue", SimpleNamespace(Queue=Impatient, Empty=queue.Empty))
    hanging = child("import time; time.sleep(600)")
    assert watch(hanging, patience=2) == ({"epochs": 3}, "hang: no sign of life for 2 s")


def test_the_command_lists_its_names():
    done = run_command([sys.executable, "-m", "bench", "nonsense"])
    assert done.returncode == 2 and all(name in done.stderr for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_name_has_its_file(name):
    assert (ROOT / f"bench/bench_{name}.py").exists()
    module = pytest.importorskip(f"bench.bench_{name}")  # some need a package
    assert callable(module.run) and module.__doc__ and name in TABLES
