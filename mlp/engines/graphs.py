"""The engine `graph`: launches of many steps, captured in CUDA graphs and replayed over an epoch.

A graph holds the two launches of `kernels.train_step` if they serve, else the manual step. A replay
reads the same memory as the capture, and repeats the numbers that the host had at the capture. So
everything that changes from step to step, or during a run, is in device memory. Everything else is
compared before each epoch (`Bound`). If it differs, a new graph is captured.
"""

import contextlib
import math
from collections.abc import Callable
from typing import NamedTuple

import torch

import kernels
from kernels import launch

from .. import loss as losses
from ..data import Dataset
from ..net import Net
from ..state import parameters_of
from . import updates
from .epochwise import Fused, Trained
from .stepwise import EpochResult, Manual

_CAPTURED = 25  # steps in one CUDA graph


class Bound(NamedTuple):
    """Everything that a capture depends on, except the contents of the tensors that it reads.

    spec: see `spec_of`. parts: for each part of the optimizer's parameters, the rule and everything
    else that is compiled in. scheduled: True if every step has its own numbers. memory: the place
    and layout of every tensor that is read. loss: its class and arguments. reading: scale, shift
    and kind of the data. length: samples of the epoch. batch: samples of a step. products: their
    precision in float32, and the instructions that compute them.
    """

    spec: kernels.Spec | str
    parts: tuple
    scheduled: bool
    memory: tuple
    loss: tuple
    reading: tuple
    length: int
    batch: int
    products: tuple[str, str | None]

    @classmethod
    def of(
        cls, engine: "Graph", spec: kernels.Spec | str, now: "Now", data: Dataset, batch: int
    ) -> "Bound":
        """The values for an epoch that starts now."""
        states = [t for state in engine.optimizer.state.values() for t in state.values()]
        tensors = (*engine.parameters, *states, data.inputs, data.targets)
        facts = {k: _fact(v) for k, v in vars(engine.loss).items() if not k.startswith("_")}
        return cls(
            spec,
            tuple((part.rule, part.maximize, *map(id, part.parameters)) for part in now.parts),
            engine.demands.per_step,
            tuple(_fact(t) for t in tensors),
            (type(engine.loss), *sorted(facts.items())),
            (data.scale, data.shift, data.is_classification, len(data.classes)),
            len(now.order),
            batch,
            (launch.dot_precision(), launch.products()),
        )


class Now(NamedTuple):
    """The start of an epoch.

    order: indices of its samples. parts: of the optimizer. counts: the steps that each part has
    taken. They are read before the states are made, because after that a first step looks like any
    other. numbers: of each part, see `Fused.numbers`.
    """

    order: torch.Tensor
    parts: list
    counts: list
    numbers: list


def _fact(value: object) -> object:
    """A value that can be compared. For a tensor these are its address, layout and dtype."""
    if isinstance(value, torch.Tensor):
        # A count on the CPU is read before the epoch, so its address does not matter.
        on_host = value.device.type == "cpu" and value.numel() == 1
        place = None if on_host else value.data_ptr()
        return place, tuple(value.shape), value.stride(), value.dtype, value.device
    return tuple(map(_fact, value)) if isinstance(value, (tuple, list)) else value


class Graph(Fused):
    """Launches of many steps, captured in CUDA graphs and replayed.

    It needs CUDA, the kernels, and losses and optimizers of mlp.
    """

    name = "graph"

    def __init__(
        self,
        model: Net | torch.nn.Module,
        loss: losses.LossFunction,
        optimizer: torch.optim.Optimizer,
    ):
        super().__init__(model, loss, optimizer)
        self._bound: Bound | None = None
        self._steps: _TwoLaunches | _Chain | None = None

    @classmethod
    def refuses(
        cls,
        model: Net | torch.nn.Module,
        loss: losses.LossFunction,
        optimizer: torch.optim.Optimizer,
        batch_size: int = 1,
    ) -> str | None:
        first = next(iter(parameters_of(model).values())).detach()
        if not _has_graphs(first.device):
            return "graph: needs a CUDA GPU"
        if kernels.backend(first) != "triton":
            return (
                f"graph: captures kernels, but the reference serves here ({first.dtype}, or "
                "kernels.use(\"torch\")); use engine 'manual'"
            )
        reason = cls.differs(model, loss, optimizer)
        if reason is not None:
            return f"graph: {reason}"
        if type(loss) not in losses.LOSSES.values():
            return (
                f"graph: takes the losses {', '.join(losses.LOSSES)}, got {type(loss).__name__}, "
                "which may read the device; use engine 'manual'"
            )
        return None

    @torch.no_grad()
    def epoch(
        self,
        data: Dataset,
        order: torch.Tensor,
        batch_size: int,
        on_step: Callable[..., object] | None = None,
    ) -> EpochResult:
        with _current(data.inputs.device):
            spec, parts = self.spec, self.optimizer.parts(parameters_of(self.model).values())
            counts = [self.count(part) for part in parts]
            for part in parts:
                part.states()  # makes missing states
            numbers = self.numbers(parts, math.ceil(len(order) / batch_size))
            now = Now(order, parts, counts, numbers)
            bound = Bound.of(self, spec, now, data, batch_size)
            if self._steps is None or bound != self._bound:
                self._bound = self._steps = None  # frees their memory first
                kind = _TwoLaunches if _served(bound.spec, batch_size) else _Chain
                self._steps = kind(self, data, now, batch_size)
                self._bound = bound
            values, correct = self._steps.run(data, now)
        return self.measured(values, correct, data, order, batch_size, on_step)


def _served(spec: kernels.Spec | str, batch: int) -> bool:
    """True if the two launches of `kernels.train_step` serve and are faster than the chain."""
    if not isinstance(spec, kernels.Spec):
        return False
    return not (kernels.refusal(spec, batch, "graph") or kernels.outgrown(spec, batch, "graph"))


class _TwoLaunches:
    """Steps by `kernels.train_step`. Order, numbers and count are written before each epoch."""

    def __init__(self, engine: Graph, data: Dataset, now: Now, batch_size: int):
        self.engine = engine
        (part,), (count,), (numbers,) = now.parts, now.counts, now.numbers
        spec = engine.spec
        assert not isinstance(spec, str)  # `_served` checked it
        own = now.order.clone(), batch_size, count.clone(), numbers.clone()
        run = engine.run(Trained(spec, part), data, *own)
        self.state = kernels.StepState(run)
        self.state.position[0] = run.steps  # past the end, so the first call only compiles
        step = lambda: kernels.train_step(self.state)  # noqa: E731
        self.replay = _captured(step, _CAPTURED, run.device)

    def run(self, data: Dataset, now: Now) -> tuple[torch.Tensor, torch.Tensor]:
        """Losses and correct predictions of every step."""
        run = self.state.run
        (part,), (count,), (numbers,) = now.parts, now.counts, now.numbers
        run.order.copy_(now.order)
        run.hyper.copy_(numbers)
        run.count.copy_(count)
        if run.targets.data_ptr() != data.targets.data_ptr():
            run.targets.copy_(
                self.engine.targets(data, run.spec.sizes[-1])
            )  # the run holds a copy as columns
        self.state.position.zero_()
        # A step's update is applied by the step after it, so one more step follows the last.
        for _ in range(math.ceil((run.steps + 1) / _CAPTURED)):
            self.replay()
        part.advance(run.steps)
        assert run.losses is not None and run.correct is not None  # made with the run
        return run.losses, run.correct


class _Chain:
    """The manual step, with all that changes from step to step in device memory.

    This is the position, the batch, the optimizer's numbers and counts, and the losses.
    """

    def __init__(self, engine: Graph, data: Dataset, now: Now, batch_size: int):
        self.data, self.batch_size = data, batch_size
        self.engine = Manual(engine.model, engine.loss, engine.optimizer)
        self.engine.demands = engine.demands
        self.engine.trust(data)
        count, device = len(now.order), data.inputs.device
        self.order = torch.zeros(count, dtype=torch.int64, device=device)
        self.offsets = torch.arange(batch_size, device=device)
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        memory = updates.InMemory(self.engine.update, now.parts, now.numbers, self.position)
        self.engine.update = self.update = memory
        self.losses = torch.zeros(math.ceil(count / batch_size), device=device)
        self.correct = torch.zeros((), dtype=torch.int64, device=device)
        self.replays: dict[int, Callable[[], None]] = {}
        self._held: list[dict] = []

    def step(self) -> None:
        """Train on the batch at `position` and advance it.

        A capture freezes every value of the host in here.
        """
        indices = self.order.index_select(0, self.position * self.batch_size + self.offsets)
        self._train(indices)
        self.position += 1

    def _train(self, indices):
        x, y = self.data.batch(indices, self.engine.dtype)
        output, value = self.engine.step(x, y)
        self.losses.index_copy_(0, self.position, value.float().view(1))
        if self.data.is_classification:
            self.correct += (output.argmax(1) == y).sum()

    def run(self, data: Dataset, now: Now) -> tuple[torch.Tensor, torch.Tensor]:
        """Losses of every step, and correct predictions.

        Replays train the whole batches. A last smaller batch is trained without a graph.
        """
        full, rest = divmod(len(now.order), self.batch_size)
        self.order.copy_(now.order)
        wanted = [_CAPTURED] * (full // _CAPTURED) + [1] * (full % _CAPTURED)
        for steps in dict.fromkeys(wanted):
            if steps not in self.replays:
                self.replays[steps] = self._capture(steps, now)
        self.update.write(now.parts, now.counts, now.numbers)
        self.position.zero_()
        self.correct.zero_()
        for steps in wanted:
            self.replays[steps]()
        if rest:
            self._train(self.order[-rest:])
        self.update.advance(full + (rest > 0))
        return self.losses, self.correct

    def _capture(self, steps, now):
        """A capture of so many steps.

        One step runs before, to compile every kernel. Then its changes are undone.
        """
        states = [t for part in now.parts for ts in part.states() for t in ts]
        tensors = [*parameters_of(self.engine.model).values(), *states]
        before = [t.detach().clone() for t in tensors]
        self.update.write(now.parts, now.counts, now.numbers)
        self.position.zero_()
        replay = _captured(self.step, steps, self.order.device)
        for t, good in zip(tensors, before, strict=True):
            t.copy_(good)
        # The graph reads and writes buffers of the net, the data set and the loss. They must live
        # as long as the graph, also when their owners make new ones.
        owners = (self.data, *self.engine.net.stages)
        self._held += [dict(owner._buffers) for owner in owners if hasattr(owner, "_buffers")]
        self._held.append(dict(vars(self.engine.loss)))
        return replay


def _has_graphs(device: torch.device) -> bool:
    return device.type == "cuda"


def _current(device: torch.device) -> contextlib.AbstractContextManager:
    """A context with this device as the current one, for streams, graphs and launches."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _captured(step: Callable[[], None], times: int, device: torch.device) -> Callable[[], None]:
    """A function that replays a CUDA graph of the launches of `times` calls of `step`."""
    stream, current = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        step()  # compiles the kernels
    current.wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # Without `stream`, torch takes a stream of the device that captured first.
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(times):
            step()
    return graph.replay
