"""Arguments of the six constructors: said alike where they are shared, and refused where a checkpoint has others."""

import inspect
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from anomalib.engine import Engine
from conftest import CFLOW, FAST_FLOW, MS_FLOW, SMALL
from PIL import Image

from anomalib_csflow import CFlow, CSFlow, DifferNet, FastFlow, MSFlow, RealNVP
from anomalib_csflow.engine.checkpoints import CHECKPOINT_KEY, CheckpointError
from anomalib_csflow.engine.detector import FlowDetector
from anomalib_csflow.engine.images import ImageOptions
from anomalib_csflow.engine.optimization import TrainingOptions

DETECTORS = (CFlow, CSFlow, DifferNet, FastFlow, MSFlow, RealNVP)
COMPONENTS = {"pre_processor", "post_processor", "evaluator", "visualizer"}
OF_ITS_OWN_TYPE = {(MSFlow, "num_blocks")}  # one for each layer

SIX: dict[type[FlowDetector], tuple[dict[str, Any], dict[str, Any]]] = {
    CFlow: (CFLOW, {"score_by": "energy", "top_share": 0.1, "image_size": 96, "num_blocks": 1}),
    CSFlow: (
        SMALL,
        {
            "map_mode": "mean",
            "antialias": False,
            "clamp": 2,
            "kernel_sizes": [5, 5],
            "coarse_kernel_size": 1,
            "output_kernel_size": 1,
            "conditioner_clamp": 0.5,
            "num_scales": 2,
        },
    ),
    DifferNet: (SMALL | {"num_test_rotations": 2}, {"num_test_rotations": 3, "image_size": (64, 96)}),
    FastFlow: (FAST_FLOW, {"top_share": 0.1, "hidden_ratio": 0.5, "kernel_sizes": None}),
    MSFlow: (MS_FLOW, {"top_share": 0.1, "num_blocks": [2, 1], "clamp": 1}),
    RealNVP: (SMALL, {"backbone": "tf_efficientnet_lite1", "layer": "blocks.3", "num_hidden": 1}),
}
"""Of each detector: small arguments, and those of another that gives other scores or maps."""


WRONG: dict[str, list[Any]] = {
    "hidden_channels": [0, -1, 1.5, "16", None, True],
    "num_blocks": [0, -3, [], [0], None, "4", float("nan")],
    "kernel_sizes": [[0], [-1], [], [101], [3.0], "3", 3, [True]],
    "coarse_kernel_size": [0, -1, 101, 3.0, "3", [5]],
    "output_kernel_size": [0, 101, 3.0, "1"],
    "conditioner_clamp": [0, -2, float("nan"), "2"],
    "clamp": [0, -1, float("nan"), float("inf"), None, "1"],
    "hidden_ratio": [0, -0.5, float("nan")],
    "lr": [-1e-3, float("nan"), float("inf"), None],
    "eps": [-1.0, float("nan")],
    "weight_decay": [-1.0, float("nan")],
    "gradient_clip_norm": [0, -1.0, float("nan")],
    "optimizer": ["sgd", None, 3, ["adam"]],
    "betas": [0.9, [0.9], [0.9, 1], [-0.1, 0.9], [float("nan"), 0.9]],
    "image_size": [0, -64, [64], [64, 0], [64, 64, 64], [], 64.5, "64", None],
    "layers": ["blocks.2", [2], None],
    "layer": [3, None],
    "backbone": [None, 7],
    "weights": [None, 7],
    "top_share": [float("nan"), None, "0.1", -0.1, 1.1],
    "noise": [float("nan"), -1, "much", None],
    "schedule": ["cosine", None],
    "map_mode": ["max", None],
    "image_score": ["max", None],
    "score_by": ["max", None],
    "region": [7, "no/such/file.png"],
}
"""Values that are refused, by an argument's name."""
COUNTED = (
    "num_scales",
    "num_steps",
    "condition_channels",
    "num_train_rotations",
    "num_test_rotations",
    "fibers_per_step",
)
FLAGS = (
    "antialias",
    "standardize",
    "whiten",
    "bfloat16",
    "recompute",
    "permute_soft",
    "fixed_train_rotations",
    "localize",
    "keep_aspect",
)
WRONG |= {name: [0, -1, 1.5, None] for name in COUNTED} | {name: ["no", 1, None] for name in FLAGS}
WRONG |= {name: [0, -1, 1.5, "2"] for name in ("max_epochs", "max_steps", "crop_size")} | {"num_hidden": [-1, 0.5]}


def parameters(cls: type[FlowDetector]) -> dict[str, inspect.Parameter]:
    """Arguments of a detector's constructor."""
    return {name: one for name, one in inspect.signature(cls.__init__).parameters.items() if name != "self"}


def texts(cls: type[FlowDetector]) -> dict[str, str]:
    """What a detector's docstring says of each argument."""
    block = inspect.getdoc(cls).partition("Args:\n")[2].partition("\n\n")[0]
    entries = re.split(r"(?m)^    (?=\w+: )", block)[1:]
    return {name: " ".join(text.split()) for name, _, text in (entry.partition(": ") for entry in entries)}


@pytest.mark.parametrize("cls", DETECTORS)
def test_every_argument_changes_the_output_or_may_differ(cls: type[FlowDetector]) -> None:
    free = {field.name for field in fields(TrainingOptions)} | COMPONENTS | {"weights"}  # of which there is a digest
    free |= {*cls.free_arguments}
    output = {field.name for field in fields(ImageOptions)} - {"weights"} | {*cls.output_arguments}
    assert not free & output
    assert set(parameters(cls)) - free - output == set()
    assert {*cls.free_arguments, *cls.output_arguments} <= set(parameters(cls))


@pytest.mark.parametrize("cls", DETECTORS)
def test_every_argument_has_a_text(cls: type[FlowDetector]) -> None:
    assert list(texts(cls)) == list(parameters(cls))


def test_shared_arguments_have_one_type_and_one_text() -> None:
    for name in {name for cls in DETECTORS for name in parameters(cls)}:
        having = [cls for cls in DETECTORS if name in parameters(cls)]
        types = {str(parameters(cls)[name].annotation) for cls in having if (cls, name) not in OF_ITS_OWN_TYPE}
        assert len(types) == 1, (name, types)
        assert len({texts(cls)[name] for cls in having}) == 1, name


@pytest.mark.parametrize("cls", DETECTORS)
def test_every_argument_is_checked_before_any_work(cls: type[FlowDetector], monkeypatch: pytest.MonkeyPatch) -> None:
    def work(*_: object) -> None:
        pytest.fail("a backbone was made")

    monkeypatch.setattr("anomalib_csflow.engine.detector.create_backbone", work)
    assert set(parameters(cls)) - set(WRONG) == COMPONENTS
    for name in set(parameters(cls)) & set(WRONG):
        for value in WRONG[name]:
            with pytest.raises(ValueError, match=rf"\b{name}\b") as error:
                cls(**{**SIX[cls][0], "image_size": 64, name: value})
            assert "\n" not in str(error.value), (name, value)
            assert len(str(error.value)) < 200


@pytest.fixture(scope="module", params=SIX, ids=lambda cls: cls.__name__)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[type[FlowDetector], Path]:
    """A detector's class, and a checkpoint of a small one."""
    cls = request.param
    engine = Engine(accelerator="cpu", default_root_dir=tmp_path_factory.mktemp("saved"))
    engine._setup_trainer(model := cls(**SIX[cls][0], image_size=64))
    engine.trainer.strategy.connect(model)
    path = tmp_path_factory.mktemp("checkpoint") / "model.ckpt"
    engine.trainer.save_checkpoint(path)
    return cls, path


def test_other_outputs_are_refused_by_name(saved: tuple[type[FlowDetector], Path], image_folder: Path) -> None:
    cls, path = saved
    small, others = SIX[cls]
    for name, value in others.items():
        message = rf"trained with {name}=.*, this detector has .*: create it with the same value"
        if (cls, name, value) != (FastFlow, "kernel_sizes", None):  # which stands for the 3 and 1 that it has
            with pytest.raises(CheckpointError, match=message):
                cls.load_from_checkpoint(path, **{name: value})
    name, value = next(iter(others.items()))
    engine = Engine(accelerator="cpu", default_root_dir=path.parent)
    with pytest.raises(CheckpointError, match=rf"trained with {name}=.*, this detector has"):
        engine.predict(
            cls(**{"image_size": 64} | small | {name: value}),
            data_path=image_folder / "test/blob",
            ckpt_path=path,
        )


def test_another_training_is_not_refused(saved: tuple[type[FlowDetector], Path]) -> None:
    cls, path = saved
    others = {"lr": 1.0, "schedule": "constant", "max_epochs": 3, "image_size": [64, 64]}
    for name in cls.free_arguments:
        value = parameters(cls)[name].default
        others[name] = not value if isinstance(value, bool) else value + 1
    loaded = cls.load_from_checkpoint(path, **others)
    assert loaded.training_options.lr == 1.0


def test_a_checkpoint_of_before_an_argument_was_added_has_its_default(tmp_path: Path) -> None:
    detector = CSFlow(**SMALL, image_size=64)
    checkpoint = {
        "state_dict": detector.state_dict(),
        "hyper_parameters": dict(detector.hparams),
        "pytorch-lightning_version": "2.6.0",
    }
    detector.on_save_checkpoint(checkpoint)
    for name in ("conditioner_clamp", "region", "image_score"):
        del checkpoint[CHECKPOINT_KEY]["arguments"][name]
    torch.save(checkpoint, tmp_path / "model.ckpt")
    CSFlow.load_from_checkpoint(tmp_path / "model.ckpt")
    with pytest.raises(CheckpointError, match="trained with hidden_channels=16, this detector has 8"):
        CSFlow.load_from_checkpoint(tmp_path / "model.ckpt", hidden_channels=8)
    with pytest.raises(CheckpointError, match="trained with image_score='energy', this detector has 'map'"):
        CSFlow.load_from_checkpoint(tmp_path / "model.ckpt", image_score="map")
    with pytest.raises(CheckpointError, match="trained with conditioner_clamp=None, this detector has 2"):
        CSFlow.load_from_checkpoint(tmp_path / "model.ckpt", conditioner_clamp=2.0)
    Image.new("L", (8, 8), "white").save(tmp_path / "region.png")
    with pytest.raises(CheckpointError, match="trained with region=None, this detector has 'mask"):
        CSFlow.load_from_checkpoint(tmp_path / "model.ckpt", region=tmp_path / "region.png")
