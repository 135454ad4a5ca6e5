"""Networks with own settings, trained side by side. Each trains as `Trainer` trains it alone.

On a CPU with numba, each core takes one network and trains all its epochs in compiled calls. The
networks with the most work come first.

Elsewhere, and if compiled code does not pay, networks with the same architecture, loss, rule, batch
and number of rows are a group. One launch, or batched products, train an epoch of a group. On a
GPU, each group has its own stream. A network that has ended leaves its group.

A network that the kernels cannot describe is trained by its own `Trainer`.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch

import kernels
from kernels import cpu

from . import schedule
from .data.dataset import Dataset, permutation
from .engines.epochwise import rule_of, spec_of
from .engines.stepwise import Diverged
from .engines.threads import ALONE, threads
from .init import initialise
from .metrics import measure
from .modules import MLP, blank, check_rate, whole
from .optim import OPTIMIZERS, default_rate
from .stopping import EarlyStopping


@dataclass(frozen=True)
class Settings:
    """The settings of one network of a sweep, and of its training.

    hidden: widths between the data's inputs and outputs. (100, 50) by default.
    activation, output_activation, bias, init: as for `mlp.MLP`. "relu", "identity", True and None
    by default.
    optimizer: a name in `mlp.optim.OPTIMIZERS`, "sgd" by default. options: its other arguments, by
    torch's names.
    lr: 0.1 by default. A dict that names an optimizer but no lr gets that optimizer's default.
    momentum, weight_decay: 0 (the default) keeps the optimizer's own default.
    schedule, warmup: as for `mlp.schedule`. "constant" and 0 epochs by default.
    batch_size: 32 by default, and at most the number of rows is used.
    seed: for the initial weights and the order of samples, 0 by default.
    rows: the training rows to use, as indices (n,) or a mask (samples,). An index may occur twice
    (bootstrap). None (the default) takes all.

    ValueError for an unknown name or value, if made by `of`. Other errors come from `Sweep.fit`.
    """

    hidden: tuple[int, ...] = (100, 50)
    activation: str = "relu"
    output_activation: str = "identity"
    bias: bool = True
    init: str | None = None
    optimizer: str = "sgd"
    lr: float = 0.1
    momentum: float = 0.0
    weight_decay: float = 0.0
    options: dict = field(default_factory=dict)
    schedule: str = "constant"
    warmup: int = 0
    batch_size: int = 32
    seed: int = 0
    rows: Any = None

    @classmethod
    def of(cls, given: Any) -> "Settings":
        """The Settings that `given` is, or that it describes as a dict of some fields.

        ValueError for an unknown field, optimizer or schedule. The same for a batch_size that is
        not a whole number of at least 1, and for rates that are negative or not finite.
        """
        if isinstance(given, cls):
            given = given.__dict__
        known = [f.name for f in fields(cls)]
        if unknown := [name for name in given if name not in known]:
            raise ValueError(f"sweep: no setting {unknown[0]!r}; known: {', '.join(known)}")
        hidden = given.get("hidden", cls.hidden)
        hidden = (hidden,) if isinstance(hidden, int) else tuple(hidden)
        optimizer = given.get("optimizer", cls.optimizer)
        if optimizer not in OPTIMIZERS:
            raise ValueError(
                f"sweep: unknown optimizer {optimizer!r}; known: {', '.join(OPTIMIZERS)}"
            )
        lr = cls.lr
        if "optimizer" in given:
            lr = default_rate(optimizer)
        made = cls(**{"lr": lr, **given, "hidden": hidden})
        whole("sweep: batch_size", made.batch_size)
        for name in ("lr", "momentum", "weight_decay"):
            check_rate(f"sweep: {name}", getattr(made, name))
        schedule.known(made.schedule)
        return made

    def said(self) -> dict[str, Any]:
        """The fields that differ from the defaults, without rows, for tables."""
        plain = Settings()
        return {
            f.name: getattr(self, f.name)
            for f in fields(self)
            if f.name != "rows" and getattr(self, f.name) != getattr(plain, f.name)
        }


class Member:
    """One network in training."""

    def __init__(self, settings: Settings, loss: Any, train: Dataset, device: torch.device):
        self.settings, self.loss = settings, loss
        sizes = [train.features, *settings.hidden, train.outputs]
        ends = settings.activation, settings.output_activation, settings.bias
        with blank():
            self.model = MLP(sizes, *ends, device=device)
        initialise(dict(self.model.named_parameters()), settings.init, settings.seed)
        numbers = {"lr": settings.lr, **settings.options}
        for name in ("momentum", "weight_decay"):
            if getattr(settings, name):
                numbers[name] = getattr(settings, name)
        try:
            self.optimizer = OPTIMIZERS[settings.optimizer](self.model.parameters(), **numbers)
        except TypeError as error:
            raise ValueError(f"sweep: optimizer {settings.optimizer}: {error}") from None
        rule = rule_of(self.model, self.optimizer)
        # None if the kernels cannot describe the training, such as a loss with class weights. Then
        # a Trainer trains it.
        spec = spec_of(self.model, loss, rule)
        self.spec: Any = None if isinstance(spec, str) else spec
        self.rows = _rows(settings.rows, len(train), device)
        count = len(train) if self.rows is None else len(self.rows)
        self.count, self.batch = count, min(settings.batch_size, count)
        self.steps = math.ceil(count / self.batch)
        self.losses: list[float] = []
        self.best: float | None = None
        self.diverged, self.ended, self.kept = False, False, 0
        self.plan: schedule.Schedule | None = None
        self.stopping: EarlyStopping | None = None

    @property
    def parameters(self) -> list[torch.Tensor]:
        """The network's parameters, detached. They share its memory."""
        return [p.detach() for p in self.model.parameters()]

    @property
    def work(self) -> float:
        """The estimated seconds of an epoch: a part for each step, and a part for its products."""
        sizes = self.model.sizes
        products = sum(k * n for k, n in itertools.pairwise(sizes))
        return self.steps * (1e-5 + 6 * self.batch * products / 5e10)

    def begin(self, epochs: int, early_stopping: int | None) -> None:
        """Make the schedule and the early stopping, before the first epoch."""
        plan = schedule.Plan(epochs, self.steps, self.settings.warmup)
        self.scheduler = made = schedule.named(self.settings.schedule, plan)
        if self.spec is None:
            return
        self.plan = None if made is None else schedule.Schedule(made, self.optimizer)
        self.stopping = None if early_stopping is None else EarlyStopping(early_stopping)

    def order(self, epoch: int, samples: int) -> torch.Tensor:
        """The rows of an epoch, (count,) int64, as `Trainer` draws them for this network alone."""
        device = self.parameters[0].device
        drawn = permutation(self.count, self.settings.seed, epoch, device)
        return drawn if self.rows is None else self.rows[drawn]

    def numbers(self) -> list[float]:
        """The current row of the optimizer's numbers, see `kernels.row_of`."""
        return [float(number) for number in self.part.numbers]

    @property
    def part(self) -> Any:
        """The one `optim.Part` of the optimizer, with all parameters."""
        (part,) = self.optimizer.parts()
        return part

    def states(self) -> list[list[torch.Tensor]]:
        """One list for each state of the optimizer's rule, in the parameters' order."""
        return self.part.states()


def _rows(given: Any, samples: int, device: torch.device) -> torch.Tensor | None:
    """The rows that a network trains on, (rows,) int64, or None for all.

    given: indices, a mask of all samples, or a slice.
    """
    if given is None:
        return None
    if isinstance(given, slice):
        given = list(range(samples)[given])
    try:
        rows = torch.as_tensor(given, device=device)
    except (RuntimeError, TypeError, ValueError):
        rows = torch.empty(0, 0)
    is_mask = rows.dtype == torch.bool
    if rows.dim() != 1 or (rows.is_floating_point() and len(rows)):
        raise ValueError(
            "sweep: rows must be indices (rows,) as whole numbers, a mask or a slice, got "
            f"{type(given).__name__} {given!r:.60}"
        )
    if is_mask and len(rows) != samples:
        raise ValueError(
            f"sweep: a mask of rows must have {samples} entries, one for each sample, got "
            f"{len(rows)}"
        )
    rows = torch.nonzero(rows)[:, 0] if is_mask else rows.long()
    if not len(rows) or int(rows.min()) < 0 or int(rows.max()) >= samples:
        raise ValueError(
            f"sweep: rows must be at least one index from 0 to {samples - 1}, got "
            f"{[int(rows.min()), int(rows.max())] if len(rows) else 'none'}"
        )
    return rows


@dataclass
class Task:
    """The arguments of one call of `fit`, shared by all members.

    judges: the data whose loss early stopping and schedules use. None is the training loss.
    """

    train: Dataset
    judges: Dataset | None
    epochs: int
    early_stopping: int | None
    told: Callable[[int], Any]  # called with a count of epochs, trained or left out


def train(members: Sequence[Member], task: Task) -> None:
    """Train each member until its last epoch, its early stopping or its divergence."""
    for member in members:
        member.begin(task.epochs, task.early_stopping)
    steps = task.epochs * sum(member.steps for member in members)
    compiled = [m for m in members if _is_compiled(m, steps)]
    with ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:
        order = sorted(compiled, key=lambda m: -m.work)
        futures = [pool.submit(_train_compiled, member, task) for member in order]
        try:
            for future in futures:
                future.result()
        finally:
            for future in futures:
                future.cancel()
    groups: dict[Any, list[Member]] = {}
    for member in members:
        if member.spec is None:
            _train_alone(member, task)
        elif member not in compiled:
            groups.setdefault((member.spec, member.batch, member.count), []).append(member)
    _train_groups(list(groups.values()), task)


def _train_alone(member: Member, task: Task) -> None:
    """Train a member with its own Trainer, because the kernels cannot describe it."""
    from .trainer import Trainer

    data = task.train
    if member.rows is not None:
        inputs, targets = data.inputs[member.rows], data.targets[member.rows]
        data = replace(data, inputs=inputs, targets=targets, _buffers={})
    trainer = Trainer(member.model, member.loss, member.optimizer, verbose=False)
    try:
        trainer.fit(
            data,
            task.epochs,
            member.batch,
            seed=member.settings.seed,
            scheduler=member.scheduler,
            validation=task.judges,
            early_stopping=task.early_stopping,
            on_epoch=lambda row: task.told(1),
        )
    except Diverged:
        member.diverged = True
    member.losses = [row["train_loss"] for row in trainer.history]
    task.told(task.epochs - len(member.losses))


def _is_compiled(member: Member, steps: int) -> bool:
    if member.spec is None or not cpu.serves(member.parameters[0]):
        return False
    dtype = member.parameters[0].dtype
    return cpu.costs(member.spec.sizes, member.batch, steps, dtype, cpu.MANY_EPOCHS) is None


def _train_compiled(member: Member, task: Task) -> None:
    """Train all epochs of a member in compiled calls, on this thread."""
    from kernels.cpu.session import LOSS, TRAINING_LOSS, Held, Session, Watch

    data, held, outputs = task.train, None, member.spec.sizes[-1]
    targets = member.loss.columns(data.targets, outputs).contiguous()
    if task.judges is not None and (member.stopping or _looks(member)):
        judged = task.judges
        held = Held(judged.inputs, member.loss.columns(judged.targets, outputs))
    samples = data.inputs, targets, data.scale, data.shift
    session = Session(
        *(member.spec, member.parameters, member.states(), samples),
        *(member.count, member.batch, held),
    )
    watch = Watch(TRAINING_LOSS if held is None else LOSS, strict=True)
    if member.stopping is not None:
        watch.patience, watch.keeps = float(member.stopping.patience - 1), True
    while len(member.losses) < task.epochs and not member.ended:
        done = len(member.losses)
        ahead = 1 if _looks(member) else session.ahead(task.epochs - done)
        orders = torch.stack([member.order(done + 1 + e, len(data)) for e in range(ahead)]).numpy()
        numbers = _numbers_ahead(member, ahead)
        found = session.epochs(orders, numbers, done * member.steps, watch)
        _note(member, found, done)
        task.told(len(found.losses))
        if found.failed is not None:
            member.diverged = True
        member.ended = found.stopped or member.diverged
    session.store()
    if watch.keeps and session.take_best():
        session.store()
    if watch.keeps:
        member.best = -watch.best
    task.told(task.epochs - len(member.losses))


def _note(member: Member, found: Any, done: int) -> None:
    """Record compiled epochs, and step a schedule that needs a loss."""
    member.losses += found.losses
    if _looks(member) and found.losses:
        row = {"train_loss": found.losses[-1], "validation_loss": found.values[-1]}
        assert member.plan is not None
        member.plan.after_epoch(row)


def _looks(member: Member) -> bool:
    """True if the schedule needs a loss after each epoch, such as "plateau"."""
    return member.plan is not None and member.plan.takes_metric


def _numbers_ahead(member: Member, epochs: int) -> torch.Tensor:
    """The rule's numbers for the next epochs, float64.

    They are one row (columns,), or (epochs · steps, columns) if there is a schedule that needs no
    loss. That schedule is then stepped through these epochs.
    """
    if member.plan is None or member.plan.takes_metric:
        return torch.tensor(member.numbers(), dtype=torch.float64, device="cpu")
    rows = []
    member.part.advance(0)  # torch's schedulers check that a step was taken
    for _ in range(epochs):
        for _ in range(member.steps):
            rows.append(member.numbers())
            member.plan.after_step()
        member.plan.after_epoch({})
    return torch.tensor(rows, dtype=torch.float64, device="cpu")


def _numbers_of_all(members: Sequence[Member]) -> torch.Tensor:
    """The next epoch's numbers, float32: (members, columns), or (members, steps, columns)."""
    rows = [_numbers_ahead(member, 1) for member in members]
    if any(row.dim() == 2 for row in rows):
        rows = [row.expand(member.steps, -1) for row, member in zip(rows, members, strict=True)]
    return torch.stack(rows).float()


def _train_groups(groups: list[list[Member]], task: Task) -> None:
    """Train all groups until all their members have ended.

    Each round launches one epoch of each group, and then reads the results of all groups.
    """
    packs = [_Group(group, task) for group in groups]
    for epoch in range(1, task.epochs + 1):
        for pack in packs:
            pack.launch(epoch)
        for pack in packs:
            pack.after_epoch(epoch)
        if not any(pack.active for pack in packs):
            break
    for pack in packs:
        pack.finish()


def reference(run: kernels.Run) -> tuple[torch.Tensor, torch.Tensor]:
    """Call `kernels.train_replicas_ref`, on a CPU with one thread if the products are small.

    Two threads wait for each other after every product. For small products this takes longer than
    one thread needs, and far longer on a busy machine.
    """
    is_small = run.batch * max(p.numel() for p in run.parameters) <= ALONE
    with threads(1 if is_small and run.data.device.type == "cpu" else None):
        return kernels.train_replicas_ref(run)


class _Group:
    """Networks with the same spec, batch and number of rows, stacked. Ended ones are taken out."""

    def __init__(self, members: list[Member], task: Task) -> None:
        self.active, self.task, first = list(members), task, members[0]
        self.spec, self.batch = first.spec, first.batch
        self.parameters = _stacked([m.parameters for m in members])
        self.states = [_stacked(each) for each in zip(*(m.states() for m in members), strict=True)]
        self.count = torch.zeros(1, device=task.train.inputs.device)
        on_gpu = self.count.device.type == "cuda"
        self.stream = torch.cuda.Stream(self.count.device) if on_gpu else None
        refused = kernels.backend(self.parameters[0]) != "triton" or kernels.refusal(
            self.spec, self.batch
        )
        self.train = reference if refused else kernels.train_replicas

    def launch(self, epoch: int) -> None:
        """Launch an epoch of the networks that have not ended. It does not wait for the result."""
        if not self.active:
            return
        data, task = self.task.train, self.task
        device = data.inputs.device
        loss = self.active[0].loss
        if self.stream is not None:
            # The current stream may still copy the weights, or take out networks that have ended.
            self.stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self.stream):  # None has no effect
            run = kernels.Run(
                self.spec,
                self.parameters,
                self.states,
                data.inputs,
                loss.columns(data.targets, self.spec.sizes[-1]).contiguous(),
                torch.stack([m.order(epoch, len(data)) for m in self.active]),
                self.batch,
                _numbers_of_all(self.active).to(device),
                self.count,
                data.scale,
                data.shift,
            )
            self.values, _ = self.train(run)
        task.told(len(self.active))

    def after_epoch(self, epoch: int) -> None:
        """Read the losses, judge each network, and take out the networks that have ended."""
        if not self.active:
            return
        if self.stream is not None:
            self.stream.synchronize()
        ended = []
        for i, member in enumerate(self.active):
            values = self.values[i].cpu().double()
            mean = _mean(member, values)
            if not math.isfinite(mean):
                member.diverged = member.ended = True
            else:
                member.losses.append(mean)
                self._judge(member, i, epoch, mean)
            if member.ended:
                ended.append(i)
        if ended:
            self._take_out(ended)

    def _judge(self, member: Member, i: int, epoch: int, mean: float) -> None:
        row: dict[str, Any] = {"epoch": epoch, "train_loss": mean}
        if self.task.judges is not None and (member.stopping or _looks(member)):
            self._copy(i, member)
            found = measure(member.model, member.loss, self.task.judges)
            row["validation_loss"] = found["test_loss"]
        if _looks(member):
            assert member.plan is not None
            member.part.advance(0)  # torch's schedulers check that a step was taken
            member.plan.after_epoch(row)
        if member.stopping is not None:
            self._copy(i, member)
            member.stopping.after_epoch(row, [member.model])
            member.ended = member.stopping.is_over

    def _copy(self, i: int, member: Member) -> None:
        with torch.no_grad():
            for p, stacked in zip(member.model.parameters(), self.parameters, strict=True):
                p.copy_(stacked[i])

    def _take_out(self, ended: list[int]) -> None:
        for i in ended:
            self._end(i, self.active[i])
        left = [i for i in range(len(self.active)) if i not in ended]
        self.active = [self.active[i] for i in left]
        self.parameters = [p[left].contiguous() for p in self.parameters]
        self.states = [[s[left].contiguous() for s in state] for state in self.states]

    def _end(self, i: int, member: Member) -> None:
        self._copy(i, member)
        if member.stopping is not None:
            member.stopping.take_best([member.model])
            member.best = member.stopping.best
        trained = len(member.losses) + member.diverged  # `launch` counted the failed epoch too
        self.task.told(self.task.epochs - trained)

    def finish(self) -> None:
        """Write the weights of the remaining networks into their modules."""
        for i, member in enumerate(self.active):
            self._end(i, member)


def _mean(member: Member, values: torch.Tensor) -> float:
    """The mean loss of all rows, from the losses of an epoch's batches (steps,)."""
    if member.loss.reduction == "sum":
        return float(values.sum()) / member.count
    starts = range(0, member.count, member.batch)
    sizes = [min(member.batch, member.count - start) for start in starts]
    return float((values * torch.tensor(sizes, device="cpu")).sum()) / member.count


def _stacked(lists: Sequence[Sequence[torch.Tensor]]) -> list[torch.Tensor]:
    """The tensors of all members, stacked: (members, …) each."""
    return [torch.stack(list(each)) for each in zip(*lists, strict=True)]


def grid(base: Settings, **lists: Sequence[Any]) -> list[Settings]:
    """The Settings of all combinations of these values of fields, and of `base` for the rest.

    The seeds count from the seed of `base`, so each network has its own.
    """
    found = [base]
    for name, values in lists.items():
        found = [replace(one, **{name: value}) for one in found for value in values]
    return [replace(one, seed=base.seed + i) for i, one in enumerate(found)]
