"""Measures the host's processor time for a launch of `linear_fwd` on the stub of the driver.

    python -m tests.proof.timing

Tensors in the host's memory stand for a GPU's, as in tests/proof/worker.py. The kernel does not
run, so the time is only that of Python, torch and Triton. Each line is the least mean of ROUNDS
rounds of CALLS. On a GPU, torch.cuda is also asked for the current device.
"""

import time
from collections.abc import Callable
from unittest import mock

from tests.proof import stub  # before torch

# isort: split
import torch
import triton

import kernels
from kernels import launch
from tests.proof.worker import ARCH, PROCESSORS, Driver

CALLS, ROUNDS = 500, 7


def microseconds(call: Callable[[], object]) -> float:
    """Processor time of one call, as the least mean of ROUNDS rounds of CALLS."""
    call()
    rounds = []
    for _ in range(ROUNDS):
        start = time.process_time()
        for _ in range(CALLS):
            call()
        rounds.append((time.process_time() - start) / CALLS)
    return min(rounds) * 1e6


def costs() -> dict[str, float]:
    """Microseconds of one layer's forward, of the launch in it, and of Triton's part of that."""
    x, w, b, y = torch.randn(32, 784), torch.randn(100, 784), torch.randn(100), torch.empty(32, 100)

    def forward():
        return kernels.linear_fwd(x, w, b, "relu", out=(y, None))

    seen: list = []
    with launch.observe(lambda *launched: seen.append(launched)):
        forward()
    ((kernel, grid, args, options),) = seen
    return {
        "kernels.linear_fwd": microseconds(forward),
        "its launch.run": microseconds(lambda: launch.run(kernel, grid, *args, **options)),
        "Triton's part": microseconds(
            lambda: kernel[grid](*args, enable_fp_fusion=True, **options)
        ),
    }


def main() -> None:
    """Prints the costs, with torch's smallest product for comparison."""
    torch.set_num_threads(1)
    one, few = torch.randn(1, 4), torch.randn(4, 4)
    triton.runtime.driver.set_active(Driver())
    on_gpu = mock.patch.multiple(
        launch,
        _has_kernels=lambda device: True,
        _device_facts=lambda device: (ARCH, PROCESSORS),
    )
    with on_gpu, launch.use("triton", products="fused"):
        found = costs()
    found["torch.addmm of one row"] = microseconds(lambda: torch.addmm(one, one, few))
    assert stub.driver.stub_launches() > 3 * CALLS * ROUNDS and stub.driver.stub_refused() == 0
    print(f"torch {torch.__version__}, triton {triton.__version__}; processor time on one thread")
    for name, cost in found.items():
        print(f"{name:24} {cost:6.1f} µs   {1e6 / cost:9,.0f} a second")


if __name__ == "__main__":
    main()
