"""What only DifferNet has: rotated views, maps by the gradient, exports without them."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.data import Folder, ImageBatch
from anomalib.data.utils import read_image
from anomalib.deploy import ExportType, OpenVINOInferencer, TorchInferencer
from anomalib.engine import Engine
from conftest import SMALL, folder_arguments, randomize
from torchvision.transforms.v2 import functional as transforms

from anomalib_csflow import DifferNet, RealNVP
from anomalib_csflow.detectors.differ_net.rotations import rotate_all, rotate_each
from anomalib_csflow.engine.checkpoints import CheckpointError

TINY = SMALL | {"num_test_rotations": 4, "num_train_rotations": 2}


@pytest.fixture
def differ_net() -> DifferNet:
    """Small, with random flow parameters."""
    detector = DifferNet(**TINY, image_size=(96, 128))
    randomize(detector.model.flow, scale=0.05)
    return detector.eval()


# -- rotations ----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(40, 40), (31, 50)])
@pytest.mark.parametrize("angle", [0.0, 37.0, -120.5, 180.0])
def test_rotation_is_torchvisions(size: tuple[int, int], angle: float) -> None:
    images, fill = torch.rand(2, 3, *size), [0.1, -2.0, 3.0]
    turned = rotate_all(images, torch.tensor([angle]), torch.tensor(fill))
    expected = transforms.rotate(images, angle, fill=fill)  # nearest is its default, as it was the paper's
    assert (turned != expected).any(1).float().mean() < 0.01  # pixels at equal distance of two
    each = rotate_each(images, torch.tensor([angle, 0.0]), torch.tensor(fill))
    torch.testing.assert_close(each[0], turned[0])
    torch.testing.assert_close(each[1], images[1])


def test_quarter_turns_are_exact() -> None:
    images = torch.rand(2, 3, 32, 32)
    turned = rotate_all(images, torch.tensor([0.0, 90.0, 180.0, 270.0]), torch.zeros(3)).unflatten(0, (2, 4))
    for quarter in range(4):
        torch.testing.assert_close(turned[:, quarter], torch.rot90(images, quarter, (2, 3)))


# -- views --------------------------------------------------------------------------------------


def test_a_score_is_the_mean_over_the_fixed_views(differ_net: DifferNet) -> None:
    images = torch.rand(2, 3, 96, 96)
    model = differ_net.model
    with torch.no_grad():
        scores, nlls = [], []
        for quarter in range(4):
            (latent,), log_det = model.transform(model.features(torch.rot90(images, quarter, (2, 3))))
            scores.append(latent.square().mean(1))
            normal = torch.distributions.Normal(0, 1).log_prob(latent).sum(1)
            nlls.append(-(normal + log_det))
        torch.testing.assert_close(model(images).pred_score, torch.stack(scores).mean(0))
        torch.testing.assert_close(model.nll(images), torch.stack(nlls).mean(0))
    assert torch.stack(scores).std(0).min() > 0


def test_views_in_training(differ_net: DifferNet) -> None:
    images = torch.rand(2, 3, 64, 64)
    first, second = (differ_net.turned_at_random(images) for _ in range(2))
    assert not torch.equal(first, second)
    assert differ_net.features(ImageBatch(image=images))[0].shape[0] == 4
    fixed = DifferNet(**TINY | {"fixed_train_rotations": True}, image_size=64)
    views = (images, torch.rot90(images, 2, (2, 3)))
    (features,) = fixed.features(ImageBatch(image=images))
    torch.testing.assert_close(features, torch.cat([fixed.model.features(view)[0] for view in views]))
    assert [view.name for view in fixed.fixed_views] == ["rotated by 0 degrees", "rotated by 180 degrees"]


def test_only_fixed_views_are_cached(
    datamodule: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("ANOMALIB_CSFLOW_CACHE", str(tmp_path / "cache"))

    def calls_of_the_backbone(fixed: bool) -> int:
        torch.manual_seed(0)
        detector = DifferNet(**TINY | {"fixed_train_rotations": fixed, "num_scales": 1}, image_size=64)
        sizes: list[int] = []
        detector.model.features.register_forward_pre_hook(lambda _, images: sizes.append(len(images[0])))
        trainer = {"max_epochs": 3, "limit_val_batches": 0, "accelerator": "cpu", "default_root_dir": tmp_path}
        Engine(**trainer).fit(detector, datamodule=datamodule)
        assert torch.isfinite(next(detector.model.flow.parameters())).all()
        return sum(sizes)

    images, views = 12, 2
    # the same features as RealNVP's, which would be taken for known
    engine = Engine(max_epochs=1, limit_val_batches=0, accelerator="cpu", default_root_dir=tmp_path)
    engine.fit(RealNVP(**SMALL, image_size=64), datamodule=datamodule)
    assert calls_of_the_backbone(fixed=True) == images * views
    assert calls_of_the_backbone(fixed=True) == 0
    with caplog.at_level(logging.INFO):
        assert calls_of_the_backbone(fixed=False) == 4 * images * views  # with the standardization's
    assert "DifferNet changes images at random" in caplog.text


def test_black_is_black_before_normalization(differ_net: DifferNet) -> None:
    view = differ_net.turned_at_random(torch.ones(1, 3, 64, 64))
    black = differ_net.pre_processor.transform.transforms[1](torch.zeros(3, 1, 1)).flatten()
    assert set(view[0, 0].unique().tolist()) <= {1.0, black[0].item()}
    assert (view == 1).any()


def test_paper_defaults_of_the_constructor() -> None:
    detector = DifferNet(weights="random", hidden_channels=8)  # the width alone is small
    hparams = detector.hparams
    assert (hparams.backbone, hparams.layer, hparams.image_size) == ("torchvision/alexnet", "features.12", 448)
    assert (hparams.num_train_rotations, hparams.num_test_rotations, hparams.hidden_channels) == (4, 64, 8)
    assert detector.model.features.num_features == 768
    assert len(detector.model.flow) == 16
    assert len(detector.model.angles) == 64
    (group,) = detector.configure_optimizers()["optimizer"].param_groups
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (2e-4, (0.8, 0.8), 1e-4, 1e-5)


# -- maps ---------------------------------------------------------------------------------------


def test_maps_in_the_engine_find_defects(datamodule: Folder, tmp_path: Path) -> None:
    arguments = TINY | {"schedule": "constant", "localize": True, "fixed_train_rotations": True}
    detector = DifferNet(**arguments, image_size=128)
    engine = Engine(max_epochs=8, accelerator="cpu", default_root_dir=tmp_path)
    engine.fit(detector, datamodule=datamodule)
    (metrics,) = engine.test(detector, datamodule=datamodule)
    assert metrics["image_AUROC"] == 1.0
    assert metrics["pixel_AUROC"] > 0.7
    predictions = engine.predict(detector, datamodule=datamodule)
    assert predictions[0].anomaly_map.shape == (4, 128, 128)
    assert predictions[0].pred_mask.any()


def test_a_map_belongs_to_its_own_image(differ_net: DifferNet) -> None:
    images = torch.rand(3, 3, 80, 100)
    with torch.inference_mode():
        batch = differ_net.model.localize(images)
        singles = [differ_net.model.localize(image[None]) for image in images]
        torch.testing.assert_close(batch.pred_score, differ_net.model(images).pred_score)
    expected = torch.cat([single.anomaly_map for single in singles])
    torch.testing.assert_close(batch.anomaly_map, expected, atol=1e-6 + 1e-4 * expected.max().item(), rtol=1e-3)
    assert batch.anomaly_map.shape == (3, 1, 80, 100)
    assert not batch.anomaly_map.requires_grad


def test_map_of_a_model_that_sees_one_pixel() -> None:
    """Views are rotated back: if the likelihood depends on one pixel only, the map shows that pixel."""
    detector = DifferNet(**TINY, image_size=64).eval()

    num_features = detector.model.features.num_features

    class Brightest(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor]:
            return (images.flatten(1).max(1).values[:, None].repeat(1, num_features),)

    detector.model.features = Brightest()
    images = torch.zeros(1, 3, 64, 64)
    images[..., 20, 41] = 5.0
    found = detector.model.localize(images).anomaly_map[0, 0]
    assert divmod(int(found.argmax()), 64) == (20, 41)


def test_maps_without_a_scale_are_refused(datamodule: Folder, tmp_path: Path, image_folder: Path) -> None:
    engine = Engine(max_epochs=1, accelerator="cpu", default_root_dir=tmp_path)
    engine.fit(DifferNet(**TINY, image_size=64), datamodule=datamodule)
    detector = DifferNet(**TINY | {"localize": True}, image_size=64)
    with pytest.raises(ValueError, match="no scale and no threshold: fit or validate it with localize=True"):
        engine.test(detector, datamodule=datamodule, ckpt_path=engine.best_model_path)
    plain = DifferNet.load_from_checkpoint(engine.best_model_path)
    (prediction, *_) = engine.predict(plain, data_path=image_folder / "test/blob")
    assert prediction.anomaly_map is None
    with pytest.raises(CheckpointError, match="trained with hidden_channels=16"):
        DifferNet.load_from_checkpoint(engine.best_model_path, hidden_channels=8)


# -- exports ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", [ExportType.TORCH, ExportType.OPENVINO])
def test_exports_give_the_image_score_and_say_so(
    kind: ExportType,
    image_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)  # the inferencer writes its cache where it runs
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    # exports resize without antialiasing, and the threshold is taken of what the engine sees
    detector = DifferNet(**TINY | {"num_scales": 2, "schedule": "constant", "antialias": False}, image_size=(96, 128))
    engine = Engine(max_epochs=4, accelerator="cpu", default_root_dir=tmp_path)
    engine.fit(detector, datamodule=Folder(**folder_arguments(image_folder)))
    detector.eval()
    with caplog.at_level(logging.INFO):
        path = engine.export(detector, kind, export_root=tmp_path)
    assert caplog.text.count("gives the image score and no anomaly map") == 1
    if kind == ExportType.OPENVINO:
        inferencer = OpenVINOInferencer(path, device="CPU", config={"INFERENCE_PRECISION_HINT": "f32"})
    else:
        inferencer = TorchInferencer(path, device="cpu")
    scores, labels = [], set()
    for image in sorted((image_folder / "test").rglob("*.png")):
        with torch.no_grad():
            expected = detector(read_image(image, as_tensor=True)[None])
        found = inferencer.predict(str(image))
        assert expected.anomaly_map is None
        assert found.anomaly_map is None
        np.testing.assert_allclose(np.asarray(found.pred_score).squeeze(), expected.pred_score.item(), atol=1e-3)
        assert bool(np.asarray(found.pred_label).squeeze()) == bool(expected.pred_label)
        scores.append(expected.pred_score.item())
        labels.add(bool(expected.pred_label))
    assert np.ptp(scores) > 0.05  # constants would agree as well
    assert labels == {False, True}
    if kind == ExportType.OPENVINO:  # batches of any size
        import openvino

        images = torch.rand(3, 3, 70, 90)
        model = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        with torch.no_grad():
            expected = detector(images).pred_score
        np.testing.assert_allclose(model(images.numpy())["pred_score"].reshape(-1), expected, atol=1e-3)


@pytest.mark.parametrize("name", ["num_blocks", "num_train_rotations", "num_test_rotations"])
def test_counts_are_positive(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be 1 or more, got 0"):
        DifferNet(**TINY | {name: 0}, image_size=64)


def test_reference_weights_that_do_not_fit(differ_net: DifferNet) -> None:
    with pytest.raises(ValueError, match="there is no DifferNet in these weights"):
        differ_net.load_reference_state_dict({"conv1.weight": torch.zeros(3)})
    published = {
        f"nf.module_list.{node}.s{half}.{name}.{kind}": torch.zeros(shape if kind == "weight" else shape[:1])
        for node in (2, 4)
        for half in (1, 2)
        for name, shape in {"fc1": (16, 168), "fc2": (16, 16), "fc2b": (16, 16), "fc3": (336, 16)}.items()
        for kind in ("weight", "bias")
    }
    differ_net.load_reference_state_dict(published)
    assert not any(parameter.any() for parameter in differ_net.model.flow.parameters())
    other = DifferNet(**TINY | {"num_blocks": 3}, image_size=64)
    with pytest.raises(ValueError, match=r"reference weights have 34 tensors, this detector.s flow 51"):
        other.load_reference_state_dict(published)
