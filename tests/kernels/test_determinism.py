"""Results repeat to the bit: operations whose work is split, trainings that start again, and a
training in another process.
"""

import hashlib
import os
import sys

import pytest
import torch

import kernels
from kernels import launch
from kernels.operations import OPERATIONS
from mlp import ENGINES
from tests import run_command
from tests.checks import Draw, assert_equal, snapshot
from tests.mlp.test_engines import OPTIONS, train

# CUDA graphs need CUDA, and a whole epoch in one launch needs the kernels.
RUNS = [
    (engine, backend)
    for engine in ENGINES
    for backend in ("torch", None)
    if not (engine == "graph" and not torch.cuda.is_available())
    and not (engine == "epoch" and backend)
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OPERATIONS)
def test_split_work(name, dtype, device, monkeypatch):
    """With many processors and many rows, sums are split over programs. They are added in one fixed
    order, so a second run gives the same bits.
    """
    monkeypatch.setattr(launch, "sm_count", lambda device: 8)
    op = OPERATIONS[name]
    label, args = next(iter(op.cases(Draw(device, dtype), 515, 7, 5)))
    first = snapshot(op.results(args))
    assert_equal(op.results(args), first, f"{name}, {label}")


@pytest.mark.parametrize(("engine", "backend"), RUNS)
def test_training_started_anew(engine, backend, device):
    """A new module, trainer and optimizer from the same seed give the same losses and weights, bit
    for bit.
    """
    runs = []
    for _ in range(2):
        if backend is None:
            runs.append(train(engine, device, epochs=1))
        else:
            with kernels.use(backend):
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
    """A hash of the weights after a short training by the manual engine."""
    with kernels.use("torch"):
        _, weights = train("manual", "cpu", optimizer=OPTIONS["adamw"], epochs=1)
    return hashlib.sha256(b"".join(w.numpy().tobytes() for w in weights)).hexdigest()


def test_in_another_process():
    """Another process with another seed of hashes gets the same weights. So no result depends on
    the order of a set or on an address.
    """
    environment = {**os.environ, "PYTHONHASHSEED": "12345"}
    script = (
        "import torch; torch.set_num_threads(1); from tests.kernels.test_determinism import "
        "digest; print(digest())"
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        done = run_command([sys.executable, "-c", script], env=environment)
        assert done.stdout.strip() == digest(), done.stderr[-2000:]
    finally:
        torch.set_num_threads(threads)
