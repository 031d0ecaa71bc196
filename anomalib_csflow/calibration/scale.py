"""A scale that all detectors' scores share: 0.5 at the threshold, within (0, 1), and strictly rising."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True)
class Scale:
    """Map of raw scores s to calibrated scores within (0, 1).

    ``u = (s - threshold) / width``, ``calibrated = 1/2 + 1/2 sign(u) L / (1 + L)`` with ``L = log(1 + |u|)``.

    It rises strictly and never clamps. Its tails are logarithmic: a float32 at u = 1e6 still distinguishes scores that
    differ by one in 10,000; a logistic function would be 1 beyond u = 17, and ``u / (1 + |u|)`` beyond 1e7. The median
    of good images is about 0.3; a score as far above the threshold is about 0.7, and one a hundred times as far 0.91.

    Attributes:
        threshold: raw score that is mapped to exactly 0.5.
        width: the unit of u in raw scores, above 0: the distance between the threshold and the median of good
            images.
    """

    threshold: float
    width: float

    def __post_init__(self) -> None:
        if not math.isfinite(self.threshold) or not 0 < self.width < math.inf:
            msg = f"a scale needs a finite threshold and a width above 0, got {self.threshold} and {self.width}"
            raise ValueError(msg)

    @classmethod
    def of(cls, threshold: float, scores: ArrayLike) -> "Scale":
        """The scale for a threshold and good images' scores ``(n,)``.

        If the threshold is not above their median (few images, or ties), the width is the largest distance
        between a score and the threshold, or if that is 0, the threshold's absolute value, or 1.

        Raises:
            ValueError: if the threshold is not finite.
        """
        values = np.asarray(scores, dtype=np.float64)
        candidates = (threshold - float(np.median(values)), float(np.abs(values - threshold).max()), abs(threshold))
        # a distance that float32 would round away does not count
        least = max(abs(threshold) * 1e-6, 1e-30)
        return cls(threshold, next((width for width in candidates if width > least), 1.0))

    def calibrated(self, scores: ArrayLike) -> NDArray[np.floating[Any]]:
        """Calibrated scores, within (0, 1), from raw scores of any shape, in their precision."""
        raw = np.asarray(scores)
        raw = raw if np.issubdtype(raw.dtype, np.floating) else raw.astype(np.float64)
        unit = (raw - raw.dtype.type(self.threshold)) / raw.dtype.type(self.width)
        log = np.log1p(np.abs(unit))
        return np.asarray(0.5 + 0.5 * np.sign(unit) * (log / (1 + log)))

    def raw(self, calibrated: ArrayLike) -> NDArray[np.float64]:
        """Raw scores from calibrated ones of any shape: the inverse, in float64.

        Raises:
            ValueError: if one is not within (0, 1).

        Example:
            >>> Scale(2.0, 0.5).raw(Scale(2.0, 0.5).calibrated([1.0, 2.0, 9.0])).round(9).tolist()
            [1.0, 2.0, 9.0]
        """
        signed = 2 * np.asarray(calibrated, dtype=np.float64) - 1
        if not (np.abs(signed) < 1).all():
            msg = "calibrated scores must be within (0, 1), without the ends"
            raise ValueError(msg)
        log = np.abs(signed) / (1 - np.abs(signed))
        return np.asarray(self.threshold + self.width * np.sign(signed) * np.expm1(log))
