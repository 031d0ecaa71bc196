"""Anomalib's own models as the benchmark builds them: on our backbones, weights and sizes, and still anomalib's."""

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from anomalib.data import Folder
from anomalib.engine import Engine
from anomalib.models import Patchcore
from huggingface_hub import constants
from lightning.pytorch import Callback
from torchvision.transforms.v2 import Normalize, Resize

from anomalib_csflow.features import weights

BACKBONE = "tf_efficientnet_lite0"
LAYERS = {"layers": ["blocks.2", "blocks.4"]}
FLOWS = {
    "csflow": {"layer": "blocks.4", "kernel_sizes": [3, 5], "hidden_channels": 16},
    "fast_flow": LAYERS | {"flow_steps": 2},
    "cflow": LAYERS | {"coupling_blocks": 2},
}
MEMORIES = {"padim": LAYERS | {"n_features": 20}, "patchcore": {"layers": ["blocks.4"], "coreset_sampling_ratio": 0.1}}


@pytest.fixture
def baselines(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module, under the name that a benchmark's YAML gives it."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1])
    return importlib.import_module("anomalib_csflow.benchmark.run.baselines")


class Losses(Callback):
    """The mean loss of each epoch."""

    def __init__(self) -> None:
        self.epochs: list[list[float]] = []

    def on_train_epoch_start(self, *_: Any) -> None:
        """Begin with an epoch."""
        self.epochs.append([])

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
        """Note a step's loss."""
        self.epochs[-1].append(float(outputs["loss"]))

    def means(self) -> list[float]:
        """One for each epoch."""
        return [sum(losses) / len(losses) for losses in self.epochs]


@pytest.mark.filterwarnings("ignore")  # anomalib's, of its own ways to train
@pytest.mark.parametrize(("name", "arguments"), (FLOWS | MEMORIES).items())
def test_fits_and_scores(
    baselines: ModuleType, name: str, arguments: dict[str, Any], datamodule: Folder, tmp_path: Path
) -> None:
    model = getattr(baselines, name)(BACKBONE, "package", (64, 128), False, **arguments)
    resize, normalize = model.pre_processor.transform.transforms
    assert isinstance(resize, Resize)
    assert (list(resize.size), resize.antialias) == ([64, 128], False)
    assert isinstance(normalize, Normalize)
    assert (normalize.mean, normalize.std) == weights.normalization(BACKBONE)
    frozen = weights.fingerprint(next(m for m in model.modules() if hasattr(m, "layer_strides")))
    losses = Losses()
    epochs = {"max_epochs": 3, "callbacks": [losses]} if name in FLOWS else {}
    engine = Engine(
        default_root_dir=tmp_path, accelerator="cpu", limit_val_batches=0, enable_model_summary=False, **epochs
    )
    engine.fit(model, datamodule=datamodule)
    if name in FLOWS:
        assert losses.means()[-1] < losses.means()[0]
    assert weights.fingerprint(next(m for m in model.modules() if hasattr(m, "layer_strides"))) == frozen
    model.eval()
    for images in (1, 3):
        found = model.model(torch.rand(images, 3, 64, 128))
        assert found.pred_score.numel() == images
        assert found.anomaly_map.shape[-2:] == (64, 128)
        assert torch.isfinite(found.anomaly_map).all()
    assert type(model).__module__.startswith("anomalib.models")


def test_features_are_those_that_anomalib_finds_by_itself(
    baselines: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    weights.install(BACKBONE)
    layers = ["blocks.2", "blocks.4"]
    theirs = Patchcore(BACKBONE, layers).model.feature_extractor
    ours = baselines.patchcore(BACKBONE, "package", 96, layers=layers).model.feature_extractor
    images = torch.rand(2, 3, 96, 128)
    torch.testing.assert_close(ours(images), theirs(images))


def test_a_bounded_patchcore_keeps_so_many_vectors_and_is_still_a_patchcore(
    baselines: ModuleType, datamodule: Folder, tmp_path: Path
) -> None:
    counts = {}
    for bound in (5, 100):
        model = baselines.patchcore(BACKBONE, "package", (64, 128), layers=["blocks.4"], max_vectors=bound)
        assert isinstance(model, Patchcore)
        model.model.train()
        for _ in range(10):
            model.model(torch.rand(1, 3, 64, 128))
        model.fit()
        counts[bound] = len(model.model.memory_bank)
    assert counts == {5: 5, 100: 32}  # of 10 x 4 x 8, its own 10 %


def test_farthest_first_is_the_greedy_selection(baselines: ModuleType) -> None:
    vectors = torch.randn(300, 20)
    chosen = baselines.farthest_first(vectors, 40)
    distances = torch.cdist(vectors, vectors)
    for count in range(1, 40):  # by anomalib's rule, from the same start
        assert distances[:, chosen[:count]].amin(1).argmax() == chosen[count]
    assert sorted(baselines.farthest_first(torch.ones(7, 3), 7).tolist()) == list(range(7))  # twins, each once


@pytest.mark.parametrize(("name", "multiple"), [("csflow", 64), ("fast_flow", 16)])
def test_sizes_that_anomalib_cannot_take_are_said(baselines: ModuleType, name: str, multiple: int) -> None:
    with pytest.raises(ValueError, match=f"multiples of {multiple} pixels with these layers, got image_size=100"):
        getattr(baselines, name)(BACKBONE, "package", 100, **FLOWS[name])
