"""Whether the columns of a table need to be standardised, and what is odd about them."""

from .dataset import Dataset, Moments, moments

# Columns that differ more than this in scale are not trained together at one learning rate.
_TENFOLD = 10.0
_EPS = 2.0**-24  # half a step of float32, next to 1


def columns(data: Dataset) -> Moments:
    """The range, mean and deviation of each feature, of the numbers as they are read."""
    found = moments(data.inputs)
    low, high, mean = (t * data.scale + data.shift for t in found[:3])
    return Moments(low, high, mean, found.std * abs(data.scale))


def why_standardize(data: Dataset) -> str:
    """Why the columns of a table should be standardised; "" where they need not be, and for images.

    They should where their deviations or their sizes differ more than tenfold, or where the numbers
    are far from 1, for which initial weights and usual learning rates are meant.
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
    """Columns whose changes are hardly more than the rounding of float32."""
    found = columns(data)
    lost = (found.low != found.high) & (found.std < 100 * _EPS * found.mean.abs())
    return lost.nonzero().flatten().tolist()
