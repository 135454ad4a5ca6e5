"""Networks and settings by name: what `handgrad train --recipe NAME` runs. One entry each.

`default` is what `handgrad train` does without --recipe.
"""

from dataclasses import dataclass, field, replace

from .init import initialise
from .loss import LOSSES
from .modules import build
from .net import Net
from .optim import OPTIMIZERS


@dataclass(frozen=True)
class Recipe:
    """A network without its input and output widths, which the data set gives, and how it is
    trained.
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

    def prepare(self, train, test):
        """The data as this recipe reads it."""
        if self.train_samples:
            train = train.take(self.train_samples)
        if self.normalize:
            train, test = train.normalized(*self.normalize), test.normalized(*self.normalize)
        return train, test

    def network(self, train) -> dict:
        """The `config()` of this recipe's network for a data set."""
        outputs = len(train.classes) if train.is_classification else train.targets.shape[1]
        if self.channels:
            if train.image_shape is None:
                raise ValueError(
                    f"a network with convolutions needs images, but {train.name} has rows of "
                    f"{train.features} numbers"
                )
            return {
                "kind": "convnet",
                "image_shape": list(train.image_shape),
                "channels": list(self.channels),
                "kernel_size": 5,
                "max_pool": 2,
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

    def model(self, train, seed=0, device=None, dtype=None):
        """The network with initial weights of `seed`, as a module on `device`."""
        module = build(self.network(train), device, dtype)
        initialise(dict(module.named_parameters()), self.init, seed)
        return module

    def make_loss(self):
        """The loss, as `mlp.Trainer` takes it."""
        if self.loss not in LOSSES:
            raise ValueError(f"unknown loss {self.loss!r}; known: {', '.join(LOSSES)}")
        return LOSSES[self.loss](**self.loss_options)

    def make_optimizer(self, parameters):
        """The optimizer over these parameters."""
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(
                f"unknown optimizer {self.optimizer!r}; known: {', '.join(OPTIMIZERS)}"
            )
        return OPTIMIZERS[self.optimizer](parameters, **self.optimizer_options)


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
}


def get(name: str) -> Recipe:
    """The recipe called `name`; a ValueError that lists them if there is none."""
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}; known: {', '.join(RECIPES)}")
    return RECIPES[name]


def changed(recipe: Recipe, **changes) -> Recipe:
    """A recipe with the settings that are not None replaced; lr and momentum go to the
    optimizer.
    """
    options = {key: changes.pop(key) for key in ("lr", "momentum") if changes.get(key) is not None}
    changes = {key: value for key, value in changes.items() if value is not None}
    if changes.get("loss", recipe.loss) != recipe.loss:
        changes = {"loss_options": {}, **changes}
    kept = recipe.optimizer_options
    if changes.get("optimizer", recipe.optimizer) != recipe.optimizer:
        kept = {"lr": kept["lr"]} if "lr" in kept else {}
    return replace(recipe, **changes, optimizer_options={**kept, **options})


def net(recipe: Recipe, train, seed=0, device=None, dtype=None) -> Net:
    """As `Recipe.model`, a manual Net: the same initial weights."""
    return Net.of(recipe.model(train, seed, device, dtype))
