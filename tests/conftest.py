"""How the suite runs. Kernels run on the GPU if there is one, else in Triton's interpreter on the
CPU.

In tests/kernels, new buffers are filled with NaN. On a CPU, tests/mlp uses the reference, because
trainings in the interpreter would take hours. Tests marked `interpreter` still use the kernels.
"""

import importlib.util
import os
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

TESTS = Path(__file__).parent
ON_GPU = torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1"
HAS_TRITON = importlib.util.find_spec("triton") is not None  # it has builds for Linux only
if not ON_GPU:
    # pytest-xdist runs a process for each core
    torch.set_num_threads(int(os.environ.get("HANDGRAD_TEST_THREADS", "1")))
if HAS_TRITON and not ON_GPU:
    # Triton reads this variable at its import. After an earlier import, half of it would be
    # compiled.
    assert "triton" not in sys.modules or os.environ.get("TRITON_INTERPRET") == "1", (
        "triton was imported before conftest.py"
    )
    os.environ["TRITON_INTERPRET"] = "1"

from torch._dynamo import trace_rules  # noqa: E402

import kernels  # noqa: E402
from kernels.language import ADVICE, triton  # noqa: E402
from tests import checks, seeds  # noqa: E402

pytest_plugins = ["tests.running"]

if HAS_TRITON and not ON_GPU:
    from tests import interpreter

    interpreter.improve()
seeds.shift()

if Path(kernels.__file__).parent != TESTS.parent / "kernels":
    # Another distribution on PyPI has this import name, too.
    pytest.exit(
        f"`import kernels` found {kernels.__file__}, not this repository's: uninstall that or "
        "`pip install -e .`",
        4,
    )


# Files and folders whose tests need a package that may be missing. A machine with a GPU may have
# only torch, triton, numpy and pytest. macOS has no Triton.
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
        "test_types.py",
    ],
    "torchvision": ["mlp/test_fuse.py"],
    "triton": [
        "compile",
        "kernels/test_exchange.py",
        "kernels/test_extremes.py",
        "kernels/test_products.py",
        "kernels/test_tma.py",
        "mlp/test_bench_exchange.py",
        "proof",
        "test_bench.py",
        "test_mutants.py",
    ],
    "typer": [
        "mlp/test_cli.py",
        "mlp/test_cli_errors.py",
        "mlp/test_cli_export.py",
        "mlp/test_cli_sweep.py",
        "mlp/test_comparing.py",
        "mlp/test_data_cli.py",
        "mlp/test_devices.py",
        "mlp/test_hostile.py",
        "mlp/test_main.py",
        "mlp/test_spreading.py",
        "mlp/test_tables_cli.py",
        "test_one_more.py",
    ],
}
MISSING = {
    package: files for package, files in NEEDS.items() if importlib.util.find_spec(package) is None
}
collect_ignore = [file for files in MISSING.values() for file in files]


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "interpreter: runs kernels, on a CPU in the interpreter, also in tests/mlp"
    )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Without Triton, a test that runs kernels is skipped. The library's own error shows that."""
    try:
        return (yield)
    except (RuntimeError, ValueError) as error:
        if HAS_TRITON or ADVICE not in str(error):
            raise
        pytest.skip(ADVICE)


def pytest_report_header():
    where = f"on {torch.cuda.get_device_name()}" if ON_GPU else "in Triton's interpreter on the CPU"
    where = where if HAS_TRITON else "nowhere"
    versions = f"torch {torch.__version__}, triton {triton.__version__}"
    return f"handgrad: kernels run {where}; {versions}; {seeds.SHIFT} added to every seed"


def pytest_terminal_summary(terminalreporter):
    for package, files in MISSING.items():
        name = "scikit-learn" if package == "sklearn" else package
        terminalreporter.write_line(f"not run: {', '.join(files)}. To run: pip install {name}")


@pytest.fixture(scope="session")
def device() -> str:
    """The device of tensors for kernels: "cuda", or "cpu" with the interpreter."""
    return "cuda" if ON_GPU else "cpu"


@pytest.fixture(autouse=True)
def whole_floats():
    """Turns off tf32 in cuDNN, so that torch's convolutions are float32."""
    # After an import of torch.testing._internal, single flags are locked. This context is not.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


@pytest.fixture(autouse=True)
def surroundings(request, monkeypatch):
    """The setting of each test: its own seed, buffers with NaN in tests/kernels, the reference in
    tests/mlp on a CPU.
    """
    kernels.launch.forget()
    # torch.compile reads its table of torch's functions once, and again after a process group has
    # started. It must not read it while a test replaces such functions.
    trace_rules.get_torch_obj_rule_map()
    # gives each test the same numbers, whatever ran before
    seed = zlib.crc32(request.node.nodeid.encode())
    torch.manual_seed(seed)
    if hasattr(request.module, "RNG"):
        monkeypatch.setattr(request.module, "RNG", np.random.default_rng(seed + seeds.SHIFT))
    if request.path.is_relative_to(TESTS / "kernels"):
        checks.poison_fresh_buffers(monkeypatch)
    if request.path.is_relative_to(TESTS / "mlp") and request.path.name != "test_search.py":
        # The choice of "auto" must not depend on earlier tests of this process.
        monkeypatch.setattr("kernels.cpu.is_loaded", lambda *_: False)
    on_kernels = request.node.get_closest_marker("interpreter")
    if on_kernels and not HAS_TRITON:
        pytest.skip(ADVICE)
    if request.path.is_relative_to(TESTS / "mlp") and not ON_GPU and not on_kernels:
        with kernels.use("torch"):
            yield
    else:
        yield
