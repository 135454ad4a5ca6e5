"""Random shifts of training images: another version of every image in every epoch.

All images are shifted at an epoch's start, where they lie, so every engine can train on them.
"""

import torch

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
        # One place for all epochs: engines may have recorded where they read.
        self.moved = data._with(inputs=torch.empty_like(data.inputs))

    def epoch(self, number: int) -> Dataset:
        """The images of this epoch, in the same order; the next call overwrites them."""
        data, p = self.data, self.pixels
        side = 2 * p + 1
        seed = (self.seed * _PRIME + number) % _SEEDS
        generator = torch.Generator().manual_seed(seed)
        choice = torch.randint(side * side, (len(data),), generator=generator)
        images = data.inputs.view(len(data), *(data.image_shape or ()))
        black = 0.0 if data.levels is None else data.levels[0]
        for move in range(side * side):
            rows = (choice == move).nonzero().flatten().to(images.device)
            down, right = move // side - p, move % side - p
            # A negative pad cuts off.
            edges = (right, -right, down, -down)
            block = torch.nn.functional.pad(images.index_select(0, rows), edges, value=black)
            self.moved.inputs.index_copy_(0, rows, block.flatten(1))
        return self.moved
