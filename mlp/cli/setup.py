"""What commands share: devices, precisions, the data and the network of a run's settings."""

from typing import Any

import torch

from .. import data, recipes

# name -> dtype of weights and data, and torch's name for the precision of float32 products
PRECISIONS = {
    "fp32": (torch.float32, "highest"),
    "tf32x3": (torch.float32, "high"),
    "tf32": (torch.float32, "medium"),
    "bf16": (torch.bfloat16, "highest"),
    "fp16": (torch.float16, "highest"),
    "fp64": (torch.float64, "highest"),
}


def pick_device(name: str) -> torch.device:
    """ "auto" is the GPU if there is one; a ValueError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"unknown device {name!r}; known: auto, cpu, cuda, cuda:1, …") from None
    count = torch.cuda.device_count() if device.type == "cuda" else 0
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ValueError(
            f"device {name} was asked for, but this machine has {count} CUDA devices; use "
            "--device cpu"
        )
    return device


def pick_precision(name: str) -> torch.dtype:
    """The dtype of a --precision; sets how float32 products are made."""
    if name not in PRECISIONS:
        raise ValueError(f"unknown precision {name!r}; known: {', '.join(PRECISIONS)}")
    dtype, products = PRECISIONS[name]
    torch.set_float32_matmul_precision(products)
    return dtype


def prepare(settings: dict[str, Any]):
    """(recipe, train, test, device, dtype) of a run's settings."""
    recipe = recipes.Recipe(**settings["recipe"])
    device, dtype = pick_device(settings["device"]), pick_precision(settings["precision"])
    train, test = recipe.prepare(*data.load(settings["dataset"], settings["data_dir"]))
    return recipe, train, test, device, dtype
