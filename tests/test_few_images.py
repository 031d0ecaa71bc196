"""Folders with few good images, and what a fit says of the least likely ones."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from anomalib.data import Folder
from anomalib.engine import Engine
from PIL import Image
from test_fitting import OVER_LAYERS

from anomalib_csflow import CSFlow
from anomalib_csflow.engine.good_images import Seen
from anomalib_csflow.engine.images import TooFewImagesError
from anomalib_csflow.engine.post_processing import ConformalPostProcessor
from anomalib_csflow.engine.suspects import least_likely


def fit(images: Path, root: Path, count: int, **options: Any) -> CSFlow:
    """Fit on so many good images, as anomalib's Folder divides them by default."""
    (root / "good").mkdir()
    for file in sorted(images.iterdir())[:count]:
        (root / "good" / file.name).symlink_to(file)
    detector = CSFlow(**OVER_LAYERS, max_steps=4)
    engine = Engine(accelerator="cpu", default_root_dir=root / "results", logger=False)
    arguments = {"name": "few", "root": root, "normal_dir": "good", "num_workers": 0, "train_batch_size": 4}
    engine.fit(detector, datamodule=Folder(**arguments | options))
    return detector


@pytest.mark.parametrize("count", [1, 3, 4])
def test_too_few_images_are_said_before_training(image_folder: Path, tmp_path: Path, count: int) -> None:
    expected = rf"there (is|are) {count} good images? in .*good, and anomalib keeps 20% .*, which takes 5 or more"
    with pytest.raises(TooFewImagesError, match=expected):
        fit(image_folder / "train" / "good", tmp_path, count)


def test_the_number_needed_is_that_of_the_split(image_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(TooFewImagesError, match="takes 10 or more"):
        fit(image_folder / "train" / "good", tmp_path, 8, test_split_ratio=0.1)


def test_images_to_validate_on_are_enough(image_folder: Path, tmp_path: Path) -> None:
    detector = fit(image_folder / "train" / "good", tmp_path, 3, normal_test_dir=image_folder / "test" / "good")
    assert detector.post_processor.num_good == 2


@pytest.mark.refits
@pytest.mark.filterwarnings("ignore:Total length of .DataLoader. across ranks is zero")  # no image to validate on
def test_five_images_have_no_threshold_and_that_is_said(image_folder: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="cannot be set, because there is no good validation image: 4 training images"):
        assert not fit(image_folder / "train" / "good", tmp_path, 5).post_processor.is_calibrated


@pytest.mark.refits
@pytest.mark.filterwarnings("ignore:Total length of .DataLoader. across ranks is zero")  # no image to validate on
def test_seven_images_have_a_threshold(image_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    processor = fit(image_folder / "train" / "good", tmp_path, 7).post_processor
    assert (processor.num_good, processor.made.kind) == (6, "estimated")
    assert "least likely of 6 training images, scored by refits" in caplog.text


def test_a_defect_among_the_training_images_is_shown_first(
    image_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    images = tmp_path / "images"
    images.mkdir()
    for file in (image_folder / "train" / "good").iterdir():
        (images / file.name).symlink_to(file)
    Image.new("RGB", (180, 150), (200, 10, 10)).save(images / "defect.png")
    good = image_folder / "test" / "good"
    fit(images, tmp_path, 13, normal_test_dir=good)
    (shown,) = (line for line in caplog.messages if "Is a defect among them?" in line)
    assert "of 13 training images, scored by the detector itself" in shown
    first = shown.splitlines()[1]
    assert "defect.png" in first
    assert float(first.split()[0]) > 0.5


def test_suspects_are_the_highest_by_score_or_map() -> None:
    processor = ConformalPostProcessor(0.2)
    good = torch.linspace(0, 1, 20)
    processor.calibrate(good, 10 * good)
    seen: list[Seen] = [("usual", 0.5, 5.0), ("score", 3.0, 5.0), ("map", 0.5, 90.0)]
    lines = least_likely(seen, processor, is_out_of_fold=True).splitlines()[1:]
    assert [line.split()[1] for line in lines] == ["map", "score", "usual"]
    processor.calibrate(good)
    lines = least_likely([(path, score, None) for path, score, _ in seen], processor, is_out_of_fold=True).splitlines()
    assert lines[1].endswith("score")
