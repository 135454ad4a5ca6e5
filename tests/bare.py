"""Runs pytest as where packages are missing, which are hidden from imports.

    python -m tests.bare [ARGUMENTS OF PYTEST]
    python -m tests.bare --without triton [ARGUMENTS OF PYTEST]

The first finds only torch, triton, numpy, pytest and what these need. A machine with a GPU may be
like that. The second finds all but one package. macOS has no Triton.
"""

import os
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

FOUR = ("torch", "triton", "numpy", "pytest")
OURS = {"kernels", "mlp", "bench", "tests"}


def needed(names) -> set[str]:
    """These distributions and all that they need, as far as they are installed."""
    found, waiting = set(), list(names)
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name in found:
            continue
        try:
            requirements = map(Requirement, metadata.requires(name) or ())
        except metadata.PackageNotFoundError:
            continue
        found.add(name)
        waiting += [r.name for r in requirements if r.marker is None or r.marker.evaluate()]
    return found


def hidden() -> set[str]:
    """The import names of all other distributions."""
    kept = needed(FOUR)
    given = metadata.packages_distributions().items()
    return {name for name, by in given if not kept & set(map(canonicalize_name, by))} - OURS


def without(names: set[str], environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment of a Python, and of all that it starts, that finds none of these packages."""
    places = [str(Path(__file__).with_name("hidden")), environment.get("PYTHONPATH", "")]
    return {
        **environment,
        "PYTHONPATH": os.pathsep.join(filter(None, places)),
        "HANDGRAD_HIDDEN": ",".join(sorted(names)),
    }


if __name__ == "__main__":
    arguments, environment = sys.argv[1:], dict(os.environ)
    if arguments[:1] == ["--without"]:
        names, arguments = {arguments[1]}, arguments[2:]
    else:
        names = hidden()
        environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    command = [sys.executable, "-m", "pytest", *arguments]
    sys.exit(subprocess.run(command, env=without(names, environment)).returncode)
