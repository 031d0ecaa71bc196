"""Charts of calibrated scores: of good images after a fit, and of both kinds after a test."""

from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

import numpy as np
from anomalib.data import ImageBatch
from numpy.typing import NDArray
from scipy import ndimage

from .verdicts import levels

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GOOD, DEFECTIVE, AXIS = "tab:green", "tab:red", "calibrated score, or the map's maximum if that is larger"
BINS = 4000
"""Of calibrated values in (0, 1), in which pixels are counted for the PRO curve."""
LARGEST = 0.3
"""False positive rate up to which a PRO curve is commonly drawn."""


class ScoredTest:
    """What charts need of tested images, taken in by batches; of pixels only counts are kept."""

    def __init__(self) -> None:
        self.levels: list[float] = []
        self.is_defective: list[bool] = []
        self.is_called: list[bool] = []
        self._good_pixels = np.zeros(BINS)
        self._regions = np.zeros(BINS)
        self._num_regions = 0

    def add(self, batch: ImageBatch) -> None:
        """Take in a batch with calibrated scores and labels, and its maps and true masks if there are such."""
        if batch.gt_label is None or batch.pred_label is None or batch.pred_score is None:
            return
        maps = batch.anomaly_map if batch.pred_mask is not None else None
        maxima = None if maps is None else maps.flatten(1).amax(1)
        self.levels += levels(batch.pred_score.flatten(), maxima).tolist()
        self.is_defective += batch.gt_label.bool().tolist()
        self.is_called += batch.pred_label.flatten().bool().tolist()
        if maps is None or batch.gt_mask is None:
            return
        found = maps.detach().float().cpu().numpy().reshape(-1, *maps.shape[-2:])
        truths = batch.gt_mask.bool().cpu().numpy().reshape(found.shape)
        for values, truth in zip(found, truths, strict=True):
            self._good_pixels += _counted(values[~truth])
            regions, number = ndimage.label(truth, np.ones((3, 3)))
            for region in range(1, number + 1):
                inside = values[regions == region]
                self._regions += _counted(inside) / inside.size
            self._num_regions += number

    @property
    def has_both(self) -> bool:
        """Whether there are good images and defective ones."""
        return any(self.is_defective) and not all(self.is_defective)

    def split(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Levels of good images and of defective ones."""
        values, defective = np.asarray(self.levels), np.asarray(self.is_defective)
        return values[~defective], values[defective]

    def roc(self) -> NDArray[np.float64]:
        """False alarms and recall of every threshold on the level, ``(k, 2)``."""
        good, defective = self.split()
        at = np.concatenate([[np.inf], np.unique(self.levels)[::-1]])
        return np.stack(
            [1 - np.searchsorted(np.sort(values), at) / values.size for values in (good, defective)], axis=1
        )

    def pro(self) -> NDArray[np.float64] | None:
        """Share of good pixels above a threshold on the map and mean share of a true region, ``(k, 2)``, or None."""
        if not self._num_regions or not self._good_pixels.any():
            return None
        shares = self._good_pixels / self._good_pixels.sum(), self._regions / self._num_regions
        return np.stack([[0, *np.cumsum(share[::-1])] for share in shares], axis=1)

    def __str__(self) -> str:
        """What the calibrated threshold did, in words."""
        called, defective = np.asarray(self.is_called), np.asarray(self.is_defective)
        return (
            f"At the calibrated threshold: {(called & ~defective).sum()} of {(~defective).sum()} good images were "
            f"called anomalous (false alarms), and {(called & defective).sum()} of {defective.sum()} defective ones "
            "were found (recall)."
        )


def draw_good(path: Path, good: NDArray[np.floating[Any]], promise: str) -> None:
    """Write a chart of the good images that were calibrated on.

    Args:
        path: of the PNG file, whatever its suffix.
        good: ``(n,)``, levels of the images.
        promise: what the thresholds promise, in words.
    """
    figure = _figure(7, 3.4)
    axes = figure.subplots()
    _histogram(axes, {f"{len(good)} good images": (good, GOOD)})
    figure.suptitle(fill(promise, 100), fontsize=9)
    figure.savefig(path, format="png", dpi=110)


def draw_tested(path: Path, tested: ScoredTest, promise: str) -> None:
    """Write the charts of a test with good and defective images: histograms, ROC and PRO curves.

    Args:
        path: of the PNG file, whatever its suffix.
        tested: images of both kinds.
        promise: what the thresholds promise, in words.
    """
    pro = tested.pro()
    figure = _figure(10 if pro is None else 13, 3.8)
    axes = figure.subplots(1, 2 if pro is None else 3, width_ratios=[1.8, 1, 1][: 2 if pro is None else 3])
    good, defective = tested.split()
    _histogram(axes[0], {f"{len(good)} good": (good, GOOD), f"{len(defective)} defective": (defective, DEFECTIVE)})
    called, is_defective = np.asarray(tested.is_called), np.asarray(tested.is_defective)
    here = (called[~is_defective].mean(), called[is_defective].mean())
    _curve(axes[1], "ROC, of images", tested.roc(), ("good images above the threshold", "defective images above it"))
    axes[1].plot(*here, "ko", label=f"calibrated threshold:\n{here[0]:.1%} and {here[1]:.1%}")
    axes[1].legend(loc="lower right", fontsize=8)
    if pro is not None:
        shown = pro[pro[:, 0] <= LARGEST]
        _curve(axes[2], "PRO, of pixels", shown, ("good pixels above the threshold", "mean share of a true region"))
        axes[2].plot(*pro[BINS // 2], "ko", label="calibrated threshold")
        axes[2].set_xlim(-0.02 * LARGEST, 1.02 * LARGEST)
        axes[2].legend(loc="lower right", fontsize=8)
    figure.suptitle(f"{tested}\n{fill(promise, 150)}", fontsize=9)
    figure.savefig(path, format="png", dpi=110)


def _counted(values: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    return np.histogram(values, BINS, (0, 1))[0].astype(np.float64)


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure  # noqa: PLC0415 (half a second, for who draws)

    return Figure((width, height), layout="constrained")


def _histogram(axes: "Axes", groups: dict[str, tuple[NDArray[np.floating[Any]], str]]) -> None:
    """Draw levels by group, and the threshold."""
    for name, (values, colour) in groups.items():
        below = np.asarray(values) - 1e-6  # what is at the threshold is not above it
        axes.hist(below, bins=50, range=(0, 1), color=colour, alpha=0.6, label=name)
    axes.axvline(0.5, color="black", label="threshold")
    axes.set(xlim=(0, 1), xlabel=AXIS, ylabel="images")
    axes.legend(loc="upper left", fontsize=8)  # "best" is slow, with a warning, on a slow processor


def _curve(axes: "Axes", title: str, curve: NDArray[np.float64], names: tuple[str, str]) -> None:
    axes.plot(*curve.T, color="tab:blue", linewidth=2)
    axes.set(title=title, xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), xlabel=names[0], ylabel=names[1])
    axes.title.set_fontsize(10)
