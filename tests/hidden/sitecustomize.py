"""Python runs this at its start where PYTHONPATH names this folder. It hides packages from imports.

`$HANDGRAD_HIDDEN` names them, with commas between.
"""

import importlib.machinery
import os
import sys


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


hide(set(filter(None, os.environ.get("HANDGRAD_HIDDEN", "").split(","))))
