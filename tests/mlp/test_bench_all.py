"""`python -m bench all` writes a summary of every part, whatever one of them does."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

from bench import __main__ as main
from bench import bench_trainer, parts, suite, summary
from bench.parts import Part
from kernels.language import IS_INSTALLED
from mlp import data
from tests import ROOT, run_command, uninterpreted

EXTRAS = ("tqdm", "typer", "sklearn", "torchvision", "matplotlib", "PIL", "scipy")
# Python code that makes every later import of them fail
WITHOUT_EXTRAS = f"import sys; sys.modules.update(dict.fromkeys({EXTRAS}))"


def script(code):
    return (sys.executable, "-c", code)


def run_all(out, skipped, **more):
    command = [sys.executable, "-m", "bench", "all", "--out", str(out), "--skip", ",".join(skipped)]
    environment = uninterpreted() | more
    return run_command(command, env=environment)


def test_a_part_that_fails_or_hangs_leaves_the_others(tmp_path, monkeypatch):
    # the part's child hangs, too
    hanging = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'while 1: pass'])"
    fakes = [
        Part("good", script("print('7 of 7')"), quote=lambda log: log.strip()),
        Part("crash", script("import os; os.abort()")),
        Part("error", script("raise ValueError('a | b')")),
        Part("hang", script(hanging)),
        Part("absent", reason="needs a GPU"),
        Part("left", script("raise SystemExit(1)")),
        Part("last", script("print('still here')"), quote=lambda log: log.strip()),
    ]
    execute = suite.execute

    def limited(part, limit, out):
        return execute(part, 1 if part.name == "hang" else limit, out)

    monkeypatch.setattr(suite, "execute", limited)
    assert suite.run(fakes, tmp_path, skip=["left"]) == 1
    page = json.loads((tmp_path / "summary.json").read_text())
    statuses = {part["part"]: part["status"] for part in page["parts"]}
    assert statuses == {
        "good": "passed",
        "crash": "failed",
        "error": "failed",
        "hang": "timed out",
        "absent": "not run: needs a GPU",
        "left": "skipped",
        "last": "passed",
    }
    headlines = {part["part"]: part["headline"] for part in page["parts"]}
    assert headlines["good"] == "7 of 7" and headlines["last"] == "still here"
    assert headlines["error"] == r"status 1: ValueError: a \| b"
    assert headlines["hang"] == "after 1 s; status -9: printed nothing"
    text = (tmp_path / "summary.md").read_text()
    assert (
        all(f"| {name} | {status} |" in text for name, status in statuses.items())
        and "something failed" in text
    )


def test_a_run_that_is_cut_off_leaves_what_it_had(tmp_path):
    code = (
        "from pathlib import Path; from bench import suite; from bench.parts import Part; import "
        "sys\n"
        # The second part runs until the process that started it is killed.
        "waits = 'import os, sys, time\\nwhile os.getppid() == int(sys.argv[1]): time.sleep(0.1)'\n"
        "two = sys.executable, '-c', waits, str(suite.os.getpid())\n"
        "fakes = [Part('one', (sys.executable, '-c', '')), Part('two', two)]\n"
        "suite.run(fakes, Path(sys.argv[1]))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as child:
        try:
            assert child.stdout.readline().startswith("one: passed")
        finally:
            child.kill()
    page = json.loads((tmp_path / "summary.json").read_text())
    assert [part["status"] for part in page["parts"]] == ["passed", "waiting"] and page[
        "verdict"
    ] == "waiting"
    assert "cut off, or still running" in (tmp_path / "summary.md").read_text()


def test_every_part_is_in_the_summary_without_any_extra(tmp_path):
    """Runs two short parts for real, as if only torch, triton, numpy and pytest were installed.

    A part that needs another package says so, and the rest goes on. The summary names the parts
    that were left out.
    """
    (tmp_path / "sitecustomize.py").write_text(WITHOUT_EXTRAS)
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    names = [part.name for part in parts.parts(tmp_path)]
    checks = ["compile", "info", *parts.TESTS, "memcheck", "racecheck"]
    assert names[: len(checks) + 2] == [*checks, "exchange", "soak"]
    skipped = [name for name in names if name not in ("exchange", "recipes")]
    done = run_all(tmp_path / "out", skipped, PYTHONPATH=path)
    page = json.loads((tmp_path / "out/summary.json").read_text())
    assert done.returncode == 0 and page["verdict"] != summary.FAILED, done.stdout + done.stderr
    assert [part["part"] for part in page["parts"]] == names
    statuses = {part["part"]: part["status"] for part in page["parts"]}
    assert statuses["tests-mlp"] == "skipped" and statuses["exchange"] in (
        "passed",
        "not run: needs a GPU",
    )
    assert statuses["recipes"].startswith("not run: needs the package")
    assert page["machine"] and page["commit"] and (tmp_path / "out/exchange.md").exists()


def test_few_tables_need_an_extra():
    code = WITHOUT_EXTRAS + "; from bench.__main__ import *; missing = []\n"
    code += "for name in NAMES:\n try: importlib.import_module(f'bench.bench_{name}')\n"
    code += " except ModuleNotFoundError: missing.append(name)\nprint(*sorted(missing))"
    done = run_command(script(code))
    kernels_alone = [] if IS_INSTALLED else ["exchange", "launches"]
    assert done.stdout.split() == sorted(["accuracy", "recipes", "search", *kernels_alone])


def test_a_table_that_needs_an_extra_while_it_runs_says_so(monkeypatch):
    def loaded(name):
        raise data.needs_extra("scikit-learn", f"the data set {name}")

    monkeypatch.setattr(bench_trainer, "loaded", loaded)
    table = main.make("trainer", {})
    assert table.not_run.startswith("the data set digits needs scikit-learn: install")
    assert not table.rows and not table.failed


def test_unknown_parts_are_refused(tmp_path):
    done = run_all(tmp_path, ["nonsense"])
    assert done.returncode == 2 and "nonsense" in done.stderr and "losses" in done.stderr


def recorded(monkeypatch, failing=()):
    """Replaces running a part by noting its time limit. The result is {part's name: limit}.

    No time passes.
    """
    limits = {}
    monkeypatch.setattr(suite, "time", SimpleNamespace(monotonic=lambda: 0.0))

    def execute(part, limit, out):
        limits[part.name] = limit
        return {"status": "failed" if part.name in failing else "passed", "headline": ""}

    monkeypatch.setattr(suite, "execute", execute)
    return limits


def test_time_is_shared_by_what_parts_need(tmp_path, monkeypatch):
    """A part may use all the time that the parts after it do not need. A part that needs more than
    is left does not start, unless it is the first.
    """
    fakes = [Part("a", seconds=30), Part("b", seconds=10), Part("c", seconds=20)]
    limits = recorded(monkeypatch)
    suite.run(fakes, tmp_path, seconds=100)
    assert limits == {"a": 70, "b": 80, "c": 100}
    limits.clear()
    suite.run(fakes, tmp_path, seconds=15)
    assert limits == {"a": 15, "b": 10}
    page = json.loads((tmp_path / "summary.json").read_text())
    assert [row["status"] for row in page["parts"]] == ["passed", "passed", "waiting"]
    assert page["verdict"] == summary.WAITING


def test_a_run_goes_on_where_it_stopped(tmp_path, monkeypatch):
    fakes = [Part("a", seconds=1), Part("b", seconds=1), Part("c", seconds=100)]
    limits = recorded(monkeypatch, failing=["b"])
    assert suite.run(fakes, tmp_path, seconds=50) == 1
    assert list(limits) == ["a", "b"]
    limits = recorded(monkeypatch)
    assert suite.run(fakes, tmp_path, seconds=500, resume=True) == 0
    assert list(limits) == ["b", "c"]
    page = json.loads((tmp_path / "summary.json").read_text())
    assert [row["status"] for row in page["parts"]] == ["passed"] * 3
    monkeypatch.setattr(summary, "commit", lambda: "another")
    limits.clear()
    suite.run(fakes, tmp_path, seconds=500, resume=True)
    assert list(limits) == ["a", "b", "c"]


def test_parts_alone(tmp_path):
    command = [sys.executable, "-m", "bench", "all", "--out", str(tmp_path), "--only", "memcheck"]
    done = run_command(command)
    page = json.loads((tmp_path / "summary.json").read_text())
    assert done.returncode == 0, done.stderr
    statuses = {part["part"]: part["status"] for part in page["parts"]}
    assert statuses.pop("memcheck") != "skipped" and set(statuses.values()) == {"skipped"}


def test_tests_in_parts_are_the_whole_suite():
    """Every folder of tests has a part of its own or is in the rest. Each part fits the time of one
    GPU run on 16 cores.
    """
    assert {chosen[0] for chosen, _, _ in parts.TESTS.values()} >= {"tests", "tests/kernels"}
    chosen = {arguments[0] for arguments, _, _ in parts.TESTS.values()} - {"tests"}
    ignored = set(parts.TESTS["tests-rest"][0][1:])
    assert ignored == {f"--ignore={folder}" for folder in chosen}
    for _, kernels, rest in parts.TESTS.values():
        assert rest + kernels * 0.6 / 16 < suite.GPU_SECONDS
