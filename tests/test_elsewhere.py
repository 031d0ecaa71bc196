"""Other systems: workers that are spawned, as on macOS and Windows, and nothing that only POSIX has."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import anomalib_csflow

PACKAGE = Path(anomalib_csflow.__file__).parent
OF_POSIX = {"fcntl", "grp", "posix", "pwd", "resource", "termios"}
"""Modules."""
NAMES = {
    "os": {"chown", "fork", "getgid", "geteuid", "getgroups", "getuid", "kill", "killpg", "setsid", "statvfs", "uname"},
    "signal": {"SIGALRM", "SIGCHLD", "SIGHUP", "SIGKILL", "SIGUSR1", "SIGUSR2", "alarm", "pause", "setitimer"},
}
"""Attributes of modules that are everywhere."""
GUARDED = {
    "benchmark/run/timing.py": {"resource"},
    "jobs.py": {"os.kill"},
    "features/store.py": {"os.getuid"},
    "runtime/record.py": {"fcntl"},
    "features/trust.py": {"os.getuid"},
}
"""What is used where ``os.name`` or ``sys.platform`` is looked at before."""


def of_posix(path: Path) -> set[str]:
    """What a file uses that Windows does not have."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names} & OF_POSIX
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module or ""} & OF_POSIX
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            found |= {f"{node.value.id}.{node.attr}"} if node.attr in NAMES.get(node.value.id, ()) else set()
    return found


def test_what_only_posix_has_is_guarded() -> None:
    used = {path.relative_to(PACKAGE).as_posix(): of_posix(path) for path in PACKAGE.rglob("*.py")}
    assert {name: found for name, found in used.items() if found} == GUARDED


SCRIPT = """
import multiprocessing, sys, warnings
from pathlib import Path
warnings.simplefilter("ignore")
import torch
from anomalib.data import Folder
from anomalib.engine import Engine
from anomalib_csflow import CSFlow, FeatureCache

if __name__ == "__main__":
    torch.set_num_threads(1)
    multiprocessing.set_start_method("spawn")
    _, root, out = sys.argv
    data = Folder("textures", "train/good", root=root, normal_test_dir="test/good", val_split_mode="none",
                  train_batch_size=6, num_workers=1)
    model = CSFlow("tf_efficientnet_lite0", "blocks.4", "package", image_size=64, num_blocks=1, hidden_channels=8,
                   kernel_sizes=[3], standardize=True, max_steps=3)
    engine = Engine(default_root_dir=out, accelerator="cpu", limit_val_batches=0, enable_progress_bar=False,
                    enable_model_summary=False, callbacks=[FeatureCache(out + "/cache")])
    engine.fit(model, datamodule=data)
    print("ended after", engine.trainer.global_step, "steps")
"""


@pytest.mark.long
def test_workers_may_be_spawned(image_folder: Path, tmp_path: Path) -> None:
    """As they are where nothing is forked: all that a worker needs can be pickled; in a folder of an odd name."""
    out = tmp_path / "a folder with spaces, äöü and 漢"
    out.mkdir()
    (out / "script.py").write_text(SCRIPT)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(PACKAGE.parent)}
    command = [sys.executable, str(out / "script.py"), str(image_folder), str(out)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "ended after 3 steps" in done.stdout
    assert len([*out.rglob("*.safetensors")]) == 12
