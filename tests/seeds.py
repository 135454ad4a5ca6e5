"""Other random numbers for every test: HANDGRAD_TEST_SEED is added to every seed."""

import os

import torch

SHIFT = int(os.environ.get("HANDGRAD_TEST_SEED", "0"))


class Generator(torch.Generator):
    def manual_seed(self, seed: int) -> torch.Generator:
        return super().manual_seed(seed + SHIFT)


def shift() -> None:
    """From here on, in this process: torch's generators, its own and new ones."""
    if SHIFT:
        torch.Generator, seed_all = Generator, torch.manual_seed
        torch.manual_seed = lambda seed: seed_all(seed + SHIFT)
