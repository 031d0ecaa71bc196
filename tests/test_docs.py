"""The documentation: its example keeps the contract of all detectors, and its links lead somewhere."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import test_detectors as contract
import torch
from anomalib.data import Folder
from anomalib.data.utils import read_image
from anomalib.engine import Engine
from conftest import randomize

import anomalib_csflow
from anomalib_csflow.engine.detector import FlowDetector

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("speed/*.md"), *ROOT.glob("docs/**/*.md")])
SMALL = {"backbone": "tf_efficientnet_lite0", "num_blocks": 2}


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> type[FlowDetector]:
    """The detector of the page "How to add a detector"."""
    spec = importlib.util.spec_from_file_location("cell_flow", ROOT / "docs" / "examples" / "cell_flow.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "cell_flow", module)
    spec.loader.exec_module(module)
    return module.CellFlow


@pytest.mark.parametrize(
    "check",
    [
        contract.test_a_score_depends_on_its_own_image_alone,
        contract.test_forward_gives_the_same_in_training_mode,
        contract.test_loss_is_the_nll_per_dimension_less_its_constant,
        contract.test_nll_is_of_the_pre_processed_images,
    ],
)
def test_the_example_keeps_the_contract(check: object, example: type[FlowDetector]) -> None:
    detector = example(**SMALL, image_size=(96, 128))
    randomize(detector.model.flow, scale=0.05)
    check(detector.eval())


def test_the_example_finds_defects(
    example: type[FlowDetector], datamodule: Folder, image_folder: Path, tmp_path: Path
) -> None:
    detector = example(**SMALL, image_size=(64, 96))
    Engine(max_epochs=4, accelerator="cpu", default_root_dir=tmp_path).fit(detector, datamodule=datamodule)
    scores = []
    for kind in ("good", "blob"):
        files = sorted((image_folder / "test" / kind).iterdir())
        images = torch.stack([read_image(file, as_tensor=True) for file in files])
        with torch.no_grad():
            scores.append(detector.eval().model(detector.pre_processor(images)).pred_score)
    assert scores[0].max() < scores[1].min()


@pytest.mark.refits
def test_the_example_is_refitted(example: type[FlowDetector], datamodule: Folder, tmp_path: Path) -> None:
    detector = example(**SMALL, image_size=(64, 96))
    Engine(max_epochs=1, accelerator="cpu", default_root_dir=tmp_path).fit(detector, datamodule=datamodule)
    assert detector.post_processor.image_threshold.isfinite()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    """Of files read where they are; Sphinx sees the pages that it builds, and not the README."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    assert [link for link in links if link and not (page.parent / link).exists()] == []


def test_every_detector_and_recipe_has_its_page() -> None:
    pages = "".join(page.read_text() for page in PAGES if page.parent.name == "detectors")
    detectors = [
        name
        for name in anomalib_csflow.__all__
        if name[0].isupper() and name not in {"ConformalPostProcessor", "FeatureCache"}
    ]
    assert [name for name in detectors if f"`{name}`" not in pages] == []
    recipes = [path.name for detector in detectors for path in recipes_of(detector)]
    assert len(recipes) >= 2 * len(detectors)
    assert [name for name in recipes if f"configs/{name}" not in pages] == []


def recipes_of(detector: str) -> list[Path]:
    """The recipes of a detector."""
    line = f"model:\n  class_path: anomalib_csflow.{detector}\n"
    return [path for path in ROOT.glob("configs/*.yaml") if line in path.read_text()]
