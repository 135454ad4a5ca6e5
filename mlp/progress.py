"""Progress bars: in a terminal a line on stderr, in a notebook a widget, into a file nothing."""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def bar(total: int, unit: str, shown: bool | None = None) -> Iterator[Any]:
    """A bar of tqdm with the time that is left.

    shown: None shows it where somebody can watch: in a terminal and in a notebook.
    """
    from tqdm.auto import tqdm

    hidden = None if shown is None else not shown
    with tqdm(total=total, unit=unit, leave=False, disable=hidden, file=sys.stderr) as made:
        yield made
