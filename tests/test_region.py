"""A region of interest: nothing outside it changes a score, in any detector, checkpoint or export."""

from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from anomalib.data import Folder
from anomalib.engine import Engine
from conftest import SMALL, folder_arguments, randomize
from PIL import Image
from test_arguments import DETECTORS, SIX
from torchvision.transforms import v2
from torchvision.tv_tensors import Mask

from anomalib_csflow import CSFlow, from_recipe
from anomalib_csflow.engine.cache_key import transform_key
from anomalib_csflow.engine.checkpoints import CheckpointError
from anomalib_csflow.engine.detector import FlowDetector
from anomalib_csflow.engine.images import ImageOptions
from anomalib_csflow.engine.region import Region, RegionError, packed


@pytest.fixture
def left_half(tmp_path: Path) -> str:
    """A mask whose left half is to be inspected."""
    mask = Image.new("L", (32, 32))
    mask.paste(255, (0, 0, 16, 32))
    mask.save(tmp_path / "region.png")
    return str(tmp_path / "region.png")


def changed(images: torch.Tensor, columns: slice) -> torch.Tensor:
    """The images with noise in some columns."""
    found = images.clone()
    found[..., columns] = torch.rand_like(found[..., columns])
    return found


@pytest.mark.parametrize("cls", DETECTORS)
def test_only_the_region_counts(cls: type[FlowDetector], left_half: str) -> None:
    detector: Any = cls(**SIX[cls][0] | {"image_size": 64, "antialias": False}, region=left_half)
    randomize(detector.model.flow)
    detector.eval()
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        all_of_it, outside, inside = (
            detector(seen) for seen in (images, changed(images, slice(32, 64)), changed(images, slice(0, 32)))
        )
    assert torch.equal(all_of_it.pred_score, outside.pred_score)
    assert not torch.isclose(all_of_it.pred_score, inside.pred_score, rtol=1e-4).any()
    if all_of_it.anomaly_map is not None:
        assert torch.equal(all_of_it.anomaly_map, outside.anomaly_map)


@pytest.mark.slow
@pytest.mark.refits
def test_checkpoints_and_exports_contain_it(left_half: str, image_folder: Path, tmp_path: Path) -> None:
    detector = CSFlow(**SMALL | {"image_size": 64, "antialias": False}, region=left_half, max_steps=2)
    engine = Engine(accelerator="cpu", default_root_dir=tmp_path / "results", logger=False)
    engine.fit(detector, datamodule=Folder(**folder_arguments(image_folder)))
    assert detector.post_processor.made.kind == "estimated"  # with refits, which have the region too
    Path(left_half).unlink()
    loaded = CSFlow.load_from_checkpoint(engine.best_model_path).eval()
    session = onnxruntime.InferenceSession(loaded.to_onnx(tmp_path))
    images = torch.rand(1, 3, 96, 96)
    for seen in (images, changed(images, slice(48, 96))):
        with torch.no_grad():
            torch.testing.assert_close(loaded(seen).pred_score, loaded(images).pred_score)
        score = session.run(["pred_score"], {session.get_inputs()[0].name: seen.numpy()})[0]
        torch.testing.assert_close(torch.from_numpy(score).flatten(), loaded(images).pred_score, atol=1e-4, rtol=1e-4)
    with pytest.raises(CheckpointError, match=r"trained with region='mask .*', this detector has None"):
        CSFlow.load_from_checkpoint(engine.best_model_path, region=None)


def test_true_masks_are_not_painted(left_half: str) -> None:
    transform = ImageOptions("tf_efficientnet_lite0", "random", 64, antialias=False, region=left_half).pre_processor()
    assert transform.transform is not None
    image, mask = transform.transform(torch.rand(1, 3, 64, 64), Mask(torch.ones(1, 64, 64)))
    assert bool(mask.all())
    assert bool(image[..., :32].any())
    assert not image[..., 32:].any()


def test_features_of_different_regions_are_told_apart(left_half: str) -> None:
    mask = packed(left_half)
    other = Image.new("L", (32, 32), 255)
    other.save(left_half)
    keys = {transform_key(v2.Compose([Region(text, (64, 64))])) for text in (mask, packed(left_half))}
    assert len(keys) == 2
    assert packed(mask) == mask  # which is what a checkpoint has


def test_what_is_no_region(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no image")
    Image.new("L", (8, 8)).save(tmp_path / "black.png")
    for region, message in (
        (tmp_path / "none.png", r"the region .*none.png cannot be read .*: give the file"),
        (tmp_path / "text.png", r"the region .*text.png cannot be read .*: give the file"),
        ("data:image/png;base64,AAAA", "the region cannot be read"),
        ("data:image/png;base64,!", "the region cannot be read"),
        (tmp_path / "black.png", "has no white part, so that nothing would be inspected"),
    ):
        with pytest.raises(RegionError, match=message):
            from_recipe("cs_flow_small", region=str(region))
    Image.new("L", (8, 8), 255).save(tmp_path / "white.png")
    with pytest.raises(ValueError, match="region needs the detector's own pre-processor"):
        from_recipe(
            "cs_flow_small",
            region=str(tmp_path / "white.png"),
            pre_processor=ImageOptions("tf_efficientnet_lite2", "random", 64, antialias=False).pre_processor(),
        )
