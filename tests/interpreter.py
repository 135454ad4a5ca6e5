"""Changes Triton's interpreter so that it computes more like a GPU and takes less time."""

import dataclasses
import functools
import inspect

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def improve() -> None:
    """Replaces functions of Triton's interpreter, the first for its results, the others for time.

    The oldest and the newest version that we test both have these functions.
    """
    interpreter._implicit_cvt = _rounding_floats(interpreter._implicit_cvt)
    interpreter._patch_lang = _patching_once(interpreter._patch_lang)
    interpreter._patch_builtin = _patch_builtin
    interpreter._get_np_dtype = _by_name(interpreter._get_np_dtype)
    # Each sum of integers is computed again to find an overflow. That takes half of the time, and
    # what it finds is ignored outside of the debug mode.
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    semantic = interpreter.interpreter_semantic
    semantic.broadcast_impl_value = _only_where_shapes_differ(semantic.broadcast_impl_value)
    tl.core.block_type.__init__ = _made_once(tl.core.block_type.__init__, _block)
    tl.core.tensor.__init__ = _made_once(tl.core.tensor.__init__, _tensor)


def _rounding_floats(convert):
    """Makes a float argument float32, as on a GPU. The interpreter keeps Python's float64, which
    hides this rounding.
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

    The first call comes before anything is replaced. The search takes milliseconds, so its result
    is kept.
    """
    return [(name, f) for name, f in inspect.getmembers(place) if tl.core.is_builtin(f)]


def _patch_builtin(place, builder, scope):
    for name, function in _builtins(place):
        interpreter._patch_attr(place, name, function, builder, scope)


def _by_name(numpy_type):
    """Keeps each type's answer, because Triton makes a table of all types for every call."""
    known = {}

    def remembered(kind):
        if kind.name not in known:
            known[kind.name] = numpy_type(kind)
        return known[kind.name]

    return remembered


def _only_where_shapes_differ(broadcast):
    """Arguments often have one shape already. Finding that out from types takes long."""

    def broadcast_arguments(left, right):
        same = left.handle.data.shape == right.handle.data.shape
        if same and left.type.is_block() == right.type.is_block():
            return left, right
        return broadcast(left, right)

    return broadcast_arguments


def _made_once(make, describe):
    """A constructor that copies attributes from an earlier object with the same description.

    Types and shapes of blocks take long to make, and every operation makes some. describe: gives
    the description and the attributes that are the object's own.
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
    """(the description of a block's type, its own attributes)."""
    sides = [s.value if isinstance(s, tl.constexpr) else s for s in shape]
    return (_kind(element_ty), *sides), {}


def _tensor(handle, type):
    """(the description of a tensor's attributes, its own attributes)."""
    return _kind(type), {"handle": handle}


def _kind(dtype):
    return dtype.name, getattr(dtype.scalar, "address_space", None)


def _patching_once(patch):
    """Replaces functions of triton.language once for a kernel. The interpreter does it again for
    every call of a device function, in 6 ms each.
    """
    done, places = set(), {}

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
        # for bounds of loops: Triton 3.6 calls int() on an array of one element, which numpy 2.4
        # refuses
        tl.tensor.__index__ = lambda self: self.handle.data.item()
        return scope

    def patch_once(fn):
        modules = places.get(id(fn.__globals__))
        if modules is None:
            values = fn.__globals__.values()
            modules = {id(value) for value in values if value is tl or value is tl.core}
            places[id(fn.__globals__)] = modules
        if done and modules <= done:
            return Nested()
        outermost = not done
        done.update(modules)
        return Scope(fn) if outermost else repaired(fn)

    return patch_once
