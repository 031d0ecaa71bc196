"""``anomalib-csflow calibrate``: new thresholds of a checkpoint, from new good images."""

from pathlib import Path

import pytest
import torch
from anomalib.data import Folder, PredictDataset
from anomalib.engine import Engine
from conftest import SMALL
from torch.utils.data import DataLoader

from anomalib_csflow import CSFlow, cli

SIZED = SMALL | {"image_size": [96, 128]}
pytestmark = pytest.mark.filterwarnings("ignore:.*The new thresholds are too low")  # they are, here


@pytest.fixture
def checkpoint(datamodule: Folder, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """Of a fit with the given post-processor."""
    engine = Engine(max_epochs=1, default_root_dir=tmp_path, logger=False, accelerator="cpu")
    engine.fit(CSFlow(**SIZED, post_processor=getattr(request, "param", True)), datamodule=datamodule)
    return Path(engine.best_model_path)


def test_thresholds_are_those_of_the_new_images(
    checkpoint: Path, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = checkpoint.read_bytes()
    good = image_folder / "train" / "good"
    cli.main(["calibrate", str(checkpoint), "--good", str(good), "--rate", "0.2", "--promise", "marginal"])
    said = capsys.readouterr().out
    assert "At most 20 % of good images will be called anomalous, on average (12 good images)." in said
    assert checkpoint.read_bytes() == before
    path = checkpoint.with_name("model_calibrated.ckpt")
    old, new = CSFlow.load_from_checkpoint(checkpoint), CSFlow.load_from_checkpoint(path)
    assert new.post_processor.num_good == 12
    assert (old.post_processor.num_good, old.post_processor.false_alarm_rate) == (4, 0.01)
    images = torch.rand(3, 3, 96, 128)
    torch.testing.assert_close(new.eval().model(images).pred_score, old.eval().model(images).pred_score)
    # as the engine judges, with the checkpoint given to it
    loader = DataLoader(PredictDataset(good), collate_fn=PredictDataset(good).collate_fn)
    engine = Engine(default_root_dir=tmp_path / "predicted", logger=False, accelerator="cpu")
    batches = engine.predict(CSFlow(**SIZED), dataloaders=loader, ckpt_path=path)
    scores = torch.cat([batch.pred_score.flatten() for batch in batches]).sort().values
    expected = new.post_processor.score_scale(new.post_processor.score_scale.good)
    torch.testing.assert_close(scores, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("checkpoint", [False], indirect=True)
def test_a_checkpoint_without_thresholds_gets_some(checkpoint: Path, image_folder: Path) -> None:
    output = checkpoint.with_name("other.ckpt")
    cli.main(["calibrate", str(checkpoint), "--good", str(image_folder / "train/good"), "--output", str(output)])
    assert CSFlow.load_from_checkpoint(checkpoint).post_processor is None
    assert CSFlow.load_from_checkpoint(output).post_processor.num_good == 12


def test_nothing_is_overwritten_unasked(checkpoint: Path, image_folder: Path) -> None:
    arguments = ["calibrate", str(checkpoint), "--good", str(image_folder / "test/good"), "--output", str(checkpoint)]
    before = checkpoint.read_bytes()
    with pytest.raises(SystemExit, match="exists already: name another --output, or replace it with --overwrite"):
        cli.main(arguments)
    assert checkpoint.read_bytes() == before
    cli.main([*arguments, "--overwrite", "--rate", "0.3"])
    assert CSFlow.load_from_checkpoint(checkpoint).post_processor.false_alarm_rate == 0.3


def test_what_is_wrong_is_said_first(tmp_path: Path, image_folder: Path) -> None:
    good = str(image_folder / "test" / "good")
    with pytest.raises(SystemExit, match="there is no checkpoint at"):
        cli.main(["calibrate", str(tmp_path / "none.ckpt"), "--good", good])
    other = tmp_path / "other.ckpt"
    torch.save({"state_dict": {}}, other)
    with pytest.raises(SystemExit, match="there is no folder of good images"):
        cli.main(["calibrate", str(other), "--good", str(tmp_path / "none")])
    with pytest.raises(SystemExit, match="not a checkpoint of this package"):
        cli.main(["calibrate", str(other), "--good", good])
    other.write_text("no checkpoint")
    with pytest.raises(SystemExit, match="not a readable checkpoint"):
        cli.main(["calibrate", str(other), "--good", good])
