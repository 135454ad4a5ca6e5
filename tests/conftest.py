"""How the suite runs: on a GPU where there is one, else every kernel in Triton's interpreter on the
CPU.

tests/kernels runs on NaN-filled buffers; tests/mlp takes the reference path on a CPU, where
training through the interpreter would take hours, unless a test is marked `interpreter`.
"""

import importlib.util
import os
import sys
import zlib
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parent
ON_GPU = torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1"
if not ON_GPU:
    # Triton reads the variable when it is imported, and that must not have happened: half of it
    # would be compiled.
    assert "triton" not in sys.modules or os.environ.get("TRITON_INTERPRET") == "1", (
        "triton was imported before conftest.py"
    )
    os.environ["TRITON_INTERPRET"] = "1"
    # pytest-xdist has a process for each core
    torch.set_num_threads(int(os.environ.get("HANDGRAD_TEST_THREADS", "1")))

import triton  # noqa: E402
from torch._dynamo import trace_rules  # noqa: E402

import kernels  # noqa: E402
from tests import checks, interpreter, seeds  # noqa: E402

pytest_plugins = ["tests.running"]

if not ON_GPU:
    interpreter.improve()
seeds.shift()

if Path(kernels.__file__).parent != TESTS.parent / "kernels":
    # Another distribution on PyPI imports under this name.
    pytest.exit(
        f"`import kernels` found {kernels.__file__}, not this repository's: uninstall that or "
        "`pip install -e .`",
        4,
    )


# Files whose tests need a package beyond torch, triton, numpy and pytest: a GPU machine may have no
# more than these.
NEEDS = {
    "expecttest": [
        "databases/test_modules.py",
        "databases/test_operators.py",
        "databases/test_optimizers.py",
    ],
    "hypothesis": ["kernels/test_properties.py"],
    "safetensors": ["mlp/test_checkpoint.py", "mlp/test_runs.py", "mlp/test_sweep.py"],
    "sklearn": [
        "mlp/test_data.py",
        "mlp/test_data_files.py",
        "mlp/test_estimators.py",
        "mlp/test_metrics.py",
        "mlp/test_readme.py",
        "mlp/test_trainer.py",
    ],
    "torchvision": ["mlp/test_fuse.py"],
    "typer": [
        "mlp/test_cli.py",
        "mlp/test_cli_errors.py",
        "mlp/test_cli_sweep.py",
        "mlp/test_data_cli.py",
        "mlp/test_hostile.py",
        "mlp/test_main.py",
    ],
}
MISSING = {
    package: files for package, files in NEEDS.items() if importlib.util.find_spec(package) is None
}
collect_ignore = [file for files in MISSING.values() for file in files]


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "interpreter: under tests/mlp, run the kernels in the interpreter also on a CPU"
    )


def pytest_report_header():
    where = f"on {torch.cuda.get_device_name()}" if ON_GPU else "in Triton's interpreter on the CPU"
    versions = f"torch {torch.__version__}, triton {triton.__version__}"
    return f"handgrad: kernels run {where}; {versions}; {seeds.SHIFT} added to every seed"


def pytest_terminal_summary(terminalreporter):
    for package, files in MISSING.items():
        terminalreporter.write_line(f"not run: {', '.join(files)}. To run: pip install {package}")


@pytest.fixture(scope="session")
def device() -> str:
    """Where tensors that kernels shall take are made: "cuda", or "cpu" under the interpreter."""
    return "cuda" if ON_GPU else "cpu"


@pytest.fixture(autouse=True)
def whole_floats():
    """Convolutions are judged by their float32 results, which cuDNN would compute in tf32."""
    # The flags one by one are locked once torch.testing._internal was imported; this is not.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


@pytest.fixture(autouse=True)
def surroundings(request, monkeypatch):
    """What the folder's tests run under: poisoned buffers for kernels, the reference for training
    on a CPU; its own seed.
    """
    kernels.launch.forget()
    # What torch.compile knows of torch's functions is read once, and once more after a process
    # group began. It must not be read while a test has put others in their places.
    trace_rules.get_torch_obj_rule_map()
    # the same numbers whatever ran before
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))
    if request.path.is_relative_to(TESTS / "kernels"):
        checks.poison_fresh_buffers(monkeypatch)
    if request.path.is_relative_to(TESTS / "mlp") and request.path.name != "test_search.py":
        # What "auto" takes must not depend on what ran before in this process.
        monkeypatch.setattr("mlp.cpu.is_loaded", lambda: False)
    if (
        request.path.is_relative_to(TESTS / "mlp")
        and not ON_GPU
        and not request.node.get_closest_marker("interpreter")
    ):
        with kernels.use("torch"):
            yield
    else:
        yield
