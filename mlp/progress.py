"""Progress bars: a line on stderr in a terminal, a widget in a notebook, nothing in a file."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

from .data import needs_extra

OnEpoch = Callable[[dict], object] | None
OnStep = Callable[..., object] | None


@contextlib.contextmanager
def bar(total: int, unit: str, shown: bool | None = None) -> Iterator[Any]:
    """A context with a tqdm bar of `total` units, which shows the time left.

    shown: True or False, or None to show it in a terminal or a notebook only. DataError if tqdm is
    not installed.
    """
    try:
        from tqdm.auto import tqdm
    except ModuleNotFoundError:
        raise needs_extra("tqdm", "a progress bar") from None
    hidden = None if shown is None else not shown
    with tqdm(total=total, unit=unit, leave=False, disable=hidden, file=sys.stderr) as made:
        yield made


@contextlib.contextmanager
def shown(
    progress: bool | None, steps: int, on_epoch: OnEpoch, on_step: OnStep
) -> Iterator[tuple[OnEpoch, OnStep]]:
    """A context with the two callbacks of `Trainer.fit`, extended to move a bar.

    If no bar is shown, they are the given ones. progress: see `shown` of `bar`. steps: the bar's
    total.
    """
    if progress is False:
        yield on_epoch, on_step
        return
    with bar(steps, "step", progress) as made:
        if made.disable:
            yield on_epoch, on_step
            return

        def ended(row: dict) -> object:
            made.set_postfix_str(f"loss {row['train_loss']:.4f}", refresh=False)
            return None if on_epoch is None else on_epoch(row)

        def stepped(*count: int) -> object:
            made.update(*count)
            return None if on_step is None else on_step(*count)

        yield ended, stepped
