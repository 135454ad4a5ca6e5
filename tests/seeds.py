"""HANDGRAD_TEST_SEED is added to every seed, which gives every test other random numbers."""

import os

import torch

SHIFT = int(os.environ.get("HANDGRAD_TEST_SEED", "0"))


class Generator(torch.Generator):
    def manual_seed(self, seed: int) -> torch.Generator:
        return super().manual_seed(seed + SHIFT)


def shift() -> None:
    """Shifts the seeds of torch's global generator and of new ones, from now on in this process."""
    if SHIFT:
        torch.Generator, seed_all = Generator, torch.manual_seed
        torch.manual_seed = lambda seed: seed_all(seed + SHIFT)
