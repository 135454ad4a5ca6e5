"""Runs pytest as on a machine that has only torch, triton, numpy, pytest and what these need.

    python -m tests.bare [ARGUMENTS OF PYTEST]

All other packages are hidden from imports of this process. A machine with a GPU may be like that.
"""

import importlib.machinery
import os
import sys
from importlib import metadata

import pytest
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


def hide(names: set[str]) -> None:
    """Lets Python's search for files find none of these packages."""

    class Rest(importlib.machinery.PathFinder):
        @classmethod
        def find_spec(cls, fullname, path=None, target=None):
            if fullname.partition(".")[0] in names:
                return None
            return super().find_spec(fullname, path, target)

    place = sys.meta_path.index(importlib.machinery.PathFinder)
    sys.meta_path[place] = Rest


if __name__ == "__main__":
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    hide(hidden())
    sys.exit(pytest.main(sys.argv[1:]))
