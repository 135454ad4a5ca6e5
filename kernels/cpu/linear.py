"""The products of linear layers in compiled loops: the host's side of `dense`.

The functions have the arguments and results of the references in `kernels.ops.linear`. These also
serve tensors without memory: empty ones, zeros that torch has not written, and freed storages.
"""

import array
import math
import threading
from typing import Any, NamedTuple

import torch

from .. import activations, launch, tape
from ..ops import linear
from . import DTYPES, blocks, dense, rows, sparse, tiles

# Multiply-adds from which a second thread saves more than it takes to wake it. From there on, it
# also pays to look whether x has zeros to leave out.
_SHARED = 300_000
# Bytes of w from which torch's own product is faster, because it packs what no cache holds.
_PACKED = 1 << 20
_NEAREST = 1 << 15  # bytes of the nearest cache. It holds a share of w in `sparse.forward`.
_SCRATCH = 1 << 15  # most numbers of a `_scratch`
_PER_ELEMENT = 8  # multiply-adds that take as long as an activation of one number
_threads = threading.local()
_ONES = {dtype: torch.ones(1, dtype=dtype) for dtype in DTYPES}


class Code(NamedTuple):
    """Compiled functions of a dtype, see `dense` and `sparse`."""

    forward: blocks.Code
    dx: blocks.Code
    dw: blocks.Code
    pointwise: blocks.Code
    look: blocks.Code
    sparse_forward: blocks.Code
    look_dw: blocks.Code
    sparse_dw: blocks.Code
    activations: dict[str, Any]  # see `_loops`


class Call(NamedTuple):
    """A call of compiled code, that may be repeated."""

    code: blocks.Code
    block: tuple[int, ...]  # see `dense`
    is_shared: bool  # True if several threads pay
    zeros: tuple[blocks.Code, blocks.Code] | None  # looks for zeros of x, and leaves them out
    memory: tuple  # what the block has addresses of, and nobody else may keep


_made: dict[torch.dtype, Code] = {}


def compiled(dtype: torch.dtype) -> Code:
    """The products for numbers of this dtype, compiled or read from disk."""
    forward, dx, dw, pointwise, look, sparse_forward, look_dw, sparse_dw = (
        blocks.Code(function, dtype) for module in (dense, sparse) for function in module.FUNCTIONS
    )
    made = Code(forward, dx, dw, pointwise, look, sparse_forward, look_dw, sparse_dw, {})
    return _made.setdefault(dtype, made)


def _loops(code: Code, dtype: torch.dtype, activation: str) -> tuple[int, int]:
    """The addresses of the loops of act and of act'."""
    act = activations.get(activation)
    known, addresses = code.activations.get(activation, (None, (0, 0)))
    if known is not act:
        with blocks.compiling:
            loops = rows.activation(act, DTYPES[dtype])
        addresses = loops[0].address, loops[1].address
        code.activations[activation] = act, addresses
    return addresses


def _run(call: Call) -> None:
    """Run a call, on several threads if that pays, and without zeros of x if that does."""
    kept = array.array("q", call.block)
    run_at(call, kept, 0)


def run_at(call: Call, kept: array.array, start: int) -> None:
    """Run a call whose block is at this place of an array."""
    address, code = kept.buffer_info()[0] + 8 * start, call.code
    if call.zeros is not None:
        look, instead = call.zeros
        look.call(address)
        code = instead if kept[start + dense.LISTED] else code
    blocks.run(code, address, call.is_shared)


def matrix(t: torch.Tensor) -> torch.Tensor:
    """t (…, n) as (M, n) whose rows are contiguous.

    A tensor may have a minus sign that torch has not applied yet, as `z.conj().imag` has.
    """
    if t.is_neg():
        t = t.resolve_neg()
    if t.dim() != 2:
        t = t.reshape(math.prod(t.shape[:-1]), t.shape[-1])
    if t.is_contiguous() or (t.stride(1) == 1 and t.stride(0) >= t.shape[1]):
        return t
    return t.contiguous()


def _fits(out: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    """True if the loops can write a result of this shape and dtype to `out`."""
    return out.shape == shape and out.dtype is dtype and out.is_contiguous() and not out.is_neg()


def _scratch(shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """Memory for a small result that nobody keeps. A thread uses its own again and again."""
    size = shape[0] * shape[1]
    if size > _SCRATCH:
        return torch.empty(shape, dtype=dtype)
    found = getattr(_threads, "scratch", None)
    if found is None or found.dtype is not dtype:
        with torch.inference_mode(False):
            found = _threads.scratch = torch.empty(_SCRATCH, dtype=dtype)
    return found


def _packed(rows_: int, columns: int, like: torch.Tensor) -> bool:
    """True if torch's own product with a matrix of this size is faster."""
    return rows_ * columns * like.element_size() >= _PACKED


def note_changes(tensors: list[torch.Tensor]) -> None:
    """Tell autograd that `out` was written. Tensors of inference mode count no changes."""
    launch.changed([t for t in tensors if not t.is_inference()])


def _call(code: blocks.Code, block: tuple, zeros: tuple | None, memory: tuple = ()) -> Call:
    """A call of a function with a block, as far as ACT and BESIDE.

    zeros: (code that looks for zeros, code without them, size of the lists), or None.
    """
    is_shared = block[dense.M] * block[dense.N] * block[dense.TERMS] >= _SHARED
    if not is_shared or zeros is None:
        return Call(code, (*block, 0, 0, 0), is_shared, None, memory)
    look, instead, size = zeros
    lists = torch.empty(size, dtype=torch.int32)
    block = *block, lists.data_ptr(), 0, 0
    return Call(code, block, is_shared, (look, instead), (*memory, lists))


def _lanes(x: torch.Tensor) -> int:
    return tiles.VECTOR // x.element_size()


def forward(
    x: torch.Tensor,
    w: torch.Tensor,
    b: torch.Tensor | None,
    activation: str,
    *,
    out: Any = None,
    calls: list[Call | None] | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`layer_ref` of `kernels.ops.linear`, which also serves what these loops do not.

    calls: gets the call that was made, or None if it cannot be repeated.
    """
    act, dtype = activations.get(activation, "linear"), x.dtype
    x2, w2, (y, z) = matrix(x), matrix(w), out or (None, None)
    (rows_, terms), columns = x2.shape, w2.shape[0]
    shape, is_linear = (rows_, columns), act.needs == "nothing"
    if b is not None and (b.is_neg() or not b.is_contiguous()):
        b = b.resolve_neg().contiguous()
    y = torch.empty(shape, dtype=dtype) if y is None else y
    if is_linear:
        z = y
    elif act.needs != "z":
        z = _scratch(shape, dtype) if calls is None else torch.empty(shape, dtype=dtype)
    elif z is None:
        z = torch.empty(shape, dtype=dtype)
    at = x2.data_ptr(), w2.data_ptr(), y.data_ptr(), z.data_ptr(), 0 if b is None else b.data_ptr()
    is_odd = (at[0] | at[1] | at[2] | at[3] | at[4]) & (x.element_size() - 1)
    fits = _fits(y, shape, dtype) and (act.needs != "z" or _fits(z, shape, dtype))
    has_memory = at[0] and at[1] and at[2] and (b is None or at[4])
    is_packed, serves = _packed(columns, terms, x), not is_odd and has_memory and fits
    if is_packed or not serves:
        _note(calls, None)
        if not serves or not is_slow(act):
            return linear.layer_ref(x, w, b, activation, out=out)
        y, z = _by_library(x2, w2, b, activation, y, z)
        return (y if x.dim() == 2 else tape.reshaped(y, (*x.shape[:-1], columns))), z
    code = _made.get(dtype) or compiled(dtype)
    loop = 0 if is_linear else _loops(code, dtype, activation)[0]
    block = 0, at[3], at[0], x2.stride(0), at[1], w2.stride(0), rows_, columns, terms
    zeros, vectors = None, terms // _lanes(x)
    if vectors and terms * x.element_size() * sparse.WIDE <= _NEAREST:
        zeros = code.look, code.sparse_forward, (rows_ + 1) * (vectors + 1)
    call = _call(code.forward, (*block, at[4], loop, at[2]), zeros, (z,))
    _run(call)
    _note(calls, call if x2 is x and w2 is w else None)
    if out is not None:
        note_changes([y] if act.needs != "z" else [y, z])
    if x.dim() != 2:
        y = tape.reshaped(y, (*x.shape[:-1], columns))
    return y, linear.kept(act, y, z)


def is_slow(act: activations.Activation) -> bool:
    """True if torch computes act' (and act, from z) in several passes, for want of an operator."""
    return act.on_tape is None and act.needs_z


def _pointwise(loop: int, out: torch.Tensor, left: torch.Tensor | None, beside: torch.Tensor):
    """Run an activation's loop over two contiguous matrices, see `dense.pointwise`."""
    code, (rows_, columns) = _made.get(out.dtype) or compiled(out.dtype), out.shape
    at, pitch = (0, 0) if left is None else (left.data_ptr(), left.stride(0))
    block = 0, out.data_ptr(), at, pitch, 0, 0, rows_, columns, _PER_ELEMENT, 0, loop
    _run(_call(code.pointwise, (*block, beside.data_ptr()), None))


@torch.no_grad()
def _by_library(x, w, b, activation: str, y, z) -> tuple[torch.Tensor, torch.Tensor]:
    """`forward` by torch's product, into z, and the activation's loop."""
    z = torch.mm(x, w.t(), out=z) if b is None else torch.addmm(b, x, w.t(), out=z)
    code = _made.get(x.dtype) or compiled(x.dtype)
    _pointwise(_loops(code, x.dtype, activation)[0], z, None, y)
    note_changes([y])
    return y, z


def dz(
    dy: torch.Tensor, s: torch.Tensor | None, activation: str, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """`linear_bwd_dz_ref` of `kernels.ops.linear`, which also serves what these loops do not."""
    if s is None or not is_slow(activations.get(activation)):
        return linear.linear_bwd_dz_ref(dy, s, activation, out=out)
    left, beside, dtype = matrix(dy), matrix(s).contiguous(), dy.dtype
    shape = left.shape
    made = torch.empty(shape, dtype=dtype) if out is None else out
    at = left.data_ptr(), beside.data_ptr(), made.data_ptr()
    fits = beside.shape == shape and beside.dtype is dtype and _fits(made, tuple(shape), dtype)
    is_odd = (at[0] | at[1] | at[2]) & (dy.element_size() - 1)
    spans = [(start, start + t.nbytes) for start, t in ((at[1], beside), (at[2], made))]
    fits = fits and (spans[0][1] <= spans[1][0] or spans[1][1] <= spans[0][0])
    if is_odd or not (at[0] and at[1] and at[2]) or not fits:
        return linear.linear_bwd_dz_ref(dy, s, activation, out=out)
    code = _made.get(dtype) or compiled(dtype)
    _pointwise(_loops(code, dtype, activation)[1], made, left, beside)
    if out is not None:
        note_changes([made])
    return made


def _note(calls: list | None, call: Call | None) -> None:
    if calls is not None:
        calls.append(call)


def dx(
    dz: torch.Tensor,
    w: torch.Tensor,
    s_below: torch.Tensor | None = None,
    activation_below: str = "identity",
    *,
    out: torch.Tensor | None = None,
    calls: list[Call | None] | None = None,
) -> torch.Tensor:
    """`linear_bwd_dx_ref` of `kernels.ops.linear`, which also serves what these loops do not.

    calls: as in `forward`.
    """
    dtype, left, right = w.dtype, matrix(dz), matrix(w)
    (rows_, terms), columns = left.shape, right.shape[1]
    s = None if s_below is None else matrix(s_below).contiguous()
    made = torch.empty((rows_, columns), dtype=dtype) if out is None else out
    at = left.data_ptr(), right.data_ptr(), made.data_ptr(), 0 if s is None else s.data_ptr()
    is_odd = (at[0] | at[1] | at[2] | at[3]) & (w.element_size() - 1)
    fits = terms == right.shape[0] and dz.dtype is dtype and _fits(made, (rows_, columns), dtype)
    if s is not None:
        fits = fits and s.dtype is dtype and s.shape == made.shape
    has_memory = at[0] and at[1] and at[2] and (s is None or at[3])
    if is_odd or not has_memory or not fits or _packed(terms, columns, w):
        _note(calls, None)
        return linear.linear_bwd_dx_ref(dz, w, s_below, activation_below, out=out)
    code = _made.get(dtype) or compiled(dtype)
    loop = 0 if s is None else _loops(code, dtype, activation_below)[1]
    block = 0, at[2], at[0], left.stride(0), at[1], right.stride(0), rows_, columns, terms
    call = _call(code.dx, (*block, 0, loop, at[3]), None)
    _run(call)
    _note(calls, call if left is dz and right is w and s is s_below else None)
    if out is not None:
        note_changes([made])
    return made


def dw(
    dz: torch.Tensor,
    x: torch.Tensor,
    bias: bool = True,
    *,
    out: Any = None,
    calls: list[Call | None] | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`linear_bwd_dw_ref` of `kernels.ops.linear`, which also serves what these loops do not.

    calls: as in `forward`.
    """
    dtype, left, right, (made, db) = x.dtype, matrix(dz), matrix(x), out or (None, None)
    (terms, rows_), columns = left.shape, right.shape[1]
    made = torch.empty((rows_, columns), dtype=dtype) if made is None else made
    if not bias:
        db = None
    elif db is None:
        db = torch.empty(rows_, dtype=dtype)
    at = left.data_ptr(), right.data_ptr(), made.data_ptr(), 0 if db is None else db.data_ptr()
    is_odd = (at[0] | at[1] | at[2] | at[3]) & (x.element_size() - 1)
    fits = terms == right.shape[0] and dz.dtype is dtype and _fits(made, (rows_, columns), dtype)
    fits = fits and (db is None or _fits(db, (rows_,), dtype))
    has_memory = at[0] and at[1] and at[2] and (db is None or at[3])
    if is_odd or not has_memory or not fits or _packed(rows_, columns, x):
        _note(calls, None)
        return linear.linear_bwd_dw_ref(dz, x, bias, out=out)
    code, one = _made.get(dtype) or compiled(dtype), _ONES[dtype].data_ptr()
    block = 0, at[2], at[0], left.stride(0), at[1], right.stride(0), rows_, columns, terms
    vectors, zeros = columns // _lanes(x), None
    if vectors:
        zeros = code.look_dw, code.sparse_dw, vectors * min(terms, dense.DEEP)
    call = _call(code.dw, (*block, at[3], 0, one), zeros)
    _run(call)
    _note(calls, call if left is dz and right is x else None)
    if out is not None:
        note_changes([made] if db is None else [made, db])
    return made, db
