"""anomalib's engine around our detectors: checkpoints, exports, look-up, and the host's known traps."""

import subprocess
import sys
from pathlib import Path

import anomalib.models
import numpy as np
import pytest
import torch
from anomalib.data import Folder
from anomalib.data.utils import read_image
from anomalib.deploy import CompressionType, ExportType, OpenVINOInferencer, TorchInferencer
from anomalib.engine import Engine
from anomalib.metrics import AUPRO, AUROC, Evaluator
from anomalib.models import AnomalibModule, Csflow, Padim, get_model, list_models
from conftest import SMALL, folder_arguments, randomize
from lightning.pytorch.callbacks import EarlyStopping
from torchvision.transforms.v2.functional import resize

import anomalib_csflow
from anomalib_csflow import CSFlow
from anomalib_csflow.engine.checkpoints import CheckpointError

SIZE = (96, 128)


@pytest.fixture(scope="module")
def trained(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[CSFlow, Path]:
    """A trained detector at a size that is not the default, and its checkpoint."""
    detector = CSFlow(**SMALL, image_size=SIZE)
    engine = Engine(max_epochs=6, accelerator="cpu", default_root_dir=tmp_path_factory.mktemp("trained"))
    engine.fit(detector, datamodule=Folder(**folder_arguments(image_folder)))
    return detector.eval(), Path(engine.best_model_path)


@pytest.fixture(scope="module")
def images(image_folder: Path) -> list[Path]:
    """Four images, good and defective in turn, of another size than the model's."""
    pairs = zip(*(sorted((image_folder / "test" / kind).iterdir())[:2] for kind in ("good", "blob")), strict=True)
    return [path for pair in pairs for path in pair]


# -- look-up ------------------------------------------------------------------------------------


def test_get_model_by_class_path() -> None:
    detector = get_model({"class_path": "anomalib_csflow.CSFlow", "init_args": {**SMALL, "image_size": 96}})
    assert isinstance(detector, CSFlow)


def test_importing_us_changes_nothing_for_others() -> None:
    code = (
        "from anomalib.models import list_models, get_model, AnomalibModule;"
        "names = lambda: {n: c.__module__ for c in AnomalibModule.__subclasses__() for n in [c.__name__.lower()]};"
        "before, listed = names(), list_models();"
        "from anomalib_csflow import *;"
        "after = names();"
        "assert {n: after[n] for n in before} == before;"
        "assert set(listed) <= set(list_models());"
        "assert [n for n, m in after.items() if m.startswith('anomalib_csflow')] == ['flowdetector']"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
    by_name = {cls.__name__.lower(): cls for cls in AnomalibModule.__subclasses__()}
    assert by_name["csflow"] is Csflow
    assert "csflow" in list_models()


def test_public_names() -> None:
    detectors = {"CFlow", "CSFlow", "DifferNet", "FastFlow", "MSFlow", "RealNVP"}
    assert set(anomalib_csflow.__all__) == detectors | {"ConformalPostProcessor", "FeatureCache", "from_recipe"}
    assert anomalib_csflow.__version__


# -- checkpoints --------------------------------------------------------------------------------


def test_load_from_checkpoint_at_another_image_size(trained: tuple[CSFlow, Path]) -> None:
    detector, path = trained
    loaded = CSFlow.load_from_checkpoint(path).eval()
    images = torch.rand(2, 3, 150, 180)
    with torch.no_grad():
        expected, prediction = detector(images), loaded(images)
    assert loaded.input_size == SIZE
    torch.testing.assert_close(prediction.pred_score, expected.pred_score)
    torch.testing.assert_close(prediction.anomaly_map, expected.anomaly_map)


def test_checkpoint_is_plain_data_without_the_backbone(trained: tuple[CSFlow, Path]) -> None:
    detector, path = trained
    checkpoint = torch.load(path, weights_only=True)
    assert not any("backbone" in key or "evaluator" in key for key in checkpoint["state_dict"])
    flow = sum(parameter.numel() * 4 for parameter in detector.model.flow.parameters())
    assert path.stat().st_size < 3 * flow + 200_000  # the flow, and Adam's two moments


def test_resume(image_folder: Path, tmp_path: Path) -> None:
    def fit(epochs: int, ckpt_path: str | None = None) -> tuple[CSFlow, Engine]:
        detector = CSFlow(**SMALL | {"schedule": "constant"}, image_size=96)
        engine = Engine(max_epochs=epochs, accelerator="cpu", default_root_dir=tmp_path)
        engine.fit(detector, datamodule=Folder(**folder_arguments(image_folder)), ckpt_path=ckpt_path)
        return detector, engine

    detector, engine = fit(1)
    first = {key: value.clone() for key, value in detector.model.flow.state_dict().items()}
    resumed, engine = fit(2, engine.best_model_path)
    assert engine.trainer.current_epoch == 2
    assert engine.trainer.global_step == 6
    state = resumed.model.flow.state_dict()
    # the statistics are the first run's; the parameters went on
    assert torch.equal(state["0.mean_0"], first["0.mean_0"])
    assert not torch.equal(state["2.from_first.gamma"], first["2.from_first.gamma"])


def test_resume_for_more_epochs_than_were_planned(image_folder: Path, tmp_path: Path) -> None:
    """A one-cycle schedule is stretched to the new number of steps."""
    rates: list[float] = []

    class Watched(CSFlow):
        def on_before_zero_grad(self, optimizer: torch.optim.Optimizer) -> None:
            rates.append(optimizer.param_groups[0]["lr"])

    path = None
    for epochs in (2, 4):
        engine = Engine(max_epochs=epochs, accelerator="cpu", default_root_dir=tmp_path)
        engine.fit(Watched(**SMALL, image_size=96), datamodule=Folder(**folder_arguments(image_folder)), ckpt_path=path)
        path = engine.best_model_path
    assert engine.trainer.global_step == len(rates) == 12
    uninterrupted = torch.optim.lr_scheduler.OneCycleLR(torch.optim.SGD([torch.zeros(1)]), SMALL["lr"], total_steps=12)
    expected = []
    for _ in range(12):
        expected.append(uninterrupted.get_last_lr()[0])
        uninterrupted.optimizer.step()
        uninterrupted.step() if len(expected) < 12 else None
    assert rates[6:] == pytest.approx(expected[6:], rel=1e-6)


def test_random_backbone_is_kept_in_its_checkpoint(datamodule: Folder, tmp_path: Path) -> None:
    detector = CSFlow(**SMALL | {"weights": "random"}, image_size=96)
    engine = Engine(max_epochs=1, accelerator="cpu", default_root_dir=tmp_path)
    engine.fit(detector, datamodule=datamodule)
    loaded = CSFlow.load_from_checkpoint(engine.best_model_path)
    images = torch.rand(2, 3, 96, 96)
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(images), detector.eval().model(images))


def test_checkpoint_of_another_model(trained: tuple[CSFlow, Path], datamodule: Folder, tmp_path: Path) -> None:
    detector, path = trained
    padim = Padim("tf_efficientnet_lite0", ["blocks.2"], pre_trained=False, n_features=10)
    engine = Engine(max_epochs=1, accelerator="cpu", default_root_dir=tmp_path)
    engine.fit(padim, datamodule=datamodule)
    foreign = engine.trainer.checkpoint_callback.best_model_path
    with pytest.raises(
        CheckpointError, match=r"model\.ckpt is not a checkpoint of this package: CSFlow cannot load it"
    ):
        CSFlow.load_from_checkpoint(foreign)
    with pytest.raises(CheckpointError, match="is not a checkpoint of this package"):
        Engine(accelerator="cpu", default_root_dir=tmp_path).test(detector, datamodule=datamodule, ckpt_path=foreign)

    class Sibling(CSFlow):
        pass

    with pytest.raises(CheckpointError, match="is a checkpoint of CSFlow: Sibling cannot load it"):
        Sibling.load_from_checkpoint(path)
    with pytest.raises(CheckpointError, match="trained with hidden_channels=16, this detector has 8: create it with"):
        CSFlow.load_from_checkpoint(path, hidden_channels=8)
    with pytest.raises(CheckpointError, match=r"trained with layer='blocks\.4', this detector has 'blocks\.3'"):
        CSFlow.load_from_checkpoint(path, layer="blocks.3")
    text = tmp_path / "text.ckpt"
    text.write_text("no checkpoint")
    with pytest.raises(CheckpointError, match=r"text\.ckpt is not a readable checkpoint"):
        CSFlow.load_from_checkpoint(text)
    with pytest.raises(FileNotFoundError, match=r"there is no checkpoint at .*none\.ckpt"):
        CSFlow.load_from_checkpoint(tmp_path / "none.ckpt")


def test_checkpoint_trained_on_other_weights(trained: tuple[CSFlow, Path]) -> None:
    with pytest.raises(CheckpointError, match="trained on other weights of the backbone 'tf_efficientnet_lite0'"):
        CSFlow.load_from_checkpoint(trained[1], weights="random")


def test_aupro_in_the_evaluator(datamodule: Folder, tmp_path: Path) -> None:
    """AUPRO has a buffer: anomalib's own models then fail to load and to export."""

    def evaluator() -> Evaluator:
        return Evaluator(test_metrics=[AUPRO(fields=["anomaly_map", "gt_mask"])])

    detector = CSFlow(**SMALL, image_size=96, evaluator=evaluator())
    engine = Engine(max_epochs=1, accelerator="cpu", default_root_dir=tmp_path)
    engine.fit(detector, datamodule=datamodule)
    path = engine.best_model_path
    (metrics,) = engine.test(detector, datamodule=datamodule, ckpt_path=path)
    assert 0 <= metrics["AUPRO"] <= 1
    CSFlow.load_from_checkpoint(path)
    CSFlow.load_from_checkpoint(path, evaluator=evaluator())
    assert engine.export(detector, ExportType.TORCH, export_root=tmp_path, ckpt_path=path).is_file()


def test_early_stopping_with_the_default_evaluator(datamodule: Folder, tmp_path: Path) -> None:
    stopping = EarlyStopping(monitor="pixel_AUROC", mode="max", patience=1, min_delta=1.0)
    engine = Engine(max_epochs=5, accelerator="cpu", default_root_dir=tmp_path, callbacks=[stopping])
    engine.fit(CSFlow(**SMALL, image_size=96), datamodule=datamodule)
    assert engine.trainer.current_epoch == 2


# -- export -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(trained: tuple[CSFlow, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The detector, rebuilt from its checkpoint, in each format."""
    root = tmp_path_factory.mktemp("exported")
    engine = Engine(accelerator="cpu", default_root_dir=root)
    return {
        kind.value: engine.export(CSFlow(**SMALL, image_size=SIZE), kind, export_root=root, ckpt_path=trained[1])
        for kind in (ExportType.TORCH, ExportType.ONNX, ExportType.OPENVINO)
    }


@pytest.mark.slow
def test_openvino_inferencer_agrees(
    trained: tuple[CSFlow, Path],
    exported: dict[str, Path],
    images: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)  # the inferencer writes its cache where it runs
    inferencer = OpenVINOInferencer(exported["openvino"], device="CPU", config={"INFERENCE_PRECISION_HINT": "f32"})
    _compare(trained[0], images, inferencer.predict)


@pytest.mark.slow
def test_torch_inferencer_agrees(
    trained: tuple[CSFlow, Path], exported: dict[str, Path], images: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    _compare(trained[0], images, TorchInferencer(exported["torch"], device="cpu").predict)


def _compare(detector: CSFlow, images: list[Path], predict) -> None:  # noqa: ANN001
    scores, labels = [], set()
    for path in images:
        with torch.no_grad():
            expected = detector(read_image(path, as_tensor=True)[None])
        found = predict(str(path))
        scores.append(expected.pred_score.item())
        assert not getattr(found.pred_score, "requires_grad", False)
        np.testing.assert_allclose(np.asarray(found.pred_score).squeeze(), scores[-1], atol=1e-3)
        np.testing.assert_allclose(np.asarray(found.anomaly_map).squeeze(), expected.anomaly_map.squeeze(), atol=1e-3)
        assert bool(np.asarray(found.pred_label).squeeze()) == bool(expected.pred_label)
        labels.add(bool(expected.pred_label))
    assert np.ptp(scores) > 0.1  # constants would agree as well
    assert labels == {False, True}


@pytest.mark.parametrize("antialias", [False, True])
def test_engine_and_export_see_the_same_pixels_without_antialiasing(
    antialias: bool, image_folder: Path, tmp_path: Path
) -> None:
    detector = CSFlow(**SMALL, image_size=64, antialias=antialias).eval()
    randomize(detector.model.flow, scale=0.05)
    predictions = Engine(accelerator="cpu", default_root_dir=tmp_path).predict(
        detector, data_path=image_folder / "test/good"
    )
    with torch.no_grad():
        exported = [detector(read_image(batch.image_path[0], as_tensor=True)[None]) for batch in predictions]
    differences = [
        (engine.pred_score - other.pred_score).abs().item() for engine, other in zip(predictions, exported, strict=True)
    ]
    assert (max(differences) < 1e-3) is not antialias


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("kind", ["onnx", "openvino"])
def test_exported_graphs_take_any_batch(
    kind: str, batch: int, trained: tuple[CSFlow, Path], exported: dict[str, Path], images: list[Path]
) -> None:
    import openvino

    pixels = torch.stack([read_image(path, as_tensor=True) for path in images[:batch]])
    with torch.no_grad():
        expected = trained[0](pixels)
    model = openvino.Core().compile_model(exported[kind], "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = model(pixels.numpy())
    np.testing.assert_allclose(found["pred_score"].reshape(-1), expected.pred_score, atol=1e-3)
    np.testing.assert_allclose(found["anomaly_map"], expected.anomaly_map, atol=1e-3)
    assert expected.anomaly_map.std() > 1e-3


@pytest.mark.slow
def test_export_drops_what_is_not_used(exported: dict[str, Path], trained: tuple[CSFlow, Path]) -> None:
    parameters = sum(p.numel() for p in trained[0].model.parameters())
    assert exported["openvino"].with_suffix(".bin").stat().st_size < 4 * parameters + 100_000


@pytest.mark.slow
@pytest.mark.parametrize("input_size", [None, SIZE], ids=["any size", "fixed size"])
def test_8_bit_models_are_calibrated_with_good_images_alone(
    input_size: tuple[int, int] | None, trained: tuple[CSFlow, Path], image_folder: Path, tmp_path: Path
) -> None:
    import openvino

    detector = CSFlow(**SMALL, image_size=SIZE)  # without thresholds, as good images alone leave it
    detector.model.load_state_dict(trained[0].model.state_dict())
    good = Folder(name="good", root=image_folder, normal_dir="train/good", val_split_mode="none", num_workers=0)
    path = Engine(accelerator="cpu", default_root_dir=tmp_path).export(
        detector.eval(),
        ExportType.OPENVINO,
        tmp_path,
        input_size=input_size,
        compression_type=CompressionType.INT8_PTQ,
        datamodule=good,
    )
    model = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    pixels = torch.stack([read_image(path, as_tensor=True) for path in sorted((image_folder / "test").rglob("*.png"))])
    pixels = resize(pixels, list(SIZE), antialias=False)
    with torch.no_grad():
        expected = detector(pixels).pred_score
    found = torch.tensor(np.array([model(image[None].numpy())["pred_score"].item() for image in pixels]))
    assert float(torch.corrcoef(torch.stack([expected.double(), found.double()]))[0, 1]) > 0.95
    assert float(found.max() / found.min()) > 1.2  # a cut-off range would make them all alike
    parameters = sum(p.numel() for p in detector.model.parameters())
    assert path.with_suffix(".bin").stat().st_size < 0.35 * 4 * parameters


def test_8_bit_models_need_images(detector: CSFlow, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="INT8_PTQ measures activations on training images"):
        detector._post_training_quantization_ov(model=None)


def test_metrics_see_what_the_host_monitors(datamodule: Folder) -> None:
    evaluator = CSFlow.configure_evaluator()
    assert [type(metric) for metric in evaluator.val_metrics] == [AUROC, AUROC]
    assert len(evaluator.test_metrics) == len(AnomalibModule.configure_evaluator().test_metrics)


def test_allow_list() -> None:
    assert "anomalib_csflow" in anomalib.models.ALLOWED_MODULES
