"""Images of one part or session stay together when thresholds are set."""

from pathlib import Path
from typing import Any

import pytest
from anomalib.data import Folder
from anomalib.engine import Engine
from test_fitting import OVER_LAYERS

from anomalib_csflow import CSFlow
from anomalib_csflow.engine import folds
from anomalib_csflow.engine.groups import GroupError
from anomalib_csflow.engine.post_processing import ConformalPostProcessor

PARTS = r"part_(\d+)_"


def parts(images: Path, root: Path, count: int) -> Folder:
    """Eight good images of so many parts, and four to validate on, two of them of another part."""
    for name, first in (("good", 0), ("new", 8)):
        (root / name).mkdir()
        for index, file in enumerate(sorted(images.iterdir())[first : first + 8 if name == "good" else None]):
            part = index % count if name == "good" else index % 2 * 99
            (root / name / f"part_{part}_{index}.png").symlink_to(file)
    return Folder(
        name="parts",
        root=root,
        normal_dir="good",
        normal_test_dir="new",
        val_split_mode="same_as_test",
        train_batch_size=4,
        num_workers=0,
    )


def fit(data: Folder, root: Path, **arguments: Any) -> CSFlow:
    """Fit with some arguments of the post-processor."""
    detector = CSFlow(**OVER_LAYERS, max_steps=2, post_processor=ConformalPostProcessor(**arguments))
    Engine(accelerator="cpu", default_root_dir=root / "results", logger=False).fit(detector, datamodule=data)
    return detector


@pytest.mark.refits
def test_refits_score_parts_that_they_have_not_seen(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    refit = folds._refit

    def spied(detector: Any, data: folds._Fold, collector: Any) -> None:
        seen.append(
            [
                {Path(file).name.split("_")[1] for file in part.samples["image_path"]}
                for part in (data.train_data, data.val_data)
            ]
        )
        refit(detector, data, collector)

    monkeypatch.setattr(folds, "_refit", spied)
    detector = fit(parts(image_folder / "train/good", tmp_path, 4), tmp_path, groups=PARTS)
    assert len(seen) == 3
    for fitted, scored in seen:
        assert fitted
        assert scored
        assert not fitted & scored
    assert set.union(*(scored for _, scored in seen)) == {"0", "1", "2", "3"}
    assert detector.post_processor.num_good == 8 + 2  # of the validation, the images of part 99 only
    assert detector.post_processor.made.kind == "estimated"


@pytest.mark.refits
def test_no_more_refits_than_parts(image_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    fit(parts(image_folder / "train/good", tmp_path, 2), tmp_path, groups=PARTS)
    assert "Taking thresholds from 2 refits" in caplog.text
    assert "Refit 2 of 2 is done, after" in caplog.text


def test_parts_seen_in_training_are_not_calibrated_on(image_folder: Path, tmp_path: Path) -> None:
    detector = fit(parts(image_folder / "train/good", tmp_path, 4), tmp_path, groups=PARTS, num_folds=0)
    assert detector.post_processor.num_good == 2


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (r"day_(\d+)", r"part_0_0\.png belongs to no group, since groups='day_.*' matches nothing in its path"),
        (r"part_", "all training images are of one group, 'part_', by groups='part_', so that none can be held out"),
    ],
)
def test_what_cannot_be_grouped(image_folder: Path, tmp_path: Path, groups: str, message: str) -> None:
    with pytest.raises(GroupError, match=message):
        fit(parts(image_folder / "train/good", tmp_path, 4), tmp_path, groups=groups)


def test_a_validation_image_of_no_group_is_said_before_training(image_folder: Path, tmp_path: Path) -> None:
    data = parts(image_folder / "train/good", tmp_path, 4)
    (tmp_path / "new/other.png").symlink_to(image_folder / "test/good/000.png")
    with pytest.raises(GroupError, match=r"new/other\.png belongs to no group"):
        fit(data, tmp_path, groups=PARTS)


def test_defective_images_need_no_group(image_folder: Path, tmp_path: Path) -> None:
    data = parts(image_folder / "train/good", tmp_path, 4)
    data.abnormal_dir = image_folder / "test/blob"
    detector = fit(data, tmp_path, groups=PARTS, num_folds=0)
    assert detector.post_processor.num_good == 2


def test_no_regular_expression() -> None:
    with pytest.raises(ValueError, match=r"groups must be a regular expression such as .*, got '\(': missing \)"):
        ConformalPostProcessor(groups="(")
