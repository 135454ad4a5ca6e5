"""Builds the stub of the CUDA driver, driver.c, and loads it into this process.

Import this module before torch. On a machine with a GPU, the import of torch loads the real driver,
and Triton takes the libcuda.so.1 that was loaded first.
"""

import ctypes
import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("driver.c")


def build(folder: Path) -> ctypes.CDLL:
    """Builds the stub as libcuda.so.1 in `folder` and loads it.

    Raises CalledProcessError if the compiler fails.
    """
    compiler = os.environ.get("CC", "cc")
    triton = importlib.util.find_spec("triton")
    assert triton is not None and triton.origin is not None
    include = Path(triton.origin).parent / "backends/nvidia/include"
    library = folder / "libcuda.so.1"
    name = "-Wl,-soname,libcuda.so.1"  # Triton's library then uses the one that is loaded
    options = ["-shared", "-fPIC", name, "-I", str(include)]
    command = [compiler, *options, "-o", str(library), str(SOURCE)]
    subprocess.run(command, check=True, capture_output=True)
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    return ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


assert "torch" not in sys.modules, "the stub must be loaded before torch"
# Triton's library is linked against the file, so it stays until the process ends.
_folder = tempfile.TemporaryDirectory()
driver = build(Path(_folder.name))
