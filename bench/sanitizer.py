"""Finds NVIDIA's compute-sanitizer."""

import importlib.util
import os
import shutil
from pathlib import Path

NAME = "compute-sanitizer"
# folders inside a CUDA folder or a wheel
_BELOW = ("bin", "compute-sanitizer", "extras/compute-sanitizer")


def find() -> str | None:
    """Its path from PATH, CUDA's folders, or the nvidia and triton wheels. None if not found."""
    folders = [
        Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)
    ]
    folders += [*sorted(Path("/usr/local").glob("cuda*"), reverse=True), Path("/opt/cuda")]
    for package in ("nvidia", "triton"):
        found = importlib.util.find_spec(package)
        for root in map(Path, found.submodule_search_locations if found else ()):
            folders += [root / "backends/nvidia"] if package == "triton" else sorted(root.iterdir())
    places = [str(folder / below) for folder in folders for below in _BELOW]
    return shutil.which(NAME) or shutil.which(NAME, path=os.pathsep.join(places))
