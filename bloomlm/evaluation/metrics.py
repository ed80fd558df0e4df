"""Numbers with their standard errors.

The observations (examples, documents, windows) are treated as a sample of a larger population. The standard error of a
statistic follows from the influence of each observation, which is how much the statistic changes with it (the delta
method). A report keeps the influences. If two models saw the same observations, their influences are subtracted one by
one, and the error of the difference is far smaller than the error of either model.

Source: delta method and ratio estimator, e.g. Cochran, Sampling Techniques, chapter 6.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
LARGEST_EXPONENT = 700.0
"""Largest exponent of a perplexity; exp(710) is too large for a float."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Metric:
    """One result."""

    value: float
    standard_error: float | None
    """None if it is unknown: fewer than two observations, or no influences."""
    higher_is_better: bool
    influences: Floats | None = None
    """Influence of each observation, in the order of the data; their sum is 0."""


def mean(values: Sequence[float], *, higher_is_better: bool) -> Metric:
    """The mean of observations."""
    return ratio(values, np.ones(len(values)), higher_is_better=higher_is_better)


def ratio(numerators: Sequence[float], denominators: Sequence[float] | Floats, *, higher_is_better: bool) -> Metric:
    """The ratio of two sums over the same observations, such as log-probability per word."""
    above, below = np.asarray(numerators, dtype=np.float64), np.asarray(denominators, dtype=np.float64)
    total = math.fsum(below)
    value = math.fsum(above) / total
    return from_influences(value, (above - value * below) / total, higher_is_better=higher_is_better)


def exponential(exponent: Metric, *, scale: float = 1.0, limit: float = LARGEST_EXPONENT) -> Metric:
    """exp(min(limit, scale * exponent)), for an exponent with influences.

    A scale of -1 turns a mean log-probability into a perplexity, and a higher value from better into worse.
    """
    assert exponent.influences is not None
    scaled = scale * exponent.value
    value = math.exp(min(limit, scaled))
    slope = scale * value if scaled <= limit else 0.0
    return from_influences(
        value, slope * exponent.influences, higher_is_better=exponent.higher_is_better == (scale > 0)
    )


def linear(metric: Metric, factor: float) -> Metric:
    """A metric with influences, times a factor; a negative factor reverses which direction is better."""
    assert metric.influences is not None
    return from_influences(
        factor * metric.value,
        factor * metric.influences,
        higher_is_better=metric.higher_is_better == (factor > 0),
    )


def from_influences(value: float, influences: Floats, *, higher_is_better: bool) -> Metric:
    """A metric whose standard error comes from its influences."""
    return Metric(
        value=value,
        standard_error=error_of(influences),
        higher_is_better=higher_is_better,
        influences=influences,
    )


def error_of(influences: Floats) -> float | None:
    """Standard error of a statistic from the influences of its observations; None for fewer than two."""
    count = len(influences)
    if count < 2:
        return None
    return math.sqrt(math.fsum(influences**2) * count / (count - 1))
