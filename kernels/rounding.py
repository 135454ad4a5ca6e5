"""Simulated rounding: results that a computation in a given precision may give, drawn at random.

`selfcheck` and the tests use it to decide whether an error can still be rounding.

Each operation of torch is computed in float64. Its result is then disturbed as rounding in the
lower precision may disturb it, and all later operations use the disturbed numbers. So an error
grows or shrinks as a real one does, for example in a saturated tanh or in a difference that
cancels. This is Monte Carlo arithmetic (Parker, 1997), with two sources of errors:

- A result is rounded up or down to a number of the precision (standard model: Higham, Accuracy and
  Stability of Numerical Algorithms, 2nd edition, section 2.2). A result that the precision can
  represent stays as it is.
- A sum of n terms is off by Σ δ_k s_k over its partial sums s_k, with |δ_k| ≤ u (Higham, section
  4.2). The order of the terms is not known, so a random order is assumed (section 4.5). Then s_k is
  k/n of the sum s, plus a deviation that comes from the spread of the terms,

      E Σ s_k² = s² n/3 + (q - s²/n) n/6,    q = Σ (term)².

  δ_k is uniform in [-u, u], so its variance is u²/3. The sum s may cancel. The terms in q do not.

The errors are random, but not independent (Higham, section 2.8). A computer rounds equal numbers in
equal ways and opposite numbers in opposite ways. So n equal rows of a batch have equal errors. In a
gradient they add up to n times one error. Independent errors would add up to √n times one.
Therefore an error here is a hash of the operation, of its result and, for a sum, of q. The seed
chooses the hash.
"""

import itertools
import zlib

import torch
from torch._decomp import get_decompositions
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from .operations import flatten

aten = torch.ops.aten
SIMULATIONS = 16  # in a tensor of few numbers, the worst of few draws may be small by luck


def floor(dtype: torch.dtype, device: torch.device) -> float:
    """The error that every result may have, relative to the tensor's largest number.

    It is one ulp, and three ulps for float32 on a GPU. There, Triton divides by div.full.f32 and
    computes exponentials by ex2.approx.f32. Each has an error of up to two ulps (PTX ISA,
    floating-point instructions). The compiler of torch's own kernels rounds a quotient to nearest.
    """
    gpu = device.type != "cpu" and dtype == torch.float32
    return torch.finfo(dtype).eps * (3 if gpu else 1)


def _mean(x, *args, **kwargs):
    total = x.sum(*args, **kwargs)
    return total / (x.numel() / max(total.numel(), 1))


def _var_mean(x, dim, unbiased=True, keepdim=False):
    mean = x.mean(dim, keepdim=True)
    total = (x - mean).square().sum(dim, keepdim=keepdim)
    count = x.numel() / max(total.numel(), 1) - unbiased
    return total / count, mean if keepdim else mean.view(total.shape)


# Operations that consist of several steps. Each step rounds.
STEPS = {
    aten.mean.default: _mean,
    aten.mean.dim: _mean,
    aten.var_mean.dim: _var_mean,
} | get_decompositions(
    [
        aten._log_softmax,
        aten._log_softmax_backward_data,
        aten._softmax,
        aten._softmax_backward_data,
        aten.gelu,
        aten.gelu_backward,
        aten.mse_loss,
        aten.mse_loss_backward,
        aten.nll_loss_backward,
        aten.nll_loss_forward,
        aten.native_layer_norm,
        aten.native_layer_norm_backward,
        aten.sigmoid,
        aten.sigmoid_backward,
        aten.silu,
        aten.silu_backward,
        aten.tanh_backward,
        aten.leaky_relu_backward,
        aten.threshold_backward,
    ]
)
# Operations that are sums of their arguments, or of products of these. With ones as arguments they
# count the terms. With squares they sum the terms' squares.
SUMS = {
    aten.addmm.default,
    aten.addmm_.default,
    aten.addmv.default,
    aten.baddbmm.default,
    aten.bmm.default,
    aten.convolution.default,
    aten.convolution_backward.default,
    aten.dot.default,
    aten.mm.default,
    aten.mv.default,
    aten.sum.default,
    aten.sum.dim_IntList,
}


def summed(func, change, args, kwargs) -> list[torch.Tensor]:
    """The results of a sum after `change` is applied to every factor of its terms."""

    def apply(value):
        return change(value) if isinstance(value, torch.Tensor) else value

    scales = {name: change(kwargs[name]) for name in ("alpha", "beta") if name in kwargs}
    results = func(*tree_map(apply, args), **(tree_map(apply, kwargs) | scales))
    return [t for t in flatten(results) if t.numel()]


def square(value):
    return value * value


def one(value):
    return torch.ones_like(value) if isinstance(value, torch.Tensor) else 1


def hashed(seed: int, *numbers: torch.Tensor) -> torch.Tensor:
    """Numbers in (0, 1), each a hash of the seed and of the elements of `numbers` at its place.

    The elements are rounded to float32 first, because two computations of one sum in float64 may
    differ in the last bits. The bits are mixed as in SplitMix64 (Steele, Lea and Flood, Fast
    Splittable Pseudorandom Number Generators, 2014).
    """
    bits = torch.tensor(seed, device=numbers[0].device)
    for t in numbers:
        bits = bits ^ t.float().view(torch.int32).long()
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
            above = (bits >> shift) & ((1 << (64 - shift)) - 1)  # int64 fills with its sign
            bits = (bits ^ above) * (factor - (factor >> 63 << 64))
    return ((bits >> 11 & ((1 << 53) - 1)).double() + 0.5) / (1 << 53)


class Rounding(TorchDispatchMode):
    """A mode in which float64 operations give results of `dtype`, with sums in float32.

    choices: results that are not floating point, such as those of comparisons and of argmax, in the
    order of the operations. Without a seed they are appended. With a seed they are read back, so
    the simulation decides as the exact computation did. Which of two nearly equal numbers is larger
    is not a question of accuracy.
    seed: of the random errors. None makes no errors.
    """

    def __init__(self, dtype: torch.dtype, choices: list[torch.Tensor], seed: int | None):
        super().__init__()
        self.dtype, self.choices, self.seed = dtype, choices, seed
        self.left = None if seed is None else iter(choices)
        self.unit = torch.finfo(dtype).eps / 2
        self.unit_of_sums = min(self.unit, torch.finfo(torch.float32).eps / 2)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in STEPS:
            with self:
                return STEPS[func](*args, **kwargs)
        count, squares = (
            summed(func, change, args, kwargs) if self.seed is not None and func in SUMS else []
            for change in (one, square)
        )
        result = func(*args, **kwargs)
        if not func.is_view:
            changed = [t for t in flatten(written(func, args) or result) if t.numel()]
            for t, n, q in itertools.zip_longest(changed, count, squares):
                self.disturb(func, t, n, q)
        return result

    def disturb(self, func, t, n, q) -> None:
        """Disturbs a result of `func` in place.

        For a sum, n is the number of its terms, and q is Σ (term)². Else they are None.
        """
        if not t.is_floating_point():
            if self.left is None:
                self.choices.append(t.clone())
            else:
                t.copy_(next(self.left))
        elif t.dtype == torch.float64 and self.seed is not None:
            seed = zlib.crc32(f"{func} {self.seed}".encode())
            if n is not None:
                partial = t * t * n / 3 + (q - t * t / n).clamp(min=0) * n / 6  # E Σ s_k²
                size = self.unit_of_sums * (partial / 3).sqrt().copysign(t)
                t += size * torch.special.ndtri(hashed(seed, t.abs(), q))
            between = self.unit / 2 * t * (2 * hashed(seed, t.abs()) - 1)
            t.copy_((t + between).to(self.dtype))


def written(func, args) -> list:
    """The arguments that an in-place operation writes."""
    return [
        value
        for value, argument in zip(args, func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]


def errors(result: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """|result - exact| in float64.

    It is 0 where both are NaN or the same infinity, and infinite where only one of them is.
    """
    result, exact = result.detach().double(), exact.detach().double()
    difference = (result - exact).abs().nan_to_num(nan=float("inf"))
    return torch.where((result == exact) | (result.isnan() & exact.isnan()), 0.0, difference)


def worst(result: torch.Tensor, exact: torch.Tensor) -> float:
    """The largest error among the finite results, or 0.0 if there are none."""
    finite = result.isfinite()
    return errors(result, exact)[finite].amax().item() if finite.any() else 0.0


def worst_errors(compute, dtype: torch.dtype) -> list[float]:
    """The largest error of each of `compute()`'s results in `dtype`, over SIMULATIONS draws.

    compute: a function without arguments that computes in float64, the same every time. Its results
    may be in nested lists and tuples.
    """
    choices: list = []
    with Rounding(dtype, choices, seed=None):
        exact = flatten(compute())
    draws = []
    for seed in range(SIMULATIONS):
        with Rounding(dtype, choices, seed):
            results = flatten(compute())
        draws.append([worst(a, b) for a, b in zip(results, exact)])
    return [max(found) for found in zip(*draws)]
