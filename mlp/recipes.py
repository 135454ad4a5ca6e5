"""Networks and settings by name: what `handgrad train --recipe NAME` runs. One entry each.

`default` is what `handgrad train` does without --recipe.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from dataclasses import fields as fields_of
from typing import Any

import torch
from torch.optim import Optimizer

from kernels import activations
from kernels.losses import unchanged

from . import schedule
from .data.dataset import Dataset
from .init import initialise
from .loss import LOSSES, Criterion
from .modules import build
from .net import Net
from .optim import OPTIMIZERS

# numbers of optimizers that a user may know; torch's arguments have others, such as foreach
_SHOWN = {"lr", "momentum", "nesterov", "dampening", "weight_decay", "betas", "eps", "alpha"}
_LOSS_OF_NUMBERS = "mse"
_KERNEL, _POOL = 5, 2  # of every convolution: the side of its kernel, and of the max-pool behind it


@dataclass(frozen=True)
class Recipe:
    """A network and how it is trained.

    Its input and output widths come from the data set.
    """

    about: str
    hidden: tuple[int, ...] = (100, 50)
    channels: tuple[int, ...] = ()  # of convolutions before the hidden layers: none is an MLP
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
        None  # (mean, std) subtracted from and dividing pixels in [0, 1]
    )
    train_samples: int | None = None  # only the first so many
    schedule: str = "constant"  # of the learning rate, by its name in mlp.schedule
    warmup: int = 0  # epochs that the rate takes to rise
    early_stopping: int | None = None  # epochs without a lower loss that end the training
    clip_norm: float | None = None  # the largest norm of all gradients together
    augment: int = 0  # pixels by which images are shifted at random in each epoch

    def prepare(self, train: Dataset, test: Dataset) -> tuple[Dataset, Dataset]:
        """The data as this recipe reads it."""
        if self.train_samples:
            train = train.take(self.train_samples)
        if self.normalize:
            train, test = train.normalized(*self.normalize), test.normalized(*self.normalize)
        return train, test

    def network(self, train: Dataset) -> dict:
        """The `config()` of this recipe's network for a data set."""
        outputs = len(train.classes) if train.is_classification else train.targets.shape[1]
        if self.channels:
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
                    f"{' × '.join(map(str, train.image_shape[1:]))}: train on mnist, or take a "
                    "recipe without convolutions"
                )
            return {
                "kind": "convnet",
                "image_shape": list(train.image_shape),
                "channels": list(self.channels),
                "kernel_size": _KERNEL,
                "max_pool": _POOL,
                "hidden": list(self.hidden),
                "classes": outputs,
                "activation": self.activation,
            }
        return {
            "kind": "mlp",
            "sizes": [train.features, *self.hidden, outputs],
            "activation": self.activation,
            "output_activation": self.output_activation,
            "bias": self.bias,
        }

    def model(
        self,
        train: Dataset,
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> torch.nn.Module:
        """The network with initial weights of `seed`, as a module on `device`."""
        module = build(self.network(train), device, dtype)
        initialise(dict(module.named_parameters()), self.init, seed)
        return module

    def describe(self, network: dict) -> str:
        """The network that a `config()` describes and how this recipe trains it, in one line."""
        if network["kind"] == "convnet":
            channels = " → ".join(map(str, [network["image_shape"][0], *network["channels"]]))
            widths = [*network["hidden"], network["classes"]]
            shape = f"convolutions {channels}, then {'-'.join(map(str, widths))}"
        else:
            shape = "-".join(map(str, network["sizes"]))
        ends = network.get("output_activation", "identity")
        options = ", ".join(f"{name} {value}" for name, value in self.optimizer_options.items())
        return "; ".join(
            [
                f"{shape} {network['activation']}"
                + (f", {ends} at the end" * (ends != "identity")),
                f"{self.loss} by {self.optimizer}" + (f" ({options})" if options else ""),
                f"batches of {self.batch_size}",
                *self._rules(),
            ]
        )

    @property
    def reads_values(self) -> bool:
        """Whether the loss reads outputs as values of the targets, not as logits."""
        return LOSSES[self.loss].row.predict is unchanged

    def _rules(self) -> Iterator[str]:
        """What this recipe does to the rate and the gradients, in words."""
        if self.schedule != "constant" or self.warmup:
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
        """What of this recipe many networks in one launch cannot have, or None."""
        asked = {
            "a schedule": self.schedule != "constant" or self.warmup > 0,
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
        """The schedule for so many samples an epoch, as `Trainer.fit` takes it."""
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
    # The loss is averaged over the batch and the ten classes: a tenth of the usual, and so is every
    # gradient.
    "sigmoid": Recipe(
        "784-100-50-10 sigmoid, weights normal(0, 0.1), plain SGD, loss averaged over classes too",
        activation="sigmoid",
        init="normal:0.1",
        loss_options={"scale": 0.1},
        drop_last=True,
    ),
    # The notebook divides the bias gradient by the batch twice; here it is the gradient of the mean
    # loss.
    "deep-linear": Recipe(
        "784-64-64-64-64-64-10 without activations, Xavier normal weights, slow SGD",
        hidden=(64,) * 5,
        activation="identity",
        init="xavier_normal",
        optimizer_options={"lr": 0.001},
        epochs=20,
        normalize=(0.5, 0.5),
    ),
    # The notebook takes σ' at σ(z); here it is taken at z, which is the derivative.
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
    # Plain torch reached 98.6% with it; the rate rises for one epoch and falls for five.
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

# What `handgrad sweep` starts from: no momentum, so that learning rates alone differ.
PLAIN = Recipe("plain SGD", optimizer_options={})


def get(name: str) -> Recipe:
    """The recipe called `name`; a ValueError that lists them if there is none."""
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}; known: {', '.join(RECIPES)}")
    return RECIPES[name]


def changed(recipe: Recipe, **changes: Any) -> Recipe:
    """A recipe in which the settings that are not None are replaced.

    What is no field of a recipe goes to the optimizer. A ValueError for an option that the
    optimizer does not have, or a name that no table holds.
    """
    changes = {key: value for key, value in changes.items() if value is not None}
    fields = {f.name: changes.pop(f.name) for f in fields_of(recipe) if f.name in changes}
    if fields.get("loss", recipe.loss) != recipe.loss:
        fields = {"loss_options": {}, **fields}
    kept = recipe.optimizer_options
    if fields.get("optimizer", recipe.optimizer) != recipe.optimizer:
        kept = {"lr": kept["lr"]} if "lr" in kept else {}
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
    recipe: Recipe, train: Dataset, loss_chosen: bool, default: str = _LOSS_OF_NUMBERS
) -> Recipe:
    """The recipe with a loss that the targets can train: `default` in place of one of classes
    where they are numbers. A ValueError where such a loss was chosen, and cannot be.
    """
    row = LOSSES[recipe.loss].row
    if train.is_classification or row.targets != "classes":
        return recipe
    if loss_chosen:
        if reason := row.refusal(train.targets.shape[1], train.targets):
            raise ValueError(f"{train.name}: {reason}")
        return recipe
    return replace(recipe, loss=default, loss_options={})


def _optimizer(name: str):
    if name not in OPTIMIZERS:
        raise ValueError(f"unknown optimizer {name!r}; known: {', '.join(OPTIMIZERS)}")
    return OPTIMIZERS[name]


def _options_of(optimizer: str) -> set[str]:
    """The names of an optimizer's arguments, torch's own among them."""
    kinds = [kind for kind in OPTIMIZERS[optimizer].__mro__ if "__init__" in vars(kind)]
    names = set().union(*(_arguments(vars(kind)["__init__"]) for kind in kinds))
    return names - {"params", "defaults"}


def _arguments(kind: Callable) -> set[str]:
    """The names of what a class or function takes."""
    rows = inspect.signature(kind).parameters.items()
    return {n for n, p in rows if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)} - {"self"}


def _check_options(optimizer: str, options: dict) -> None:
    """A ValueError that says to which optimizers an option belongs, if not to this one."""
    _optimizer(optimizer)
    for option in options.keys() - _options_of(optimizer):
        losses = [name for name in LOSSES if option in _arguments(LOSSES[name])]
        if losses:
            raise ValueError(
                f"--{option.replace('_', '-')} belongs to the loss {' or '.join(losses)}: choose "
                "it with --loss, or leave the option out"
            )
        owners = [name for name in OPTIMIZERS if option in _options_of(name)]
        raise ValueError(
            f"--{option.replace('_', '-')} belongs to the optimizer "
            f"{' or '.join(owners) or 'of nobody'}, not to {optimizer}, which takes "
            f"{', '.join(sorted(_options_of(optimizer) & _SHOWN))}: leave it out"
        )


def net(
    recipe: Recipe,
    train: Dataset,
    seed: int = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Net:
    """As `Recipe.model`, a manual Net: the same initial weights."""
    return Net.of(recipe.model(train, seed, device, dtype))
