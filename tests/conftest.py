"""Fixtures that several tests share: random parameters, a small real data set, the data to measure on."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.data import Folder
from PIL import Image
from torch import nn

from anomalib_csflow import CFlow, CSFlow, DifferNet, FastFlow, MSFlow, RealNVP
from anomalib_csflow.engine.detector import FlowDetector
from anomalib_csflow.engine.post_processing import ConformalPostProcessor

torch.set_num_threads(1)  # two test processes on two cores would stall one another

collect_ignore = ["full_disk.py", "kills.py", "processes.py"]  # scripts that tests start

SMALL = {
    "backbone": "tf_efficientnet_lite0",
    "layer": "blocks.4",
    "weights": "package",
    "num_blocks": 2,
    "hidden_channels": 16,
    "standardize": True,
    "lr": 1e-3,
    "schedule": "one_cycle",
}

LAYERS = {"backbone": "tf_efficientnet_lite0", "layers": ["blocks.2", "blocks.4"], "weights": "package"}
CFLOW = LAYERS | {"num_blocks": 2, "condition_channels": 16, "lr": 1e-3, "schedule": "one_cycle"}
FAST_FLOW = LAYERS | {"num_steps": 2, "lr": 1e-3, "schedule": "one_cycle"}
MS_FLOW = LAYERS | {"num_blocks": [1, 2], "condition_channels": 16, "lr": 1e-3, "schedule": "one_cycle"}


DETECTORS: dict[str, tuple[type[FlowDetector], dict[str, object]]] = {
    "CSFlow": (CSFlow, SMALL),
    "DifferNet": (
        DifferNet,
        SMALL | {"num_test_rotations": 2, "num_train_rotations": 2, "fixed_train_rotations": True},
    ),
    "RealNVP": (RealNVP, SMALL),
    "CFlow": (CFlow, CFLOW | {"standardize": True}),
    "FastFlow": (FastFlow, FAST_FLOW),
    "MSFlow": (MSFlow, MS_FLOW | {"standardize": True, "lr": 3e-3}),
}
"""Each detector once, small."""


def randomize(module: nn.Module, seed: int = 0, scale: float = 0.3) -> nn.Module:
    """Draw every parameter: a zero-initialised flow is the identity and proves nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return module


def texture(generator: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A striped grey texture with noise, in [0, 255]."""
    x = np.arange(width)[None] + np.zeros((height, 1))
    stripes = 128 + 60 * np.sin(x / 4 + generator.uniform(0, 6))
    return np.clip(stripes + generator.normal(0, 12, (height, width)), 0, 255)


@pytest.fixture(autouse=True)
def _no_refits(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Thresholds come from what was held out, or every small fit would take four times as long; not where marked."""
    if request.node.get_closest_marker("refits") is None:
        monkeypatch.setattr(FlowDetector, "configure_post_processor", lambda self: ConformalPostProcessor(num_folds=0))


@pytest.fixture(autouse=True)
def _seed() -> None:
    """The same random numbers in every run."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Features go to a folder of the test run's own."""
    os.environ["ANOMALIB_CSFLOW_CACHE"] = str(tmp_path_factory.mktemp("feature_cache"))


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve good images to train on; four good and four defective ones with masks to test on."""
    root = tmp_path_factory.mktemp("textures")
    generator = np.random.default_rng(0)
    for folder, count in {"train/good": 12, "test/good": 4, "test/blob": 4}.items():
        (root / folder).mkdir(parents=True)
        for index in range(count):
            image = texture(generator, 150, 180)
            if folder == "test/blob":
                mask = np.zeros((150, 180), np.uint8)
                top, left = generator.integers(20, 80, 2)
                mask[top : top + 50, left : left + 50] = 255
                image[mask > 0] = generator.uniform(0, 255, int((mask > 0).sum()))
                (root / "masks").mkdir(exist_ok=True)
                Image.fromarray(mask).save(root / "masks" / f"{index:03d}.png")
            Image.fromarray(image.astype(np.uint8)).save(root / folder / f"{index:03d}.png")
    return root


def folder_arguments(root: Path) -> dict[str, object]:
    """Arguments of anomalib's Folder for :func:`image_folder`."""
    return {
        "name": "textures",
        "root": str(root),
        "normal_dir": "train/good",
        "normal_test_dir": "test/good",
        "abnormal_dir": "test/blob",
        "mask_dir": "masks",
        "val_split_mode": "same_as_test",
        "train_batch_size": 4,
        "eval_batch_size": 4,
        "num_workers": 0,
    }


@pytest.fixture
def datamodule(image_folder: Path) -> Folder:
    """Anomalib's Folder on :func:`image_folder`."""
    return Folder(**folder_arguments(image_folder))


@pytest.fixture
def detector() -> CSFlow:
    """A small CS-Flow with random flow parameters, at a size that is neither square nor a multiple of 128."""
    detector = CSFlow(**SMALL, image_size=(96, 128))
    randomize(detector.model.flow, scale=0.05)
    return detector.eval()


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder above golden/, where the environment names it."""
    root = os.environ.get("ANOMALIB_CSFLOW_TEST_DATA")
    if not root:
        pytest.skip("ANOMALIB_CSFLOW_TEST_DATA does not name a folder with golden/")
    return Path(root)


@pytest.fixture(scope="session")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A benchmark's folder with its page; nobody writes there."""
    from benchmark_output import write_output

    from anomalib_csflow.benchmark.page import report

    out = tmp_path_factory.mktemp("benchmark")
    write_output(out)
    assert report.write(out) == out / "report.html"
    return out
