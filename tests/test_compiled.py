"""The backbone in OpenVINO: torch's features, in the engine too, and torch wherever OpenVINO cannot compute them."""

from pathlib import Path
from typing import Any

import openvino
import pytest
import timm
import torch
from anomalib.data import Folder
from anomalib.engine import Engine
from conftest import SMALL
from lightning.pytorch import Callback, seed_everything

from anomalib_csflow import CSFlow, DifferNet, FeatureCache
from anomalib_csflow.engine import compiled as module
from anomalib_csflow.engine.compiled import CompiledFeatures, compiled, computed_by
from anomalib_csflow.features import CrossScalePyramid, FrozenBackbone, FrozenLayers, ImagePyramid, PooledPyramid

CPU = torch.device("cpu")


def backbone() -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model("resnet18", pretrained=False)


PYRAMIDS = {
    "layers": lambda: CrossScalePyramid(FrozenLayers(backbone(), ["layer2", "layer3"])),
    "image sizes": lambda: ImagePyramid(FrozenBackbone(backbone(), "layer2"), num_scales=2),
    "vectors": lambda: PooledPyramid(FrozenBackbone(backbone(), "layer2"), num_scales=2),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PYRAMIDS)
def test_features_are_torchs_at_every_size_and_number_of_images(name: str) -> None:
    features = PYRAMIDS[name]()
    fast = CompiledFeatures(features)
    for size in [(3, 3, 64, 96), (1, 3, 64, 96), (2, 3, 50, 71)]:
        images = torch.randn(size)
        found, wanted = fast(images), features(images)
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            assert one.shape == other.shape
            assert float((one - other).norm() / other.norm()) < 1e-4
    assert all(fast._compiled.values())  # none of the sizes fell back to torch


def test_an_image_of_a_wrong_size_is_torchs_error() -> None:
    with pytest.raises(ValueError, match="too small"):
        CompiledFeatures(PYRAMIDS["layers"]())(torch.zeros(1, 3, 8, 8))


def fails(*args: Any, **kwargs: Any) -> None:
    msg = "no such operation"
    raise RuntimeError(msg)


def test_torch_computes_what_openvino_cannot_convert(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino, "convert_model", fails)
    features, images = PYRAMIDS["layers"](), torch.randn(2, 3, 64, 64)
    for found, wanted in zip(CompiledFeatures(features)(images), features(images), strict=True):
        assert torch.equal(found, wanted)


def test_torch_computes_where_openvino_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    right = module.ImageByImage.__call__
    monkeypatch.setattr(module.ImageByImage, "__call__", lambda *args: tuple(1.01 * level for level in right(*args)))
    features, images = PYRAMIDS["layers"](), torch.randn(2, 3, 64, 64)
    for found, wanted in zip(CompiledFeatures(features)(images), features(images), strict=True):
        assert torch.equal(found, wanted)


def test_it_is_used_where_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    features = PYRAMIDS["layers"]()
    assert isinstance(compiled(features, 200, CPU, "32-true"), CompiledFeatures)
    assert compiled(features, 199, CPU, "32-true") is None
    assert compiled(features, 200, CPU, "bf16-mixed") is None
    assert compiled(features, 200, torch.device("cuda"), "32-true") is None
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    assert compiled(features, 200, CPU, "32-true") is None


class Scores(Callback):
    """Keeps the scores of a test, and what computes features."""

    def __init__(self) -> None:
        self.scores: list[torch.Tensor] = []
        self.library = ""

    def on_test_batch_end(self, trainer: Any, pl_module: CSFlow, outputs: Any, *args: Any) -> None:
        """Keep a batch's."""
        self.scores.append(outputs.pred_score)
        self.library = computed_by(pl_module.compute).split()[0]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [CSFlow, DifferNet])
def test_a_detector_scores_alike_with_and_without(
    kind: type, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {}
    for least, library in [(1, "openvino"), (1000, "torch")]:
        monkeypatch.setattr(module, "LEAST_IMAGES", least)
        seed_everything(0, verbose=False)
        scores = Scores()
        model = kind(**SMALL | {"image_size": 96}, **({"num_test_rotations": 2} if kind is DifferNet else {}))
        data = Folder(
            name="textures",
            root=image_folder,
            normal_dir="train/good",
            abnormal_dir="test/blob",
            train_batch_size=4,
            num_workers=0,
        )
        engine = Engine(
            default_root_dir=tmp_path / library,
            max_epochs=1,
            accelerator="cpu",
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[scores, FeatureCache(tmp_path / "cache")],
        )
        engine.fit(model, datamodule=data)
        engine.test(model, datamodule=data)
        assert model.compiled is None  # nothing of it is left in the detector
        assert scores.library == library
        found[library] = torch.cat(scores.scores)
    assert torch.allclose(found["openvino"], found["torch"], atol=1e-3)
    if kind is CSFlow:
        assert len([path for path in (tmp_path / "cache").iterdir() if path.is_dir()]) == 2  # one for each library
