"""The public names of `mlp`. `mlp/__init__.py` loads this file at the first use of a name."""

import importlib
from typing import Any

from . import data, recipes
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
from .optim import SGD, Adagrad, Adam, AdamW, Lion, RMSprop
from .packs import Settings
from .runs import load
from .runs.checkpoint import load_weights, save
from .sequential import Sequential
from .sweep import Sweep
from .trainer import History, Trainer

__all__ = [
    "ENGINES",
    "MLP",
    "SGD",
    "Adagrad",
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
    "Lion",
    "MSELoss",
    "MeanSquaredError",
    "Net",
    "Pinball",
    "PinballLoss",
    "RMSprop",
    "Sequential",
    "Settings",
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

# They need scikit-learn, which may be missing and takes a second to import.
ESTIMATORS = {"MLPClassifier": "estimators", "MLPRegressor": "estimators", "SearchCV": "search"}


def __getattr__(name: str) -> Any:
    if name not in ESTIMATORS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(f".{ESTIMATORS[name]}", __package__), name)
    except ModuleNotFoundError as missing:
        if not str(missing.name).startswith("sklearn"):
            raise
        raise data.needs_extra("scikit-learn", f"mlp.{name}") from None
