"""The targets of a regression, in units in which a network learns well.

A network with usual initial weights gives outputs of about 1. So targets such as prices are
standardised for the training, and predictions are converted back to the targets' own units.
"""

from dataclasses import dataclass

import torch

from .dataset import DataError, Dataset, centre, moments

_FAR, _SMALL = 10.0, 0.1  # a mean or deviation above _FAR, or a deviation below _SMALL, is bad


@dataclass(frozen=True)
class Units:
    """Mean and deviation of each target, one number for each output."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        numbers = torch.tensor([*self.mean, *self.std], dtype=torch.float64, device="cpu")
        good = len(self.mean) == len(self.std) and bool(numbers.isfinite().all())
        if not good or not all(std > 0 for std in self.std):
            raise DataError("units must have a finite mean and a deviation above 0 for each target")

    def learned(self, targets: torch.Tensor) -> torch.Tensor:
        """Targets (N,) or (N, outputs), from their own units to those that the network learns."""
        mean, std = self._numbers(targets)
        return ((targets.double() - mean) / std).to(targets.dtype)

    def own(self, outputs: torch.Tensor) -> torch.Tensor:
        """Outputs (N, outputs), or targets as learned, converted to the targets' own units."""
        mean, std = self._numbers(outputs)
        return (outputs.double() * std + mean).to(outputs.dtype)

    def _numbers(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        outputs = like.shape[1] if like.dim() > 1 else 1
        if len(self.mean) not in (1, outputs):
            raise DataError(f"units of {len(self.mean)} targets do not fit {outputs} outputs")
        mean, std = (
            torch.tensor(values, dtype=torch.float64, device=like.device)
            for values in (self.mean, self.std)
        )
        return mean, std


def of(train: Dataset, standardize: str) -> Units | None:
    """The units of a data set's targets, or None if the targets are learned unchanged.

    standardize: "yes", "no", or "auto", which standardises numbers that are far from 0, large or
    very small. Targets that are all 0 or 1 are labels, and stay unchanged.
    """
    if train.is_classification or standardize == "no":
        return None
    targets = train.targets.double().reshape(len(train), -1)
    mean, std = centre(moments(targets))
    binary = bool(((targets == 0) | (targets == 1)).all())
    odd = bool((mean.abs() > _FAR).any() or (std > _FAR).any() or (std < _SMALL).any())
    if binary or (standardize == "auto" and not odd):
        return None
    return Units(tuple(mean.tolist()), tuple(std.tolist()))


def learned(data: Dataset, units: Units | None) -> Dataset:
    """The same samples, with targets in the units that the network learns."""
    return data if units is None else data._with(targets=units.learned(data.targets))
