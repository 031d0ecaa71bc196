"""Two processes train what one does with the same effective batch, and score each image once."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPT = """
import sys, warnings
warnings.simplefilter("ignore")
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
from anomalib.data import Folder
from anomalib.engine import Engine
from conftest import FAST_FLOW, MS_FLOW, SMALL, folder_arguments, randomize
import anomalib_csflow
from anomalib_csflow import FeatureCache
from anomalib_csflow.engine.post_processing import ConformalPostProcessor

OPTIONS = {
    "CSFlow": SMALL | {"map_mode": "soft_minimum"},
    "DifferNet": SMALL | {"fixed_train_rotations": True, "num_train_rotations": 2, "num_test_rotations": 2},
    "FastFlow": FAST_FLOW,
    "MSFlow": MS_FLOW,
    "RealNVP": {name: SMALL[name] for name in ("backbone", "layer", "weights", "hidden_channels", "standardize", "lr")},
}
_, _, name, root, out, devices = sys.argv
torch.manual_seed(0)
detector = getattr(anomalib_csflow, name)(
    **OPTIONS[name], image_size=64, post_processor=ConformalPostProcessor(num_folds=0)  # two processes do not refit
)
randomize(detector.model.flow, scale=0.05)
computed = []
detector.model.features.register_forward_pre_hook(lambda module, images: computed.append(len(images[0])))
# every step sees all images: the order in which processes share them does not matter
data = Folder(**folder_arguments(root) | {"train_batch_size": 12 // int(devices), "eval_batch_size": 1})
Engine(
    default_root_dir=out, max_epochs=3, accelerator="cpu", devices=int(devices), enable_progress_bar=False,
    strategy="ddp" if devices == "2" else "auto", enable_model_summary=False,
    callbacks=[FeatureCache(out + "/cache")],
).fit(detector, datamodule=data)
if detector.global_rank == 0:
    torch.save(detector.state_dict(), out + "/state.pt")
with open(f"{out}/computed {detector.global_rank}", "w") as file:
    file.write(str(sum(computed)))
"""


def trained(name: str, devices: int, image_folder: Path, out: Path) -> dict[str, Any]:
    """Tensors of a detector after three steps on all images."""
    out.mkdir()
    (out / "script.py").write_text(SCRIPT)
    options = [Path(__file__).parent, name, image_folder, out, devices]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, str(out / "script.py"), *map(str, options)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return torch.load(out / "state.pt", weights_only=True)


@pytest.mark.long
@pytest.mark.parametrize("name", ["CSFlow", "DifferNet", "FastFlow", "MSFlow", "RealNVP"])
def test_two_processes_train_what_one_does(name: str, image_folder: Path, tmp_path: Path) -> None:
    one, two = (trained(name, devices, image_folder, tmp_path / str(devices)) for devices in (1, 2))
    assert one.keys() == two.keys()
    computed = [[int(path.read_text()) for path in (tmp_path / str(devices)).glob("computed *")] for devices in (1, 2)]
    assert len(computed[1]) == 2
    if (
        name != "DifferNet"
    ):  # of which a fit in one process scores the training images in the end, in views without a cache
        assert sum(computed[0]) == sum(computed[1]) == 20  # features of each image once, in one process or the other
    for key, value in one.items():
        torch.testing.assert_close(
            two[key], value, rtol=1e-3, atol=1e-4, equal_nan=True, msg=lambda text, k=key: k + text
        )


@pytest.mark.long
def test_torchrun_starts_the_command_line(image_folder: Path, tmp_path: Path) -> None:
    arguments = {"root": image_folder, "name": "few", "normal_dir": "train/good", "train_batch_size": "2"}
    options = [f"--data.{name}={value}" for name, value in ({"num_workers": "0"} | arguments).items()]
    model = {"max_steps": "3", "image_size": "64", "backbone": "tf_efficientnet_lite0"}
    options += [f"--model.{name}={value}" for name, value in model.items()]
    options += [  # without the validation: one image for two processes makes anomalib's metrics wait for each other
        f"--trainer.{name}={value}"
        for name, value in {"accelerator": "cpu", "devices": "2", "strategy": "ddp", "limit_val_batches": "0"}.items()
    ]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--no_python"]
    program = [sys.executable, "-m", "anomalib_csflow.cli", "fit", "-c", "configs/cs_flow_small.yaml"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [*launcher, *program, f"--default_root_dir={tmp_path}", *options]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, cwd=Path(__file__).parents[1], env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (version,) = tmp_path.rglob("v*/")  # of the first process alone
    assert (version.parent / "latest").resolve() == version
    (checkpoint,) = version.rglob("model.ckpt")
    assert torch.load(checkpoint, weights_only=True)["global_step"] == 3


def started(task: str, rank: int, images: Path, out: Path, devices: int = 2) -> subprocess.CompletedProcess[str]:
    """Run ``processes.py`` to the end of all its processes, since each holds the pipe open."""
    out.mkdir()
    options = [Path(__file__).with_name("processes.py"), task, rank, images, out, devices]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, *map(str, options)]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=300, env=environment)


@pytest.mark.long
def test_two_processes_predict_each_image_once(image_folder: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for name in ("train/good", "test/blob"):
        for file in (image_folder / name).iterdir():
            (images / f"{file.parent.name}_{file.name}").symlink_to(file)
    (images / "good_000.png").unlink()  # 15, which two processes cannot share evenly
    found = {}
    for devices in (1, 2):
        done = started("predict", 0, images, tmp_path / str(devices), devices)
        assert done.returncode == 0, done.stderr[-2000:]
        parts = [json.loads((tmp_path / f"{devices}/{rank}.json").read_text()) for rank in range(devices)]
        assert sum(part["count"] for part in parts) == 15
        assert all(part["count"] for part in parts)
        found[devices] = {name: score for part in parts for name, score in part["scores"].items()}
    assert found[1].keys() == found[2].keys()
    assert [found[2][name] for name in found[1]] == pytest.approx([*found[1].values()], rel=1e-4)
    pictures = {path.name for path in (tmp_path / "2").rglob("images/*.png")}
    assert pictures == set(found[1])


@pytest.mark.long
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("task", ["NaN", "error", "broken"])
def test_what_happens_to_one_ends_both(task: str, rank: int, image_folder: Path, tmp_path: Path) -> None:
    """A NaN in a step, an error while scoring, and an image that can no longer be read when it is its turn."""
    images = image_folder
    if task == "error":
        images = image_folder / "test/blob"
    elif task == "broken":
        images = tmp_path / "images"
        shutil.copytree(image_folder, images)
    done = started(task, rank, images, tmp_path / "out")
    assert done.returncode != 0
    words = {"NaN": "the loss became nan at epoch 0, step 1", "error": "cannot read", "broken": "cannot identify"}
    assert words[task] in done.stderr, done.stderr[-2000:]
