"""Checks that the suite notices faults. Each fault of mutants.txt is put into the library alone.
Then its file's tests run.

    python -m tests.mutants [WORD …]        faults whose file or description contains one of the
                                            words, or all

It is started by hand, never by pytest, and works in a temporary copy of the tree. A fault is caught
if a test fails that passes without it. So at the end, all tests that failed run again without a
fault. The column "rule" has "yes" if the test failed by the rule of accuracy in tests/checks.py.
The exit status is 1 if a fault survives.

In mutants.txt a fault is a description, the present code (-) and the code with the fault (+). The
code must occur once in the file that the heading (#) names. Words and signs are compared. Line
breaks, comments, and a comma after the last argument make no difference.
"""

import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import pytest
import torch  # noqa: F401
import triton  # noqa: F401

ROOT = Path(__file__).parent.parent
LIMIT = 1200  # seconds for the tests of a fault
SURVIVED = "**survived**", ""

# file -> the tests that run with a fault in it, until one fails. The default is test_<file>.py of
# the same package.
TESTS = {
    "kernels/activations": ("kernels/test_activations.py", "kernels/test_extremes.py"),
    "kernels/ops/linear": (
        "kernels/test_products.py",
        "kernels/test_tma.py",
        "kernels/test_linear.py",
        "kernels/test_linear_memory.py",
    ),
    "kernels/tiles": (
        "kernels/test_tma.py",
        "kernels/test_linear.py",
        "kernels/test_linear_memory.py",
    ),
    "kernels/configs": ("kernels/test_products.py", "kernels/test_tma.py"),
    "kernels/ops/cross_entropy": (
        "kernels/test_cross_entropy.py",
        "kernels/test_cross_entropy_kernel.py",
    ),
    "kernels/losses": (
        "kernels/test_elementwise_loss.py",
        "kernels/test_cross_entropy.py",
        "kernels/test_cross_entropy_kernel.py",
        "kernels/test_step.py",
    ),
    **dict.fromkeys(
        ("kernels/ops/patches", "kernels/ops/conv", "kernels/ops/conv_bwd"),
        ("kernels/test_conv.py", "kernels/test_conv_memory.py"),
    ),
    **dict.fromkeys(
        (f"kernels/training/{name}" for name in ("layers", "objective", "network", "plan", "run")),
        ("kernels/test_step.py", "kernels/test_epoch.py"),
    ),
    "kernels/ops/mlp": ("kernels/test_mlp.py", "kernels/test_mlp_update.py"),
    **{
        f"kernels/{path}": ("kernels/test_launch.py", f"kernels/test_{Path(path).name}.py")
        for path in (
            "ops/optim",
            "ops/mlp_update",
            "training/epoch",
            "training/exchange",
            "training/step",
        )
    },
    "kernels/launch": (
        "kernels/test_launch.py",
        "kernels/test_linear.py",
        "kernels/test_numba.py",
    ),
    "kernels/tape": ("kernels/test_launch.py", "kernels/test_linear.py"),
    "kernels/rules": (
        "kernels/test_launch.py",
        "kernels/test_optim.py",
        "kernels/test_mlp_update.py",
        "kernels/test_step.py",
        "kernels/test_epoch.py",
    ),
    "kernels/training/replicas": ("kernels/test_epoch.py",),
    "kernels/compiled": ("kernels/test_compile.py",),
    **dict.fromkeys(("kernels/cpu/dense", "kernels/cpu/softmax"), ("kernels/test_numba.py",)),
    "kernels/cpu/doubles": ("mlp/test_cpu_epoch.py",),
    "kernels/cpu/epoch": ("mlp/test_several_epochs.py", "mlp/test_cpu_epoch.py"),
    "mlp/engines/epochwise": ("mlp/test_several_epochs.py",),
    "mlp/engines/graphs": ("proof/test_graphs.py", "mlp/test_graph.py", "proof/test_engines.py"),
    "mlp/trainer": ("mlp/test_optim_grads.py",),
}


class Mutant(NamedTuple):
    """A fault: in the file at `path`, the code from `start` to `end` becomes `new`."""

    path: Path  # relative to the root
    fault: str
    start: int
    end: int
    new: str

    @property
    def line(self) -> int:
        return (ROOT / self.path).read_text()[: self.start].count("\n") + 1

    def put_into(self, tree: Path) -> None:
        text = (tree / self.path).read_text()
        (tree / self.path).write_text(text[: self.start] + self.new + text[self.end :])


def words(code: str) -> list[tuple[str, int, int]]:
    """(word or sign, start, end), without comments and commas before a closing bracket."""
    found = [(m[0], *m.span()) for m in re.finditer(r"#.*|[\w.]+|[^\w\s]", code)]
    found = [word for word in found if not word[0].startswith("#")]
    return [
        word
        for word, following in zip(found, [*found[1:], ("", 0, 0)])
        if not (word[0] == "," and following[0] in (")", "]", "}"))
    ]


def find(code: str, text: str) -> list[tuple[int, int]]:
    """All places of the code in the text, as [(start, end)]."""
    sought, given = [word for word, *_ in words(code)], words(text)
    all_words = [word for word, *_ in given]
    return [
        (given[i][1], given[i + len(sought) - 1][2])
        for i in range(len(given) - len(sought) + 1)
        if all_words[i : i + len(sought)] == sought
    ]


def indented_as(new: str, text: str, start: int) -> str:
    """`new` with the indentation for a place that starts at `start`.

    At the beginning of a line, all lines of `new` move with the first. In the middle of a line they
    stay.
    """
    before = text[text.rfind("\n", 0, start) + 1 : start]
    if before.strip():
        return new
    spaces = [len(line) - len(line.lstrip()) for line in new.split("\n")]
    lines = [
        " " * (n + len(before) - spaces[0]) + line.lstrip()
        for n, line in zip(spaces, new.split("\n"))
    ]
    return "\n".join(lines)[len(before) :]


def read() -> list[Mutant]:
    """The faults of mutants.txt. Exits and names those whose code does not occur exactly once."""
    mutants, wrong, path, text = [], [], Path(), ""
    for block in (ROOT / "tests" / "mutants.txt").read_text().strip().split("\n\n"):
        if block.startswith("# "):
            path = ROOT / f"{block[2:]}.py"
            text = path.read_text()
            continue
        fault, *lines = block.split("\n")
        old, new = ("\n".join(line[2:] for line in lines if line.startswith(sign)) for sign in "-+")
        places = find(old, text)
        if len(places) == 1:
            ((start, end),) = places
            new = indented_as(new, text, start)
            mutants.append(Mutant(path.relative_to(ROOT), fault, start, end, new))
        else:
            wrong.append(
                f"{path} must have this once, has it {len(places)} times ({fault}):\n{old}"
            )
    if wrong:
        raise SystemExit("\n".join(wrong))
    return mutants


class Failure(NamedTuple):
    """A test that failed, or another error as text."""

    test: str
    by_rule: bool = False  # True if the message is from checks.assert_as_accurate


class Failures:
    """A plugin of pytest that collects failed tests and files that cannot be imported."""

    def __init__(self):
        self.found: list[Failure] = []

    def pytest_runtest_logreport(self, report):
        if report.failed:
            by_rule = bool(re.search(r"are off by more than [\d.]", report.longreprtext))
            self.found.append(Failure(report.nodeid.removeprefix("tests/"), by_rule))

    pytest_collectreport = pytest_runtest_logreport


def run(tree, tests, options) -> list[Failure]:
    """Runs pytest in this process on the copy of the tree. Returns the tests that fail."""
    os.chdir(tree)
    sys.path[:] = [str(tree), *(p for p in sys.path if p not in ("", str(ROOT)))]
    for module in [m for m in sys.modules if m.partition(".")[0] in ("tests", "kernels", "mlp")]:
        del sys.modules[module]
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    noted = Failures()
    options = [*options, "-p", "no:cacheprovider", "--tb=short", "--rootdir", str(tree)]
    code = pytest.main([*options, *(f"tests/{t}" for t in tests)], plugins=[noted])
    if code and not noted.found:
        noted.found.append(Failure(f"pytest, which ended with {code}"))
    return noted.found


def failures(tree, tests, *options) -> list[Failure]:
    """Those of the copy's tests that fail.

    They run in a fork of this process. It has imported everything except kernels and tests, because
    these imports take longer than most tests.
    """
    file = tree / "failures.json"
    file.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        try:
            signal.alarm(LIMIT)
            file.write_text(json.dumps(run(tree, tests, options)))
        finally:
            os._exit(0 if sys.exc_info()[0] is None else 1)
    _, status = os.waitpid(child, 0)
    if status:
        return [Failure(f"pytest, which ended with status {status} (within {LIMIT} s)")]
    return [Failure(*found) for found in json.loads(file.read_text())]


def caught_by(tree, mutant) -> Failure | None:
    """The first test that fails with the fault, or None if all pass."""
    path, file = tree / mutant.path, mutant.path.with_suffix("").as_posix()
    tests = f"{mutant.path.parts[0]}/test_{mutant.path.stem}.py"
    text = path.read_text()
    mutant.put_into(tree)
    try:
        found = failures(tree, TESTS.get(file, (tests,)), "-x")
    finally:
        path.write_text(text)
    return found[0] if found else None


def main(named) -> int:
    chosen = [m for m in read() if not named or any(n in f"{m.path}: {m.fault}" for n in named)]
    caught: list[Failure] = []
    # A file with a fault may have the old one's length and second, so bytecode would hide it.
    sys.dont_write_bytecode = True
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        for name in ("kernels", "mlp", "tests"):
            shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", tree)
        print("| # | fault | where | caught by | rule | s |\n|---|---|---|---|---|---|", flush=True)
        for number, mutant in enumerate(chosen, 1):
            started = time.perf_counter()
            found = caught_by(tree, mutant)
            caught += [found] if found else []
            test, rule = (found.test, "yes" if found.by_rule else "") if found else SURVIVED
            print(
                f"| {number} | {mutant.fault} | {mutant.path}:{mutant.line} | {test} | {rule} | "
                f"{time.perf_counter() - started:.0f} |",
                flush=True,
            )
        tests = sorted({found.test for found in caught if "::" in found.test})
        wrong = failures(tree, tests) if tests else []
    for found in wrong:
        print(f"\n{found.test} fails without any fault too")
    rule = sum(found.by_rule for found in caught)
    print(f"\n{len(caught)} of {len(chosen)} caught, {rule} of them by the rule of accuracy")
    return len(caught) < len(chosen) or bool(wrong)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
