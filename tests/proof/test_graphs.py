"""More tests of the graph engine under the rules of CUDA graphs. Others show that the imitation of
graphs finds faults.
"""

import copy

import pytest
import torch

import kernels
import mlp
from kernels import launch
from mlp.engines import Graph, Manual, graphs
from tests.proof.graphs import CaptureError, install
from tests.proof.trainings import MODELS, assert_same, problem, train

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(
        not launch.INTERPRETED,
        reason="on a GPU the engine has real graphs; these run in the interpreter",
    ),
]


def test_captures_products_by_the_library(monkeypatch):
    """Products by the library train as the manual engine's. After a change of products the engine
    captures again.
    """
    monkeypatch.setattr(graphs, "_served", lambda *_: False)  # step kernels use no library
    sizes, data = install(monkeypatch, steps=2), problem("labels")
    model, order = MODELS["chain"](), torch.arange(4)
    other, captures = copy.deepcopy(model), []
    engine, manual = (
        kind(m, mlp.SoftmaxCrossEntropy(), mlp.SGD(m.parameters(), lr=0.1))
        for kind, m in ((Graph, model), (Manual, other))
    )
    for products in ("fused", "fused", "library"):
        with kernels.use(products=products):
            ours, theirs = (e.epoch(data, order, 2) for e in (engine, manual))
        captures.append(len(sizes))
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-5)
    assert captures[0] == captures[1] < captures[2]
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert (p - q).abs().max() <= 1e-5 * q.abs().max()


def test_two_groups_with_steps_of_their_own(monkeypatch):
    """Some parameters have taken more steps than others, and two groups have their own rates."""
    install(monkeypatch, steps=2)
    torch.manual_seed(0)

    def make(parameters):
        first, *rest = parameters
        optimizer = mlp.Adam([{"params": [first], "lr": 0.1}, {"params": rest}], lr=0.02)
        optimizer.update([torch.ones_like(first), *(None for _ in rest[1:]), torch.ones(3)])
        return optimizer

    model, loss = MODELS["two launches"](), mlp.SoftmaxCrossEntropy()
    theirs = train(Manual, copy.deepcopy(model), loss, (make, {}), "labels", 2)
    assert_same(train(Graph, model, loss, (make, {}), "labels", 2), theirs, 1e-5)


def test_a_first_step_of_some_parameters(monkeypatch):
    """Dampening starts at a parameter's second step. Only one parameter has taken its first."""
    install(monkeypatch, steps=2)
    torch.manual_seed(0)

    def make(parameters):
        first, *rest = parameters
        optimizer = mlp.SGD([first, *rest], lr=0.02, momentum=0.9, dampening=0.5)
        optimizer.update([torch.ones_like(first), *(None for _ in rest)])
        return optimizer

    model, loss = MODELS["two launches"](), mlp.SoftmaxCrossEntropy()
    theirs = train(Manual, copy.deepcopy(model), loss, (make, {}), "labels", 2)
    assert_same(train(Graph, model, loss, (make, {}), "labels", 2), theirs, 1e-5)


@pytest.mark.parametrize("reason", ["float64", "use", "a foreign loss"])
def test_refuses_in_one_line(reason, monkeypatch):
    install(monkeypatch, steps=2)
    model, loss = MODELS["chain"](), mlp.SoftmaxCrossEntropy()
    if reason == "float64":
        model = model.double()
    if reason == "a foreign loss":
        loss = type("Own", (), {"forward": None, "backward": None})()
    optimizer = mlp.SGD(model.parameters())
    if reason == "use":
        with kernels.use("torch"):
            said = Graph.refuses(model, loss, optimizer, 3)
    else:
        said = Graph.refuses(model, loss, optimizer, 3)
    assert said.startswith("graph: ") and "use engine 'manual'" in said and "\n" not in said
    assert Graph.refuses(MODELS["chain"](), mlp.SoftmaxCrossEntropy(), optimizer, 3) is None


def test_a_read_on_the_host_is_an_error(monkeypatch):
    install(monkeypatch, steps=2)
    t = torch.ones(3)
    for read in (lambda: t.sum().item(), lambda: bool(t[0] > 0), lambda: torch.tensor(1.0)):
        with pytest.raises(CaptureError):
            graphs._captured(read, 1, t.device)


def test_a_frozen_number_is_seen(monkeypatch):
    """A capture keeps numbers of the host as they were. So a test would notice a frozen rate."""
    install(monkeypatch, steps=2)
    t, rate = torch.zeros(2), [1.0]
    replay = graphs._captured(lambda: t.add_(1, alpha=rate[0]), 2, t.device)
    assert t.tolist() == [1.0, 1.0]  # from the first step, which only compiles
    rate[0] = 5.0
    replay()
    assert t.tolist() == [3.0, 3.0]


class Recorder:
    """Replaces a class of torch.cuda and keeps the arguments of each object that is made."""

    def __init__(self, said):
        self.said = said

    def __call__(self, *args, **options):
        made = copy.copy(self)
        made.arguments = args, options
        self.said.append(made)
        return made

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def wait_stream(self, stream):
        pass

    def replay(self):
        pass


def test_a_capture_is_made_on_the_tensors_device(monkeypatch):
    said = {}
    for name in ("Stream", "CUDAGraph", "graph", "stream", "current_stream", "device"):
        said[name] = []
        monkeypatch.setattr(torch.cuda, name, Recorder(said[name]))
    device = torch.device("cuda", 1)
    graphs._captured(lambda: None, 2, device)
    (stream,) = said["Stream"]
    assert stream.arguments == ((device,), {})
    assert [made.arguments for made in said["current_stream"]] == [((device,), {})]
    assert said["graph"][0].arguments == ((said["CUDAGraph"][0],), {"stream": stream})
    with graphs._current(device):
        assert said["device"][0].arguments == ((device,), {})
