"""Versions of Python and the packages that matter. Imports none of them."""

import importlib.metadata
import platform


def version(package: str) -> str:
    """Of an installed package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def versions() -> dict[str, str]:
    """Package -> version."""
    packages = ("handgrad", "torch", "triton", "numpy", "torchvision", "scikit-learn")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}
