"""Checks of a table's columns: do they need to be standardised, and does float32 resolve them?"""

import torch

from .dataset import Dataset, Moments, moments

# If columns differ in scale by more than this factor, one learning rate does not suit all.
_TENFOLD = 10.0
_EPS = 2.0**-24  # half the distance from 1 to the next number of float32


def columns(data: Dataset) -> Moments:
    """The range, mean and deviation of each feature, (features,) float64, of numbers as read."""
    found = moments(data.inputs)
    low, high, mean = (t * data.scale + data.shift for t in found[:3])
    return Moments(low, high, mean, found.std * abs(data.scale))


def why_standardize(data: Dataset) -> str:
    """The reason why a table's columns should be standardised, or "". It is "" for images.

    They should if their deviations or their sizes differ by more than a factor of ten. They also
    should if the numbers are far from 1, because initial weights and usual learning rates suit
    numbers near 1.
    """
    if data.levels is not None or data.image_shape is not None:
        return ""
    found = columns(data)
    varies = found.low != found.high
    if not bool(varies.any()):
        return ""
    std, size = found.std[varies], (found.mean**2 + found.std**2).sqrt()[varies]
    for what, values in (("deviations", std), ("sizes", size)):
        low, high = float(values.min()), float(values.max())
        if high > _TENFOLD * low:
            return f"their {what} are {low:.3g} to {high:.3g}"
    largest = float(size.max())
    if not 1 / _TENFOLD <= largest <= _TENFOLD:
        return f"their sizes are at most {largest:.3g}"
    return ""


def lost_in_float32(data: Dataset) -> list[int]:
    """Indices of columns whose deviation is below 100 times the rounding of float32."""
    return lost(columns(data)).nonzero().flatten().tolist()


def lost(found: Moments) -> torch.Tensor:
    """(columns,) bool: True if the deviation is below 100 times the rounding of float32."""
    return (found.low != found.high) & (found.std < 100 * _EPS * found.mean.abs())
