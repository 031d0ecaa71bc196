"""The drift monitor: what it never does, and how soon it finds what; each stream draws its own calibration."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy.stats import kstest, norm

from anomalib_csflow.calibration import DriftMonitor

SHIFT = norm.isf(0.05) - norm.isf(0.10)
"""What turns 5 % of false alarms into 10 % if all scores move up by it, in standard deviations."""


def moved(generator: np.random.Generator, count: int) -> np.ndarray:
    """All scores have moved up."""
    return generator.standard_normal(count) + SHIFT


def defective(generator: np.random.Generator, count: int) -> np.ndarray:
    """The good ones are what they were, but 1 in 19 is now above them all."""
    return np.where(generator.random(count) < 0.05 / 0.95, 9.0, 0.0) + generator.standard_normal(count)


def fallen(generator: np.random.Generator, count: int) -> np.ndarray:
    """All scores have moved down."""
    return generator.standard_normal(count) - SHIFT


def delays(
    change: Callable[[np.random.Generator, int], np.ndarray], calibration: int, unchanged: int = 0, streams: int = 200
) -> np.ndarray:
    """Images from the change to the alarm; infinite if there was none among 1000, NaN if it came before."""
    found = []
    for seed in range(streams):
        generator = np.random.default_rng(seed)
        monitor = DriftMonitor(generator.standard_normal(calibration), seed=seed)
        stream = np.concatenate([generator.standard_normal(unchanged), change(generator, 1000)])
        alarm = next((state.num_images for state in map(monitor.update, stream) if state.alarm), math.inf)
        found.append(alarm - unchanged if alarm > unchanged else math.nan)
    return np.array(found)


@pytest.mark.slow
@pytest.mark.parametrize("calibration", [60, 300])
def test_unchanged_streams(calibration: int) -> None:
    alarms = 0
    for seed in range(200):
        generator = np.random.default_rng(seed)
        monitor = DriftMonitor(generator.gamma(2, size=calibration), seed=seed)
        alarms += any(monitor.update(score).alarm for score in generator.gamma(2, size=10_000))
    assert alarms <= 16


@pytest.mark.parametrize("change", [moved, defective])
@pytest.mark.parametrize("unchanged", [0, 300])
def test_a_change_is_found_within_300_images(
    change: Callable[[np.random.Generator, int], np.ndarray], unchanged: int
) -> None:
    assert np.nanquantile(delays(change, 300, unchanged), 0.8, method="higher") <= 300


def test_scores_that_fall_are_a_change_too() -> None:
    assert np.median(delays(fallen, 300)) <= 300


def test_delay_after_60_calibration_images() -> None:
    found = delays(moved, 60)  # as the class says: half of them are found, and soon or never
    assert 0.35 <= np.isfinite(found).mean() <= 0.65
    assert np.median(found[np.isfinite(found)]) <= 150


def test_ranks_are_uniform_with_ties_too() -> None:
    generator = np.random.default_rng(0)
    monitor = DriftMonitor(generator.integers(0, 4, 50), seed=1)
    ranks = [state.p_value for state in monitor.watch(generator.integers(0, 4, 3000))]
    assert 0 < min(ranks) < max(ranks) <= 1
    assert kstest(ranks, "uniform").pvalue > 0.01


def test_bets_are_fair() -> None:
    from anomalib_csflow.calibration.drift import STAKES, _gains

    ranks = (np.arange(100_000) + 0.5) / 100_000
    np.testing.assert_allclose(np.mean([_gains(rank) for rank in ranks], axis=0), 1, atol=1e-4)
    assert sum(STAKES) == pytest.approx(1)


def test_since_when() -> None:
    errors = []
    for seed in range(50):
        generator = np.random.default_rng(seed)
        monitor = DriftMonitor(generator.standard_normal(300), seed=seed)
        monitor.watch(generator.standard_normal(500))
        monitor.watch(generator.standard_normal(300) + 1)
        assert monitor.alarm
        errors.append(abs(monitor.since - 500))
    assert np.median(errors) <= 20


def test_state_and_seed() -> None:
    monitors = [DriftMonitor([1.0, 2.0, 2.0], seed=3) for _ in range(2)]
    states = [monitor.watch([2.0, 5.0, 1.0]) for monitor in monitors]
    assert states[0] == states[1]
    assert (states[0][-1].num_images, states[0][-1].alarm, states[0][-1].since) == (3, False, None)


def test_a_long_change_stays_finite() -> None:
    monitor = DriftMonitor(np.arange(300))
    states = monitor.watch(np.arange(1000, 6000))
    assert monitor.alarm
    assert math.isfinite(states[-1].evidence)
    assert monitor.since <= 3


def test_one_calibration_image_raises_no_alarm_at_once() -> None:
    assert not DriftMonitor([1.0]).update(1e9).alarm


@pytest.mark.parametrize("score", [math.nan, math.inf])
def test_no_rank(score: float) -> None:
    monitor = DriftMonitor([1.0, 2.0])
    with pytest.raises(ValueError, match=r"the score of image 0 is (nan|inf): only finite scores have a rank"):
        monitor.update(score)


def test_no_monitor() -> None:
    with pytest.raises(ValueError, match="there are no calibration scores"):
        DriftMonitor([])
    with pytest.raises(ValueError, match="the rate of false alarms is a probability"):
        DriftMonitor([1.0], rate=0)
