"""README's Python blocks run as they are, in their order."""

import contextlib
import re
import sys
import types
from pathlib import Path

import pytest
import torch

README = Path(__file__).parents[2] / "README.md"


@pytest.fixture
def tracked(monkeypatch):
    """Replaces MLflow and W&B by modules that collect (step, numbers). They need not be here."""
    calls: dict[str, list] = {"mlflow": [], "wandb": []}
    for name, start, log in (("mlflow", "start_run", "log_metrics"), ("wandb", "init", "log")):
        module = types.ModuleType(name)
        run = contextlib.nullcontext()
        told = lambda numbers, step, to=calls[name]: to.append((step, numbers))  # noqa: E731
        vars(module).update({start: lambda run=run, **settings: run, log: told})
        monkeypatch.setitem(sys.modules, name, module)
    return calls


def test_examples(tmp_path, monkeypatch, capsys, tracked):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace = {}
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    for block in blocks:
        exec(compile(block, str(README), "exec"), namespace)
    assert len(blocks) >= 5
    assert namespace["history"][-1]["test_accuracy"] > 0.9
    assert namespace["best"].test_accuracy > 0.9
    gradient = namespace["small"].grads["0.weight"][2, 1]
    torch.testing.assert_close(torch.tensor(namespace["slope"]).double(), gradient.double())
    assert namespace["grid"].evaluate(namespace["points"].test)["test_accuracy"] > 0.7
    for name, calls in tracked.items():
        assert bool(calls) == (f"{name}.log" in README.read_text()), name
        assert all(numbers["epoch"] == step for step, numbers in calls)
    assert "Linear" in capsys.readouterr().out  # from the report of fuse
