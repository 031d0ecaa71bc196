"""What can be promised about the false alarms of a threshold that comes from n good images.

If n good scores and a new one are exchangeable, the new score exceeds the j-th largest with probability j / (n + 1) on
average over calibrations; for a single calibration, the probability has the distribution Beta(j, n + 1 - j) (an upper
bound if scores tie).

References:
    Vovk, Gammerman, Shafer: Algorithmic Learning in a Random World, 2005 (marginal validity).
    Vovk: Conditional validity of inductive conformal predictors, 2012 (the Beta distribution).
    Angelopoulos, Bates: A Gentle Introduction to Conformal Prediction, 2021, section 3.2 (the same, explained).
"""

import math
from dataclasses import dataclass
from functools import cache
from typing import Literal, get_args

import numpy as np

Kind = Literal["marginal", "certified", "estimated"]
"""How a rate is promised: on average, with a confidence, or as an estimate; see above."""
KINDS: tuple[str, ...] = get_args(Kind)
CONFIDENCE = 0.95
"""Share of calibrations in which the true rate keeps a certified promise."""
ROUNDING = 1e-9
"""Relative tolerance of a rate, so that 0.01 of 100 is 1 in spite of rounding."""


@dataclass(frozen=True)
class Promise:
    """What was asked of a threshold, and what it promises.

    Attributes:
        kind: kind of promise.
        asked_rate: requested share of good images that may be called anomalous.
        rate: the promised share: the requested one, or the lowest that the number of images allows.
        confidence: share of calibrations in which the true rate keeps the promise, if it is certified.
        num_images: number of good images that the threshold comes from.
        num_needed: number of good images that the requested rate needs.
        threshold: an image is called anomalous if its score is higher; with joint thresholds, the image score's.
    """

    kind: Kind
    asked_rate: float
    rate: float
    confidence: float | None
    num_images: int
    num_needed: int
    threshold: float

    @property
    def is_as_asked(self) -> bool:
        """Whether there are enough images for the requested rate."""
        return self.num_images >= self.num_needed

    def __str__(self) -> str:
        """One sentence for the user."""
        how = {
            "marginal": "on average",
            "certified": f"with {_percent(self.confidence or CONFIDENCE)} confidence",
            "estimated": "as estimated from out-of-fold scores, without a guarantee",
        }[self.kind]
        images = f"{self.num_images} good image{'' if self.num_images == 1 else 's'}"
        if self.is_as_asked:
            return f"At most {_percent(self.rate)} of good images will be called anomalous, {how} ({images})."
        return (
            f"A false-alarm rate of {_percent(self.asked_rate)} needs {self.num_needed} good images to calibrate on, "
            f"and there {'is' if self.num_images == 1 else 'are'} {self.num_images}: at most {_percent(self.rate)} of "
            f"good images will be called anomalous instead, {how}."
        )


def _percent(share: float) -> str:
    """A share in per cent, never rounded down."""
    digits = 2 if share < 0.1 else 1
    return f"{math.ceil(round(share * 100 * 10**digits, 6)) / 10**digits:g} %"


def check_asked(rate: float, kind: str, confidence: float = CONFIDENCE) -> None:
    """Check the request for a threshold.

    Raises:
        ValueError: if the rate or the confidence is not within (0, 1), or there is no promise of that kind.
    """
    if not 0 < rate < 1:
        msg = f"the false-alarm rate is a share of good images within (0, 1), such as 0.01, got {rate}"
        raise ValueError(msg)
    if kind not in KINDS:
        msg = f"unknown promise {kind!r}: choose one of {', '.join(KINDS)}"
        raise ValueError(msg)
    if not 0 < confidence < 1:
        msg = f"the confidence is a share of calibrations within (0, 1), such as 0.95, got {confidence}"
        raise ValueError(msg)


def num_above(num_images: int, rate: float, kind: Kind, confidence: float = CONFIDENCE) -> int:
    """The largest j for which the j-th largest of n scores, as a threshold, keeps a rate; 0 if none does.

    Args:
        num_images: n.
        rate: requested false-alarm rate.
        kind: kind of promise.
        confidence: of a certified promise.

    Returns:
        j, in [0, n]. ``marginal``: ``j / (n + 1) <= rate``. ``certified``: ``P(Beta(j, n + 1 - j) <= rate)`` is at
        least the confidence as well.

    Example:
        >>> num_above(98, 0.01, "marginal"), num_above(99, 0.01, "marginal"), num_above(199, 0.01, "marginal")
        (0, 1, 2)
    """
    marginal = min(math.floor((num_images + 1) * rate * (1 + ROUNDING)), num_images)
    if kind != "certified" or marginal == 0:
        return marginal
    from scipy.stats import beta  # noqa: PLC0415 (takes a second, and a production line does not need it)

    candidates = np.arange(1, marginal + 1)  # a certified promise includes the marginal one, for any confidence
    kept = beta.cdf(rate, candidates, num_images + 1 - candidates) >= confidence
    return int(kept.sum())  # the probability falls with j


def rate_above(num_images: int, above: int, kind: Kind, confidence: float = CONFIDENCE) -> float:
    """The rate that the j-th largest of n scores promises as a threshold: 1 if j is above n.

    Example:
        >>> rate_above(59, 1, "marginal")
        0.016666666666666666
    """
    if above > num_images:
        return 1.0
    if kind != "certified":
        return above / (num_images + 1)
    from scipy.stats import beta  # noqa: PLC0415

    return max(float(beta.ppf(confidence, above, num_images + 1 - above)), above / (num_images + 1))


def images_needed(rate: float, kind: Kind = "marginal", confidence: float = CONFIDENCE, *, above: int = 1) -> int:
    """Number of good images that a false-alarm rate needs.

    Args:
        rate: share of good images that may be called anomalous.
        kind: kind of promise.
        confidence: of a certified promise.
        above: least rank of the threshold from the top; 1 is the largest score.

    Raises:
        ValueError: if the rate, the kind or the confidence is not valid.

    Example:
        >>> images_needed(0.01), images_needed(0.01, "certified")
        (99, 299)
    """
    check_asked(rate, kind, confidence)
    return _images_needed(rate, kind, confidence, above)


@cache
def _images_needed(rate: float, kind: Kind, confidence: float, above: int) -> int:
    low, high = 0, 1  # num_above grows with the number of images
    while num_above(high, rate, kind, confidence) < above:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if num_above(middle, rate, kind, confidence) >= above else (middle, high)
    return high


def promise(num_images: int, rate: float, kind: Kind, confidence: float, *, above: int = 1) -> tuple[Promise, int]:
    """The promise for a number of images, without its threshold (NaN), and the rank j of the threshold.

    Args:
        num_images: n, at least 1.
        rate: requested false-alarm rate.
        kind: kind of promise.
        confidence: of a certified promise.
        above: the least j.

    Raises:
        ValueError: if the rate, the kind or the confidence is not valid.
    """
    needed = images_needed(rate, kind, confidence, above=above)
    rank = max(num_above(num_images, rate, kind, confidence), above)
    given = rate if num_images >= needed else rate_above(num_images, rank, kind, confidence)
    certain = confidence if kind == "certified" else None
    return Promise(kind, rate, given, certain, num_images, needed, math.nan), min(rank, num_images)
