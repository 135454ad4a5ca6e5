"""README's Python blocks run as they are, in their order."""

import re
from pathlib import Path

import torch

README = Path(__file__).parents[2] / "README.md"


def test_examples(tmp_path, monkeypatch, capsys):
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
    assert "Linear" in capsys.readouterr().out  # from the report of fuse
