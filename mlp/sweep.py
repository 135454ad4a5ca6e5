"""Many independent networks trained together: networks with own settings, or replicas of one.

`Sweep([settings, …])` trains networks with their own settings, see `mlp.packs`. `Sweep(sizes,
replicas, lr, …)` trains replicas, which share everything but seed, lr and momentum.

On a GPU, one launch trains an epoch of all replicas, with one program for each network. On a CPU
with numba, each core takes one network at a time. Elsewhere, and for networks that the kernel does
not serve, batched products compute the same.

A replica has the initial weights and the order of samples of `Trainer` with its seed. So any
replica can be trained again alone.
"""

import copy
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

import kernels
from kernels import cpu

from . import packs, spreading
from .data.dataset import Dataset, permutation
from .data.given import check_columns, fitted, take
from .data.seen import Seen
from .engines.epochwise import rule_of, spec_of
from .engines.means import is_entropy
from .init import initialise
from .loss import check_outputs
from .metrics import measure
from .modules import MLP, blank, check_rate, loss_of
from .optim import OPTIMIZERS
from .recipes import Recipe
from .runs.checkpoint import save


def spread(low: float, high: float, count: int) -> list[float]:
    """`count` numbers from low to high, in equal ratios. ValueError unless 0 < low <= high."""
    if not 0 < low <= high:
        raise ValueError(
            "sweep: a range of learning rates must be LOW:HIGH with 0 < LOW <= HIGH, got "
            f"{low:g}:{high:g}"
        )
    return [low * (high / low) ** (i / max(count - 1, 1)) for i in range(count)]


def _one_each(name: str, value, replicas: int) -> list:
    values = list(value) if hasattr(value, "__iter__") else [value] * replicas
    if len(values) != replicas:
        raise ValueError(
            f"sweep: {name} must be one number, or one for each of {replicas} replicas, got "
            f"{len(values)}"
        )
    return values


def _rates(name: str, value: float | Sequence[float], replicas: int) -> list:
    """One number for each replica, finite and at least 0."""
    values = _one_each(name, value, replicas)
    for number in values:
        check_rate(f"sweep: {name}", number)
    return values


@dataclass
class Row:
    """One network of a sweep, after its last epoch."""

    replica: int
    seed: int
    lr: float
    momentum: float
    train_loss: float
    test_accuracy: float | None = None
    test_loss: float | None = None  # if the targets are not labels
    diverged: bool = False  # True if the loss of a step was not finite
    validation_accuracy: float | None = None
    validation_loss: float | None = None
    epochs: int | None = None  # trained epochs. None for a replica.
    settings: dict[str, Any] = field(default_factory=dict)  # those that differ from the defaults

    @property
    def rank(self) -> tuple:
        """The sort key: the best network first, and those that diverged last.

        Networks are judged by the validation data if there are any, else by the test data, else by
        the training loss.
        """
        accuracy, loss = self.validation_accuracy, self.validation_loss
        if accuracy is None and loss is None:
            accuracy, loss = self.test_accuracy, self.test_loss
        last = self.train_loss if loss is None else loss
        return self.diverged, -(accuracy or 0), last if math.isfinite(last) else math.inf


class Sweep:
    """Many multilayer perceptrons: networks with own settings, or replicas of one.

    All networks are float32. `fit` trains them, and `rows` then has its results.

    Sweep([settings, …]): networks with own settings. Each is a `mlp.Settings`, or a dict of some of
    its fields, such as hidden, optimizer, lr, batch_size and seed. Of the other arguments it takes
    only loss, device and devices.

    Sweep(sizes, replicas, …): networks of the same sizes. sizes, activation, output_activation,
    bias, init: as for `mlp.MLP`, with the same defaults.
    lr, momentum: one number, or one for each replica. 0.1 and 0.0 by default.
    seeds: one number, or one for each replica. None (the default) counts from 0.
    optimizer: a name in `mlp.optim.OPTIMIZERS`, "sgd" by default. options: its other arguments.

    loss: a loss of `mlp.loss`, its name, or a loss module. The default, None, is softmax
    cross-entropy.
    device: None (the default) is the GPU if there is one, else the CPU.
    devices: several devices, instead of `device`. They train shares of the networks at the same
    time. The results are the same as on one device. A CPU is one device, and all its cores are used
    in any case.

    ValueError for settings, options or numbers that do not fit. The same for replicas that the
    training kernels cannot describe, such as those with a loss that they do not know.
    """

    def __init__(
        self,
        sizes: Sequence[Any],
        replicas: int | None = None,
        lr: float | Sequence[float] = 0.1,
        momentum: float | Sequence[float] = 0.0,
        seeds: Sequence[int] | None = None,
        *,
        activation: str = "relu",
        output_activation: str = "identity",
        bias: bool = True,
        init: str | None = None,
        optimizer: str = "sgd",
        loss: Any = None,
        device: torch.device | str | None = None,
        devices: Sequence[torch.device | str] | None = None,
        **options: Any,
    ):
        if optimizer not in OPTIMIZERS:
            raise ValueError(
                f"sweep: unknown optimizer {optimizer!r}; known: {', '.join(OPTIMIZERS)}"
            )
        shared: dict[str, Any] = {"lr": lr, "momentum": momentum, "seeds": seeds, "init": init}
        shared |= {"activation": activation, "output_activation": output_activation}
        shared |= {"bias": bias, "optimizer": optimizer}
        if replicas is None:
            options |= {name: value for name, value in shared.items() if value is not _PLAIN[name]}
        device = devices[0] if devices else device
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.loss, self.rows = loss_of(loss), []
        self._seen: Seen | None = None  # facts about the training data
        self.members: list[packs.Member] = []
        self.settings: list[packs.Settings] = []
        self.shares: list[Sweep] = []  # one sweep for each of several devices
        if devices:
            each = {name: shared.pop(name) for name in ("lr", "momentum", "seeds")}
            network = {**shared, **options}
            self._deal(devices, sizes, replicas, each, options if replicas is None else network)
            return
        if replicas is None:
            self._take_settings(sizes, options)
            return
        if replicas < 1:
            raise ValueError(f"sweep: replicas must be at least 1, got {replicas}")
        self.replicas = replicas
        self.lrs = _rates("lr", lr, replicas)
        self.momenta = _rates("momentum", momentum, replicas)
        self.seeds = _one_each("seeds", range(replicas) if seeds is None else seeds, replicas)
        self.config: dict[str, Any] = {
            "sizes": list(sizes),
            "activation": activation,
            "output_activation": output_activation,
            "bias": bias,
        }
        self._make_replicas(optimizer, options, init)

    def _make_replicas(self, optimizer: str, options: dict[str, Any], init: str | None) -> None:
        """Make the replicas of the network of `config`, and what the kernels need of them.

        optimizer, options: its name and its arguments, without learning rate and momentum.
        """
        with blank():
            model = MLP(**self.config)
        if max(self.momenta):
            options["momentum"] = max(self.momenta)
        made = OPTIMIZERS[optimizer](model.parameters(), lr=self.lrs[0], **options)
        spec = spec_of(model, self.loss, rule_of(model, made))
        if isinstance(spec, str):
            raise ValueError(f"sweep: {spec}")
        self.spec = spec
        (self._group,) = made.param_groups
        self._stack(model, made, init)

    def _stack(self, model: MLP, optimizer: Any, init: str | None) -> None:
        """Make the stacked weights, from each replica's seed, and the stacked optimizer states."""
        self.parameters = [
            torch.empty(self.replicas, *p.shape, device=self.device) for p in model.parameters()
        ]
        for replica, seed in enumerate(self.seeds):
            initialise(
                dict(zip(dict(model.named_parameters()), [p[replica] for p in self.parameters])),
                init,
                seed,
            )
        self.states = [
            [t.to(self.device).expand(self.replicas, *t.shape).clone() for t in state]
            for part in optimizer.parts()
            for state in part.states()
        ]
        self.count = torch.zeros(1, device=self.device)

    rows: list[Row]

    def _deal(
        self,
        devices: Sequence[torch.device | str],
        sizes: Sequence[Any],
        replicas: int | None,
        each: dict[str, Any],
        options: dict[str, Any],
    ) -> None:
        """Make one sweep for each device, with its share of the networks.

        each: arguments that are one value, or one for each replica. options: those for all.
        """
        lists: dict[str, Sequence[Any]]
        if replicas is None:
            self._take_settings(sizes, options)
            lists = {"sizes": self.settings}
        else:
            self.replicas = replicas
            each["seeds"] = range(replicas) if each["seeds"] is None else each["seeds"]
            lists = {name: _one_each(name, value, replicas) for name, value in each.items()}
        count = min(len(devices), self.replicas)
        for i, device in enumerate(devices[:count]):
            own: dict[str, Any] = {
                name: spreading.share(values, i, count) for name, values in lists.items()
            }
            if replicas is not None:
                own |= {"sizes": sizes, "replicas": len(own["lr"])}
            loss = copy.deepcopy(self.loss)
            self.shares.append(Sweep(**own, loss=loss, device=device, **options))

    def _take_settings(self, given: Sequence[Any], options: dict[str, Any]) -> None:
        """Read the settings. The networks are made when `fit` knows the data."""
        if isinstance(given[0] if len(given) else 0, int):
            raise ValueError(
                "sweep: give replicas, how many networks of these sizes; or a list of settings, "
                "such as [{'hidden': (64,), 'lr': 0.1}, …]"
            )
        if options:
            name = next(iter(options))
            raise ValueError(f"sweep: {name} belongs into the settings of each network")
        self.settings = [packs.Settings.of(one) for one in given]
        self.replicas = len(self.settings)

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        train: Dataset,
        replicas: int,
        lrs: Sequence[float],
        *,
        seed: int = 0,
        device: torch.device | str | None = None,
        devices: Sequence[torch.device | str] | None = None,
    ) -> "Sweep":
        """A sweep of `replicas` networks of a recipe, with one learning rate and seed for each.

        train: gives the sizes of inputs and outputs. lrs: (replicas,). The seeds count from `seed`.
        ValueError for convolutions, and for a recipe with a schedule, random shifts, clipped
        gradients or early stopping.
        """
        if reason := recipe.beyond_pack():
            raise ValueError(f"sweep: {reason}")
        network = recipe.network(train)
        if network.pop("kind") != "mlp":
            raise ValueError("sweep: trains multilayer perceptrons only, not convolutions")
        numbers = {name: v for name, v in recipe.optimizer_options.items() if name != "lr"}
        return cls(
            network.pop("sizes"),
            replicas,
            lrs,
            numbers.pop("momentum", 0.0),
            range(seed, seed + replicas),
            **network,
            init=recipe.init,
            optimizer=recipe.optimizer,
            loss=recipe.make_loss(),
            device=device,
            devices=devices,
            **numbers,
        )

    def _hyper(self) -> torch.Tensor:
        options = {name: self._group[name] for name, _ in self.spec.rule.hyperparameters}
        if "momentum" in options:
            options["momentum"] = self.momenta
        options["lr"] = self.lrs
        return kernels.hyperparameters(
            self.spec.rule, **options, replicas=self.replicas, device=self.device
        )

    def fit(
        self,
        train: Dataset,
        epochs: int = 10,
        batch_size: int = 32,
        evaluate: Dataset | None = None,
        *,
        drop_last: bool = False,
        on_epoch: Callable[[int, torch.Tensor], Any] | None = None,
        validation: Any = None,
        early_stopping: int | None = None,
        on_progress: Callable[[int], Any] | None = None,
    ) -> list[Row]:
        """Train all networks, and return one row for each, the best first.

        Networks are ranked by accuracy (by loss if the targets are not labels) on `validation`,
        else on `evaluate`, else by training loss. A network whose loss is not finite at some step
        comes last. The others go on.

        train, evaluate, validation: as for `Trainer.fit`.
        batch_size, drop_last, on_epoch: for replicas. on_epoch(epoch, losses) is called after each
        epoch, with the mean losses (replicas,). Networks with own settings use their own
        batch_size, and they do not leave out a smaller last batch.
        early_stopping, on_progress: for networks with own settings. A network ends after
        `early_stopping` epochs without a lower loss, and then has its best weights. The loss is
        that of validation, else of evaluate, else of train. on_progress(count) is called with a
        number of epochs, from any thread.

        ValueError for data that do not fit the networks, and for early_stopping with replicas.
        """
        if self.shares:
            told = on_epoch and spreading.Gathered(on_epoch, self.replicas, len(self.shares)).told
            options = {"drop_last": drop_last, "validation": validation}
            options |= {"early_stopping": early_stopping, "on_progress": on_progress}
            return self._fit_shares(told, (train, epochs, batch_size, evaluate), options)
        if self.settings:
            measured = (evaluate, validation)
            return self._fit_settings(train, measured, epochs, early_stopping, on_progress)
        if early_stopping is not None:
            raise ValueError("sweep: early_stopping is for a list of settings")
        train = self._trained_on(train, self.config["sizes"][-1])
        if train.features != self.config["sizes"][0]:
            raise ValueError(
                f"sweep: the networks take {self.config['sizes'][0]} features, but {train.name} "
                f"has {train.features}"
            )
        evaluate, validation = self._parts((evaluate, validation))
        for part in filter(None, (train, evaluate, validation)):
            check_outputs("sweep", self.loss, part, self.config["sizes"][-1])
        count = len(train) // batch_size * batch_size if drop_last else len(train)
        found = self._train_replicas(train, epochs, batch_size, count, on_epoch)
        return self._ranked(*found, (evaluate, validation))

    def _train_replicas(
        self,
        train: Dataset,
        epochs: int,
        batch_size: int,
        count: int,
        on_epoch: Callable[[int, torch.Tensor], Any] | None,
    ) -> tuple[list[float], list[bool]]:
        """Train all replicas on `count` samples an epoch.

        Returns each one's mean loss of the last epoch, and True for each that diverged.
        """
        hyper = self._hyper()
        losses = torch.full((self.replicas,), math.nan, device=self.device)
        diverged = torch.zeros(self.replicas, dtype=torch.bool, device=self.device)
        steps = epochs * self.replicas * math.ceil(count / batch_size)
        train_all = self._backend(batch_size, steps)
        for epoch in range(1, epochs + 1):
            order = torch.stack(
                [permutation(len(train), seed, epoch, self.device)[:count] for seed in self.seeds]
            )
            run = kernels.Run(
                self.spec,
                self.parameters,
                self.states,
                train.inputs,
                train.targets,
                order,
                batch_size,
                hyper,
                self.count,
                train.scale,
                train.shift,
            )
            values, _ = train_all(run)
            losses = self._means(values, count, batch_size)
            diverged |= ~losses.isfinite()
            if on_epoch is not None:
                on_epoch(epoch, losses)
        for stacked in self.parameters:
            diverged |= ~stacked.flatten(1).isfinite().all(1)
        return losses.tolist(), diverged.tolist()

    def _fit_shares(self, told: Any, data: tuple, options: dict[str, Any]) -> list[Row]:
        """Do the work of `fit`: train the share of each device in its own thread.

        told: called with (index of the device, epoch, losses) after each epoch, or None. data,
        options: the other arguments of `fit`.
        """
        fits = [
            partial(share.fit, *data, on_epoch=told and partial(told, i), **options)
            for i, share in enumerate(self.shares)
        ]
        rows = []
        for i, found in enumerate(spreading.side_by_side(fits, self.device)):
            for row in found:
                row.replica = i + row.replica * len(self.shares)
                rows.append(row)
        self.config, self._seen = self.shares[0].config, self.shares[0]._seen
        self.rows = sorted(rows, key=lambda row: row.rank)
        return self.rows

    def _fit_settings(
        self, train: Any, measured: Any, epochs: int, early_stopping: int | None, told: Any
    ) -> list[Row]:
        data = self._trained_on(train, 1)
        self.config = {"sizes": [data.features, data.outputs]}
        evaluate, validation = self._parts(measured)
        self.members = [packs.Member(s, self.loss, data, self.device) for s in self.settings]
        judges = validation if validation is not None else evaluate
        told = told or (lambda count: None)
        packs.train(self.members, packs.Task(data, judges, epochs, early_stopping, told))
        return self._ranked_settings(evaluate, validation)

    def _ranked_settings(self, evaluate: Any, validation: Any) -> list[Row]:
        found = [self._measured(data) for data in (evaluate, validation)]
        rows = []
        for i, (member, tests, others) in enumerate(zip(self.members, *found)):
            s, losses = member.settings, member.losses
            row = Row(i, s.seed, s.lr, s.momentum, losses[-1] if losses else math.nan, *tests)
            row.diverged, row.epochs, row.settings = member.diverged, len(losses), s.said()
            row.validation_accuracy, row.validation_loss = others
            rows.append(row)
        self.rows = sorted(rows, key=lambda row: row.rank)
        return self.rows

    def _measured(self, data: Any) -> list[tuple[float | None, float | None]]:
        """(accuracy, None) of each network on data with labels, (None, loss) on other data.

        Without data, both are None.
        """
        if data is None:
            return [(None, None)] * self.replicas
        data = self._fitted(data)
        if data.is_classification:
            return [(value, None) for value in self.accuracies(data)]
        return [(None, value) for value in self.test_losses(data)]

    def _backend(self, batch_size: int, steps: int):
        """The function that trains an epoch of all networks.

        steps: the sum of the steps of all networks, to judge if compiled code pays.
        """
        if cpu.serves(self.parameters[0]):
            costs = cpu.costs(self.spec.sizes, batch_size, steps, self.parameters[0].dtype)
            return cpu.train_replicas if costs is None else packs.reference
        refused = kernels.backend(self.parameters[0]) != "triton" or kernels.refusal(
            self.spec, batch_size
        )
        return packs.reference if refused else kernels.train_replicas

    def _trained_on(self, train: Any, outputs: int) -> Dataset:
        """The training data on the networks' device. outputs: of the networks."""
        before = self._seen if self.rows and not self.settings else None
        if before is None:
            taken = take(train)
            self._seen = Seen.of(taken)
        else:
            taken = before.more(train, either=is_entropy(self.loss))
            self._seen = before.joined(taken)
        return fitted(taken.data, self.device, torch.float32, outputs)

    def _parts(self, given: Any) -> list[Dataset | None]:
        """The test and validation data, checked before any training. None stays None."""
        return [None if part is None else self._fitted(part) for part in given]

    def _fitted(self, data: Any) -> Dataset:
        """Other data of any kind that `fit` takes, read as the training data, on their device."""
        taken = Dataset.of(data) if self._seen is None else self._seen.take(data)
        if self._seen is not None:
            check_columns(taken.columns, self._seen.columns, f"sweep: {taken.name}")
        return fitted(taken, self.device, torch.float32, self.config["sizes"][-1])

    def _means(self, values, count: int, batch_size: int) -> torch.Tensor:
        """(replicas,) mean losses of an epoch, from the losses of its steps (replicas, steps)."""
        if self.loss.reduction == "sum":
            return values.sum(1) / count
        sizes = [min(batch_size, count - s) for s in range(0, count, batch_size)]
        return (values * torch.tensor(sizes, device=self.device)).sum(1) / count

    def _ranked(self, losses: list[float], diverged: list[bool], measured: Any) -> list[Row]:
        """One row for each network, the best first. measured: (test, validation) data, or None.

        Networks that diverged come last, even if they predict some labels right by chance.
        """
        tests, others = (self._measured(data) for data in measured)
        numbers = zip(self.seeds, self.lrs, self.momenta, losses, tests, diverged, others)
        rows = [
            Row(i, seed, lr, momentum, loss, test[0], test[1], bad, other[0], other[1])
            for i, (seed, lr, momentum, loss, test, bad, other) in enumerate(numbers)
        ]
        self.rows = sorted(rows, key=lambda row: row.rank)
        return self.rows

    def network(self, replica: int) -> MLP:
        """A copy of one network as its own module, on the first device of this sweep."""
        if self.shares:
            place, device = divmod(replica, len(self.shares))
            return self.shares[device].network(place).to(self.device)
        if self.members:
            return copy.deepcopy(self.members[replica].model)
        with blank():
            model = MLP(**self.config, device=self.device)
        with torch.no_grad():
            for p, stacked in zip(model.parameters(), self.parameters):
                p.copy_(stacked[replica])
        return model

    def save(self, folder: str | Path) -> None:
        """Write every network as NNN.safetensors into `folder`, for `mlp.load`."""
        for replica in range(self.replicas):
            save(self.network(replica), Path(folder) / f"{replica:03d}.safetensors")

    @torch.no_grad()
    def _scores(self, data, replicas):
        """Pairs of probabilities (networks, rows, classes) and labels (rows,), piece by piece.

        replicas: the indices of the networks. ValueError if the targets are not labels.
        """
        data = self._fitted(data)
        if not data.is_classification:
            raise ValueError(f"sweep: accuracy is of labels, but {data.name} has numbers to meet")
        models = [self.network(replica) for replica in replicas]
        for x, y in data.chunks(1024):
            yield torch.stack([self.loss.probabilities(model(x)) for model in models]), y

    def test_losses(self, data: Dataset) -> list[float]:
        """The mean loss of each network over the samples of `data`."""
        data = self._fitted(data)
        networks = map(self.network, range(self.replicas))
        return [measure(network, self.loss, data)["test_loss"] for network in networks]

    def accuracies(self, data: Dataset) -> list[float]:
        """The share of samples that each network predicts right. ValueError without labels."""
        right: Any = 0
        total = 0
        for scores, y in self._scores(data, range(self.replicas)):
            right, total = right + (scores.argmax(2) == y).sum(1), total + len(y)
        return (right / total).tolist()

    def ensemble_accuracy(self, data: Dataset) -> float:
        """The share of samples that the mean of the networks' probabilities predicts right.

        Networks that diverged are left out. The result is NaN if all diverged. ValueError without
        labels.
        """
        diverged = {row.replica for row in self.rows if row.diverged}
        sound = [replica for replica in range(self.replicas) if replica not in diverged]
        if not sound:
            return math.nan
        right, total = 0, 0
        for scores, y in self._scores(data, sound):
            right, total = right + int((scores.mean(0).argmax(1) == y).sum()), total + len(y)
        return right / total


# What the arguments of a Sweep are if they are not given.
_PLAIN = {name: p.default for name, p in inspect.signature(Sweep).parameters.items()}
