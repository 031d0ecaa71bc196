"""Pictures of tested and predicted images: their colours, contours, boxes and words."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.data import Folder, ImageBatch, ImageItem
from anomalib.engine import Engine
from anomalib.visualization import ImageVisualizer
from anomalib.visualization.image.item_visualizer import visualize_image_item
from conftest import SMALL, folder_arguments
from PIL import Image
from test_post_processing import good, predictions

from anomalib_csflow import CSFlow, RealNVP
from anomalib_csflow.engine import drawing
from anomalib_csflow.engine.post_processing import ConformalPostProcessor
from anomalib_csflow.engine.verdicts import Verdict
from anomalib_csflow.engine.visualizer import CalibratedVisualizer


@pytest.fixture
def visualizer() -> CalibratedVisualizer:
    """Of a post-processor that was calibrated on 60 good images."""
    visualizer = CalibratedVisualizer(size=120)
    visualizer.post_processor = ConformalPostProcessor(0.05)
    visualizer.post_processor.calibrate(*good(60), "estimated")
    return visualizer


def judged(processor: ConformalPostProcessor, count: int = 6) -> list[ImageItem]:
    """Predictions that are more and more unusual, of grey images of 60 x 80 pixels."""
    found = processor(predictions(count))
    return ImageBatch(
        image=torch.full((count, 3, 60, 80), 0.5),
        pred_score=found.pred_score,
        pred_label=found.pred_label,
        anomaly_map=found.anomaly_map[:, 0],
        pred_mask=found.pred_mask[:, 0],
    ).items


# -- words ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("verdict", "words"),
    [
        (Verdict(False, 43, 100), "good: like 43 of 100 good parts"),
        (Verdict(False, 60, 60), "good: like all 60 good parts"),
        (Verdict(True, 0, 60), "defect: more unusual than all 60 good parts"),
        (Verdict(True, 3, 400), "defect: more unusual than 397 of 400 good parts"),
        (Verdict(True, 0, 1), "defect: more unusual than the one good part"),
        (Verdict(False, 0, 60), "good: more unusual than all 60 good parts"),  # the sensitivity was lowered
        (Verdict(None, 5, 60), "no label: like 5 of 60 good parts"),
    ],
)
def test_words(verdict: Verdict, words: str) -> None:
    assert str(verdict) == words


def test_words_agree_with_the_label(visualizer: CalibratedVisualizer, monkeypatch: pytest.MonkeyPatch) -> None:
    processor = visualizer.post_processor
    scores, maxima = good(60)
    said: list[tuple[str, bool]] = []
    monkeypatch.setattr(drawing, "picture", lambda image, words, **given: said.append((words, given["is_defect"])))
    maps = maxima[:, None, None, None].expand(-1, 1, 4, 4)
    found = processor(predictions(2)._replace(pred_score=scores, anomaly_map=maps))
    batch = ImageBatch(
        image=torch.zeros(60, 3, 4, 4),
        pred_score=found.pred_score,
        pred_label=found.pred_label,
        anomaly_map=found.anomaly_map[:, 0],
        pred_mask=found.pred_mask[:, 0],
    )
    for item in (*batch.items, *judged(processor)[2:]):
        visualizer.draw(item)
    ranks = [int(number) for words, _ in said[:60] for number in re.findall(r"like (\d+) of 60", words)]
    assert len(set(ranks)) > 50  # the images that were calibrated on have one each
    assert min(ranks) == 3  # 5 % of 61 may be called defective, and the third is the threshold
    assert sum(is_defect for _, is_defect in said[:60]) == 2
    assert all(words.startswith("defect" if is_defect else "good") for words, is_defect in said)
    assert said[60:] == [("defect: more unusual than all 60 good parts", True)] * 4


# -- pictures ---------------------------------------------------------------------------------------


def test_colours_are_the_same_in_every_image() -> None:
    grey = Image.new("RGB", (40, 40), (120, 120, 120))
    heat = np.full((20, 20), 0.45)
    alone = np.asarray(drawing.heated(grey, heat))
    heat[:, 10:] = 0.95
    beside = np.asarray(drawing.heated(grey, heat))
    np.testing.assert_array_equal(alone[:, :15], beside[:, :15])
    assert len({tuple(pixel) for pixel in beside[:, [0, -1]].reshape(-1, 3)}) == 2


def test_good_images_are_left_as_they_are() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 50, 3), np.uint8))
    np.testing.assert_array_equal(drawing.heated(noise, np.full((10, 10), 0.39)), noise)


def test_opacity_and_colour_change_with_the_value_alone() -> None:
    values = np.linspace(0, 1, 101)[None]
    found = drawing.colours(values)[0]
    assert (np.diff(found[:, 0]) >= 0).all()  # opacity
    assert (np.diff(found[:, 2]) <= 0).all()  # green
    assert found[40, 0] == 0 < found[45, 0]


def test_a_box_for_each_defect() -> None:
    mask = np.zeros((100, 200), bool)
    mask[10:20, 30:50] = mask[22:26, 40:44] = True  # two parts of one defect
    mask[80, 190] = True  # one pixel
    assert drawing.defects(mask) == [(slice(10, 26), slice(30, 50)), (slice(80, 81), slice(190, 191))]
    boxed = np.asarray(drawing.boxed(Image.new("RGB", (400, 200)), mask, margin=2))
    blue = (boxed == drawing.BOX).all(2)
    assert blue[18, 58:102].all()
    assert blue[158:164, 378].all()
    assert not drawing.defects(np.zeros((5, 5), bool))


def test_outline_stands_around_the_mask() -> None:
    mask = np.zeros((50, 50), bool)
    mask[20:30, 20:30] = True
    drawn = (np.asarray(drawing.outlined(Image.new("RGB", (100, 100)), mask, drawing.CONTOUR)) == drawing.CONTOUR).all(
        2
    )
    assert drawn[50].sum() == 4
    assert not drawn[45:55, 45:55].any()


@pytest.mark.parametrize("size", [(640, 200), (50, 300)])
@pytest.mark.parametrize("panels", [1, 2])
def test_size_and_words_fit(size: tuple[int, int], panels: int) -> None:
    given = {"heat": np.zeros((16, 16)), "mask": np.zeros((16, 16), bool)} if panels == 2 else {}
    words = "defect: more unusual than all 60 good parts"
    drawn = drawing.picture(Image.new("RGB", size), words, is_defect=True, size=300, **given)
    width, height = (round(side * 300 / max(size)) for side in size)
    assert drawn.width == max(panels * width + (panels - 1) * drawing.GAP, drawing.LEAST_WIDTH)
    assert drawn.height > height
    strip = np.asarray(drawn)[: drawn.height - height]
    assert (strip[:, -2:] == drawing.STRIPS[True]).all()  # no word is cut off


def test_truth_stands_in_the_plain_panel(visualizer: CalibratedVisualizer) -> None:
    item = judged(visualizer.post_processor)[-1]
    item.gt_mask = torch.zeros(8, 6, dtype=torch.bool)
    item.gt_mask[2:5, 2:4] = True
    drawn = np.asarray(visualizer.draw(item))
    green = (drawn == drawing.TRUTH).all(2)
    assert green[:, :120].any()
    assert not green[:, 120:].any()


def test_notes(visualizer: CalibratedVisualizer, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(drawing, "picture", lambda *_, **given: said.append(given["note"]))
    item = judged(visualizer.post_processor)[-1]
    visualizer.draw(item)
    item.gt_label = torch.tensor(True)
    visualizer.draw(item)
    item.pred_mask = torch.zeros(8, 6, dtype=torch.bool)
    visualizer.draw(item)
    assert said == ["", "(labelled defective)", "(no single place stands out; labelled defective)"]


# -- which are drawn --------------------------------------------------------------------------------


def test_items_and_batches(visualizer: CalibratedVisualizer) -> None:
    items = judged(visualizer.post_processor)
    batch = ImageBatch.collate(items[:2])
    drawn = visualizer(batch)
    for item, picture in zip(items, drawn, strict=False):
        np.testing.assert_array_equal(visualizer(item), picture)
        np.testing.assert_array_equal(visualizer(item.to_numpy()), picture)
    assert isinstance(visualizer(ImageBatch.collate(items[:1])), Image.Image)


@pytest.mark.parametrize("change", ["none", "f1", "uncalibrated", "raw"])
def test_without_a_calibration_pictures_are_anomalib_s(visualizer: CalibratedVisualizer, change: str) -> None:
    item = judged(visualizer.post_processor)[0]
    if change == "raw":
        visualizer.post_processor.enable_normalization = False
    else:
        given = {"none": None, "f1": ConformalPostProcessor(threshold="f1"), "uncalibrated": ConformalPostProcessor()}
        visualizer.post_processor = given[change]
    expected = visualize_image_item(
        item, fields=["image", "gt_mask"], overlay_fields=[("image", ["anomaly_map"]), ("image", ["pred_mask"])]
    )
    np.testing.assert_array_equal(visualizer.draw(item), expected)


def test_raw_maps_are_not_drawn() -> None:
    visualizer = CalibratedVisualizer(size=300)
    visualizer.post_processor = ConformalPostProcessor()
    visualizer.post_processor.calibrate(good(30)[0])  # no maps
    raw = predictions(1)
    item = ImageItem(image=torch.zeros(3, 60, 80), pred_score=torch.tensor(0.3), anomaly_map=raw.anomaly_map[0, 0])
    assert visualizer.draw(item).width == 300


def test_wrong_size() -> None:
    with pytest.raises(ValueError, match="above 0"):
        CalibratedVisualizer(size=0)


# -- in the engine ----------------------------------------------------------------------------------


def test_test_and_predict_draw(datamodule: Folder, image_folder: Path, tmp_path: Path) -> None:
    detector = CSFlow(**SMALL, image_size=(96, 128))
    engine = Engine(max_epochs=1, default_root_dir=tmp_path, logger=False, accelerator="cpu")
    engine.fit(detector, datamodule=datamodule)
    engine.test(detector, datamodule=datamodule, verbose=False)
    drawn = sorted((tmp_path / "CSFlow" / "textures").glob("v*/images/*/*.png"))
    assert len(drawn) == 8
    with Image.open(drawn[0]) as picture:
        assert picture.width == 2 * 400 + drawing.GAP
    engine = Engine(default_root_dir=tmp_path / "predicted", logger=False, accelerator="cpu")
    reloaded = CSFlow(**SMALL, image_size=(96, 128))
    engine.predict(reloaded, data_path=image_folder / "test" / "blob", ckpt_path=str(next(tmp_path.rglob("*.ckpt"))))
    (first, *_) = drawn = sorted((tmp_path / "predicted").rglob("images/*/*.png"))
    assert len(drawn) == 4
    with Image.open(first) as picture:
        assert picture.width == 2 * 400 + drawing.GAP


def test_detectors_without_maps_have_words_alone(image_folder: Path, tmp_path: Path) -> None:
    detector = RealNVP("tf_efficientnet_lite0", weights="package", image_size=64, num_blocks=2)
    engine = Engine(max_epochs=1, default_root_dir=tmp_path, logger=False, accelerator="cpu")
    datamodule = Folder(**folder_arguments(image_folder))
    engine.fit(detector, datamodule=datamodule)
    engine.test(detector, datamodule=datamodule, verbose=False)
    with Image.open(next(tmp_path.rglob("images/**/*.png"))) as picture:
        assert picture.width == 400


def test_anomalib_s_own_can_be_chosen() -> None:
    own = ImageVisualizer()
    assert CSFlow(**SMALL, image_size=64, visualizer=own).visualizer is own
    assert CSFlow(**SMALL, image_size=64, visualizer=False).visualizer is None
    assert isinstance(CSFlow(**SMALL, image_size=64).visualizer, CalibratedVisualizer)
