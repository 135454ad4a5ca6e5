"""A training for any engine, in which everything changes that may change during a run."""

import contextlib
import copy
from typing import NamedTuple

import torch

import kernels
import mlp
from mlp.loss import LOSSES
from mlp.optim import OPTIMIZERS

MODELS = {
    "two launches": lambda: mlp.MLP([6, 5, 3], activation="tanh"),
    "chain": lambda: mlp.MLP([6, 5, 3], activation="gelu"),
    "no bias": lambda: mlp.MLP([6, 5, 3], activation="tanh", bias=False),
    "convolution": lambda: mlp.ConvNet((1, 3, 2), (2,), 2, 1, (4,), 3, activation="tanh"),
}
NUMBERS = {
    "lr": 0.03,
    "momentum": 0.7,
    "dampening": 0.3,
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
    "dampening": (mlp.SGD, {"lr": 0.02, "momentum": 0.9, "dampening": 0.2}),
    "rmsprop, momentum": (mlp.RMSprop, {"lr": 0.02, "momentum": 0.9}),
    "maximize": (mlp.SGD, {"lr": 0.001, "maximize": True}),
}
ALL_LOSSES = {**LOSSES, "smoothed": lambda: mlp.SoftmaxCrossEntropy(label_smoothing=0.1)}
# name -> (dtype of the network, backend that `kernels.use` forces, relative tolerance)
PRECISIONS = {
    "fp32": (torch.float32, None, 1e-5),
    "bf16": (torch.bfloat16, None, 2e-2),
    "fp64": (torch.float64, None, 1e-9),
    "torch": (torch.float32, "torch", 1e-5),
}


def problem(kind):
    """Seven rows of pixels, with labels or with three numbers each."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (7, 6), dtype=torch.uint8, generator=generator)
    targets = pixels.float()[:, :3]
    targets = targets.argmax(1) if kind == "labels" else targets.softmax(1)
    return mlp.Dataset(pixels, targets, scale=1 / 255, shift=-0.5)


def moved(model, optimizer):
    """Moves parameters to other memory, as model.cpu() and back does. The old memory gets NaN."""
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


def moving(optimizer):
    """Changes rate and betas or momentum after a step, as a scheduler does."""
    group = optimizer.param_groups[0]
    group["lr"] *= 0.8
    if "betas" in group:
        group["betas"] = (group["betas"][0] + 0.01, group["betas"][1] - 0.01)
    elif group.get("momentum"):
        group["momentum"] -= 0.05


def epoch(trained, samples, order, batch, moves=None):
    """One epoch of an engine. `moves` is called after each step."""
    trained.demands = trained.demands._replace(per_step=moves is not None)
    trained.moves = moves
    assert trained.cannot(trained.demands) is None
    after = None if moves is None or trained.reads_ahead else lambda: moves() and None
    return trained.epoch(samples, order, batch, after)


class Epoch(NamedTuple):
    """The outcome of one epoch."""

    result: mlp.engines.EpochResult
    weights: list[torch.Tensor]
    leads: torch.Tensor  # of each sample's label, see `lead`; empty where none were kept


def lead(output, labels):
    """How far each label's output is above the best other output, relative to the batch's largest
    output.
    """
    output, labels = output.double(), labels.unsqueeze(1)
    others = output.scatter(1, labels, -torch.inf).amax(1)
    return (output.gather(1, labels).squeeze(1) - others) / output.abs().max()


@contextlib.contextmanager
def leads(trained, samples):
    """A list that gets `lead` of each batch of the engine."""
    found, step = [], trained.step

    def watched(x, y):
        output, value = step(x, y)
        if output.dim() == 2:  # engine lean keeps the labels only
            found.append(lead(output, y))
        return output, value

    if samples.is_classification and not trained.reads_ahead:
        trained.step = watched
    yield found
    trained.step = step


def train(engine, model, loss, make, kind, epochs=8):
    """The outcome of each epoch of a run in which everything changes.

    epochs: how many of the eight epochs to run.
    """
    data, optimizer, found = problem(kind), make[0](model.parameters(), **make[1]), []
    trained = engine(model, loss, optimizer)
    other = mlp.Dataset(data.inputs.clone(), data.targets.flip(0), scale=1 / 255, shift=-0.5)
    plan = (
        (None, data, 3),
        (numbers, data, 3),
        (moving, data, 3),
        (None, data.normalized(0.1, 0.5), 2),
        (None, other, 2),
        (moved, other, 2),
        (reloaded, other, 2),
        (moving, other, 2),
    )
    for number, (change, samples, batch) in enumerate(plan[:epochs]):
        moves = (lambda: moving(optimizer)) if change is moving else None
        if change is not None and moves is None:
            change(model, optimizer)
        with leads(trained, samples) as seen:
            order = mlp.data.permutation(7, 0, number)
            result = epoch(trained, samples, order, batch, moves)
        weights = [p.detach().clone() for p in model.parameters()]
        found.append(Epoch(result, weights, torch.cat([torch.empty(0), *seen])))
    return found


def forced(backend):
    """`kernels.use(backend)`, or nothing for None."""
    return contextlib.nullcontext() if backend is None else kernels.use(backend)


def assert_same(ours, theirs, tolerance):
    """Checks losses, accuracies and weights after each epoch.

    `theirs` must come from an engine that keeps its outputs. An output may be off by `tolerance` of
    the largest. So a sample whose label leads or lags by less than twice that may be right or
    wrong. Every other sample counts as in `theirs`.
    """
    for number, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert a.result.samples == b.result.samples, number
        if b.result.accuracy is None:
            assert a.result.accuracy is None, number
        else:
            assert len(b.leads) == b.result.samples, number
            right = round(a.result.accuracy * a.result.samples)
            surely = int((b.leads > 2 * tolerance).sum())
            possibly = int((b.leads >= -2 * tolerance).sum())
            assert surely <= right <= possibly, number
        assert abs(a.result.loss - b.result.loss) <= tolerance * abs(b.result.loss), number
        for p, q in zip(a.weights, b.weights, strict=True):
            assert (p - q).abs().max() <= 10 * tolerance * q.abs().max(), number
