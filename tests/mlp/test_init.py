"""Every initialiser has its distribution, and a seed fixes every number."""

import math

import pytest
import torch

from mlp import MLP, Net, initialise
from mlp.init import NAMES
from tests.checks import assert_equal

N, K = 300, 400
# Standard deviations by the definitions. A uniform distribution's limit is √3 times its deviation.
DEVIATIONS = {
    "torch": 1 / math.sqrt(3 * K),
    "normal": 1.0,
    "xavier_normal": math.sqrt(2 / (N + K)),
    "xavier_uniform": math.sqrt(2 / (N + K)),
    "kaiming_normal": math.sqrt(2 / K),
    "kaiming_uniform": math.sqrt(2 / K),
}


def fresh(**shapes):
    """Parameters that hold NaN, so an element that is not written fails."""
    return {f"0.{name}": torch.full(shape, math.nan) for name, shape in shapes.items()}


@pytest.mark.parametrize("name", NAMES)
def test_distribution(name):
    parameters = fresh(weight=(N, K), bias=(N,))
    initialise(parameters, name, seed=0)
    weight, bias = parameters.values()
    deviation = DEVIATIONS[name]
    assert abs(weight.mean()) < 5 * deviation / math.sqrt(N * K)
    assert abs(weight.std() / deviation - 1) < 0.01
    if name == "torch" or name.endswith("uniform"):
        assert 0.999 < weight.abs().max() / (math.sqrt(3) * deviation) <= 1
    else:
        assert weight.abs().max() > 4 * deviation
    if name == "torch":
        assert 0.9 < bias.abs().max() * math.sqrt(K) <= 1
    else:
        assert not bias.any()


def test_normal_with_a_deviation():
    parameters, unit = fresh(weight=(N, K), bias=(N,)), fresh(weight=(N, K))
    initialise(parameters, "normal:0.1", seed=0)
    initialise(unit, "normal", seed=0)
    torch.testing.assert_close(parameters["0.weight"], unit["0.weight"] * 0.1)
    assert not parameters["0.bias"].any()


def test_seed():
    """The same seed draws the same numbers, whatever the global generator's state. Another seed, or
    None, draws others.
    """
    drawn = []
    for seed in (0, 0, 1, None, None):
        parameters = fresh(weight=(5, 7), bias=(5,))
        initialise(parameters, seed=seed)
        drawn.append(parameters["0.weight"])
    assert torch.equal(drawn[0], drawn[1])
    assert not any(torch.equal(a, b) for i, a in enumerate(drawn[1:]) for b in drawn[i + 2 :])


def test_none_is_torchs_own():
    """None draws from the global generator as nn.Linear and nn.Conv2d do, up to rounding of the
    bound.
    """
    for layer in (torch.nn.Linear(7, 5), torch.nn.Conv2d(3, 5, 2)):
        torch.manual_seed(3)
        layer.reset_parameters()
        parameters = {name: torch.empty_like(p) for name, p in layer.named_parameters()}
        torch.manual_seed(3)
        initialise(parameters)
        for name, p in layer.named_parameters():
            torch.testing.assert_close(parameters[name], p.detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_device_and_dtype_only_round(name, dtype, device):
    """Net and module, on any device and in any dtype, start from the same float32 numbers."""
    net = Net((6, 5, 3), init=name, device=device, dtype=dtype, seed=4)
    reference = Net((6, 5, 3), init=name, seed=4)
    assert_equal(
        [p.cpu() for p in net.parameters.values()],
        [p.to(dtype) for p in reference.parameters.values()],
    )
    module = MLP((6, 5, 3), device=device, dtype=dtype)
    initialise(dict(module.named_parameters()), name, 4)
    assert_equal([p.detach() for p in module.parameters()], list(net.parameters.values()))


@pytest.mark.parametrize("name", ["he", "xavier_normal:0.1", "normal:wide", "normal:-1"])
def test_unknown(name):
    parameters = fresh(weight=(5, 7), bias=(5,))
    with pytest.raises(
        ValueError, match=f"unknown initialiser '{name}'; known: {', '.join(NAMES)}.*normal:0.1"
    ):
        initialise(parameters, name)
    assert all(p.isnan().all() for p in parameters.values())
