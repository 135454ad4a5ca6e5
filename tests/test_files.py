"""The tree of files: what there is, how long, documented, and what importing it brings along."""

import ast
import subprocess
import sys

import pytest

import kernels
import mlp
from tests.test_structure import FILES, ROOT, TREES

TOP_LEVEL = {"pyproject.toml", "kernels", "mlp", "tests", "bench", "README.md", "LICENSE", "CHANGELOG.md"}
# Lines a file may have, by its folder, and the files that need more, with the reason.
LIMITS = {"kernels": 255, "mlp": 255, "bench": 140, "tests": 155}
LONGER = {
    "kernels/linear.py": (340, "five kernels: forward, three products of the backward, and the sum of split ones"),
    "kernels/cross_entropy.py": (390, "one formula for labels, probabilities, weights, smoothing and any dimensions"),
    "kernels/optim.py": (260, "two optimizers, whose rules the training kernels share"),
    "kernels/layers.py": (290, "what the step and the epoch kernels have in common"),
    "mlp/data.py": (340, "a reader for each of the file formats"),
    "mlp/cli.py": (370, "an option of the command line is a line or two"),
    "tests/compile/worker.py": (185, "what Triton does between a call and a compilation, and what to read off the result"),
}


@pytest.mark.parametrize("package", [kernels, mlp], ids=["kernels", "mlp"])
def test_public_names_are_documented(package):
    for name in package.__all__:
        assert getattr(getattr(package, name), "__doc__", None), f"{package.__name__}.{name} has no docstring"


@pytest.mark.parametrize("name", TREES)
def test_file(name):
    """It says what it is, and is not too long to be one thing."""
    lines = len(FILES[name].read_text().splitlines())
    limit, _ = LONGER.get(name, (LIMITS[name.split("/")[0]], ""))
    assert lines <= limit, f"{lines} lines, at most {limit}: look for the second thing that it does"
    assert lines == 0 or ast.get_docstring(TREES[name])


def test_top_level():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    if not listed:
        pytest.skip("not a git checkout: the top level holds what was built and downloaded as well")
    top = {name.split("/")[0] for name in listed}
    assert {name for name in top if not name.startswith(".")} <= TOP_LEVEL


@pytest.mark.parametrize(("module", "absent"), [("kernels", ["mlp", "bench", "tests"]), ("mlp", ["bench", "tests"])])
def test_import_stays_small(module, absent):
    """Importing takes nothing of ours but what is beneath, and nothing of the `train` extra, which need not be there."""
    extra = ["torchvision", "sklearn", "matplotlib", "typer"]
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({extra}))\n"  # None there makes an import fail
        f"import {module}; print([m for m in sys.modules if m.split('.')[0] in {absent}])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr[-2000:]
