"""Every engine trains every rule, loss and precision as the manual engine does, or refuses in one
line.

The CUDA graphs are those of tests/proof/graphs.py, which refuse host reads during a capture.
"""

import copy
import itertools

import pytest
import torch

from kernels import launch
from mlp.engines import ENGINES
from tests.proof.graphs import install
from tests.proof.trainings import (
    ALL_LOSSES,
    MODELS,
    PRECISIONS,
    RULES,
    assert_same,
    forced,
    train,
)

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(
        not launch.INTERPRETED,
        reason="on a GPU the engine has real graphs; these run in the interpreter",
    ),
]
OTHERS = [name for name in ENGINES if name != "manual"]
# without --full; tests/mlp/test_engines.py tests the other engines
WHOLE = [name for name in OTHERS if ENGINES[name].reads_ahead]
CASES = [
    ("two launches", "cross_entropy", "adamw", "labels", "fp32"),
    ("chain", "smoothed", "dampening", "labels", "fp32"),
    ("chain", "bce", "lion", "numbers", "bf16"),
    ("chain", "huber", "rmsprop, momentum", "labels", "fp64"),
    ("chain", "pinball", "maximize", "labels", "torch"),
]
FULL = [
    *itertools.product(("two launches", "chain"), ALL_LOSSES, RULES, ("labels",), ("fp32",)),
    *itertools.product(
        ("two launches", "chain"), ALL_LOSSES, ("sgd", "adamw"), ("numbers",), ("fp32",)
    ),
    *itertools.product(
        ("no bias", "convolution"), ("cross_entropy",), RULES, ("labels",), ("fp32",)
    ),
    *itertools.product(("chain",), ALL_LOSSES, RULES, ("labels",), ("bf16", "fp64", "torch")),
    *itertools.product(
        ("two launches",), ALL_LOSSES, ("adamw",), ("labels",), ("bf16", "fp64", "torch")
    ),
]


def expected(engine, model, loss, rule, precision):
    """The start of an engine's reason to refuse, or None where it must train."""
    if engine == "graph" and precision in ("fp64", "torch"):
        return "captures kernels, but the reference serves here"
    if engine == "lean":
        return expected_of_lean(model, rule)
    if engine != "epoch":
        return None
    if model == "convolution":
        return "trains multilayer perceptrons, got convnet"
    if precision == "bf16":
        return "trains float32 and float64 networks, got torch."
    if loss == "smoothed":
        return "takes cross-entropy without"
    return "trains with one parameter group" if rule == "maximize" else None


def expected_of_lean(model, rule):
    """`expected` of the engine that keeps outputs only and updates a layer at a time."""
    if model == "convolution":
        return "trains multilayer perceptrons, got convnet"
    if model == "chain":
        return "keeps a layer's output, but the gradient of gelu needs its input"
    return "updates a layer at a time, so it needs one parameter" if rule == "maximize" else None


@pytest.mark.parametrize(
    ("model", "loss", "rule", "kind", "precision"),
    [
        pytest.param(*case, marks=[] if case in CASES else pytest.mark.full, id="-".join(case))
        for case in CASES + [case for case in FULL if case not in CASES]
    ],
)
def test_trains_as_manual_or_refuses(model, loss, rule, kind, precision, monkeypatch, request):
    install(monkeypatch, steps=2)
    torch.manual_seed(0)
    dtype, backend, tolerance = PRECISIONS[precision]
    network, make = MODELS[model]().to(dtype), RULES[rule]
    with forced(backend):
        manual = copy.deepcopy(network)
        theirs = train(ENGINES["manual"], manual, ALL_LOSSES[loss](), make, kind)
        for name in OTHERS if request.config.getoption("full") else WHOLE:
            twin, engine = copy.deepcopy(network), ENGINES[name]
            optimizer = make[0](twin.parameters(), **make[1])
            said = engine.refuses(twin, ALL_LOSSES[loss](), optimizer, 3)
            wanted = expected(name, model, loss, rule, precision)
            if wanted is not None:
                assert said is not None and said.startswith(f"{name}: {wanted}"), said
                assert "\n" not in said
                continue
            assert said is None
            ours = train(engine, twin, ALL_LOSSES[loss](), make, kind)
            assert_same(ours, theirs, tolerance)
