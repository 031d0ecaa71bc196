"""Resuming a training: with other numbers of steps, epochs and images in a batch, the schedule ends with it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from anomalib.data import Folder
from anomalib.engine import Engine
from conftest import CFLOW, SMALL
from lightning.pytorch.callbacks import ModelCheckpoint

from anomalib_csflow import CFlow, CSFlow
from anomalib_csflow.engine.checkpoint_files import CheckpointError
from anomalib_csflow.engine.detector import FlowDetector

pytestmark = pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")

LOWEST = SMALL["lr"] / 25 / 1e4  # of torch's one-cycle schedule, in its last step


def fit(
    image_folder: Path,
    root: Path,
    *,
    batch: int = 4,
    epochs: int | None = None,
    ckpt_path: str | None = None,
    cls: type[FlowDetector] = CSFlow,
    every: int | None = None,
    **options: Any,
) -> tuple[Engine, list[float]]:
    """Train on ten images, since two are kept for tests; return what the learning rate was in each step."""
    rates: list[float] = []

    class Watched(cls):
        def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
            rates.append(optimizer.param_groups[0]["lr"])

    saving = [ModelCheckpoint(dirpath=root / "saved", every_n_train_steps=every, save_top_k=-1)] if every else []
    engine = Engine(
        accelerator="cpu",
        default_root_dir=root,
        callbacks=saving,
        enable_progress_bar=False,
        limit_val_batches=0,
        **({} if epochs is None else {"max_epochs": epochs}),
    )
    data = Folder("t", "train/good", root=image_folder, val_split_mode="none", train_batch_size=batch, num_workers=0)
    detector = Watched(**{**(CFLOW if cls is CFlow else SMALL), "image_size": 64, "post_processor": False, **options})
    engine.fit(detector, datamodule=data, ckpt_path=ckpt_path)
    return engine, rates


@pytest.mark.parametrize(
    ("saved", "batch", "epochs", "steps"),
    [(6, 2, 3, 5), (6, 12, 3, 1), (6, 4, 3, 3), (4, 4, 2, 2), (4, 4, 3, 5), (6, 3, 4, 8), (4, 12, 4, 3)],
)
def test_a_cycle_ends_with_the_training(
    saved: int, batch: int, epochs: int, steps: int, image_folder: Path, tmp_path: Path
) -> None:
    """Two epochs of 3 steps, from after the fourth or the last on."""
    engine, _ = fit(image_folder, tmp_path, epochs=2, every=None if saved == 6 else 2)
    path = engine.best_model_path if saved == 6 else next((tmp_path / "saved").glob(f"*step={saved}.ckpt"))
    engine, rates = fit(
        image_folder,
        tmp_path / "again",
        epochs=epochs,
        batch=batch,
        ckpt_path=str(path),
        every=None if saved == 6 else 2,
    )
    assert (engine.trainer.global_step, len(rates)) == (saved + steps, steps)
    assert rates[-1] == pytest.approx(LOWEST, rel=1e-4)


@pytest.mark.parametrize(("first", "then", "batch"), [(5, 8, 4), (5, 6, 2), (3, 9, 12)])
def test_more_steps_than_a_finished_fit_had(
    first: int, then: int, batch: int, image_folder: Path, tmp_path: Path
) -> None:
    engine, rates = fit(image_folder, tmp_path, max_steps=first)
    assert rates[-1] == pytest.approx(LOWEST, rel=1e-4)
    engine, rates = fit(image_folder, tmp_path, max_steps=then, batch=batch, ckpt_path=engine.best_model_path)
    assert (engine.trainer.global_step, len(rates)) == (then, then - first)
    assert rates[-1] == pytest.approx(LOWEST, rel=1e-4)
    assert then - first == 1 or rates[0] > 10 * LOWEST  # the new schedule's, from its first step on
    again, rates = fit(image_folder, tmp_path, max_steps=then + 1, ckpt_path=engine.best_model_path)
    assert (again.trainer.global_step, len(rates)) == (then + 1, 1)


@pytest.mark.parametrize("then", [3, 6, 9])
def test_an_interrupted_fit_by_steps_goes_on(then: int, image_folder: Path, tmp_path: Path) -> None:
    fit(image_folder, tmp_path, max_steps=6, every=2)
    (path,) = (tmp_path / "saved").glob("*step=2.ckpt")
    engine, rates = fit(image_folder, tmp_path / "again", max_steps=then, batch=3, ckpt_path=str(path), every=2)
    assert (engine.trainer.global_step, len(rates)) == (then, then - 2)
    assert rates[-1] == pytest.approx(LOWEST, rel=1e-4)


def test_a_finished_fit_has_no_steps_left(image_folder: Path, tmp_path: Path) -> None:
    engine, _ = fit(image_folder, tmp_path, max_steps=4)
    again, rates = fit(image_folder, tmp_path, max_steps=4, ckpt_path=engine.best_model_path)
    assert (again.trainer.global_step, rates) == (4, [])


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_another_optimizer_does_not_go_on(optimizer: str, image_folder: Path, tmp_path: Path) -> None:
    engine, _ = fit(image_folder, tmp_path, max_steps=2, optimizer=optimizer)
    path, other = engine.best_model_path, {"adam": "muon", "muon": "adam"}[optimizer]
    with pytest.raises(CheckpointError, match=f"fit has optimizer='{optimizer}', and cannot go on with '{other}'"):
        fit(image_folder, tmp_path / "other", max_steps=3, optimizer=other, ckpt_path=path)
    again, _ = fit(image_folder, tmp_path / "same", max_steps=3, optimizer=optimizer, ckpt_path=path)
    assert again.trainer.global_step == 3


def test_an_optimizer_that_is_no_argument(image_folder: Path, tmp_path: Path) -> None:
    """As in a detector of one's own, which may fix it."""

    class Fixed(CSFlow):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self.training_options = replace(self.training_options, optimizer="muon")

    engine, _ = fit(image_folder, tmp_path, cls=Fixed, max_steps=2)
    again, _ = fit(image_folder, tmp_path / "again", cls=Fixed, max_steps=3, ckpt_path=engine.best_model_path)
    assert again.trainer.global_step == 3


def test_several_steps_a_batch(image_folder: Path, tmp_path: Path) -> None:
    """CFLOW-AD's schedule moves with batches, of which each gives many steps."""
    engine, _ = fit(image_folder, tmp_path, epochs=1, cls=CFlow)
    _, rates = fit(image_folder, tmp_path, epochs=3, batch=6, cls=CFlow, ckpt_path=engine.best_model_path)
    assert rates[-1] == pytest.approx(LOWEST, rel=1e-4)


def test_a_batch_that_lightning_repeats(image_folder: Path, tmp_path: Path) -> None:
    """After several resumptions within an epoch, its counts differ by more than the batch at hand."""
    fit(image_folder, tmp_path, epochs=2, every=2)
    (path,) = (tmp_path / "saved").glob("*step=4.ckpt")
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["completed"] -= 1
    torch.save(checkpoint, path)
    engine, rates = fit(image_folder, tmp_path / "again", epochs=2, ckpt_path=str(path), every=2)
    assert (engine.trainer.global_step, len(rates)) == (7, 3)
    assert rates[-1] == pytest.approx(LOWEST, rel=1e-4)
