"""One rate for two decisions: the label, from an image's score, and the contour, from its map's maximum.

References:
    Tukey: Nonparametric estimation II: statistically equivalent blocks and tolerance regions, 1947.
    Angelopoulos, Bates: A Gentle Introduction to Conformal Prediction, 2021 (one score of several).
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .promises import CONFIDENCE, Kind, Promise, check_asked, promise
from .scale import Scale
from .thresholds import Scores, checked, threshold

BALANCED = 2
"""Least number of images above a threshold on two scores without a reference: one for each score."""


@dataclass(frozen=True)
class JointThresholds:
    """Scales of the image score and of the map, whose thresholds together keep one rate.

    Attributes:
        score: scale of the image score; its threshold decides the label.
        map: scale of the map's values; its threshold decides the mask. None without maps.
        promise: at most this rate of good images has a score, or any value of the map, above its threshold.
    """

    score: Scale
    map: Scale | None
    promise: Promise

    def larger(self, scores: ArrayLike, map_maxima: ArrayLike | None) -> NDArray[np.floating[Any]]:
        """The larger of calibrated score and calibrated maximum of the map ``(n,)``: above 0.5 if one of them is."""
        calibrated = self.score.calibrated(scores)
        if self.map is None or map_maxima is None:
            return calibrated
        return np.maximum(calibrated, self.map.calibrated(map_maxima))


def joint_thresholds(
    scores: ArrayLike,
    map_maxima: ArrayLike | None = None,
    rate: float = 0.01,
    kind: Kind = "marginal",
    confidence: float = CONFIDENCE,
    *,
    reference: tuple[ArrayLike, ArrayLike] | None = None,
) -> JointThresholds:
    """Thresholds of score and map; a good image exceeds at least one of them with a single false-alarm rate.

    The two are on different scales, and the calibration images must not be used to make them comparable:

    - With a reference, other good images give each a centre and a spread (median, and median distance from it), and
      the rate is calibrated on the larger of the two standardized values, as on one score.
    - Without one, ``marginal`` and ``certified`` cut off the images with the highest score and with the highest map
      in turn: the thresholds left after j cuts are exceeded as often as the j-th largest of one score (Tukey's
      equivalent blocks). Both must be cut at least once, so no rate below ``2 / (n + 1)`` can be promised.
    - Without one, ``estimated`` takes centre and spread from the calibration images themselves. Measured in the worst
      case, scores that are independent of the maps: 1.8 % where 1/60 is promised, and 1.1 % where 1 % is promised. With
      correlated scores, the promise was kept.

    Args:
        scores: ``(n,)``, image scores of good images; higher is more anomalous.
        map_maxima: ``(n,)``, the maximum of each image's map; None without maps.
        rate: share of good images that may have a label "anomalous" or any masked pixel.
        kind: kind of promise, see :mod:`~anomalib_csflow.calibration.promises`.
        confidence: of a certified promise.
        reference: scores and map maxima ``(m,)`` of good images that were held out from training and are not used for
            calibration, such as those used to choose the epoch.

    Raises:
        ValueError: if there are no scores, one is not finite, the numbers of scores and maxima differ, or the rate,
            the kind or the confidence is not valid.
    """
    check_asked(rate, kind, confidence)
    score = checked(scores)
    if map_maxima is None:
        made = threshold(score, rate, kind, confidence)
        return JointThresholds(Scale.of(made.threshold, score), None, made)
    both = _pairs(score, map_maxima)
    if reference is None and kind != "estimated":
        made, cuts = promise(len(both), rate, kind, confidence, above=BALANCED)
        levels = _cut_in_turn(both, max(cuts, BALANCED))
    else:
        made, rank = promise(len(both), rate, kind, confidence)
        levels = _larger_of_standardized(both, both if reference is None else _pairs(*reference), rank)
    scales = [Scale.of(float(level), column) for level, column in zip(levels, both.T, strict=True)]
    return JointThresholds(scales[0], scales[1], replace(made, threshold=scales[0].threshold))


def _pairs(scores: ArrayLike, map_maxima: ArrayLike) -> NDArray[np.float64]:
    """Score and maximum of each image, ``(n, 2)``."""
    columns: tuple[Scores, Scores] = checked(scores), checked(map_maxima, "maxima of maps")
    if columns[0].size != columns[1].size:
        msg = f"each image needs one score and one maximum of its map, got {columns[0].size} and {columns[1].size}"
        raise ValueError(msg)
    return np.stack(columns, axis=1).astype(np.float64)


def _cut_in_turn(both: NDArray[np.float64], cuts: int) -> NDArray[np.float64]:
    """Thresholds after cutting off the highest score and the highest map in turn, ``(2,)``."""
    levels = both.max(axis=0)
    left = both
    for index in range(min(cuts, len(both))):
        column = index % 2
        highest = int(left[:, column].argmax())
        levels[column] = left[highest, column]
        left = np.delete(left, highest, axis=0)
    return levels


def _larger_of_standardized(
    both: NDArray[np.float64], reference: NDArray[np.float64], rank: int
) -> NDArray[np.float64]:
    """Thresholds at the rank-th largest of the larger of the two standardized values, ``(2,)``."""
    centre = np.median(reference, axis=0)
    distances = np.abs(reference - centre)
    spread = np.median(distances, axis=0)
    for other in (distances.mean(axis=0), np.abs(centre), np.ones(2)):  # with few or tied images
        spread = np.where(spread > 0, spread, other)
    larger = ((both - centre) / spread).max(axis=1)
    level = np.sort(larger)[-rank]
    # rounding must not put an image above the threshold that it sets
    return np.maximum(centre + spread * level, both[larger <= level].max(axis=0))
