"""Initialisers by name.

The values are drawn on the CPU, so that every device starts from the same weights.
"""

import functools
import inspect
import math
from collections.abc import Callable

import torch

_INITIALISERS: dict[str, Callable[..., torch.Tensor]] = {
    "normal": torch.nn.init.normal_,
    "xavier_normal": torch.nn.init.xavier_normal_,
    "xavier_uniform": torch.nn.init.xavier_uniform_,
    "kaiming_normal": functools.partial(torch.nn.init.kaiming_normal_, nonlinearity="relu"),
    "kaiming_uniform": functools.partial(torch.nn.init.kaiming_uniform_, nonlinearity="relu"),
}
NAMES = ("torch", *_INITIALISERS)


def _draw(init: str, weight: torch.Tensor, generator) -> None:
    name, _, std = init.partition(":")
    try:
        options = {"std": float(std)} if std else {}
    except ValueError:
        name = ""
    draw = _INITIALISERS.get(name)
    takes = () if draw is None else inspect.signature(draw).parameters
    if draw is None or not options.keys() <= set(takes) or not options.get("std", 0.0) >= 0:
        raise ValueError(
            f"init: unknown initialiser {init!r}; known: {', '.join(NAMES)}, and normal:STD, such "
            "as normal:0.1"
        )
    draw(weight, **options, generator=generator)


@torch.no_grad()
def initialise(
    parameters: dict[str, torch.Tensor], init: str | None = None, seed: int | None = None
) -> None:
    """Fill weights and biases in place, in the order of `parameters`, of any dtype and device.

    parameters: name -> tensor. A name that ends in "weight" is a weight (out, in, …). Any other is
    a bias (out,), which follows its weight. init: None or "torch" fills weights and biases as
    nn.Linear and nn.Conv2d do, uniformly within ±1/√fan_in. Another of NAMES, or "normal:STD" such
    as "normal:0.1", fills the weights, and biases become 0. seed: seeds a new generator. None draws
    from torch's global one. ValueError for an unknown `init`.
    """
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    bound = math.inf
    for name, parameter in parameters.items():
        values = torch.empty(parameter.shape, dtype=torch.float32, device="cpu")
        is_weight = name.endswith("weight")
        if is_weight:
            fan_in = parameter[0].numel()
            bound = 1 / math.sqrt(fan_in) if fan_in else 0.0
        if init in (None, "torch"):
            values.uniform_(-bound, bound, generator=generator)
        elif is_weight:
            _draw(init, values, generator)
        else:
            values.zero_()
        parameter.copy_(values)
