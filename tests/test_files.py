"""Files: the top level, long lines and functions, docstrings, and what an import brings along."""

import ast
import sys

import pytest

import kernels
import mlp
from tests import run_command
from tests.test_structure import FILES, tree

TOP_LEVEL = {
    "pyproject.toml",
    "kernels",
    "mlp",
    "tests",
    "bench",
    "README.md",
    "LICENSE",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
}
# The most lines of a function's body, without signature and docstring. Files have no limit, because
# one would make their code denser.
LIMIT = 50


def body_lines(function) -> int:
    """Lines from the first statement after the docstring to the last."""
    body = function.body[1:] if ast.get_docstring(function) and function.body[1:] else function.body
    return body[-1].end_lineno - body[0].lineno + 1


@pytest.mark.parametrize("package", [kernels, mlp], ids=["kernels", "mlp"])
def test_public_names_are_documented(package):
    for name in package.__all__:
        assert getattr(getattr(package, name), "__doc__", None), (
            f"{package.__name__}.{name} has no docstring"
        )


@pytest.mark.parametrize("name", FILES)
def test_file(name):
    """Each file has a docstring, at most 100 columns, and at most 50 lines in a function."""
    wide = [i for i, line in enumerate(FILES[name].read_text().split("\n"), 1) if len(line) > 100]
    assert not wide, f"over 100 columns: lines {wide}"
    assert not FILES[name].read_text() or ast.get_docstring(tree(name))
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.FunctionDef):
            lines = body_lines(node)
            assert lines <= LIMIT, f"{node.name}: {lines} lines, at most {LIMIT}"


def test_top_level():
    listed = run_command(["git", "ls-files"]).stdout.split()
    if not listed:
        pytest.skip("needs a git checkout, which says what was built or downloaded")
    top = {name.split("/")[0] for name in listed}
    assert {name for name in top if not name.startswith(".")} <= TOP_LEVEL


@pytest.mark.parametrize(
    ("module", "absent"), [("kernels", ["mlp", "bench", "tests"]), ("mlp", ["bench", "tests"])]
)
def test_import_stays_small(module, absent):
    """An import of a package does not import the packages above it. It works without the `train`
    extra.
    """
    extra = ["torchvision", "sklearn", "matplotlib", "typer"]
    code = (
        # an entry of None makes the import fail
        f"import sys; sys.modules.update(dict.fromkeys({extra}))\n"
        f"import {module}; print([m for m in sys.modules if m.split('.')[0] in {absent}])"
    )
    done = run_command([sys.executable, "-c", code])
    assert done.stdout.strip() == "[]", done.stderr[-2000:]
