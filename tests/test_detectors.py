"""What every detector must do: one row per detector. And what is CS-Flow's alone."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from anomalib.data import Folder, ImageBatch
from anomalib.engine import Engine
from anomalib.pre_processing import PreProcessor
from conftest import CFLOW, FAST_FLOW, MS_FLOW, SMALL, folder_arguments, randomize
from PIL import Image
from torchvision.transforms.v2 import Normalize, Resize

from anomalib_csflow import CFlow, CSFlow, DifferNet, FastFlow, MSFlow, RealNVP, scoring
from anomalib_csflow.engine import precision
from anomalib_csflow.engine.detector import FlowDetector
from anomalib_csflow.engine.images import UnreadableImageError
from anomalib_csflow.engine.optimization import NonFiniteLossError
from anomalib_csflow.engine.precision import computes_bfloat16
from anomalib_csflow.features.weights import WeightsError
from anomalib_csflow.flows import CrossScaleCoupling

DETECTORS: dict[str, tuple[type[FlowDetector], dict[str, Any]]] = {
    "CSFlow": (CSFlow, SMALL),
    "CSFlow, fused map": (CSFlow, SMALL | {"map_mode": "mean", "num_scales": 2, "standardize": False}),
    "CSFlow, maps rounded down": (
        CSFlow,
        SMALL | {"backbone": "convnext_atto", "layer": "stages.2", "weights": "random"},
    ),
    "CSFlow, transformer": (
        CSFlow,
        SMALL | {"backbone": "vit_tiny_patch16_224", "layer": "blocks.2", "weights": "random"},
    ),
    "DifferNet": (DifferNet, SMALL | {"num_train_rotations": 2, "num_test_rotations": 3}),
    "DifferNet, fixed rotations": (
        DifferNet,
        SMALL | {"num_test_rotations": 1, "fixed_train_rotations": True, "standardize": False},
    ),
    "RealNVP": (RealNVP, SMALL),
    "RealNVP, transformer": (
        RealNVP,
        SMALL | {"backbone": "vit_tiny_patch16_224", "layer": "blocks.2", "weights": "random", "standardize": False},
    ),
    "CFlow": (CFlow, CFLOW),
    "CFlow, transformer": (
        CFlow,
        CFLOW | {"backbone": "vit_tiny_patch16_224", "layers": ["blocks.1", "blocks.2"], "weights": "random"},
    ),
    "CFlow, standardized and permuted": (CFlow, CFLOW | {"standardize": True, "permute_soft": False}),
    "CFlow, by energy": (CFlow, CFLOW | {"score_by": "energy", "top_share": 0.03}),
    "FastFlow": (FastFlow, FAST_FLOW),
    "FastFlow, of the least likely positions": (FastFlow, FAST_FLOW | {"top_share": 0.03}),
    "FastFlow, transformer": (
        FastFlow,
        FAST_FLOW
        | {"backbone": "vit_tiny_patch16_224", "layers": ["blocks.2"], "weights": "random", "standardize": False},
    ),
    "FastFlow, borders not padded": (
        FastFlow,
        FAST_FLOW | {"backbone": "inception_v4", "layers": ["features.3", "features.10"], "weights": "random"},
    ),
    "MSFlow": (MSFlow, MS_FLOW),
    "MSFlow, standardized": (MSFlow, MS_FLOW | {"standardize": True}),
}
WITHOUT_MAPS = (DifferNet, RealNVP)
"""Detectors whose forward gives the image score alone."""


@pytest.fixture(params=DETECTORS.values(), ids=DETECTORS.keys())
def each(request: pytest.FixtureRequest) -> FlowDetector:
    """Every detector, small, with random flow parameters."""
    cls, arguments = request.param
    detector = cls(**arguments, image_size=(96, 128))
    randomize(detector.model.flow, scale=0.05)
    return detector.eval()


def test_a_score_depends_on_its_own_image_alone(each: FlowDetector) -> None:
    images = torch.rand(4, 3, 110, 140)
    with torch.no_grad():
        batch, singles = each.model(images), [each.model(image[None]) for image in images]
        nll = torch.cat([each.nll(image[None]) for image in images])
        torch.testing.assert_close(batch.pred_score, torch.cat([s.pred_score for s in singles]), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(each.nll(images), nll, atol=1e-2, rtol=1e-4)
    assert batch.pred_score.shape == (4,)
    assert batch.pred_score.std() > 0
    if isinstance(each, WITHOUT_MAPS):
        assert batch.anomaly_map is None
        return
    torch.testing.assert_close(batch.anomaly_map, torch.cat([s.anomaly_map for s in singles]), atol=1e-4, rtol=1e-3)
    assert batch.anomaly_map.shape == (4, 1, 110, 140)


def test_forward_gives_the_same_in_training_mode(each: FlowDetector) -> None:
    images = torch.rand(2, 3, 96, 128)
    torch.testing.assert_close(each.model.train()(images), each.model.eval()(images))


def test_loss_is_the_nll_per_dimension_less_its_constant(each: FlowDetector) -> None:
    images = torch.rand(3, 3, 96, 128)
    constant = 0.5 * torch.log(torch.tensor(2 * torch.pi))
    features = each.model.features(each.model.views(images))
    dims = scoring.num_dims(features)
    torch.testing.assert_close(each.loss(features), each.model.nll(images).mean() / dims - constant)


def test_nll_is_of_the_pre_processed_images(each: FlowDetector) -> None:
    raw = torch.rand(3, 3, 200, 170)  # nll() pre-processes, as forward() does
    images = each.pre_processor(raw)
    nats, dims = each.model.nll(images), scoring.num_dims(each.model.features(images))
    torch.testing.assert_close(each.nll(raw), nats)
    torch.testing.assert_close(each.nll(raw, bits_per_dim=True), scoring.bits_per_dim(nats, dims))


def test_the_optimizer_has_the_flow_and_nothing_frozen(each: FlowDetector, datamodule: Folder, tmp_path: Path) -> None:
    """The detector comes in eval mode, which makes training fail in anomalib's own models."""
    before = {name: value.clone() for name, value in each.model.features.state_dict().items()}
    Engine(max_epochs=1, accelerator="cpu", default_root_dir=tmp_path).fit(each, datamodule=datamodule)
    (optimizer,) = each.trainer.optimizers
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert held == {id(parameter) for parameter in each.model.flow.parameters()}
    after = each.model.features.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_training_on_good_images_finds_defects(datamodule: Folder, tmp_path: Path) -> None:
    detector = CSFlow(**SMALL, image_size=128)
    engine = Engine(max_epochs=8, accelerator="cpu", default_root_dir=tmp_path)
    engine.fit(detector, datamodule=datamodule)
    (metrics,) = engine.test(detector, datamodule=datamodule)
    assert metrics["image_AUROC"] == 1.0
    assert metrics["pixel_AUROC"] > 0.9


def test_number_of_parameters_is_the_papers() -> None:
    """The published flow has 275.2 M parameters."""
    with torch.device("meta"):
        dims = [(304, 24, 24), (304, 12, 12), (304, 6, 6)]
        blocks = [CrossScaleCoupling(dims, kernel_size=k) for k in (3, 3, 3, 5)]
    parameters = sum(p.numel() for block in blocks for p in block.parameters())
    assert parameters == pytest.approx(275.2e6, rel=1e-3)


def test_paper_defaults_of_the_constructor() -> None:
    detector = CSFlow(weights="random", hidden_channels=8)  # the width alone is small, to be built in little memory
    hparams = detector.hparams
    assert (hparams.backbone, hparams.layer, hparams.image_size) == ("tf_efficientnet_b5.aa_in1k", "blocks.5", 768)
    assert detector.input_size == (768, 768)
    assert detector.model.features.channels == [304] * 3
    assert detector.model.features.backbone.stride == 32  # 24x24, 12x12 and 6x6 maps
    couplings = detector.model.flow[1::2]
    assert [coupling.from_first.enter[0].kernel_size[0] for coupling in couplings] == [3, 3, 3, 5]
    assert detector.model.standardization is None
    (group,) = detector.configure_optimizers()["optimizer"].param_groups
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (2e-4, (0.9, 0.999), 1e-4, 1e-5)
    assert hparams.gradient_clip_norm == 1.0


def test_pre_processing_follows_the_backbone() -> None:
    def transform(detector: CSFlow) -> tuple[list[float], list[float], list[int]]:
        resize, normalize = detector.pre_processor.transform.transforms
        assert isinstance(resize, Resize)
        assert isinstance(normalize, Normalize)
        return normalize.mean, normalize.std, resize.size

    assert transform(CSFlow(**SMALL, image_size=(96, 128))) == ([0.5] * 3, [0.5] * 3, [96, 128])
    resnet = CSFlow("resnet18.tv_in1k", "layer2", "random", image_size=64, hidden_channels=4)
    assert transform(resnet) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225], [64, 64])


@pytest.mark.parametrize("size", [(96, 128), (160, 96), (250, 333)])
def test_inference_at_another_size_than_in_training(detector: CSFlow, size: tuple[int, int]) -> None:
    with torch.no_grad():
        assert detector.model(torch.rand(2, 3, *size)).anomaly_map.shape == (2, 1, *size)
    detector.pre_processor = detector.configure_pre_processor(size)
    with torch.no_grad():
        assert detector(torch.rand(1, 3, 400, 300)).anomaly_map.shape == (1, 1, *size)


@pytest.mark.parametrize(("mode", "gain"), [("L", 1), ("I;16", 1), ("RGB", 1), ("RGBA", 1), ("I;16", 256)])
def test_grey_and_16_bit_images(mode: str, gain: int, image_folder: Path, tmp_path: Path) -> None:
    """Whatever anomalib reads; but it reads 16-bit values above 255 as white, which is said instead."""
    folder = tmp_path / "good"
    folder.mkdir()
    for source in sorted((image_folder / "train/good").iterdir()):
        values = np.asarray(Image.open(source))
        image = Image.fromarray(values.astype(np.uint16) * gain) if mode == "I;16" else Image.open(source).convert(mode)
        assert image.mode == mode
        image.save(folder / source.name)
    datamodule = Folder("grey", "good", root=tmp_path, train_batch_size=4, eval_batch_size=1, num_workers=0)
    engine = Engine(max_epochs=1, accelerator="cpu", default_root_dir=tmp_path)
    detector = CSFlow(**SMALL, image_size=96)
    if gain > 1:
        with pytest.raises(UnreadableImageError, match=r"\.png has values up to .* scale it to 8 bits per channel"):
            engine.fit(detector, datamodule=datamodule)
        return
    engine.fit(detector, datamodule=datamodule)
    (prediction, *_) = engine.predict(detector, data_path=folder)
    assert torch.isfinite(prediction.pred_score).all()
    assert prediction.image.std() > 0.1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"backbone": "tf_efficientnet_lite9"},
            "no backbone 'tf_efficientnet_lite9'; near names are .*tf_efficientnet_lite",
        ),
        ({"layer": "block.4"}, r"no layer 'block\.4'; near names are .*blocks\.4"),
        ({"image_size": 63}, "63x63 pixels is too small for 3 scales .* the least size is 64x64"),
        ({"map_mode": "max"}, "unknown map_mode 'max': choose one of"),
        ({"image_size": 0}, "image_size must be positive, a whole number or two, got 0"),
        ({"schedule": "cosine"}, "unknown schedule 'cosine': choose one of constant, one_cycle"),
        (
            {"backbone": "inception_v4", "layer": "features.10", "weights": "random"},
            "which do not halve: choose a backbone",
        ),
        ({"num_blocks": 0}, "num_blocks must be 1 or more"),
        ({"num_blocks": 2, "kernel_sizes": [3]}, "give one of kernel_sizes for each of num_blocks"),
    ],
)
def test_bad_arguments(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CSFlow(**SMALL | {"image_size": 96} | changes)


def test_bad_weights() -> None:
    with pytest.raises(WeightsError, match=r"no file of weights at nowhere\.pth"):
        CSFlow(**SMALL | {"weights": "nowhere.pth"}, image_size=96)


def test_too_small_an_image_at_inference(detector: CSFlow) -> None:
    with pytest.raises(ValueError, match="the least size is 64x64"):
        detector.model(torch.rand(1, 3, 96, 60))


def test_non_finite_loss_stops_and_keeps_the_last_checkpoint(datamodule: Folder, tmp_path: Path) -> None:
    class Poisoned(CSFlow):
        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 1:
                with torch.no_grad():
                    next(self.model.flow.parameters()).fill_(float("nan"))

    detector = Poisoned(**SMALL, image_size=96)
    engine = Engine(max_epochs=3, accelerator="cpu", default_root_dir=tmp_path)
    with pytest.raises(NonFiniteLossError, match=r"the loss became nan at epoch 1, step 3: .*model\.ckpt") as error:
        engine.fit(detector, datamodule=datamodule)
    path = re.search(r"checkpoint: (\S+\.ckpt)", str(error.value))[1]
    kept = Poisoned.load_from_checkpoint(path)
    assert all(torch.isfinite(parameter).all() for parameter in kept.model.flow.parameters())


def test_gradient_clipping_is_the_papers_unless_asked(datamodule: Folder, tmp_path: Path) -> None:
    class Watched(CSFlow):
        norms: list[float] = []

        def on_before_zero_grad(self, optimizer: torch.optim.Optimizer) -> None:
            gradients = [p.grad for p in self.model.flow.parameters() if p.grad is not None]
            if gradients:
                self.norms.append(float(torch.nn.utils.get_total_norm(gradients)))

    for asked, bound in ((None, 1.0), (0.01, 0.01)):
        Watched.norms = []
        detector = Watched(**SMALL | {"standardize": False}, image_size=96)
        engine = Engine(max_epochs=2, accelerator="cpu", default_root_dir=tmp_path, gradient_clip_val=asked)
        engine.fit(detector, datamodule=datamodule)
        assert Watched.norms
        assert max(Watched.norms) == pytest.approx(bound, rel=1e-2)


def test_non_finite_gradient_stops_before_the_step(datamodule: Folder, tmp_path: Path) -> None:
    class Exploding(CSFlow):
        def on_after_backward(self) -> None:
            if self.current_epoch == 1:
                next(self.model.flow.parameters()).grad.fill_(float("inf"))

    detector = Exploding(**SMALL, image_size=96)
    engine = Engine(max_epochs=2, accelerator="cpu", default_root_dir=tmp_path)
    with pytest.raises(NonFiniteLossError, match=r"the gradient became inf at epoch 1, step 3: .*model\.ckpt"):
        engine.fit(detector, datamodule=datamodule)
    assert all(torch.isfinite(parameter).all() for parameter in detector.model.flow.parameters())


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


def test_custom_pre_processor_is_used() -> None:
    detector = CSFlow(**SMALL, image_size=96, pre_processor=PreProcessor(Resize((128, 64))))
    assert detector.input_size == (128, 64)


def broken_copy(source: Path, folder: Path, kind: str) -> Path:
    """A copy of a folder with one image more, which cannot be read."""
    folder.mkdir(parents=True)
    files = sorted(source.iterdir())
    for file in files:
        (folder / file.name).write_bytes(file.read_bytes())
    content = files[0].read_bytes()
    broken = {"no image": b"no image", "cut": content[: len(content) // 2], "empty": b""}[kind]
    (folder / "broken.png").write_bytes(broken)
    return folder


@pytest.mark.parametrize("kind", ["no image", "cut", "empty"])
def test_unreadable_image_is_named_before_training(kind: str, image_folder: Path, tmp_path: Path) -> None:
    folder = broken_copy(image_folder / "train/good", tmp_path / "images", kind)
    datamodule = Folder(**folder_arguments(image_folder) | {"normal_dir": str(folder)})
    with pytest.raises(UnreadableImageError, match=r"cannot read the image .*broken\.png"):
        Engine(max_epochs=1, accelerator="cpu", default_root_dir=tmp_path).fit(
            CSFlow(**SMALL, image_size=96), datamodule=datamodule
        )


@pytest.mark.parametrize("folder", ["normal_test_dir", "mask_dir"])
def test_unreadable_validation_image_is_named_before_training(folder: str, image_folder: Path, tmp_path: Path) -> None:
    arguments = folder_arguments(image_folder)
    images = tmp_path / "images"
    images.mkdir()
    for file in sorted((image_folder / str(arguments[folder])).iterdir()):
        content = file.read_bytes()
        (images / file.name).write_bytes(content[: len(content) // 2] if file.stem == "002" else content)
    datamodule = Folder(**arguments | {folder: str(images)})
    with pytest.raises(UnreadableImageError, match=r"cannot read the image .*002\.png"):
        Engine(max_epochs=1, accelerator="cpu", default_root_dir=tmp_path).fit(
            CSFlow(**SMALL, image_size=96), datamodule=datamodule
        )


def test_unreadable_image_is_named_before_test_and_predict(
    detector: CSFlow, image_folder: Path, tmp_path: Path
) -> None:
    folder = broken_copy(image_folder / "test/good", tmp_path / "images", "cut")
    engine = Engine(accelerator="cpu", default_root_dir=tmp_path)
    with pytest.raises(UnreadableImageError, match=r"cannot read the image .*broken\.png"):
        engine.predict(detector, data_path=folder)
    datamodule = Folder(**folder_arguments(image_folder) | {"normal_test_dir": str(folder)})
    with pytest.raises(UnreadableImageError, match=r"cannot read the image .*broken\.png"):
        engine.test(detector, datamodule=datamodule)


@pytest.mark.parametrize("exists", [True, False])
def test_empty_or_missing_folder(exists: bool, tmp_path: Path) -> None:
    if exists:
        (tmp_path / "good").mkdir()
    with pytest.raises((RuntimeError, FileNotFoundError), match=str(tmp_path / "good")):
        Engine(max_epochs=1, accelerator="cpu", default_root_dir=tmp_path).fit(
            CSFlow(**SMALL, image_size=96), datamodule=Folder("none", "good", root=tmp_path)
        )


def test_recomputed_activations_give_the_same_gradient() -> None:
    detector = CSFlow(**SMALL, image_size=(96, 128))
    randomize(detector.model.flow, scale=0.05)
    features = detector.model.features(torch.rand(2, 3, 96, 128))
    parameters = list(detector.model.flow.parameters())
    kept = torch.autograd.grad(detector.loss(features), parameters)
    detector.model.flow.recompute = True
    again = torch.autograd.grad(detector.loss(features), parameters)
    torch.testing.assert_close(again, kept)


def test_recompute_keeps_little_between_the_passes() -> None:
    def kept_bytes(**arguments: Any) -> int:
        detector = CSFlow(**SMALL | {"num_blocks": 8} | arguments, image_size=128)
        sizes = []
        features = detector.model.features(torch.rand(4, 3, 128, 128))

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            sizes.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            detector.loss(features)
        return sum(sizes)

    assert kept_bytes(recompute=True) < 0.4 * kept_bytes()


@pytest.mark.skipif(not computes_bfloat16(torch.device("cpu")), reason="the processor does not compute in bfloat16")
def test_bfloat16_trains_as_well(datamodule: Folder, tmp_path: Path) -> None:
    losses = {}
    for wanted in (False, True):
        torch.manual_seed(0)
        detector = CSFlow(**SMALL, image_size=(96, 128), bfloat16=wanted)
        engine = Engine(default_root_dir=tmp_path, max_epochs=4, accelerator="cpu", enable_progress_bar=False)
        engine.fit(detector, datamodule=datamodule)
        losses[wanted] = float(engine.trainer.callback_metrics["train_loss_epoch"])
        assert {parameter.dtype for parameter in detector.model.parameters()} == {torch.float32}
    assert losses[True] != losses[False]
    assert losses[True] == pytest.approx(losses[False], rel=0.01)


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
