"""Each detector in each format: the same scores and maps as in torch, for any batch."""

from pathlib import Path
from typing import Any

import numpy as np
import openvino
import pytest
import torch
from anomalib.data import Folder
from anomalib.data.utils import read_image
from anomalib.deploy import ExportType, TorchInferencer
from anomalib.engine import Engine
from conftest import CFLOW, DETECTORS, FAST_FLOW, SMALL, folder_arguments

from anomalib_csflow import CFlow, CSFlow, FastFlow
from anomalib_csflow.engine.detector import FlowDetector
from anomalib_csflow.engine.quantization import float_operations
from anomalib_csflow.features import strips
from anomalib_csflow.runtime.bundle import BundleError
from anomalib_csflow.runtime.engines import check_size
from anomalib_csflow.runtime.precision import read_model

SIZE = (64, 96)
VARIANTS = DETECTORS | {
    "CFlow, by energy": (CFlow, CFLOW | {"standardize": True, "score_by": "energy", "top_share": 0.03}),
    "FastFlow, of the least likely positions": (FastFlow, FAST_FLOW | {"top_share": 0.03}),
}


@pytest.fixture(scope="module", params=VARIANTS.values(), ids=VARIANTS.keys())
def trained(
    request: pytest.FixtureRequest, image_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[FlowDetector, Path]:
    """A detector trained for a moment at a size that is not the default, and its checkpoint."""
    cls, arguments = request.param
    detector = cls(**arguments, image_size=SIZE)
    engine = Engine(max_epochs=6, accelerator="cpu", default_root_dir=tmp_path_factory.mktemp("trained"))
    engine.fit(detector, datamodule=Folder(**folder_arguments(image_folder)))
    return detector.eval(), Path(engine.best_model_path)


@pytest.fixture(scope="module")
def images(image_folder: Path) -> list[Path]:
    """Four images, good and defective in turn, of another size than the model's."""
    pairs = zip(*(sorted((image_folder / "test" / kind).iterdir())[:2] for kind in ("good", "blob")), strict=True)
    return [path for pair in pairs for path in pair]


def test_training_for_a_moment_finds_defects(trained: tuple[FlowDetector, Path], image_folder: Path) -> None:
    detector, _ = trained
    kinds = []
    for kind in ("good", "blob"):
        files = sorted((image_folder / "test" / kind).iterdir())
        pixels = detector.pre_processor(torch.stack([read_image(file, as_tensor=True) for file in files]))
        with torch.no_grad():
            kinds.append(detector.model(pixels).pred_score)
    good, bad = kinds
    assert good.max() < bad.min()


def untrained(**arguments: Any) -> CSFlow:
    """CS-Flow with random weights of the flow, which would be the identity otherwise."""
    torch.manual_seed(0)
    detector = CSFlow(**SMALL, image_size=SIZE, post_processor=False, **arguments).eval()
    with torch.no_grad():
        for parameter in detector.model.flow.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return detector


@pytest.mark.parametrize("divided", [False, True])
def test_openvino_of_a_model_without_a_pre_processor_in_strips(
    divided: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(strips, "STRIP_VALUES", 2**14 if divided else 2**22)
    detector = untrained(pre_processor=False)
    path = detector.to_openvino(tmp_path)
    model = openvino.Core().read_model(path)
    assert list(model.input(0).partial_shape)[2:] == list(SIZE)
    with pytest.raises(BundleError, match="for images of 64x96 pixels only, got 70x96"):
        check_size(model, 70, 96)
    stems = {
        operation.get_friendly_name()
        for operation in model.get_ops()
        if operation.get_type_name() == "Convolution" and operation.input_value(1).shape[1] == 3
    }
    assert (len(stems) > 3) == divided
    in_float = set(float_operations(model, num_first=1))
    assert stems <= in_float
    resizing = {o.get_friendly_name() for o in model.get_ops() if o.get_type_name() == "MatMul"}
    assert resizing
    assert resizing <= in_float
    convolutions = {o.get_friendly_name() for o in model.get_ops() if o.get_type_name() == "Convolution"}
    assert not (convolutions - stems) & in_float
    images = torch.rand(2, 3, *SIZE)
    compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    outputs = compiled(images.numpy())
    with torch.no_grad():
        expected = detector(images)
    for name in ("pred_score", "anomaly_map"):
        torch.testing.assert_close(torch.from_numpy(outputs[name]), getattr(expected, name), atol=1e-3, rtol=1e-3)


def test_openvino_computes_in_float32_even_where_it_would_take_bfloat16(tmp_path: Path) -> None:
    path = untrained(image_score="score_test").to_openvino(tmp_path)
    core = openvino.Core()
    image = torch.rand(1, 3, *SIZE).numpy()

    def scores(model: Any, precision: str) -> torch.Tensor:
        outputs = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": precision})(image)
        return torch.from_numpy(outputs["anomaly_map"])

    expected = scores(path, "f32")
    openvino.save_model(core.read_model(path), tmp_path / "again.xml", compress_to_fp16=False)
    has_bfloat16 = "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    for written in (path, tmp_path / "again.xml"):
        lost = (scores(read_model(core, written, "bf16"), "bf16") - expected).abs().mean()
        kept = (scores(written, "bf16") - expected).abs().mean()
        assert (lost > 0) == has_bfloat16
        assert kept <= lost / 4  # OpenVINO still resizes images and maps in bfloat16


def test_exporter_sees_no_in_place_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would take half as long again; what the engine computes with afterwards is as before."""
    detector = untrained()
    in_place = [module for module in detector.modules() if getattr(module, "inplace", False)]
    seen = []

    def export(model: FlowDetector, **_: Any) -> None:
        seen.extend(getattr(module, "inplace", False) for module in model.modules())
        raise OSError("the disk is full")

    monkeypatch.setattr(torch.onnx, "export", export)
    with pytest.raises(OSError, match="full"):
        detector.to_onnx(tmp_path)
    assert in_place
    assert seen
    assert not any(seen)
    assert all(module.inplace for module in in_place)


def test_load_from_checkpoint(trained: tuple[FlowDetector, Path]) -> None:
    detector, path = trained
    loaded = type(detector).load_from_checkpoint(path).eval()
    raw = torch.rand(2, 3, 150, 180)
    with torch.no_grad():
        expected, prediction = detector(raw), loaded(raw)
        torch.testing.assert_close(loaded.nll(raw), detector.nll(raw))
    assert loaded.input_size == SIZE
    torch.testing.assert_close(prediction.pred_score, expected.pred_score)
    assert (prediction.anomaly_map is None) == (expected.anomaly_map is None)
    if expected.anomaly_map is not None:
        torch.testing.assert_close(prediction.anomaly_map, expected.anomaly_map)


@pytest.mark.slow
def test_exports_agree(
    trained: tuple[FlowDetector, Path], images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import openvino

    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    detector, path = trained
    pixels = torch.stack([read_image(image, as_tensor=True) for image in images])
    with torch.no_grad():
        expected = detector(pixels)
    assert expected.pred_score.std() > 1e-2  # constants would agree as well
    assert expected.anomaly_map is None or expected.anomaly_map.std() > 1e-3

    engine = Engine(accelerator="cpu", default_root_dir=tmp_path)
    exported = {
        kind: engine.export(type(detector).load_from_checkpoint(path), kind, export_root=tmp_path)
        for kind in (ExportType.TORCH, ExportType.ONNX, ExportType.OPENVINO)
    }
    found = TorchInferencer(exported[ExportType.TORCH], device="cpu").predict(str(images[0]))
    np.testing.assert_allclose(np.asarray(found.pred_score).squeeze(), expected.pred_score[0], atol=1e-3)
    for kind in (ExportType.ONNX, ExportType.OPENVINO):
        model = openvino.Core().compile_model(exported[kind], "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        for batch in (1, 4):
            outputs = model(pixels[:batch].numpy())
            np.testing.assert_allclose(outputs["pred_score"].reshape(-1), expected.pred_score[:batch], atol=1e-3)
            if expected.anomaly_map is not None:
                np.testing.assert_allclose(outputs["anomaly_map"], expected.anomaly_map[:batch], atol=1e-3)
