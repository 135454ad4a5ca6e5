"""epochwise: epochs and steps inside kernels (on a CPU, in the interpreter) train as the reference
path does.
"""

import pytest

import kernels
from mlp import ENGINES
from mlp.loss import LOSSES
from tests.mlp.test_engines import OPTIONS, assert_same_run, problem, train

pytestmark = pytest.mark.interpreter
IN_KERNELS = pytest.mark.parametrize(
    "engine", [e for e in ENGINES if e not in ("autograd", "manual")]
)


def by_the_reference(data, **options):
    with kernels.use("torch"):
        return train("autograd", "cpu", data, epochs=2, **options)


@pytest.mark.parametrize("engine", ENGINES)
def test_losses_are_the_references(engine, device):
    """A short run on the kernels has the losses of the reference path, to 1e-5."""
    data = problem(count=40)
    assert_same_run(train(engine, device, data, epochs=2), by_the_reference(data))


@IN_KERNELS
@pytest.mark.parametrize("optimizer", OPTIONS.values(), ids=OPTIONS)
def test_every_optimizer(optimizer, engine, device):
    data = problem(count=20)
    run = train(engine, device, data, optimizer=optimizer, epochs=2)
    assert_same_run(run, by_the_reference(data, optimizer=optimizer), tolerance=1e-4)


@IN_KERNELS
@pytest.mark.parametrize("kind", ["labels", "numbers"])
@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss(loss, kind, engine, device):
    data = problem(kind, count=20)
    run = train(engine, device, data, loss=LOSSES[loss](reduction="sum", scale=0.1), epochs=2)
    assert_same_run(run, by_the_reference(data, loss=LOSSES[loss](reduction="sum", scale=0.1)))
