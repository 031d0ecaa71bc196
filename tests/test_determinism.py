"""Equal runs are bitwise equal, with workers and without, and nearly so without the cache."""

from pathlib import Path

import pytest
import torch
from anomalib.data import Folder
from anomalib.engine import Engine
from conftest import FAST_FLOW, SMALL, folder_arguments
from lightning.pytorch import seed_everything
from torch import Tensor

from anomalib_csflow import CSFlow, FastFlow, FeatureCache
from anomalib_csflow.engine.detector import FlowDetector

TWO: dict[type[FlowDetector], dict[str, object]] = {
    CSFlow: SMALL | {"hidden_channels": 8, "noise": 0.1},
    FastFlow: FAST_FLOW | {"max_steps": 5},
}


def trained(
    cls: type[FlowDetector], image_folder: Path, root: Path, *, num_workers: int = 0, max_gb: float = 1
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """All tensors of a detector after two epochs, and its scores and maps of images."""
    seed_everything(7, workers=True, verbose=False)
    cache = FeatureCache(root / "cache", max_gb=max_gb)
    engine = Engine(
        max_epochs=2, accelerator="cpu", default_root_dir=root, callbacks=[cache], enable_progress_bar=False
    )
    detector = cls(**{**TWO[cls], "image_size": 64})
    data = Folder(**{**folder_arguments(image_folder), "num_workers": num_workers})
    engine.fit(detector, datamodule=data)
    found = engine.predict(detector, data_path=image_folder / "test/blob")
    state = {name: value.clone() for name, value in detector.state_dict().items()}
    return state, [tensor for batch in found for tensor in (batch.pred_score, batch.anomaly_map)]


# forked workers now and then end a test process that has many other libraries' threads: `make long` has one of its own
@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.long)])
@pytest.mark.parametrize("cls", TWO, ids=lambda cls: cls.__name__)
def test_equal_runs_are_bitwise_equal(
    cls: type[FlowDetector], num_workers: int, image_folder: Path, tmp_path: Path
) -> None:
    state, predictions = trained(cls, image_folder, tmp_path / "a", num_workers=num_workers)
    again, given = trained(cls, image_folder, tmp_path / "b", num_workers=num_workers)  # with a cache of its own
    for name, value in state.items():
        torch.testing.assert_close(again[name], value, rtol=0, atol=0, equal_nan=True, msg=name)
    for one, true in zip(given, predictions, strict=True):
        assert torch.equal(one, true)


def test_the_cache_changes_rounding_alone(image_folder: Path, tmp_path: Path) -> None:
    """In (0, 1), where calibrated scores and maps are; the features differ by the batches that they are computed in."""
    (_, cached), (_, computed) = (trained(CSFlow, image_folder, tmp_path, max_gb=size) for size in (1, 0))
    for one, other in zip(cached, computed, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4 if one.ndim == 1 else 1e-3)
