"""The same bits every time: operations whose work is split, training started anew, and a process of
its own.
"""

import hashlib
import os
import subprocess
import sys

import pytest
import torch

import kernels
from kernels import launch
from kernels.operations import OPERATIONS
from mlp import ENGINES
from tests.checks import Draw, assert_equal, snapshot
from tests.mlp.test_engines import OPTIONS, train

# CUDA graphs need CUDA, and a whole epoch in one launch needs the kernels.
RUNS = [
    (engine, path)
    for engine in ENGINES
    for path in ("torch", None)
    if not (engine == "graph" and not torch.cuda.is_available())
    and not (engine == "epoch" and path)
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OPERATIONS)
def test_split_work(name, dtype, device, monkeypatch):
    """Where a device has many processors and a batch many rows, sums are split over programs, and
    added in one order.
    """
    monkeypatch.setattr(launch, "sm_count", lambda device: 8)
    op = OPERATIONS[name]
    label, args = next(iter(op.cases(Draw(device, dtype), 515, 7, 5)))
    first = snapshot(op.results(args))
    assert_equal(op.results(args), first, f"{name}, {label}")


@pytest.mark.parametrize(("engine", "path"), RUNS)
def test_training_started_anew(engine, path, device):
    """A new module, trainer and optimizer from the same seed: losses and weights bitwise equal."""
    runs = []
    for _ in range(2):
        if path is None:
            runs.append(train(engine, device, epochs=1))
        else:
            with kernels.use(path):
                runs.append(train(engine, device, epochs=2))
    assert runs[0][0] == runs[1][0]
    assert_equal(*(weights for _, weights in runs))


@pytest.mark.parametrize("optimizer", ["adamw", "nesterov"])
def test_manual_engine_started_anew_with_states(optimizer):
    with kernels.use("torch"):
        (losses, weights), (same, others) = (
            train("manual", "cpu", optimizer=OPTIONS[optimizer]) for _ in range(2)
        )
    assert losses == same
    assert_equal(weights, others)


def digest() -> str:
    """A hash of the weights that a short run of the manual engine ends with."""
    with kernels.use("torch"):
        _, weights = train("manual", "cpu", optimizer=OPTIONS["adamw"], epochs=1)
    return hashlib.sha256(b"".join(w.numpy().tobytes() for w in weights)).hexdigest()


def test_in_another_process():
    """Nothing hangs on the order of a set or on an address: another process, with another seed of
    hashes, agrees.
    """
    environment = {**os.environ, "PYTHONHASHSEED": "12345", "TRITON_INTERPRET": "1"}
    script = (
        "import torch; torch.set_num_threads(1); from tests.kernels.test_determinism import "
        "digest; print(digest())"
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        result = subprocess.run(
            [sys.executable, "-c", script],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        assert result.stdout.strip() == digest()
    finally:
        torch.set_num_threads(threads)
