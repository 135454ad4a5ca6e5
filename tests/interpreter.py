"""Triton's interpreter, brought nearer to a GPU in what it computes and to a test suite in how long
it takes.
"""

import functools
import inspect

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def improve() -> None:
    """Replace functions of Triton's that both the oldest and the newest version we test have: one
    for what it computes, the others for the time it takes.
    """
    interpreter._implicit_cvt = _rounding_floats(interpreter._implicit_cvt)
    interpreter._patch_lang = _patching_once(interpreter._patch_lang)
    interpreter._patch_builtin = _patch_builtin
    interpreter._get_np_dtype = _by_name(interpreter._get_np_dtype)
    tl.core.block_type.__init__ = _made_once(tl.core.block_type.__init__, _block)
    tl.core.tensor.__init__ = _made_once(tl.core.tensor.__init__, _tensor)


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


@functools.cache
def _builtins(place) -> list:
    """(name, function) of what the interpreter replaces in a module or class of triton.language.
    Asked for the first time before anything was replaced; the search takes milliseconds.
    """
    return [(name, f) for name, f in inspect.getmembers(place) if tl.core.is_builtin(f)]


def _patch_builtin(place, builder, scope):
    for name, function in _builtins(place):
        interpreter._patch_attr(place, name, function, builder, scope)


def _by_name(numpy_type):
    """Triton makes a table of all types for every question."""
    known = {}

    def remembered(kind):
        if kind.name not in known:
            known[kind.name] = numpy_type(kind)
        return known[kind.name]

    return remembered


def _made_once(make, describe):
    """A constructor that copies the attributes of an earlier object of the same description, all
    but those of its own. Types and shapes of blocks are constants that take long to make, and every
    operation makes some.
    """
    known = {}

    def made(self, *args):
        key, own = describe(*args)
        attributes = known.get((type(self), key))
        if attributes is None:
            make(self, *args)
            known[type(self), key] = {k: v for k, v in vars(self).items() if k not in own}
        else:
            vars(self).update(attributes, **own)

    return made


def _block(element_ty, shape):
    """What a block's type depends on, and its own attributes."""
    sides = [s.value if isinstance(s, tl.constexpr) else s for s in shape]
    return (_kind(element_ty), *sides), {}


def _tensor(handle, type):
    """What a tensor's attributes depend on, and its own."""
    return _kind(type), {"handle": handle}


def _kind(dtype):
    return dtype.name, getattr(dtype.scalar, "address_space", None)


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
