"""Conformal p-values and the threshold of one score.

References:
    Vovk, Gammerman, Shafer: Algorithmic Learning in a Random World, 2005.
    Angelopoulos, Bates: A Gentle Introduction to Conformal Prediction, 2021.
"""

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .promises import CONFIDENCE, Kind, Promise, check_asked, promise

Scores = NDArray[np.floating[Any]]


def checked(scores: ArrayLike, what: str = "calibration scores") -> Scores:
    """Scores as a vector ``(n,)`` of floats.

    Raises:
        ValueError: if there are none, or one is NaN or infinite.
    """
    found = np.asarray(scores)
    found = (found if np.issubdtype(found.dtype, np.floating) else found.astype(np.float64)).reshape(-1)
    if not found.size:
        msg = f"there are no {what}: at least one good image is needed"
        raise ValueError(msg)
    wrong = int((~np.isfinite(found)).sum())
    if wrong:
        msg = f"{wrong} of {found.size} {what} are NaN or infinite: calibrate with a model that gives finite scores"
        raise ValueError(msg)
    return found


def p_values(scores: ArrayLike, calibration: ArrayLike) -> NDArray[np.float64]:
    """Conformal p-value of each score: ``p = (1 + #{calibration >= s}) / (n + 1)``.

    Of good images that are exchangeable with the calibration images, at most a share of ``a`` has ``p <= a``.

    Args:
        scores: of any shape; higher is more anomalous.
        calibration: ``(n,)``, scores of held-out good images in any order, on the same scale (raw or calibrated) and
            in the same precision. Without any, all p-values are 1.

    Returns:
        In [1 / (n + 1), 1], in the scores' shape.

    Raises:
        ValueError: if a score is NaN, or a calibration score is NaN or infinite.

    Example:
        >>> p_values([0.5, 2.0, 9.0], [1.0, 2.0, 3.0]).tolist()
        [1.0, 0.75, 0.25]
    """
    found = np.asarray(scores)
    if np.isnan(found).any():
        msg = f"{int(np.isnan(found).sum())} of {found.size} scores are NaN: they have no p-value"
        raise ValueError(msg)
    ordered = np.sort(checked(calibration)) if np.size(calibration) else np.empty(0)
    above = ordered.size - np.searchsorted(ordered, found, side="left")
    return np.asarray((1 + above) / (ordered.size + 1), dtype=np.float64)


def threshold(
    scores: ArrayLike, rate: float = 0.01, kind: Kind = "marginal", confidence: float = CONFIDENCE
) -> Promise:
    """Threshold for a false-alarm rate, from the scores of good images: an image is anomalous if its score is higher.

    Args:
        scores: ``(n,)``, of good images: held out from training for ``marginal`` and ``certified``.
        rate: share of good images that may be called anomalous.
        kind: kind of promise, see :mod:`~anomalib_csflow.calibration.promises`.
        confidence: of a certified promise.

    Returns:
        The threshold, which is one of the scores, with its rate. This is the requested rate, or the lowest one that can
        be promised with n images, which is never below ``1 / (n + 1)``.

    Raises:
        ValueError: if there are no scores, one is not finite, or the rate, the kind or the confidence is not valid.

    Example:
        >>> threshold(range(100, 0, -1), 0.05).threshold
        96.0
        >>> print(threshold(range(59), 0.01))
        A false-alarm rate of 1 % needs 99 good images to calibrate on, and there are 59: at most 1.67 % of good \
images will be called anomalous instead, on average.
    """
    check_asked(rate, kind, confidence)
    ordered = np.sort(checked(scores))
    made, rank = promise(ordered.size, rate, kind, confidence)
    return replace(made, threshold=float(ordered[-rank]))
