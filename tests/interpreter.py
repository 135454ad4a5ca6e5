"""Triton's interpreter, brought nearer to a GPU in what it computes and to a test suite in how long
it takes.
"""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def improve() -> None:
    """Two changes, by replacing functions of Triton's that both the oldest and the newest version
    we test have.
    """
    interpreter._implicit_cvt = _rounding_floats(interpreter._implicit_cvt)
    interpreter._patch_lang = _patching_once(interpreter._patch_lang)


def _rounding_floats(convert):
    """On a GPU a float argument is a float32. The interpreter keeps Python's float64, which hides
    what that rounds off.
    """

    def convert_argument(arg):
        if isinstance(arg, float):
            with np.errstate(over="ignore"):
                return tl.tensor(
                    interpreter.TensorHandle(np.array([arg], dtype=np.float32), tl.float32),
                    tl.float32,
                )
        return convert(arg)

    return convert_argument


def _patching_once(patch):
    """The interpreter puts its versions into triton.language again for every call of a device
    function, in 6 ms each.
    """
    done = set()

    class Scope:
        def __init__(self, fn):
            self.inner = repaired(fn)

        def restore(self):
            done.clear()
            self.inner.restore()

    class Nested:
        def restore(self):
            pass

    def repaired(fn):
        scope = patch(fn)
        # As bounds of a loop; Triton 3.6 calls int() on an array of one element, which numpy 2.4
        # refuses.
        tl.tensor.__index__ = lambda self: self.handle.data.item()
        return scope

    def patch_once(fn):
        modules = {
            id(value) for value in fn.__globals__.values() if value is tl or value is tl.core
        }
        if done and modules <= done:
            return Nested()
        outermost = not done
        done.update(modules)
        return Scope(fn) if outermost else repaired(fn)

    return patch_once
