"""Each detector in each format: the same scores and maps as in torch, for any batch."""

from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.data import Folder
from anomalib.data.utils import read_image
from anomalib.deploy import ExportType, TorchInferencer
from anomalib.engine import Engine
from conftest import CFLOW, DETECTORS, FAST_FLOW, folder_arguments

from anomalib_csflow import CFlow, FastFlow
from anomalib_csflow.engine.detector import FlowDetector

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
