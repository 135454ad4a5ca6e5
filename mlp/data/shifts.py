"""Random shifts of training images, which show every image moved in another way in every epoch.

All images are shifted at the start of an epoch, into one fixed place. So every engine can train on
them.
"""

import torch
from numpy.lib.stride_tricks import sliding_window_view

from .dataset import DataError, Dataset

_PRIME = 2_147_483_647  # makes these draws differ from those of the samples' order
_SEEDS = 2**63  # a generator's seeds are below this


def check_shifts(data: Dataset, pixels: int) -> None:
    """DataError if the samples are no images, or cannot be shifted by up to so many pixels."""
    if pixels < 1:
        raise DataError(f"{data.name}: a shift must be at least 1 pixel, got {pixels}")
    if data.image_shape is None:
        raise DataError(
            f"{data.name}: random shifts need images, but its rows are {data.features} numbers "
            "without an image's shape"
        )
    if pixels >= min(data.image_shape[1:]):
        raise DataError(
            f"{data.name}: a shift must be smaller than an image of "
            f"{' × '.join(map(str, data.image_shape[1:]))} pixels, got {pixels}"
        )


class Shifts:
    """A data set of images in which each epoch moves each image by up to `pixels`.

    An image moves by whole pixels, up or down and to a side. All moves are equally likely. They
    depend only on seed and epoch. The pixels that come in at an edge are black: `levels[0]` of the
    data if known, else 0. DataError for data that are no images, and unless `pixels` is at least 1
    and less than an image's sides.
    """

    def __init__(self, data: Dataset, pixels: int, seed: int = 0):
        check_shifts(data, pixels)
        self.data, self.pixels, self.seed = data, pixels, seed
        channels, height, width = data.image_shape or ()
        images = data.inputs.view(len(data), channels, height, width)
        black = 0.0 if data.levels is None else data.levels[0]
        self.padded = torch.nn.functional.pad(images, (pixels,) * 4, value=black)
        # All epochs use the same memory, because engines may have recorded its address.
        self.moved = data._with(inputs=torch.empty_like(data.inputs))

    def epoch(self, number: int) -> Dataset:
        """The images of this epoch, in the same order. The next call overwrites them."""
        side = 2 * self.pixels + 1
        seed = (self.seed * _PRIME + number) % _SEEDS
        generator = torch.Generator().manual_seed(seed)
        size = (len(self.data),)
        choice = torch.randint(side * side, size, generator=generator, device="cpu")
        # To move an image down, its window starts further up in the padded image.
        up, left = side - 1 - choice // side, side - 1 - choice % side
        _, height, width = self.data.image_shape or ()
        moved, every = self.moved.inputs, torch.arange(len(choice), device="cpu")
        known = moved.device.type == "cpu" and moved.dtype != torch.bfloat16
        if known:  # numpy copies such windows three times as fast as torch
            windows = sliding_window_view(self.padded.numpy(), (height, width), axis=(2, 3))
            found = windows.transpose(0, 2, 3, 1, 4, 5)[every.numpy(), up.numpy(), left.numpy()]
            moved.copy_(torch.from_numpy(found.reshape(len(found), -1)))
            return self.moved
        views = self.padded.unfold(2, height, 1).unfold(3, width, 1)
        on = [index.to(moved.device) for index in (every, up, left)]
        moved.copy_(views.permute(0, 2, 3, 1, 4, 5)[on].flatten(1))
        return self.moved
