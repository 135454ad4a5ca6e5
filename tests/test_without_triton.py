"""Where Triton is not installed, as on macOS, everything but the kernels works."""

import json
import subprocess
import sys

import pytest

from tests import PATIENCE, ROOT, bare, uninterpreted

SCRIPT = """
import json, sys
import torch
import kernels, mlp
from kernels import launch

found = {"installed": launch.IS_INSTALLED}
x, y = torch.randn(96, 20), torch.randint(0, 3, (96,))
for engine in sys.argv[1:]:
    torch.manual_seed(1)
    trainer = mlp.Trainer(mlp.MLP([20, 8, 3]), None, "adam", engine=engine, verbose=False)
    found[engine] = trainer.fit((x, y), 2, 32)[-1]["train_loss"]
found["backend"] = kernels.backend(x), kernels.backend(torch.empty(3, device="meta"))
for name, call in {
    "use": lambda: kernels.use("triton"),
    "launch": lambda: kernels.activations.relu[(1,)](x),
    "dry_run": lambda: launch.dry_run("sm_90", 132).__enter__(),
}.items():
    try:
        call()
    except (ValueError, RuntimeError) as error:
        found[name] = f"{type(error).__name__}: {error}"
print(json.dumps(found))
"""


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-c", *arguments],
        cwd=ROOT,
        env=bare.without({"triton"}, {**uninterpreted(), **environment}),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


def test_every_engine_of_a_cpu_trains_and_kernels_are_refused():
    engines = ["lean", "autograd", "manual"]
    done = run(SCRIPT, *engines)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert not found["installed"]
    assert found["backend"] == ["torch", "torch"]
    losses = [found[engine] for engine in engines]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)
    assert losses[0] < 1.2
    advice = "Triton is not installed; on Linux: pip install triton"
    assert found["use"] == f'ValueError: use: backend "triton" needs Triton; {advice}'
    assert found["launch"] == f"RuntimeError: relu: this kernel cannot run, because {advice}"
    assert found["dry_run"] == f"RuntimeError: dry_run: {advice}"


def test_scalars_of_the_tables_compile_for_the_cpu():
    pytest.importorskip("numba")
    script = SCRIPT.split("found =")[0] + (
        "from kernels.cpu import rows\n"
        "import numpy as np\n"
        "row = kernels.activations.ACTIVATIONS['relu']\n"
        "print(rows.scalar(row.forward, np.dtype(np.float32)).compiled(np.float32(-2)), "
        "rows.scalar(row.backward, np.dtype(np.float32)).compiled(np.float32(3), np.float32(1)))"
    )
    done = run(script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["0.0", "3.0"]


def test_the_interpreter_is_refused():
    done = run("import kernels", TRITON_INTERPRET="1")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "ImportError: TRITON_INTERPRET=1 asks for Triton's interpreter, but Triton is not "
        "installed; on Linux: pip install triton"
    )
