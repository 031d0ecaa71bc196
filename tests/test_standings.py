"""Detectors over all data sets: means, worsts, and the paired difference from the better PatchCore."""

from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from anomalib_csflow.benchmark import overview, results, standings
from anomalib_csflow.benchmark.rows import Row

LABELS = np.arange(60) % 3 > 0


def left(out: Path, detector: str, data: str, seed: int, scores: np.ndarray, **figures: float) -> Row:
    """A run's row, with its scores in its folder."""
    folder = out / "runs" / f"{detector}-{data}-{seed}"
    folder.mkdir(parents=True)
    paths = np.array([f"{data}/{index:02d}.png" for index in range(len(scores))])
    np.savez(folder / "scores.npz", scores=scores, labels=LABELS, paths=paths)
    figures |= {"fit_s": 1.0, "image_AUROC": roc_auc_score(LABELS, scores)}
    class_path = f"anomalib.models.{detector.partition(' ')[0]}"
    return Row(folder.name, detector, class_path, data, seed, "done", figures=figures)


def drawn(quality: float, seed: int) -> np.ndarray:
    """Scores of which defects have more, by so much."""
    return quality * LABELS + np.random.default_rng(seed).normal(0, 1, len(LABELS))


@pytest.fixture
def rows(tmp_path: Path) -> list[Row]:
    """Ours is far better on one set and the same as the worse PatchCore on the other; two seeds each."""
    found = []
    for seed in (0, 1):
        found += [
            left(tmp_path, "Patchcore 16", "easy", seed, drawn(1, seed), AUPRO=0.5),
            left(tmp_path, "Patchcore 8+16", "easy", seed, drawn(0, seed), AUPRO=0.6),
            left(tmp_path, "Patchcore 16", "hard", seed, drawn(0.5, seed), AUPRO=0.5),
            left(tmp_path, "Patchcore 8+16", "hard", seed, drawn(4, seed), AUPRO=0.7),
            left(tmp_path, "CSFlow", "easy", seed, drawn(5, 7 + seed), AUPRO=0.9 + 0.1 * seed),
            left(tmp_path, "CSFlow", "hard", seed, drawn(0.5, seed), AUPRO=0.2),
        ]
    return found


def found_in(rows: list[Row], out: Path) -> dict[str, standings.Standing]:
    listed = standings.standings(rows, overview.summary(rows), out)
    means = [standing.means["image_AUROC"] for standing in listed]
    assert means == sorted(means, reverse=True)
    return {standing.detector: standing for standing in listed}


def test_means_and_worsts_are_of_the_means_over_seeds(rows: list[Row], tmp_path: Path) -> None:
    ours = found_in(rows, tmp_path)["CSFlow"]
    assert (ours.sets, ours.of) == (2, 2)
    assert ours.means["AUPRO"] == pytest.approx((0.95 + 0.2) / 2)
    assert ours.worsts["AUPRO"] == (pytest.approx(0.2), "hard")
    assert "pixel_AUROC" not in ours.means


def test_difference_is_from_the_better_patchcore_of_each_set(rows: list[Row], tmp_path: Path) -> None:
    found = found_in(rows, tmp_path)
    auroc = {}
    for row in rows:
        auroc.setdefault((row.detector, row.data), []).append(row.figures["image_AUROC"])
    for data, better in {"easy": "Patchcore 16", "hard": "Patchcore 8+16"}.items():
        expected = np.mean(auroc["CSFlow", data]) - np.mean(auroc[better, data])
        difference = found["CSFlow"].differences[data]
        assert difference.value == pytest.approx(expected)
        assert difference.low < expected < difference.high
    assert found["CSFlow"].duel == "1 : 1 (1 : 1)"
    assert found["Patchcore 16"].differences == {}
    assert found["Patchcore 16"].duel == overview.NONE


def test_interval_is_the_paired_bootstraps(rows: list[Row], tmp_path: Path) -> None:
    """Against a bootstrap by hand, whose images are drawn one by one."""
    ours, theirs = drawn(2, 3), drawn(1, 4)
    for name, scores in (("A", ours), ("B", theirs)):
        left(tmp_path / "pair", name, "x", 0, scores)
    one, two = (standings.pairs(tmp_path / "pair" / "runs" / f"{name}-x-0" / "scores.npz") for name in "AB")
    found = standings.difference(one[0], two[0])
    gain, generator = one[0] - two[0], np.random.default_rng(1)
    values = [gain[generator.integers(0, 40, 40)][:, generator.integers(0, 20, 20)].mean() for _ in range(10_000)]
    low, high = np.quantile(values, (0.025, 0.975))
    assert (found.low, found.high) == (pytest.approx(low, abs=0.02), pytest.approx(high, abs=0.02))
    assert found.value == pytest.approx(roc_auc_score(LABELS, ours) - roc_auc_score(LABELS, theirs))
    same = standings.difference(one[0], one[0])
    assert (same.value, same.low, same.high) == (0, 0, 0)  # paired: no chance is left


def test_scores_of_other_images_are_not_compared(rows: list[Row], tmp_path: Path) -> None:
    other = left(tmp_path, "Other", "easy", 0, drawn(2, 5))
    path = tmp_path / "runs" / other.run / "scores.npz"
    with np.load(path) as kept:
        np.savez(path, **dict(kept) | {"paths": kept["paths"][::-1]})
    assert found_in([*rows, other], tmp_path)["Other"].differences == {}


def test_all_outputs_have_it(rows: list[Row], tmp_path: Path) -> None:
    found = results.save(rows, tmp_path)
    text = (tmp_path / "results.md").read_text()
    assert "| 1 : 1 (1 : 1)" in text
    assert str(found[0].differences.get("easy") or found[-1].differences["easy"]) in text
    assert (tmp_path / "summary.csv").read_text().splitlines()[0].startswith("detector,sets,of,")
    titles = [table.title for table in results.terminal(rows, found)]
    assert titles[-2:] == [standings.OVER_ALL, standings.BESIDE]
