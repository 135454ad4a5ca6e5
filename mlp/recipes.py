"""Networks and their settings by name, for `handgrad train --recipe NAME`. One row each.

`handgrad train` without --recipe takes the row `default`.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from dataclasses import fields as fields_of
from typing import Any

import torch
from torch.optim import Optimizer

from kernels import activations

from . import schedule
from .data.dataset import Dataset
from .init import initialise
from .loss import LOSSES, Criterion
from .modules import build
from .net import Net
from .optim import OPTIMIZERS, default_rate

# The optimizers' options that a message lists. torch has others, such as foreach.
_SHOWN = {"lr", "momentum", "nesterov", "dampening", "weight_decay", "betas", "eps", "alpha"}
LOSS_OF_NUMBERS = "mse"
_KERNEL, _POOL = 5, 2  # sides of every convolution's kernel and of its max-pool, in pixels


@dataclass(frozen=True)
class Recipe:
    """A network and the settings of its training.

    The widths of its input and output come from the data set.
    """

    about: str
    hidden: tuple[int, ...] = (100, 50)
    channels: tuple[int, ...] = ()  # of convolutions before the hidden layers; () is an MLP
    activation: str = "relu"
    output_activation: str = "identity"
    bias: bool = True
    init: str | None = None
    loss: str = "cross_entropy"
    loss_options: dict = field(default_factory=dict)
    optimizer: str = "sgd"
    optimizer_options: dict = field(default_factory=lambda: {"lr": 0.1})
    batch_size: int = 32
    epochs: int = 10
    drop_last: bool = False
    normalize: tuple[float, float] | None = (
        None  # (mean, std): a pixel x in [0, 1] is read as (x - mean) / std
    )
    train_samples: int | None = None  # train only on so many first samples
    schedule: str = "constant"  # of the learning rate, a name in mlp.schedule
    warmup: int = 0  # epochs in which the rate rises to its full value
    early_stopping: int | None = None  # epochs without a lower loss that end the training
    clip_norm: float | None = None  # the largest norm of all gradients together
    augment: int = 0  # pixels by which images are shifted at random in each epoch

    def prepare(self, train: Dataset, test: Dataset) -> tuple[Dataset, Dataset]:
        """The data as this recipe uses them: the first samples, normalized."""
        if self.train_samples:
            train = train.take(self.train_samples)
        if self.normalize:
            train, test = train.normalized(*self.normalize), test.normalized(*self.normalize)
        return train, test

    def network(self, train: Dataset) -> dict:
        """The `config()` of this recipe's network for a data set."""
        if self.channels:
            return self._convnet(train)
        return {
            "kind": "mlp",
            "sizes": [train.features, *self.hidden, train.outputs],
            "activation": self.activation,
            "output_activation": self.output_activation,
            "bias": self.bias,
        }

    def _convnet(self, train: Dataset) -> dict:
        """The `config()` of a network with convolutions. ValueError if it cannot take the data."""
        if not self.bias or not activations.get(self.output_activation).is_identity:
            raise ValueError(
                "a network with convolutions has biases and no activation at its output, got "
                f"bias {self.bias} and output_activation {self.output_activation}"
            )
        if train.image_shape is None:
            raise ValueError(
                f"a network with convolutions needs images, but {train.name} has rows of "
                f"{train.features} numbers"
            )
        smallest = 1
        for _ in self.channels:
            smallest = smallest * _POOL + _KERNEL - 1
        if min(train.image_shape[1:]) < smallest:
            raise ValueError(
                f"a network with {len(self.channels)} convolutions needs images of at least "
                f"{smallest} × {smallest} pixels, but those of {train.name} have "
                f"{' × '.join(map(str, train.image_shape[1:]))}; train on mnist, or take a "
                "recipe without convolutions"
            )
        return {
            "kind": "convnet",
            "image_shape": list(train.image_shape),
            "channels": list(self.channels),
            "kernel_size": _KERNEL,
            "max_pool": _POOL,
            "hidden": list(self.hidden),
            "classes": train.outputs,
            "activation": self.activation,
        }

    def model(
        self,
        train: Dataset,
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> torch.nn.Module:
        """The network as a module on `device`, with initial weights from `seed`."""
        module = build(self.network(train), device, dtype)
        initialise(dict(module.named_parameters()), self.init, seed)
        return module

    def describe(self, network: dict) -> str:
        """One line about the network of a `config()` and its training by this recipe."""
        if self.channels:
            channels = " → ".join(map(str, [network["image_shape"][0], *network["channels"]]))
            widths = [*network["hidden"], network["classes"]]
            shape = f"convolutions {channels}, then {'-'.join(map(str, widths))}"
        else:
            shape = "-".join(map(str, network["sizes"]))
        ends = network.get("output_activation", self.output_activation)
        options = ", ".join(f"{name} {value}" for name, value in self.optimizer_options.items())
        return "; ".join(
            [
                f"{shape} {network['activation']}"
                + ("" if activations.get(ends).is_identity else f", {ends} at the end"),
                f"{self.loss} by {self.optimizer}" + (f" ({options})" if options else ""),
                f"batches of {self.batch_size}",
                *self._rules(),
            ]
        )

    @property
    def reads_values(self) -> bool:
        """True if the loss reads outputs as values of the targets, False if as logits."""
        return LOSSES[self.loss].row.reads_values

    @property
    def gives_values(self) -> bool:
        """True if outputs are values of the targets, and may be any number."""
        return self.reads_values and activations.get(self.output_activation).is_identity

    @property
    def _moves_rate(self) -> bool:
        """True if the learning rate changes during the training."""
        return schedule.known(self.schedule).moves or self.warmup > 0

    def _rules(self) -> Iterator[str]:
        """This recipe's schedule, shifts, clipping, stopping and smoothing, in words."""
        if self._moves_rate:
            warmup = f" after {self.warmup} epochs of warm-up" if self.warmup else ""
            yield f"schedule {self.schedule}{warmup}"
        if self.augment:
            yield f"images shifted by up to {self.augment} pixels"
        if self.clip_norm is not None:
            yield f"gradients clipped to norm {self.clip_norm:g}"
        if self.early_stopping is not None:
            yield f"early stopping after {self.early_stopping} epochs"
        if smoothing := self.loss_options.get("label_smoothing"):
            yield f"label smoothing {smoothing:g}"

    def beyond_pack(self) -> str | None:
        """The reason why many networks in one launch cannot be trained by this recipe, or None."""
        asked = {
            "a schedule": self._moves_rate,
            "random shifts": self.augment > 0,
            "clipped gradients": self.clip_norm is not None,
            "early stopping": self.early_stopping is not None,
        }
        found = [name for name, is_asked in asked.items() if is_asked]
        if not found:
            return None
        return (
            f"trains networks together, each with its own constant rate, without {found[0]}; use "
            "`handgrad train` for one network"
        )

    def scheduler(self, samples: int) -> Callable[[Optimizer], Any] | None:
        """The schedule for epochs of so many samples, as `Trainer.fit` takes it."""
        count = samples // self.batch_size if self.drop_last else -(-samples // self.batch_size)
        return schedule.named(self.schedule, schedule.Plan(self.epochs, count, self.warmup))

    def make_loss(self) -> Criterion:
        """The loss, as `mlp.Trainer` takes it."""
        if self.loss not in LOSSES:
            raise ValueError(f"unknown loss {self.loss!r}; known: {', '.join(LOSSES)}")
        return LOSSES[self.loss](**self.loss_options)

    def make_optimizer(self, parameters: Iterable[torch.Tensor]) -> torch.optim.Optimizer:
        """The optimizer over these parameters."""
        return _optimizer(self.optimizer)(parameters, **self.optimizer_options)


RECIPES: dict[str, Recipe] = {
    "default": Recipe(
        "a ReLU network, SGD with momentum",
        optimizer_options={"lr": 0.05, "momentum": 0.9},
        epochs=20,
    ),
    "convnet": Recipe(
        "two convolutions with max-pool, then 192-120-60-10; Adam; the first 50,000 images",
        hidden=(120, 60),
        channels=(6, 12),
        optimizer="adam",
        optimizer_options={"lr": 0.01},
        batch_size=100,
        epochs=10,
        train_samples=50_000,
    ),
    "classifier": Recipe(
        "784-120-256-10 ReLU, SGD with momentum, batches of 4",
        hidden=(120, 256),
        optimizer_options={"lr": 0.001, "momentum": 0.9},
        batch_size=4,
        epochs=2,
        normalize=(0.5, 0.5),
    ),
    # The loss is averaged over the batch and the ten classes. So it and every gradient are a tenth
    # of the usual ones.
    "sigmoid": Recipe(
        "784-100-50-10 sigmoid, weights normal(0, 0.1), plain SGD, loss averaged over classes too",
        activation="sigmoid",
        init="normal:0.1",
        loss_options={"scale": 0.1},
        drop_last=True,
    ),
    # The original notebook divides the bias gradient by the batch twice. Here it is the gradient of
    # the mean loss.
    "deep-linear": Recipe(
        "784-64-64-64-64-64-10 without activations, Xavier normal weights, slow SGD",
        hidden=(64,) * 5,
        activation="identity",
        init="xavier_normal",
        optimizer_options={"lr": 0.001},
        epochs=20,
        normalize=(0.5, 0.5),
    ),
    # The original notebook takes σ' at σ(z). Here it is taken at z, as the derivative requires.
    "mse": Recipe(
        "784-100-10, sigmoid on both layers, no biases, half the summed squared error",
        hidden=(100,),
        activation="sigmoid",
        output_activation="sigmoid",
        bias=False,
        init="normal",
        loss="mse",
        loss_options={"reduction": "sum", "scale": 0.5},
        epochs=5,
        normalize=(0.1307, 0.3081),
    ),
    # Plain torch reached 98.6% with it. The rate rises for one epoch and falls for five.
    "fast": Recipe(
        "784-256-10 ReLU for MNIST: one cycle of the learning rate, images shifted by a pixel",
        hidden=(256,),
        optimizer_options={"lr": 0.1, "momentum": 0.9, "nesterov": True},
        batch_size=128,
        epochs=6,
        normalize=(0.1307, 0.3081),
        schedule="onecycle",
        warmup=1,
        augment=1,
    ),
}

# The base of `handgrad sweep`. It has no momentum, so that only learning rates differ.
PLAIN = Recipe("plain SGD", optimizer_options={})


def get(name: str) -> Recipe:
    """The recipe called `name`. ValueError, which lists them, for an unknown name."""
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}; known: {', '.join(RECIPES)}")
    return RECIPES[name]


def changed(recipe: Recipe, **changes: Any) -> Recipe:
    """A copy of a recipe with the changes that are not None.

    A change that is no field of a recipe is an option of the loss, else of the optimizer. Another
    optimizer starts with its own default rate.
    ValueError for an option that neither has, and for an unknown name.
    """
    changes = {key: value for key, value in changes.items() if value is not None}
    fields = {f.name: changes.pop(f.name) for f in fields_of(recipe) if f.name in changes}
    if fields.get("loss", recipe.loss) != recipe.loss:
        fields = {"loss_options": {}, **fields}
    kept = recipe.optimizer_options
    if _optimizer(fields.get("optimizer", recipe.optimizer)) is not _optimizer(recipe.optimizer):
        kept = {"lr": default_rate(fields["optimizer"])}
    made = replace(recipe, **fields)
    made.make_loss()
    of_loss = {k: changes.pop(k) for k in [*changes] if k in _arguments(LOSSES[made.loss])}
    made = replace(
        made,
        loss_options={**made.loss_options, **of_loss},
        optimizer_options={**kept, **changes},
    )
    activations.get(made.activation, "recipe")
    schedule.known(made.schedule)
    _check_options(made.optimizer, changes)
    return made


def suited(
    recipe: Recipe, train: Dataset, loss_chosen: bool, default: str = LOSS_OF_NUMBERS
) -> Recipe:
    """The recipe with a loss that fits the targets.

    If the targets are numbers but the loss needs classes, the loss `default` replaces it.
    loss_chosen: the user chose the loss, or an option of it, so it is kept. ValueError if it cannot
    train the targets. A loss of classes can train numbers that are shares of the classes.
    """
    row = LOSSES[recipe.loss].row
    if train.is_classification:
        return recipe
    if row.targets != "classes":
        _check_chances(recipe, train)
        return recipe
    if not loss_chosen:
        return replace(recipe, loss=default, loss_options={})
    if not _are_shares(train.targets):
        options = "".join(f", {name} {value}" for name, value in recipe.loss_options.items())
        raise ValueError(
            f"{train.name}: the loss {recipe.loss}{options} is for classes, but the targets are "
            "numbers; leave it out, or choose the loss mse for numbers, bce for yes or no"
        )
    return recipe


def _check_chances(recipe: Recipe, train: Dataset) -> None:
    """ValueError if the loss reads outputs as chances of yes, but a target is not within 0 to 1."""
    low, high = float(train.targets.min()), float(train.targets.max())
    if not recipe.reads_values and not (low >= 0 and high <= 1):
        raise ValueError(
            f"{train.name}: the loss {recipe.loss} needs targets from 0 for no to 1 for yes, but "
            f"they are {low:.4g} to {high:.4g}; choose the loss mse for numbers"
        )


def _are_shares(targets: torch.Tensor) -> bool:
    """True if each row (N, classes) is at least 0, sums to 1, and is not of one class only."""
    sums = targets.sum(1)
    close = bool(torch.isclose(sums, torch.ones_like(sums), atol=1e-3).all())
    return targets.shape[1] > 1 and bool((targets >= 0).all()) and close


def _optimizer(name: str):
    if name not in OPTIMIZERS:
        raise ValueError(f"unknown optimizer {name!r}; known: {', '.join(OPTIMIZERS)}")
    return OPTIMIZERS[name]


def _options_of(optimizer: str) -> set[str]:
    """The names of an optimizer's arguments, with those of torch's class."""
    kinds = [kind for kind in OPTIMIZERS[optimizer].__mro__ if "__init__" in vars(kind)]
    names = set().union(*(_arguments(vars(kind)["__init__"]) for kind in kinds))
    return names - {"params", "defaults"}


def _arguments(kind: Callable) -> set[str]:
    """The names of a class's or function's arguments."""
    rows = inspect.signature(kind).parameters.items()
    return {n for n, p in rows if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)} - {"self"}


def _check_options(optimizer: str, options: dict) -> None:
    """ValueError if an option does not belong to this optimizer. It says which ones have it."""
    _optimizer(optimizer)
    for option in options.keys() - _options_of(optimizer):
        losses = [name for name in LOSSES if option in _arguments(LOSSES[name])]
        if losses:
            raise ValueError(
                f"--{option.replace('_', '-')} belongs to the loss {' or '.join(losses)}; choose "
                "it with --loss, or leave the option out"
            )
        owners = [name for name in OPTIMIZERS if option in _options_of(name)]
        raise ValueError(
            f"--{option.replace('_', '-')} belongs to the optimizer "
            f"{' or '.join(owners) or 'of nobody'}, not to {optimizer}, which takes "
            f"{', '.join(sorted(_options_of(optimizer) & _SHOWN))}; leave it out"
        )


def net(
    recipe: Recipe,
    train: Dataset,
    seed: int = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Net:
    """As `Recipe.model`, but a manual Net, with the same initial weights."""
    return Net.of(recipe.model(train, seed, device, dtype))
