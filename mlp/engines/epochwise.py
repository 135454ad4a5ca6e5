"""Engines that run many steps without Python between: `graph` replays captured launches, `epoch` is
one launch.

    graph    the two launches of `kernels.train_step` where they serve, else the manual step;
             captured once, replayed over the epoch
    epoch    kernels.train_epoch; on a CPU mlp.cpu, one call of compiled code

Both read nothing back before the epoch's end, and allocate no gradients where the step or epoch
kernels serve.
"""

import math
from typing import Any

import torch

import kernels

from .. import cpu
from .. import loss as losses
from ..state import parameters_of
from . import takeover
from .stepwise import Demands, Engine, EpochResult, Manual, memory

_CAPTURED = 25  # steps in one CUDA graph


def spec_of(model, loss, optimizer) -> kernels.Spec | str:
    """What the training kernels call this network, loss and optimizer; or, in words, why they have
    no name for it.
    """
    config: dict[str, Any] = (
        model.config() if hasattr(model, "config") else {"kind": type(model).__name__}
    )
    if config["kind"] != "mlp":
        return f"trains multilayer perceptrons, got {config['kind']}"
    if any(p.dtype != torch.float32 for p in parameters_of(model).values()):
        return f"trains float32 networks, got {next(iter(parameters_of(model).values())).dtype}"
    criterion = _criterion(loss, config["sizes"][-1])
    rule = optimizer.rule(parameters_of(model).values()) if hasattr(optimizer, "rule") else None
    if isinstance(criterion, str) or rule is None:
        return (
            criterion
            if isinstance(criterion, str)
            else "trains with one parameter group of mlp's SGD, Adam or AdamW"
        )
    return kernels.Spec(
        tuple(config["sizes"]),
        config["activation"],
        config["output_activation"],
        config["bias"],
        **criterion,
        rule=rule,
    )


def _criterion(loss, classes: int) -> dict | str:
    """A loss of `mlp.loss` as the training kernels take it."""
    if hasattr(loss, "criterion"):
        return loss.criterion(classes)
    return f"takes the losses {', '.join(losses.LOSSES)}, got {type(loss).__name__}"


class _Fused(Engine):
    """What the two engines share: the kernels' view of model, optimizer and data."""

    @property
    def spec(self) -> kernels.Spec | str:
        """Network, loss and optimizer as they are now, see `spec_of`."""
        return spec_of(self.model, self.loss, self.optimizer)

    @property
    def parameters(self) -> list[torch.Tensor]:
        """The network's parameters where they lie now."""
        return [p.detach() for p in parameters_of(self.model).values()]

    def targets(self, data) -> torch.Tensor:
        """The targets as the kernels take them: numbers have a column for each output."""
        outputs = self.model.config()["sizes"][-1]
        return self.loss.columns(data.targets, outputs).contiguous()

    @classmethod
    def cannot(cls, demands: Demands) -> str | None:
        """Launches of many steps read the numbers once, and count every label."""
        if demands.per_step and not (cls.reads_ahead and demands.compiled):
            return (
                f"{cls.name}: reads the optimizer's numbers once an epoch, but the scheduler moves "
                "them every step"
            )
        if demands.clip_norm is not None:
            return (
                f"{cls.name}: updates a layer before the others have gradients, so it cannot clip "
                "the norm of them all"
            )
        if demands.ignored:
            return f"{cls.name}: counts every label, but the loss ignores some of them"
        return super().cannot(demands)

    @classmethod
    def differs(cls, model, loss, optimizer) -> str | None:
        """Why the kernels may not stand for this network, loss and optimizer."""
        return takeover.network(model) or takeover.criterion(loss) or takeover.optimizer(optimizer)

    def hyper(self) -> torch.Tensor:
        """The optimizer's numbers as they are now, for the kernels to read."""
        device = self.parameters[0].device
        return torch.as_tensor(self.optimizer.hyper(device), dtype=torch.float32, device=device)

    def ahead(self, steps: int) -> torch.Tensor:
        """(steps, columns) on the CPU: the optimizer's numbers at each step, as the scheduler moves
        them.
        """
        rows = []
        self.optimizer._opt_called = True  # torch's schedulers ask whether a step was taken
        for _ in range(steps):
            rows.append(self.optimizer.hyper(torch.device("cpu")))
            if self.moves is not None:
                self.moves()
        return torch.tensor(rows, dtype=torch.float64)

    def run(self, data, order, batch_size, states, count) -> kernels.Run:
        """This training as the kernels take it."""
        spec = self.spec
        assert not isinstance(spec, str)  # `refuses` would have said so
        return kernels.Run(
            spec,
            self.parameters,
            states,
            data.inputs,
            self.targets(data),
            order,
            batch_size,
            self.hyper(),
            count,
            data.scale,
            data.shift,
        )

    def measured(self, values, correct, data, order, batch_size, on_step) -> EpochResult:
        """The epoch's losses and counts, read back once; FloatingPointError names the first step
        that is not finite.
        """
        values = values.tolist()
        result = self.result(values, None, data, order, batch_size)
        if on_step is not None:
            on_step(len(values))
        if not data.is_classification:
            return result
        return result._replace(accuracy=int(correct.sum()) / len(order))


class Epoch(_Fused):
    """One launch trains the whole epoch; on a CPU one call of compiled code, which needs numba."""

    name = "epoch"
    reads_ahead = True  # in the compiled epoch of a CPU: see `cannot`

    @classmethod
    def refuses(cls, model, loss, optimizer, batch_size=1):
        first = next(iter(parameters_of(model).values())).detach()
        on_cpu = cpu.serves(first)
        if not on_cpu and kernels.backend(first) != "triton" and first.dtype == torch.float32:
            return f"epoch: {cpu.NEEDS if first.device.type == 'cpu' else 'needs a GPU'}"
        spec = cls.differs(model, loss, optimizer) or spec_of(model, loss, optimizer)
        if isinstance(spec, str):
            return f"epoch: {spec}"
        return None if on_cpu else kernels.refusal(spec, batch_size, "epoch")

    @classmethod
    def costs(cls, model, loss, optimizer, batch_size, steps):
        first = next(iter(parameters_of(model).values())).detach()
        if not cpu.serves(first):
            return None
        reason = cpu.costs(spec_of(model, loss, optimizer).sizes, batch_size, steps)
        return None if reason is None else f"epoch: {reason}"

    @torch.no_grad()
    def epoch(self, data, order, batch_size, on_step=None):
        states, count = self.optimizer.states()
        before, run = int(count), self.run(data, order, batch_size, states, count)
        try:
            if cpu.serves(self.parameters[0]):
                ahead = self.ahead(run.steps) if self.demands.per_step else None
                values, correct = cpu.train_epoch(run, ahead)
            else:
                values, correct = kernels.train_epoch(run)
        finally:
            self.optimizer.advance(int(count) - before)
        return self.measured(values, correct, data, order, batch_size, on_step)


class Graph(_Fused):
    """Launches of many steps captured in CUDA graphs and replayed; needs CUDA and one of mlp's
    optimizers.
    """

    name = "graph"

    def __init__(self, model, loss, optimizer):
        super().__init__(model, loss, optimizer)
        self._steps = self._chain = None

    @classmethod
    def refuses(cls, model, loss, optimizer, batch_size=1):
        if next(iter(parameters_of(model).values())).device.type != "cuda":
            return "graph: needs a CUDA GPU"
        reason = cls.differs(model, loss, optimizer)
        if reason is not None:
            return f"graph: {reason}"
        if any(group.get("dampening") for group in optimizer.param_groups):
            return (
                "graph: a first step with dampening differs from the others; use engine 'manual' "
                "or 'epoch'"
            )
        return None

    @torch.no_grad()
    def epoch(self, data, order, batch_size, on_step=None):
        spec = self.spec
        served = (
            isinstance(spec, kernels.Spec) and kernels.refusal(spec, batch_size, "graph") is None
        )
        run = self._fused_epoch if served else self._chain_epoch
        values, correct = run(data, order, batch_size)
        return self.measured(values, correct, data, order, batch_size, on_step)

    def _bound(self, data, order, batch_size) -> tuple:
        """What a capture depends on besides the contents of the tensors that it reads."""
        numbers = [
            (name, value)
            for group in self.optimizer.param_groups
            for name, value in group.items()
            if name not in ("params", "lr", "initial_lr", "max_lr", "min_lr")
        ]
        spec, where = self.spec, memory(self.model, self.optimizer)
        return spec, data.inputs.data_ptr(), len(order), batch_size, where, str(numbers)

    def _fused_epoch(self, data, order, batch_size):
        """Losses and correct predictions of every step, by the two launches of
        `kernels.train_step`.
        """
        steps = math.ceil(len(order) / batch_size)
        states, count = self.optimizer.states()
        key = self._bound(data, order, batch_size)[:-1]  # the numbers are read from the device
        if self._steps is None or self._steps[0] != key:
            run = self.run(data, order.clone(), batch_size, states, count.clone())
            state = kernels.StepState(run)
            state.position[0] = steps  # past the end: compiles the kernels and trains nothing
            self._steps = key, state, _captured(lambda: kernels.train_step(state), _CAPTURED)
        _, state, replay = self._steps
        run = state.run
        run.order.copy_(order)
        run.hyper.copy_(self.hyper())
        run.count.copy_(count)
        state.position.zero_()
        for _ in range(
            math.ceil((steps + 1) / _CAPTURED)
        ):  # the step past the last applies its pending update
            replay()
        self.optimizer.advance(steps)
        return run.losses, run.correct

    def _chain_epoch(self, data, order, batch_size):
        """Losses of every step and correct predictions, by the manual step."""
        full, rest = divmod(len(order), batch_size)
        self.optimizer.states(capturable=True)
        key = self._bound(data, order, batch_size)
        if self._chain is None or self._chain[0] != key:
            self._chain = (
                key,
                _Chain(self.model, self.loss, self.optimizer, data, len(order), batch_size),
            )
        return self._chain[1].run(order, full, rest)


class _Chain:
    """The manual step with everything that changes in device memory: position, batch, learning
    rate, losses.
    """

    def __init__(self, model, loss, optimizer, data, count, batch_size):
        self.engine, self.data, self.batch_size = Manual(model, loss, optimizer), data, batch_size
        self.optimizer, device = optimizer, data.inputs.device
        self.engine.trust(data)
        self.order = torch.zeros(count, dtype=torch.int64, device=device)
        self.offsets = torch.arange(batch_size, device=device)
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        self.losses = torch.zeros(math.ceil(count / batch_size), device=device)
        self.correct = torch.zeros((), dtype=torch.int64, device=device)
        self.rates = [torch.zeros((), device=device) for _ in optimizer.param_groups]
        self.replays, self._held = {}, []

    def step(self):
        """Train on the batch at `position` and move on; every host value in here is frozen at
        capture.
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

    def run(self, order, full, rest):
        """Replay `full` whole batches, then train on the `rest` samples."""
        groups = self.optimizer.param_groups
        numbers = [group["lr"] for group in groups]
        self.order.copy_(order)
        if self.engine.inlines:
            self.optimizer.hyper(order.device)  # rewrites the row that the captured updates read
        else:
            for group, rate, number in zip(groups, self.rates, numbers):
                rate.fill_(number)
                group["lr"] = rate
        try:
            for steps in (_CAPTURED, 1):
                if steps not in self.replays and full:
                    self.replays[steps] = self._capture(steps)
            self.position.zero_()
            self.correct.zero_()
            for steps in [_CAPTURED] * (full // _CAPTURED) + [1] * (full % _CAPTURED):
                self.replays[steps]()
            if rest:
                self._train(self.order[-rest:])
        finally:
            for group, number in zip(groups, numbers):
                group["lr"] = number
        return self.losses, self.correct

    def _capture(self, steps):
        """Capture after one step that compiles every kernel, and put back what that step
        changed.
        """
        self.optimizer.states(capturable=True)
        tensors = [*parameters_of(self.engine.model).values(), *_state_tensors(self.optimizer)]
        before = [t.detach().clone() for t in tensors]
        self.position.zero_()
        replay = _captured(self.step, steps)
        for t, good in zip(tensors, before):
            t.copy_(good)
        # The graph writes into the net's and the data set's buffers: keep them when these make
        # others.
        self._held += [
            dict(getattr(owner, "_buffers", {})) for owner in (self.data, *self.engine.net.stages)
        ]
        return replay


def _state_tensors(optimizer) -> list[torch.Tensor]:
    return [
        t
        for state in optimizer.state.values()
        for t in state.values()
        if isinstance(t, torch.Tensor)
    ]


def _captured(step, times: int):
    """A function that repeats `times` calls of step by replaying a CUDA graph of their launches."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()  # compiles what it launches
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(times):
            step()
    return graph.replay
