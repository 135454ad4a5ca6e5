"""The training of the estimators as in scikit-learn: solvers, schedules, and one call of `fit`.

Compiled epochs of a CPU or an engine train a network. With sample weights, steps by autograd take
the engine's place. The estimator decides when training ends, and keeps the attributes.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy
import torch

from kernels import cpu

from . import engines
from .data import Dataset
from .engines.epochwise import spec_of
from .optim import SGD, Adam

COMPILED_DRAWS = "MT19937"  # numpy's RandomState. The compiled code can shuffle with it.
ADAPTIVE_DIVISOR, ADAPTIVE_LEAST = 5.0, 1e-6
SOLVERS: dict[str, Callable] = {
    "sgd": lambda e, groups: SGD(
        groups,
        lr=e.learning_rate_init,
        momentum=e.momentum,
        nesterov=bool(e.nesterovs_momentum and e.momentum),
    ),
    "adam": lambda e, groups: Adam(
        groups, lr=e.learning_rate_init, betas=(e.beta_1, e.beta_2), eps=e.epsilon
    ),
}


def _constant(estimator: Any, optimizer: torch.optim.Optimizer) -> None:
    """Keep the learning rate."""


def _invscaling(estimator: Any, optimizer: torch.optim.Optimizer) -> None:
    set_rate(optimizer, estimator.learning_rate_init / (estimator.t_ + 1) ** estimator.power_t)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set another learning rate.

    scikit-learn's velocities contain the rate of each step, but torch's momentum buffers do not. So
    the buffers are multiplied by old rate / new rate. Past gradients then keep the rates they had.
    """
    for group in optimizer.param_groups:
        for p in group["params"]:
            velocity = optimizer.state[p].get("momentum_buffer")
            if velocity is not None:
                velocity.mul_(group["lr"] / rate)
        group["lr"] = rate


# Called after each epoch of solver "sgd". "adaptive" changes nothing here, because the
# estimator divides its rate when training would stop.
SCHEDULES = {"constant": _constant, "invscaling": _invscaling, "adaptive": _constant}


class Training:
    """The training of one call of fit: data on the device, loss and optimizer.

    Compiled epochs of a CPU or an engine train it. With sample weights, steps by autograd take the
    engine's place. judges: (held-out rows, their weights or None) that score each compiled epoch.
    weights: (samples,), or None.
    """

    def __init__(
        self,
        estimator: Any,
        data: Dataset,
        judges: tuple[Dataset, Any] | None,
        weights: Any,
        batch: int,
        epochs: int,
    ) -> None:
        self.estimator, self.data, self.weights, self.batch = estimator, data, weights, batch
        self.model, self.optimizer = estimator._model, estimator._optimizer
        self.loss, self.per_output = estimator._make_loss("mean")
        self.decayed = [p for g in self.optimizer.param_groups if g["decays"] for p in g["params"]]
        self.decays = bool(self.decayed)
        self.session: Any = None
        if epochs > 1 or estimator.engine == "epoch":
            self.session = self._session(judges, epochs)
        if weights is not None and self.session is None:
            self.loss, self.per_output = estimator._make_loss("none")
        elif self.session is None:
            chosen = (estimator.engine, self.model, self.loss, self.optimizer, batch)
            self.engine, _ = engines.choose(*chosen)
            self.engine.planned = epochs * -(-len(data) // batch)

    def _session(self, judges: tuple[Dataset, Any] | None, epochs: int) -> Any:
        """The compiled epochs of a CPU. None if they cannot train this network or do not pay."""
        parameters = [p.detach() for p in self.model.parameters()]
        wanted, parts = self.estimator.engine, self.optimizer.parts()
        if wanted not in ("auto", "epoch") or not cpu.serves(parameters[0]):
            return None
        if judges is not None and judges[1] is not None and not judges[1].any():
            return None  # scikit-learn's scores then name the reason
        spec = spec_of(self.model, self.loss, parts[0].rule)  # its groups differ only in decay
        steps = epochs * -(-len(self.data) // self.batch)
        call = parameters[0].dtype, cpu.MANY_EPOCHS
        if isinstance(spec, str) or (
            wanted == "auto"
            and cpu.costs(spec.sizes, self.batch, steps, *call, again=True) is not None
        ):
            return None
        from kernels.cpu.session import Held, Session

        for part in parts:
            part.states()  # this makes them
        states = [
            [self.optimizer.state[p][name] for p in self.model.parameters()]
            for name in spec.rule.states
        ]
        held, count = None, len(self.data)
        if judges is not None:
            rows, weights = judges
            targets = self.loss.columns(rows.targets, spec.sizes[-1])
            held = Held(rows.inputs, targets, weights=weights)
        self._parts, self._taken = parts, int(parts[0].taken)
        self._counted = self._taken  # steps that the optimizer knows of
        targets = self.loss.columns(self.data.targets, spec.sizes[-1])
        samples = self.data.inputs, targets, 1.0, 0.0, self.weights
        return Session(spec, parameters, states, samples, count, self.batch, held)

    def finish(self) -> None:
        """Write the last weights and optimizer states of compiled epochs to their tensors.

        Under early stopping, the best weights then replace the last. The states stay.
        """
        if self.session is None:
            return
        self.session.store()
        for part in self._parts:
            part.advance(self._taken - self._counted)
        self._counted = self._taken
        if self.estimator.early_stopping and self.session.take_best():
            self.session.store()
            self.estimator._best = self.estimator._weights()

    def _changes(self) -> bool:
        """True if the schedule changes the learning rate after each epoch."""
        return SCHEDULES[self.estimator.learning_rate] is not _constant

    @contextlib.contextmanager
    def optimizer_at_hand(self) -> Iterator[None]:
        """A context in which a schedule may change the optimizer's states and learning rate."""
        estimator = self.estimator
        if estimator.solver != "sgd" or estimator.learning_rate == "constant":
            yield
            return
        self.session.store()
        yield
        self.session.load()

    def ahead(self, left: int) -> int:
        """The number of epochs of the next compiled call, at most `left`.

        It is 1 if Python acts after each epoch: it prints the loss, draws the order, or changes the
        learning rate.
        """
        estimator = self.estimator
        drawn = estimator._random.get_state()[0] == COMPILED_DRAWS or not estimator.shuffle
        if estimator.verbose or not drawn or (estimator.solver == "sgd" and self._changes()):
            return 1
        return self.session.ahead(left)

    def epochs(self, orders: numpy.ndarray, watch: Any, draws: Any) -> Any:
        """Train an epoch for each row of `orders`, or fewer if `watch` ends training.

        orders: (epochs, samples) int64. draws: `cpu.session.Draws`, or None for the given orders,
        see `_draws` of the estimator. Returns `cpu.session.Found`.
        """
        group = self.optimizer.param_groups[0]
        rule, alpha = self.optimizer.row(group), self.estimator.alpha
        numbers = {name: group[name] for name, _ in rule.hyperparameters if name != "weight_decay"}
        arguments = orders, numbers, self._taken, watch, alpha, self.per_output
        found = self.session.epochs(*arguments, draws)
        self._taken += self.session.steps * len(found.losses)
        return found

    def failure(self, order: numpy.ndarray, step: int) -> Exception:
        """The error about a compiled epoch of this order, whose loss is not finite at `step`."""
        rows = order[step * self.batch : (step + 1) * self.batch]
        if self.weights is not None and not float(self.weights[rows].sum()):
            return self._weightless(len(rows))
        return self.estimator._diverged(self.session.bad_loss(step))

    def _weightless(self, rows: int) -> ZeroDivisionError:
        return ZeroDivisionError(
            f"{type(self.estimator).__name__}: the sample weights of a batch of {rows} sum to "
            "zero, so it has no mean loss; leave samples of weight 0 out, or take a larger "
            "batch_size"
        )

    def epoch(self, order: numpy.ndarray) -> float:
        """Train on all samples once, in this order (samples,).

        Returns the mean loss with its penalty, as scikit-learn reports it. ValueError if the loss
        is not finite.
        """
        try:
            return self._epoch(torch.from_numpy(order).to(self.data.inputs.device))
        except FloatingPointError as error:
            raise self.estimator._diverged(error) from None

    def _epoch(self, order: torch.Tensor) -> float:
        whole = len(order) // self.batch * self.batch
        # A batch's weight decay is alpha over its number of samples. So a smaller last batch is
        # trained on its own.
        parts = [p for p in (order[:whole], order[whole:]) if len(p)] if self.decays else [order]
        total, self._penalties = 0.0, [self._penalty()]
        self._shares: list[float] = []
        for part in parts:
            total += self._part(part) * len(part)
        batches = -(-len(order) // self.batch)
        shares = self._shares or [1.0] * batches
        penalty = sum(p * share for p, share in zip(self._penalties, shares))
        if len(self._penalties) <= batches:  # not every step was reported, so estimate
            penalty = (self._penalties[0] + self._penalty()) / 2 * batches
        return (total * self.per_output + penalty) / len(order)

    def _part(self, order: torch.Tensor) -> float:
        if self.weights is not None:
            return self._weighted(order)
        self._set_decay(min(self.batch, len(order)))
        told = self._note_penalty if order.device.type == "cpu" else None
        return self.engine.epoch(self.data, order, self.batch, told).loss

    def _note_penalty(self, steps: int = 1) -> None:
        """Record the penalty after a step, which is the one before the next step.

        steps: more than 1 from an engine that calls once an epoch. Nothing is recorded then.
        """
        if steps == 1:
            self._penalties.append(self._penalty())

    def _set_decay(self, samples: float) -> None:
        for group in self.optimizer.param_groups:
            group["weight_decay"] = self.estimator.alpha / samples if group["decays"] else 0.0

    def _penalty(self) -> float:
        """½ alpha Σ w² over all weights. scikit-learn adds it to the summed loss of each batch."""
        if not self.decays:
            return 0.0
        squares = sum(float(p.detach().square().sum()) for p in self.decayed)
        return 0.5 * self.estimator.alpha * squares

    def _weighted(self, order: torch.Tensor) -> float:
        total = 0.0
        for rows in order.split(self.batch):
            x, y = self.data.batch(rows, self.weights.dtype)
            losses = self.loss(self.model(x), y)
            losses = losses if losses.dim() == 1 else losses.sum(1)
            weights = self.weights[rows]
            weight = float(weights.sum())
            if not weight:
                raise self._weightless(len(rows))
            value = (losses * weights).sum() / weight
            self._set_decay(weight)
            self._shares.append(len(rows) / weight)  # the penalty is divided as the losses are
            self.optimizer.zero_grad()
            value.backward()
            self.optimizer.step()
            self._note_penalty()
            if not math.isfinite(value.item()):
                raise FloatingPointError(f"the loss is {value.item()}")
            total += value.item() * len(rows)
        return total / len(order)
