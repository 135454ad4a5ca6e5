"""Random shifts of training images: another version of every image in every epoch.

All images are shifted at an epoch's start, where they lie, so every engine can train on them.
"""

import torch
from numpy.lib.stride_tricks import sliding_window_view

from .dataset import DataError, Dataset

_PRIME = 2_147_483_647  # keeps these draws apart from those of the samples' order
_SEEDS = 2**63  # what a generator takes


class Shifts:
    """A data set of images whose every epoch shows each image moved by up to `pixels`.

    What comes in at an edge is black: `levels[0]` of the data where it is known, else 0. Each
    image moves by whole pixels, up or down and to a side, all moves equally likely. They depend on
    seed and epoch alone. DataError for data that are no images.
    """

    def __init__(self, data: Dataset, pixels: int, seed: int = 0):
        if pixels < 1:
            raise DataError(f"{data.name}: images are shifted by 1 pixel or more, got {pixels}")
        if data.image_shape is None:
            raise DataError(
                f"{data.name}: random shifts are for images, but its rows are {data.features} "
                "numbers"
            )
        if pixels >= min(data.image_shape[1:]):
            raise DataError(
                f"{data.name}: a shift must be smaller than an image of "
                f"{' × '.join(map(str, data.image_shape[1:]))} pixels, got {pixels}"
            )
        self.data, self.pixels, self.seed = data, pixels, seed
        channels, height, width = data.image_shape
        images = data.inputs.view(len(data), channels, height, width)
        black = 0.0 if data.levels is None else data.levels[0]
        self.padded = torch.nn.functional.pad(images, (pixels,) * 4, value=black)
        # One place for all epochs: engines may have recorded where they read.
        self.moved = data._with(inputs=torch.empty_like(data.inputs))

    def epoch(self, number: int) -> Dataset:
        """The images of this epoch, in the same order; the next call overwrites them."""
        side = 2 * self.pixels + 1
        seed = (self.seed * _PRIME + number) % _SEEDS
        generator = torch.Generator().manual_seed(seed)
        choice = torch.randint(side * side, (len(self.data),), generator=generator)
        # An image that moves down is read from further up.
        up, left = side - 1 - choice // side, side - 1 - choice % side
        _, height, width = self.data.image_shape or ()
        moved, every = self.moved.inputs, torch.arange(len(choice))
        known = moved.device.type == "cpu" and moved.dtype != torch.bfloat16
        if known:  # numpy copies such windows three times as fast
            windows = sliding_window_view(self.padded.numpy(), (height, width), axis=(2, 3))
            found = windows.transpose(0, 2, 3, 1, 4, 5)[every.numpy(), up.numpy(), left.numpy()]
            moved.copy_(torch.from_numpy(found.reshape(len(found), -1)))
            return self.moved
        views = self.padded.unfold(2, height, 1).unfold(3, width, 1)
        on = [index.to(moved.device) for index in (every, up, left)]
        moved.copy_(views.permute(0, 2, 3, 1, 4, 5)[on].flatten(1))
        return self.moved
