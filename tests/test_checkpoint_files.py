"""Checkpoint files that are damaged, another's, or made to do harm: a sentence names the file, and nothing runs."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from anomalib.engine import Engine
from conftest import SMALL

from anomalib_csflow import CSFlow
from anomalib_csflow.engine import checkpoints
from anomalib_csflow.engine.checkpoint_files import sum_of
from anomalib_csflow.engine.checkpoints import CHECKPOINT_KEY, CheckpointError

TYPES = ("pytorch-lightning_version", "state_dict", "hyper_parameters", "loops", "callbacks", "optimizer_states")
TYPES += ("lr_schedulers", "anomalib_components_enabled", "anomalib_pre_processor_config", CHECKPOINT_KEY)
TYPES += ("anomalib_post_processor_config",)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a checkpoint holds."""
    root = tmp_path_factory.mktemp("good")
    engine = Engine(accelerator="cpu", default_root_dir=root)
    engine._setup_trainer(model := CSFlow(**SMALL, image_size=64))
    engine.trainer.strategy.connect(model)
    engine.trainer.save_checkpoint(root / "model.ckpt")
    return torch.load(root / "model.ckpt", weights_only=True)


class Harm:
    """Is unpickled by a command."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


def refused(content: object, path: Path, message: str) -> None:
    """Check that a file is refused in a sentence, when it is loaded and by the engine."""
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    engine = Engine(accelerator="cpu", default_root_dir=path.parent, enable_progress_bar=False)
    with pytest.raises(CheckpointError, match=rf"(?s)\A.*model\.ckpt .*{message}") as loaded:
        CSFlow.load_from_checkpoint(path)
    with pytest.raises(CheckpointError, match=message) as restored:
        engine.predict(CSFlow(**SMALL, image_size=64), data_path=path.parent, ckpt_path=path)
    for error in (loaded, restored):
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < 400


@pytest.fixture
def path(tmp_path: Path, image_folder: Path) -> Path:
    """A file beside an image to predict."""
    (tmp_path / "000.png").write_bytes((image_folder / "test/good/000.png").read_bytes())
    return tmp_path / "model.ckpt"


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("value", [3, [1], {"a": 1}], ids=str)
def test_entries_of_another_type_are_named(name: str, value: Any, good: dict[str, Any], path: Path) -> None:
    right = {"hyper_parameters": dict, "callbacks": dict, "optimizer_states": list}
    if type(value) is right.get(name, dict if name.startswith("anomalib_") and name != CHECKPOINT_KEY else None):
        return
    content = {**good, name: value}
    message = "not a checkpoint of this package" if name == CHECKPOINT_KEY else "is a damaged checkpoint, whose"
    refused(content, path, message)


@pytest.mark.parametrize("name", ["pytorch-lightning_version", "state_dict", "hyper_parameters", CHECKPOINT_KEY])
def test_what_is_missing_is_named(name: str, good: dict[str, Any], path: Path) -> None:
    content = {key: value for key, value in good.items() if key != name}
    refused(content, path, "not a checkpoint of this package" if name == CHECKPOINT_KEY else f"whose {name} is missing")


@pytest.mark.parametrize("content", [[1], torch.ones(3), {}, 3, "text", b"", b"no checkpoint", b"PK\3\4"], ids=repr)
def test_other_files_are_refused(content: object, path: Path) -> None:
    refused(content, path, "is not a (readable checkpoint|checkpoint of this package)")


@pytest.mark.parametrize(
    "own",
    [{}, {"backbone": None}, {"backbone": 3}, {"arguments": None}, {"arguments": {}}, {"arguments": [1]}],
    ids=str,
)
def test_a_checkpoint_that_does_not_say_whose_it_is(own: dict[str, Any], good: dict[str, Any], path: Path) -> None:
    kept = good[CHECKPOINT_KEY] if own else {"detector": "CSFlow"}
    refused({**good, CHECKPOINT_KEY: {**kept, **own}}, path, "does not say what it was trained with")


def test_tensors_that_do_not_fit_are_named(good: dict[str, Any], path: Path) -> None:
    state = good["state_dict"]
    last = list(state)[-1]
    cases: dict[str, dict[str, Any]] = {
        rf"whose '{last}' is no tensor": {**state, last: 3},
        rf"whose '{last}' has NaN": {**state, last: torch.full_like(state[last], torch.nan)},
    }
    for message, changed in cases.items():
        refused({**good, "state_dict": changed}, path, message)
    refused({**good, "state_dict": {**state, last: state[last] + 1}}, path, "whose tensors are not those")
    cases = {
        f"Missing key.*{last}": {key: value for key, value in state.items() if key != last},
        "Unexpected key.*more": {**state, "more": torch.ones(1)},
        f"size mismatch for {last}": {**state, last: torch.ones(7, 7)},
    }
    for message, changed in cases.items():
        own = {**good[CHECKPOINT_KEY], "tensors": sum_of(changed)}
        torch.save({**good, "state_dict": changed, CHECKPOINT_KEY: own}, path)
        with pytest.raises(
            CheckpointError, match=rf"the tensors do not fit this CSFlow \({message}.*\): build it alike"
        ):
            CSFlow.load_from_checkpoint(path)


@pytest.mark.parametrize("where", ["whole", "loops", "callbacks", "state_dict", "hyper_parameters", CHECKPOINT_KEY])
def test_nothing_in_a_checkpoint_is_run(where: str, good: dict[str, Any], path: Path) -> None:
    harm = Harm(path.with_name("harmed"))
    content = harm if where == "whole" else {**good, where: {**good[where], "x": harm}}
    refused(content, path, "is not a readable checkpoint")
    assert not harm.path.exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("pre_processor", {"class_path": "anomalib.pre_processing.PreProcessor", "init_args": {"transform": None}}),
        ("post_processor", "unittest.mock.Mock"),
        ("post_processor", {"class_path": "anomalib_csflow.ConformalPostProcessor", "init_args": {"groups": {}}}),
        ("backbone", {"class_path": "unittest.mock.Mock"}),
        ("layers", ["blocks.2", {"class_path": "unittest.mock.Mock"}]),
    ],
)
def test_arguments_that_could_run_code_are_refused(
    name: str, value: object, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def read(arguments: dict[str, Any]) -> dict[str, Any]:
        found = {"csflow": {"detector": "CSFlow"}, "hyper_parameters": arguments}
        monkeypatch.setattr(
            checkpoints, "read_checkpoint", lambda _: {checkpoints.CHECKPOINT_KEY: found["csflow"]} | found
        )
        return checkpoints.model_of(tmp_path / "model.ckpt")

    own = {"class_path": "anomalib_csflow.ConformalPostProcessor", "init_args": {"groups": "part", "num_folds": 3}}
    kept = {"image_size": (64, 96), "pre_processor": True, "visualizer": None, "post_processor": own}
    assert read(kept)["init_args"]["post_processor"] == own
    with pytest.raises(CheckpointError, match=f"has a {name} that is not of this package"):
        read(kept | {name: value})
