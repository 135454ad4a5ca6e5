"""The images for the timed trainings."""

import os
from pathlib import Path

import torch

import mlp
from mlp import data


def mnist(on) -> mlp.Dataset:
    """MNIST's training images from $HANDGRAD_DATA, else random pixels of their shape. The name says
    which.
    """
    folder = os.environ.get("HANDGRAD_DATA")
    name = "random pixels of MNIST's shape"
    if folder and (Path(folder) / "MNIST").is_dir():  # without it, loading would download
        try:
            return data.load("mnist")[0].to(on)
        except data.DataError as error:
            name += f" ({error})"
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (60_000, 784), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 10, (60_000,), generator=generator)
    return mlp.Dataset(pixels, labels, scale=1 / 255, image_shape=(1, 28, 28), name=name).to(on)
