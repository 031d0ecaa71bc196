"""Images that a detector has seen: noted in its checkpoint, and said where it meets them again."""

import logging
import shutil
from pathlib import Path

import pytest
import torch
from anomalib.data import Folder
from anomalib.engine import Engine
from conftest import SMALL, folder_arguments

from anomalib_csflow import CSFlow, cli
from anomalib_csflow.engine.roles import TRAINED, VALIDATED, digests, met

SIZED = SMALL | {"image_size": [96, 128]}


def test_copies_are_the_same_image(image_folder: Path, tmp_path: Path) -> None:
    first, second, *_ = sorted((image_folder / "train" / "good").iterdir())
    copied = Path(shutil.copy(first, tmp_path / "other.png"))
    assert digests([first]) == digests([copied]) != digests([second])
    roles = {TRAINED: digests([first]), VALIDATED: []}
    expected = f"Of these 2 images, 1 was trained on (such as {copied}): their scores"
    assert str(met([second, copied], roles)).startswith(expected)
    assert met([second], roles) is None
    assert met([], roles) is met([first], {}) is None


def test_test_and_predict_say_what_was_seen(
    image_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    data = folder_arguments(image_folder) | {"val_split_mode": "from_train", "val_split_ratio": 0.25}
    engine = Engine(max_epochs=1, default_root_dir=tmp_path, logger=False, accelerator="cpu")
    engine.fit(CSFlow(**SIZED), datamodule=Folder(**data))
    loaded = CSFlow.load_from_checkpoint(engine.best_model_path)
    assert {role: len(known) for role, known in loaded.roles.items()} == {TRAINED: 9, VALIDATED: 3}

    def said(action: str, **given: object) -> list[str]:
        caplog.clear()
        engine = Engine(default_root_dir=tmp_path / "again", logger=False, accelerator="cpu")
        getattr(engine, action)(CSFlow(**SIZED), ckpt_path=engine_path, **given)
        return [message for message in caplog.messages if "Of these" in message]

    engine_path = engine.best_model_path
    assert not said("test", datamodule=Folder(**data), verbose=False)
    (sentence,) = said("predict", data_path=image_folder / "train" / "good")
    assert sentence.startswith("Of these 12 images, 9 were trained on (such as ")
    assert " and 3 were validated or calibrated on (such as " in sentence

    with pytest.warns(UserWarning, match="9 were trained on .* The new thresholds are too low"):
        cli.main(["calibrate", engine_path, "--good", str(image_folder / "train" / "good")])
    path = Path(engine_path).with_name("model_calibrated.ckpt")
    assert {role: len(known) for role, known in CSFlow.load_from_checkpoint(path).roles.items()} == {
        TRAINED: 9,
        VALIDATED: 12,
    }


@pytest.mark.parametrize(("seed", "has_seen"), [(0, False), (None, True)])
def test_with_a_seed_a_test_meets_no_image_that_was_trained_on(
    seed: int | None, has_seen: bool, image_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As in two commands: random numbers have gone on between them."""
    caplog.set_level(logging.INFO)
    data = {"name": "good", "root": image_folder, "normal_dir": "train/good", "num_workers": 0, "seed": seed}
    engine = Engine(max_epochs=1, default_root_dir=tmp_path, logger=False, accelerator="cpu")
    engine.fit(CSFlow(**SIZED), datamodule=Folder(**data))
    torch.manual_seed(7)
    caplog.clear()
    again = Engine(default_root_dir=tmp_path / "again", logger=False, accelerator="cpu")
    again.test(CSFlow(**SIZED), ckpt_path=engine.best_model_path, datamodule=Folder(**data), verbose=False)
    assert any("were trained on" in message or "was trained on" in message for message in caplog.messages) == has_seen
