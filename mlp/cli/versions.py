"""Facts that a run records: versions of packages (without importing them), command, git state."""

import importlib.metadata
import platform
import subprocess


def version(package: str) -> str:
    """The version of an installed package, or "not installed"."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def versions() -> dict[str, str]:
    """Versions by package, and that of Python."""
    packages = ("handgrad", "torch", "triton", "numpy", "torchvision", "scikit-learn")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


typed: list[str] = []  # the command that is running, word by word


def git_state() -> str | None:
    """The commit of the current folder, with " and changes" if files differ; None without git."""
    said = []
    for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"]):
        try:
            done = subprocess.run(["git", *words], capture_output=True, text=True, timeout=5)
        except (OSError, subprocess.TimeoutExpired):
            return None
        if done.returncode:
            return None
        said.append(done.stdout.strip())
    return f"{said[0]} and changes" if said[1] else said[0]
