"""The graph engine under the rules of CUDA graphs: whatever a run may change, it trains as the
manual engine does, or refuses in one line; and it reads nothing on the host while capturing.
"""

import copy
import itertools

import pytest
import torch

import kernels
import mlp
from kernels import launch
from mlp.engines import Graph, Manual, graphs
from mlp.loss import LOSSES
from mlp.optim import OPTIMIZERS
from tests.proof.graphs import CaptureError, install

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(
        not launch.INTERPRETED,
        reason="on a GPU the engine has real graphs; these run in the interpreter",
    ),
]
MODELS = {
    "two launches": lambda: mlp.MLP([6, 5, 3], activation="tanh"),
    "chain": lambda: mlp.MLP([6, 5, 3], activation="gelu"),
    "no bias": lambda: mlp.MLP([6, 5, 3], activation="tanh", bias=False),
    "convolution": lambda: mlp.ConvNet((1, 3, 2), (2,), 2, 1, (4,), 3, activation="tanh"),
}
NUMBERS = {
    "lr": 0.03,
    "momentum": 0.7,
    "betas": (0.8, 0.95),
    "weight_decay": 0.02,
    "eps": 1e-4,
    "alpha": 0.9,
    "lr_decay": 0.1,
}
RULES = {
    **{name: (kind, {"lr": 0.02}) for name, kind in OPTIMIZERS.items()},
    "momentum": (mlp.SGD, {"lr": 0.02, "momentum": 0.9}),
    "nesterov": (mlp.SGD, {"lr": 0.02, "momentum": 0.9, "nesterov": True}),
    "maximize": (mlp.SGD, {"lr": 0.001, "maximize": True}),
}
SMOOTH = lambda: mlp.SoftmaxCrossEntropy(label_smoothing=0.1)  # noqa: E731
ALL_LOSSES = {**LOSSES, "smoothed": SMOOTH}


def problem(kind):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (7, 6), dtype=torch.uint8, generator=generator)
    targets = pixels.float()[:, :3]
    targets = targets.argmax(1) if kind == "labels" else targets.softmax(1)
    return mlp.Dataset(pixels, targets, scale=1 / 255, shift=-0.5)


def moved(model, optimizer):
    """As model.cpu() and back: other memory, and the old one is given to somebody else."""
    for p in model.parameters():
        old, p.data = p.data, p.data.clone()
        old.fill_(torch.nan)


def reloaded(model, optimizer):
    old = [t for s in optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor)]
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for t in old:
        t.fill_(torch.nan)


def numbers(model, optimizer):
    group = optimizer.param_groups[0]
    group.update({k: v for k, v in NUMBERS.items() if group.get(k)})
    if "weight_decay" in group:
        group["weight_decay"] = NUMBERS["weight_decay"]


def train(engine, model, loss, make, kind):
    """(losses and accuracies, weights after each epoch) of a run in which everything changes."""
    data, optimizer, found = problem(kind), make[0](model.parameters(), **make[1]), []
    trained = engine(model, loss, optimizer)
    other = mlp.Dataset(data.inputs.clone(), data.targets.flip(0), scale=1 / 255, shift=-0.5)
    plan = (
        (None, data, 3),
        (numbers, data, 3),
        (None, data.normalized(0.1, 0.5), 3),
        (None, data.normalized(0.1, 0.5), 2),
        (None, other, 2),
        (moved, other, 2),
        (reloaded, other, 2),
    )
    for epoch, (change, samples, batch) in enumerate(plan):
        if change is not None:
            change(model, optimizer)
        result = trained.epoch(samples, mlp.data.permutation(7, 0, epoch), batch)
        found.append((result, [p.detach().clone() for p in model.parameters()]))
    return found


def assert_trains_as_manual(model, loss, make, kind="labels", tolerance=1e-5):
    other = copy.deepcopy(model)
    theirs = train(Manual, other, loss(), make, kind)
    ours = train(Graph, model, loss(), make, kind)
    for epoch, ((a, weights), (b, expected)) in enumerate(zip(ours, theirs, strict=True)):
        assert (a.accuracy, a.samples) == (b.accuracy, b.samples), epoch
        assert a.loss == pytest.approx(b.loss, rel=tolerance), epoch
        for p, q in zip(weights, expected, strict=True):
            assert (p - q).abs().max() <= 10 * tolerance * q.abs().max(), epoch


CASES = [
    ("two launches", "cross_entropy", "adamw", "labels", torch.float32),
    ("chain", "smoothed", "momentum", "labels", torch.float32),
    ("convolution", "mse", "adam", "numbers", torch.float32),
    ("chain", "bce", "lion", "numbers", torch.bfloat16),
]
KINDS = ("labels", "numbers")
FULL = [
    *itertools.product(("two launches", "chain"), ALL_LOSSES, RULES, KINDS, (torch.float32,)),
    *itertools.product(("chain",), ALL_LOSSES, RULES, KINDS[:1], (torch.bfloat16,)),
    *itertools.product(
        ("no bias", "convolution"), ("cross_entropy",), RULES, KINDS[:1], (torch.float32,)
    ),
]


@pytest.mark.parametrize(
    ("model", "loss", "rule", "kind", "dtype"),
    [
        pytest.param(
            *case, marks=[] if case in CASES else pytest.mark.full, id="-".join(map(str, case))
        )
        for case in CASES + [case for case in FULL if case not in CASES]
    ],
)
def test_trains_as_manual(model, loss, rule, kind, dtype, monkeypatch):
    install(monkeypatch, steps=2)
    torch.manual_seed(0)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    network = MODELS[model]().to(dtype)
    assert_trains_as_manual(network, ALL_LOSSES[loss], RULES[rule], kind, tolerance)


def test_captures_products_by_the_library(monkeypatch):
    """They train as the manual engine's, and nothing stays captured that was of another kind."""
    sizes, data = install(monkeypatch, steps=2), problem("labels")
    model, order = MODELS["chain"](), torch.arange(6)
    other, captures = copy.deepcopy(model), []
    engine, manual = (
        kind(m, mlp.SoftmaxCrossEntropy(), mlp.SGD(m.parameters(), lr=0.1))
        for kind, m in ((Graph, model), (Manual, other))
    )
    for products in ("fused", "fused", "library"):
        with kernels.use(products=products):
            ours, theirs = (e.epoch(data, order, 3) for e in (engine, manual))
        captures.append(len(sizes))
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-5)
    assert captures[0] == captures[1] < captures[2]
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert (p - q).abs().max() <= 1e-5 * q.abs().max()


def test_two_groups_with_steps_of_their_own(monkeypatch):
    """A state in which some parameters have taken more steps than others."""
    install(monkeypatch, steps=2)
    torch.manual_seed(0)

    def make(parameters):
        first, *rest = parameters
        optimizer = mlp.Adam([{"params": [first], "lr": 0.1}, {"params": rest}], lr=0.02)
        optimizer.update([torch.ones_like(first), *(None for _ in rest[1:]), torch.ones(3)])
        return optimizer

    assert_trains_as_manual(MODELS["two launches"](), mlp.SoftmaxCrossEntropy, (make, {}))


@pytest.mark.parametrize("reason", ["float64", "use", "a loss of one's own", "dampening"])
def test_refuses_in_one_line(reason, monkeypatch):
    install(monkeypatch, steps=2)
    model, loss = MODELS["chain"](), mlp.SoftmaxCrossEntropy()
    if reason == "float64":
        model = model.double()
    if reason == "a loss of one's own":
        loss = type("Own", (), {"forward": None, "backward": None})()
    options = {"momentum": 0.9, "dampening": 0.1} if reason == "dampening" else {}
    optimizer = mlp.SGD(model.parameters(), **options)
    if reason == "use":
        with kernels.use("torch"):
            said = Graph.refuses(model, loss, optimizer, 3)
    else:
        said = Graph.refuses(model, loss, optimizer, 3)
    assert said.startswith("graph: ") and "use engine 'manual'" in said and "\n" not in said
    assert Graph.refuses(MODELS["chain"](), mlp.SoftmaxCrossEntropy(), optimizer, 3) is None or (
        reason == "dampening"
    )


def test_a_read_on_the_host_is_an_error(monkeypatch):
    install(monkeypatch, steps=2)
    t = torch.ones(3)
    for read in (lambda: t.sum().item(), lambda: bool(t[0] > 0), lambda: torch.tensor(1.0)):
        with pytest.raises(CaptureError):
            graphs._captured(read, 1, t.device)


def test_a_frozen_number_is_seen(monkeypatch):
    """What a capture takes from the host stays as it was: the harness would see a frozen rate."""
    install(monkeypatch, steps=2)
    t, rate = torch.zeros(2), [1.0]
    replay = graphs._captured(lambda: t.add_(1, alpha=rate[0]), 2, t.device)
    assert t.tolist() == [1.0, 1.0]  # of the step that compiles
    rate[0] = 5.0
    replay()
    assert t.tolist() == [3.0, 3.0]


class Recorder:
    """In the place of torch.cuda's classes: what was made, and what it was made of."""

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
