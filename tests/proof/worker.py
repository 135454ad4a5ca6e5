"""Launch everything through Triton's own launcher, with a stub in the place of the CUDA driver.

    python -m tests.proof.worker [--full]    # one JSON object on standard output

A process of its own: under pytest, jit functions are interpreted. Tensors lie in the host's memory
and are taken for a GPU's. Specialisation, compilation, signature and launch are the real ones; only
the kernel does not run. So a launch that the driver would refuse shows here: too much shared
memory, too large a grid, more programs than run at once, an argument of a type that has no pointer.
"""

import ctypes
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.nvidia import driver as nvidia

import kernels
from kernels import launch
from kernels.operations import OPERATIONS, Make

SOURCE = Path(__file__).with_name("driver.c")
INCLUDE = Path(nvidia.__file__).parent / "include"
ARCH, PROCESSORS = "sm_90", 132
SHAPES = [(33, 17, 7), (2048, 100, 50)]  # nothing divides anything; a batch that is split


def build(folder: Path) -> ctypes.CDLL:
    """The stub as libcuda.so.1 in `folder`, loaded; CalledProcessError without a C compiler."""
    compiler = os.environ.get("CC", "cc")
    library = folder / "libcuda.so.1"
    name = "-Wl,-soname,libcuda.so.1"  # by which Triton's own library finds the one that is loaded
    options = ["-shared", "-fPIC", name, "-I", str(INCLUDE)]
    command = [compiler, *options, "-o", str(library), str(SOURCE)]
    subprocess.run(command, check=True, capture_output=True)
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    return ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


class Driver(nvidia.CudaDriver):
    """Triton's driver for NVIDIA, of one device that torch need not know."""

    def __init__(self):
        self.utils, self.launcher_cls = nvidia.CudaUtils(), nvidia.CudaLauncher

    def get_device_capability(self, device=0):
        return divmod(int(ARCH[3:]), 10)

    def get_current_stream(self, device=0):
        return 0

    def get_current_device(self):
        return 0

    def set_current_device(self, device):
        pass

    def get_active_torch_device(self):
        return torch.device("cpu")

    def get_device_interface(self):
        return torch.cuda


def launched(seen: dict):
    """An observer that launches for real, counts kernels and keeps what was refused."""

    def observe(kernel, grid, args, options):
        name = kernel.fn.__name__
        seen["kernels"][name] = seen["kernels"].get(name, 0) + 1
        try:
            kernel[grid](*args, enable_fp_fusion=True, **options)
        except Exception as error:  # whatever it is, it is the test's to judge
            seen["refused"].append(f"{name}: {type(error).__name__}: {str(error)[-300:]}")

    return observe


def operations(full: bool) -> None:
    """Forward and backward of every operation: one case of each, or all cases in all types."""
    for operation in OPERATIONS.values():
        for shape in SHAPES if full else SHAPES[:1]:
            for dtype in launch.KERNEL_DTYPES if full else (torch.float32,):
                cases = list(operation.cases(Make("cpu", dtype), *shape))
                for _, arguments in cases if full else cases[:1]:
                    operation.results(arguments)


def main() -> None:
    """Launch, and say what was refused."""
    seen = {"kernels": {}, "refused": [], "triton": triton.__version__}
    with tempfile.TemporaryDirectory() as folder:
        stub = build(Path(folder))
        triton.runtime.driver.set_active(Driver())
        with launch.dry_run(ARCH, PROCESSORS), launch.observe(launched(seen)):
            operations("--full" in sys.argv)
            parameter, host = torch.ones(4), torch.tensor(0.1)
            stub.stub_on_host(ctypes.c_ulonglong(host.data_ptr()))
            before = len(seen["refused"])
            kernels.sgd([parameter], [parameter], [], host)
            seen["host tensor"] = seen["refused"][before:]
            del seen["refused"][before:]
        seen["launches"], seen["refused by the driver"] = stub.stub_launches(), stub.stub_refused()
    json.dump(seen, sys.stdout)


if __name__ == "__main__":
    main()
