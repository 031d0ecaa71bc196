"""A training or a prediction by two processes with a fault in one of them; ``test_processes.py`` runs it."""

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from anomalib.data import Folder
from anomalib.engine import Engine
from conftest import SMALL, folder_arguments
from lightning.pytorch import seed_everything

from anomalib_csflow import CSFlow, FeatureCache

warnings.simplefilter("ignore")
torch.set_num_threads(1)
_, task, rank, images, out, devices = sys.argv


class Faulty(CSFlow):
    """Meets a NaN, or an image that has become unreadable, in one process only."""

    def loss(self, features: Any) -> torch.Tensor:
        """NaN in the second step."""
        is_here = str(self.global_rank) == rank and self.global_step == 1
        return super().loss(features) * (torch.nan if task == "NaN" and is_here else 1)

    def on_train_start(self) -> None:
        """All images of one process become unreadable after they were checked."""
        super().on_train_start()
        if task == "broken" and str(self.global_rank) == rank:
            sampler: Any = self.trainer.train_dataloader.sampler
            for index in sampler:
                Path(self.trainer.train_dataloader.dataset.samples.image_path[index]).write_bytes(b"no image")

    def evaluate(self, batch: Any) -> Any:
        """An error where an image is read while the other process goes on."""
        if task == "error" and str(self.global_rank) == rank:
            msg = f"cannot read {batch.image_path[0]}"
            raise OSError(msg)
        return super().evaluate(batch)


seed_everything(0, verbose=False)
arguments: dict[str, Any] = {**SMALL, "image_size": 64}
engine = Engine(
    default_root_dir=out,
    max_epochs=3,
    accelerator="cpu",
    devices=int(devices),
    strategy="ddp" if devices == "2" else "auto",
    enable_progress_bar=False,
    enable_model_summary=False,
    callbacks=[FeatureCache(f"{out}/cache", max_gb=0 if task == "broken" else 1)],
)
detector = Faulty(**arguments)
if task in {"predict", "error"}:
    found = engine.predict(detector, data_path=images)
    scores = {
        Path(path).name: float(s) for batch in found for path, s in zip(batch.image_path, batch.pred_score, strict=True)
    }
    count = sum(len(batch.image_path) for batch in found)
    Path(f"{out}/{detector.global_rank}.json").write_text(json.dumps({"count": count, "scores": scores}))
else:
    engine.fit(detector, datamodule=Folder(**folder_arguments(Path(images)) | {"train_batch_size": 2}))
