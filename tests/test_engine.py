"""The engine's path in anomalib, with one detector for all: training steps, prediction, precision."""

from pathlib import Path

import pytest
import torch
from anomalib.data import Folder, ImageBatch
from anomalib.engine import Engine
from conftest import SMALL

from anomalib_csflow import CSFlow
from anomalib_csflow.engine import precision


def test_predict_from_a_datamodule(detector: CSFlow, datamodule: Folder, tmp_path: Path) -> None:
    predictions = Engine(accelerator="cpu", default_root_dir=tmp_path).predict(detector, datamodule=datamodule)
    assert sum(len(batch.pred_score) for batch in predictions) == 8


def test_folder_of_good_images_alone(image_folder: Path, tmp_path: Path) -> None:
    """The engineer's case: nothing but good images."""
    datamodule = Folder("good", image_folder / "train/good", train_batch_size=4, eval_batch_size=2, num_workers=0)
    engine = Engine(max_epochs=1, accelerator="cpu", default_root_dir=tmp_path)
    detector = CSFlow(**SMALL, image_size=96)
    engine.fit(detector, datamodule=datamodule)
    predictions = engine.predict(detector, data_path=image_folder / "test/blob")
    assert len(predictions) == 4


def test_training_step_is_what_the_engine_logs(detector: CSFlow) -> None:
    batch = ImageBatch(image=torch.rand(2, 3, 96, 128))
    detector.log = lambda *_, **__: None
    torch.testing.assert_close(detector.training_step(batch, 0), detector.loss(detector.model.features(batch.image)))


def test_the_trainers_own_mixed_precision(datamodule: Folder, tmp_path: Path) -> None:
    engine = Engine(
        default_root_dir=tmp_path,
        max_epochs=1,
        accelerator="cpu",
        precision="bf16-mixed",
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    engine.fit(CSFlow(**SMALL, image_size=(96, 128)), datamodule=datamodule)
    assert torch.isfinite(engine.trainer.callback_metrics["train_loss_epoch"])


def test_bfloat16_is_left_alone_where_it_would_be_emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_f": True}, raising=False)
    with precision.bfloat16(torch.device("cpu"), wanted=True):
        assert not torch.is_autocast_enabled("cpu")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    with precision.bfloat16(torch.device("cpu"), wanted=True):
        assert torch.is_autocast_enabled("cpu")
    with precision.bfloat16(torch.device("cpu"), wanted=False):
        assert not torch.is_autocast_enabled("cpu")
