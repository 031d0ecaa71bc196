"""Two processes train what one does with the same effective batch, and score each image once."""

import os
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
# every step sees all images: the order in which processes share them does not matter
data = Folder(**folder_arguments(root) | {"train_batch_size": 12 // int(devices), "eval_batch_size": 1})
Engine(
    default_root_dir=out, max_epochs=3, accelerator="cpu", devices=int(devices), enable_progress_bar=False,
    strategy="ddp" if devices == "2" else "auto", enable_model_summary=False,
    callbacks=[FeatureCache(out + "/cache")],
).fit(detector, datamodule=data)
if detector.global_rank == 0:
    torch.save(detector.state_dict(), out + "/state.pt")
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
    (checkpoint,) = tmp_path.rglob("v0/**/model.ckpt")
    assert torch.load(checkpoint, weights_only=True)["global_step"] == 3
