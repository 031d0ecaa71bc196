"""Charts of scores: what they are drawn from, and that they are drawn after a fit and after a test."""

from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.data import Folder, ImageBatch
from anomalib.engine import Engine
from anomalib.visualization import ImageVisualizer
from conftest import SMALL
from PIL import Image
from sklearn.metrics import roc_curve

from anomalib_csflow import CSFlow
from anomalib_csflow.engine.charts import BINS, ScoredTest


def batch(count: int = 40, seed: int = 0) -> ImageBatch:
    """Calibrated predictions of good images and of defective ones, whose defects are higher in map and score."""
    generator = torch.Generator().manual_seed(seed)
    defective = torch.arange(count) % 2 == 1
    truth = torch.zeros(count, 16, 16, dtype=torch.bool)
    truth[defective, 2:6, 2:7] = True
    truth[defective, 10:12, 10:16] = True
    maps = 0.4 * torch.rand(count, 16, 16, generator=generator) + torch.linspace(0, 0.25, count)[:, None, None] * truth
    scores = 0.52 * torch.rand(count, generator=generator) + 0.02 * defective
    mask = maps > 0.5
    return ImageBatch(
        image=torch.zeros(count, 3, 16, 16),
        gt_label=defective,
        gt_mask=truth,
        pred_score=scores,
        pred_label=(scores > 0.5) | mask.flatten(1).any(1),
        anomaly_map=maps,
        pred_mask=mask,
    )


def test_roc_is_that_of_the_larger_of_score_and_map() -> None:
    tested, one = ScoredTest(), batch()
    tested.add(one)
    assert tested.has_both
    level = torch.maximum(one.pred_score, one.anomaly_map.flatten(1).amax(1))
    false, true, _ = roc_curve(one.gt_label, level, drop_intermediate=False)
    np.testing.assert_allclose(tested.roc(), np.stack([false, true], 1))


def test_false_alarms_and_recall_are_those_of_the_labels() -> None:
    tested, one = ScoredTest(), batch()
    for index in range(0, 40, 10):
        tested.add(ImageBatch.collate(one.items[index : index + 10]))
    false = int((one.pred_label & ~one.gt_label).sum())
    found = int((one.pred_label & one.gt_label).sum())
    assert 0 < found < 20
    assert f"{false} of 20 good images" in str(tested)
    assert f"{found} of 20 defective ones" in str(tested)


def test_pro_is_the_mean_over_regions() -> None:
    tested, one = ScoredTest(), batch()
    tested.add(one)
    curve = tested.pro()
    assert curve is not None
    np.testing.assert_allclose(curve[[0, -1]], [[0, 0], [1, 1]])
    assert (np.diff(curve, axis=0) >= -1e-12).all()
    above, truth = one.anomaly_map > 0.5, one.gt_mask.bool()
    shares = [above[one.gt_label][:, 2:6, 2:7].flatten(1), above[one.gt_label][:, 10:12, 10:16].flatten(1)]
    expected = np.concatenate([share.float().mean(1).numpy() for share in shares]).mean()
    np.testing.assert_allclose(curve[BINS // 2], [above[~truth].float().mean(), expected], atol=1e-3)


def test_without_masks_there_is_no_pro() -> None:
    tested, one = ScoredTest(), batch()
    one.gt_mask = None
    tested.add(one)
    assert tested.pro() is None
    assert tested.has_both


def test_of_good_images_alone_there_is_no_chart() -> None:
    tested, one = ScoredTest(), batch()
    tested.add(ImageBatch.collate(one.items[::2]))
    assert not tested.has_both


@pytest.mark.parametrize("own", [False, True])
def test_a_fit_and_a_test_end_with_charts(datamodule: Folder, tmp_path: Path, own: bool) -> None:
    detector = CSFlow(**SMALL, image_size=(96, 128), visualizer=ImageVisualizer() if own else True)
    engine = Engine(max_epochs=1, default_root_dir=tmp_path, logger=False, accelerator="cpu")
    engine.fit(detector, datamodule=datamodule)
    engine.test(detector, datamodule=datamodule, verbose=False)
    charts = {path.name: path for path in tmp_path.glob("CSFlow/textures/v0/*.png")}
    assert set(charts) == (set() if own else {"thresholds.png", "test.png"})
    for path in charts.values():
        with Image.open(path) as chart:
            assert chart.width > 700
            assert np.asarray(chart.convert("L")).std() > 10
