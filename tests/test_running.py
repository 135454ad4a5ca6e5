"""The plugin in tests/running.py, tried on a folder of small tests."""

import ast
import os
import sys

import pytest

from tests import ROOT, machines, run_command, running

SMALL = """
import time, pytest

def test_short(): pass

@pytest.mark.long(30)
def test_long(): pass

@pytest.mark.full
def test_full(): pass

@pytest.mark.skip(reason="this needs a GPU")
def test_gpu(): pass

def test_busy():
    end = time.process_time() + 0.3
    while time.process_time() < end: pass
"""


HANGING = """
import threading, pytest
from tests import running

running.HANGS = 5.0

@pytest.mark.long(30)
def test_hangs(): threading.Event().wait()

def test_after_it(): pass
"""


def run(folder, *arguments, budget=20):
    code = "import sys, pytest; from tests import running; running.BUDGET = float(sys.argv[1]); "
    code += "sys.exit(pytest.main(sys.argv[2:], plugins=[running]))"
    command = [sys.executable, "-c", code, str(budget), "-v", "--rootdir", str(folder), str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    environment |= {"PYTEST_ADDOPTS": "--color=no"}  # a user's own would change what is printed
    done = run_command([*command, *arguments], cwd=folder, env=environment)
    return done.returncode, done.stdout + done.stderr


def test_order_skips_and_budget(tmp_path):
    (tmp_path / "test_small.py").write_text(SMALL)
    status, text = run(tmp_path, budget=0.2)
    assert status == 0 and text.index("test_long") < text.index("test_short"), text
    assert "skipped 1: takes minutes; needs --full. To run: pytest -n auto --full" in text
    assert "skipped 1: needs a GPU. To run: on a machine with a GPU: python -m bench" in text
    assert "over the budget of 0 s of processor time: test_small.py::test_busy" in text
    status, text = run(tmp_path, "--enforce-budget", "--full", budget=0.2)
    assert status == 0 and "test_full PASSED" in text and "needs --full" not in text
    assert run(tmp_path, "--enforce-budget", budget=0.2)[0] == 1


def test_a_test_that_hangs_is_named_and_the_others_run(tmp_path):
    pytest.importorskip("xdist")
    (tmp_path / "test_hanging.py").write_text(HANGING)
    (tmp_path / "conftest.py").write_text('pytest_plugins = ["tests.running"]')
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "xdist", "-n", "1", "--rootdir", str(tmp_path)]
    done = run_command(command, cwd=tmp_path, env=environment)
    assert "crashed while running 'test_hanging.py::test_hangs'" in done.stdout, done.stderr
    assert "1 failed, 1 passed" in done.stdout and done.returncode == 1
    assert 'test_hanging.py", line 8 in test_hangs' in done.stderr, "the stack names the place"


def test_a_command_that_hangs_ends_with_all_that_it_started():
    """Its child has its output, too, so the output would end only with the child."""
    code = "import subprocess, sys\ndef waits(): subprocess.run([sys.executable, '-c', sleeps])\n"
    code += "sleeps = 'import time; time.sleep(600)'; waits()"
    with pytest.raises(AssertionError, match=r"after 5 s, .* still ran:(.|\n)* in waits\n"):
        run_command([sys.executable, "-c", code], patience=5)


def test_kinds_of_skips():
    for reason in ("graph: needs a CUDA GPU", "by design: graph: needs a CUDA GPU"):
        assert running.kind(reason) == running.kind("this needs a GPU")
    refusals = (
        "by design: epoch: trains multilayer perceptrons, got convnet",
        "by design: no class",
    )
    assert len({*map(running.kind, refusals)}) == 1
    assert running.kind("could not import 'numba'").endswith('. To run: pip install -e ".[dev]"')
    assert running.kind("something else") == "something else"


def reasons(tree):
    """The texts that calls of pytest.skip, skipif, skip and importorskip give as reasons. Of an
    f-string, its fixed part.
    """
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name = getattr(call.func, "attr", "")
        given = [k.value for k in call.keywords if k.arg == "reason"]
        given += call.args[:1] if name == "skip" else []
        for reason in given if name in ("skip", "skipif", "importorskip") else []:
            parts = reason.values if isinstance(reason, ast.JoinedStr) else [reason]
            text = "".join(part.value for part in parts if isinstance(part, ast.Constant))
            if text:
                yield text


def test_every_reason_to_skip_names_what_is_missing_and_a_command():
    found = {
        reason: path
        for path in (ROOT / "tests").rglob("*.py")
        for reason in reasons(ast.parse(path.read_text()))
    }
    assert len(found) > 10
    unknown = {reason: path for reason, path in found.items() if running.kind(reason) == reason}
    assert not unknown, "give these a row in running.KINDS"


def test_machines_are_of_tests_that_exist():
    assert all((ROOT / file).exists() for file in (*machines.FILES, *machines.COMPILED))


def test_machines_refuses_a_setting_that_it_does_not_know(capsys):
    with pytest.raises(SystemExit) as end:
        machines.main(["Zem"])
    assert end.value.code == 2
    assert "no setting has Zem; known: seed 0, seed 1" in " ".join(capsys.readouterr().err.split())
    assert {"sse4_2"} < {flag for flag, _ in machines.settings().values()}
