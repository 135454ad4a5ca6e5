"""Random shifts: each image becomes one of its nine moves, epochs differ, and engines agree."""

import pytest
import torch

from mlp import MLP, Dataset, Trainer
from mlp.data import DataError
from mlp.data.shifts import Shifts


def images(count=200, levels=None):
    """Images of 4 × 5 pixels. No pixel is black."""
    made = torch.Generator().manual_seed(0)
    inputs = torch.randint(1, 256, (count, 20), dtype=torch.uint8, generator=made)
    labels = torch.arange(count) % 3
    return Dataset(inputs, labels, image_shape=(1, 4, 5), scale=1 / 255, levels=levels)


def moves(image, black):
    """The nine versions of an image (4, 5), by plain loops."""
    found = []
    for down in (-1, 0, 1):
        for right in (-1, 0, 1):
            moved = torch.full_like(image, black)
            for y in range(4):
                for x in range(5):
                    if 0 <= y - down < 4 and 0 <= x - right < 5:
                        moved[y, x] = image[y - down, x - right]
            found.append(moved)
    return found


@pytest.mark.parametrize("black", [0, 7])
def test_each_image_is_one_of_its_moves(black):
    data = images(levels=(black, 255) if black else None)
    made, seen = Shifts(data, 1).epoch(1), set()
    assert torch.equal(made.targets, data.targets) and made.image_shape == data.image_shape
    for before, after in zip(data.inputs.view(-1, 4, 5), made.inputs.view(-1, 4, 5)):
        seen.add([torch.equal(after, move) for move in moves(before, black)].index(True))
    assert seen == set(range(9))


def test_seed_and_epoch_decide():
    data, shifts = images(), Shifts(images(), 1, seed=3)
    first = shifts.epoch(1).inputs.clone()
    place = shifts.epoch(2).inputs.data_ptr()
    second = shifts.epoch(2).inputs.clone()
    assert not torch.equal(first, second)
    assert torch.equal(Shifts(data, 1, seed=3).epoch(2).inputs, second)
    assert not torch.equal(Shifts(data, 1, seed=4).epoch(2).inputs, second)
    assert shifts.epoch(1).inputs.data_ptr() == place  # recorded steps read the same memory
    assert torch.equal(shifts.epoch(1).inputs, first) and torch.equal(data.inputs, images().inputs)


def test_engines_train_on_the_same_images():
    losses = []
    for engine in ("autograd", "manual"):
        torch.manual_seed(0)
        trainer = Trainer(MLP([20, 8, 3]), engine=engine, verbose=False)
        trainer.fit(images(), 3, 16, augment=1)
        losses.append([row["train_loss"] for row in trainer.history])
    plain = Trainer(MLP([20, 8, 3]), engine="manual", verbose=False)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0] != pytest.approx([row["train_loss"] for row in plain.fit(images(), 3, 16)])


def test_refused():
    rows = Dataset(torch.rand(4, 20), torch.arange(4))
    with pytest.raises(DataError, match="random shifts need images"):
        Shifts(rows, 1)
    with pytest.raises(DataError, match="smaller than an image of 4 × 5 pixels, got 4"):
        Shifts(images(), 4)
    with pytest.raises(DataError, match="at least 1 pixel, got -1"):
        Shifts(images(), -1)
