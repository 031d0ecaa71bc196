"""Large images: random crops of features for training, and sizes that keep the aspect ratio."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from anomalib.data import PredictDataset
from anomalib.engine import Engine
from anomalib.pre_processing import PreProcessor
from PIL import Image
from test_fitting import OVER_LAYERS, fit, folder
from torchvision.transforms.v2 import Resize

from anomalib_csflow import CSFlow
from anomalib_csflow.engine.crops import random_crops
from anomalib_csflow.engine.images import UnreadableImageError, as_large_as_square, size_like, training_files

LARGE: dict[str, Any] = OVER_LAYERS | {"keep_aspect": True, "crop_size": 64, "post_processor": False}


@pytest.fixture
def wide_images(tmp_path: Path) -> Path:
    """Ten images of 75 x 200 pixels."""
    good = tmp_path / "wide" / "train" / "good"
    good.mkdir(parents=True)
    for index in range(10):
        pixels = np.random.default_rng(index).integers(0, 255, (75, 200, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(good / f"{index}.png")
    return tmp_path / "wide"


@pytest.mark.parametrize("size", [(40, 64), (32, 47), (45, 33), (16, 64)])
def test_crops_are_the_same_square_in_all_levels(size: tuple[int, int]) -> None:
    height, width = size
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    finest = torch.stack([rows, columns]).float().expand(30, 2, -1, -1)
    levels = [finest, finest[..., ::2, ::2], finest[..., ::4, ::4]]
    crops = random_crops(tuple(levels), 128, [8, 16, 32])
    assert [tuple(crop.shape[1:]) for crop in crops] == [(2, 16, 16), (2, 8, 8), (2, 4, 4)]
    starts = crops[0][:, :, 0, 0]
    assert starts.remainder(4).eq(0).all()  # where a position of the coarsest level begins
    assert len(starts.unique(dim=0)) > 1  # of each sample another
    for crop, ratio in zip(crops, (1, 2, 4), strict=True):
        torch.testing.assert_close(crop[:, :, 0, 0], starts)
        torch.testing.assert_close(crop[:, :, -1, -1], starts + 16 - ratio)


def test_edges_are_seen_about_as_often_as_the_middle() -> None:
    torch.manual_seed(0)
    rows = torch.arange(20).view(1, 1, 20, 1).expand(4000, 1, 20, 20)
    (crops,) = random_crops((rows.float(),), 40, [8])
    seen = crops[:, 0, :, 0].long().flatten().bincount(minlength=20) / 4000
    assert seen[0] == pytest.approx(5 / 24, abs=0.03)  # as the rows in the middle; 1 / 16 if places were drawn evenly
    assert seen.min() > 0.5 * seen.max()


def test_small_images_are_taken_whole() -> None:
    pyramid = (torch.rand(2, 3, 9, 12), torch.rand(2, 3, 5, 6))
    assert random_crops(pyramid, 256, [8, 16]) == pyramid


@pytest.mark.parametrize(
    ("size", "expected"), [((460, 1130), (448, 1088)), ((1130, 460), (1088, 448)), ((50, 50), (448, 448))]
)
def test_sizes_keep_the_aspect_ratio(size: tuple[int, int], expected: tuple[int, int], tmp_path: Path) -> None:
    Image.new("L", size[::-1]).save(tmp_path / "image.png")
    assert size_like([str(tmp_path / "image.png")], 448, 32) == expected


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((460, 1130), (192, 480)),
        ((1130, 460), (480, 192)),
        ((100, 1000), (96, 992)),
        ((200, 300), (256, 384)),
        ((384, 512), (320, 320)),  # 4:3 is not long
        ((10, 9000), (32, 9600)),
    ],
)
def test_long_images_become_as_large_as_a_square(
    size: tuple[int, int], expected: tuple[int, int], tmp_path: Path
) -> None:
    Image.new("L", size[::-1]).save(tmp_path / "image.png")
    assert as_large_as_square([str(tmp_path / "image.png")], 320, 32) == expected


def test_a_file_that_is_no_image_is_named(tmp_path: Path) -> None:
    (tmp_path / "image.png").write_text("no image")
    with pytest.raises(UnreadableImageError, match=r"image\.png is not an image that can be read"):
        size_like([str(tmp_path / "image.png")], 448, 32)


def test_a_fit_keeps_the_aspect_ratio_and_checkpoints_know_it(wide_images: Path, tmp_path: Path) -> None:
    detector = CSFlow(**LARGE, max_steps=3)
    engine, _ = fit(detector, folder(wide_images), tmp_path)
    assert detector.hparams["image_size"] == (64, 160)
    by_itself = CSFlow.load_from_checkpoint(engine.best_model_path, weights="package")
    assert by_itself.image_options.size == [64, 160]
    images = torch.rand(1, 3, 75, 200)
    expected = detector.eval()(images)
    torch.testing.assert_close(by_itself.eval()(images).anomaly_map, expected.anomaly_map)
    assert expected.anomaly_map.shape == (1, 1, 64, 160)

    from_recipe = CSFlow(**LARGE)
    data = PredictDataset(wide_images / "train" / "good", image_size=None)
    predictions = Engine(accelerator="cpu", default_root_dir=tmp_path / "predict").predict(
        from_recipe, dataset=data, ckpt_path=engine.best_model_path
    )
    assert predictions is not None
    assert predictions[0].anomaly_map.shape[-2:] == (64, 160)


@pytest.mark.parametrize(("side", "expected"), [(64, (32, 96)), (96, (64, 160))])
def test_auto_keeps_the_aspect_ratio_of_long_images(
    wide_images: Path, tmp_path: Path, side: int, expected: tuple[int, int]
) -> None:
    detector = CSFlow(**LARGE | {"keep_aspect": "auto", "image_size": side, "crop_size": None}, max_steps=2)
    engine, _ = fit(detector, folder(wide_images), tmp_path)
    assert detector.hparams["image_size"] == expected
    assert detector.eval()(torch.rand(1, 3, 75, 200)).anomaly_map.shape == (1, 1, *expected)
    by_itself = CSFlow.load_from_checkpoint(engine.best_model_path, weights="package")
    assert by_itself.image_options.size == [*expected]


def test_auto_leaves_images_square_that_are_not_long(image_folder: Path, tmp_path: Path) -> None:
    detector = CSFlow(**LARGE | {"keep_aspect": "auto", "crop_size": None}, max_steps=2)
    fit(detector, folder(image_folder), tmp_path)
    assert detector.hparams["image_size"] == (64, 64)


def test_auto_leaves_the_size_to_a_given_pre_processor() -> None:
    given = PreProcessor(Resize((96, 64)))
    detector = CSFlow(**LARGE | {"keep_aspect": "auto"}, pre_processor=given)
    assert detector.pre_processor is given
    assert not detector.image_options.is_open


def test_a_step_sees_crops(wide_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    detector = CSFlow(**LARGE, max_steps=2)
    seen = []
    loss = detector.loss
    monkeypatch.setattr(detector, "loss", lambda x: seen.append([tuple(level.shape[2:]) for level in x]) or loss(x))
    fit(detector, folder(wide_images), tmp_path)
    assert seen == [[(8, 8), (4, 4), (2, 2)]] * 2


def test_sizes_need_images_and_an_own_pre_processor() -> None:
    with pytest.raises(ValueError, match="leave out pre_processor"):
        CSFlow(**LARGE, pre_processor=PreProcessor())
    with pytest.raises(ValueError, match="needs one of anomalib's datamodules"):
        training_files(None)


@pytest.mark.refits
def test_refits_have_the_size_that_the_images_gave(wide_images: Path, tmp_path: Path) -> None:
    detector = CSFlow(**LARGE | {"post_processor": True}, max_steps=2)
    fit(detector, folder(wide_images), tmp_path)
    assert detector.post_processor.made.kind == "estimated"
    assert detector.post_processor.num_good == 10
