"""The public names of `mlp`, one by one. `mlp/__init__.py` loads this file at the first use."""

from . import data, recipes
from .checkpoint import load, load_weights, save
from .data import Dataset
from .engines import ENGINES, Diverged
from .fusing import fuse
from .init import initialise
from .loss import BinaryCrossEntropy, Huber, MeanSquaredError, Pinball, SoftmaxCrossEntropy
from .modules import (
    MLP,
    BCEWithLogitsLoss,
    Conv2d,
    ConvNet,
    CrossEntropyLoss,
    HuberLoss,
    LayerNorm,
    Linear,
    MSELoss,
    PinballLoss,
)
from .net import Net
from .optim import SGD, Adam, AdamW
from .sweep import Sweep
from .trainer import History, Trainer

__all__ = [
    "ENGINES",
    "MLP",
    "SGD",
    "Adam",
    "AdamW",
    "BCEWithLogitsLoss",
    "BinaryCrossEntropy",
    "Conv2d",
    "ConvNet",
    "CrossEntropyLoss",
    "Dataset",
    "Diverged",
    "History",
    "Huber",
    "HuberLoss",
    "LayerNorm",
    "Linear",
    "MSELoss",
    "MeanSquaredError",
    "Net",
    "Pinball",
    "PinballLoss",
    "SoftmaxCrossEntropy",
    "Sweep",
    "Trainer",
    "data",
    "fuse",
    "initialise",
    "load",
    "load_weights",
    "recipes",
    "save",
]
