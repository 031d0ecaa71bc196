"""A full disk and a read-only one: a sentence says what cannot be written, and what was there is still whole."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

MOUNT = ["unshare", "--user", "--map-root-user", "--mount"]
"""Runs a command that may mount a disk of its own, and nobody else sees it."""

FAULTS = {"full": "No space left on device", "read-only": "Read-only file system"}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_what_cannot_be_written_is_said_and_nothing_is_lost(fault: str, image_folder: Path, tmp_path: Path) -> None:
    disk, elsewhere = tmp_path / "disk", tmp_path / "elsewhere"
    disk.mkdir()
    elsewhere.mkdir()
    mount = f"mount -t tmpfs -o size=160m tmpfs {disk}"
    if not shutil.which("unshare") or subprocess.run([*MOUNT, "sh", "-c", mount], check=False).returncode:
        pytest.skip("this system lets nobody mount a disk")
    script = [sys.executable, str(Path(__file__).with_name("full_disk.py")), fault, image_folder, disk, elsewhere]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    environment["ANOMALIB_CSFLOW_CACHE"] = str(elsewhere / "cache")
    command = [*MOUNT, "sh", "-c", f'{mount} && exec "$@"', "sh", *map(str, script)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.rpartition("\nfound ")[2])
    assert found.pop("changed") == []
    reason = FAULTS[fault]
    for name in ("fit", "cache", "torch", "onnx", "openvino", "bundle", "zip", "calibrate"):
        what = {"fit": "checkpoint", "cache": "checkpoint", "calibrate": "checkpoint", "zip": "bundle"}.get(name, name)
        what = "export" if name in {"torch", "onnx", "openvino"} else what
        error = found[name]["error"]
        assert error.startswith(f"WriteError: the {what} cannot be written to {disk}"), (name, error)
        assert reason in error or "OpenVINO does not say why" in error, (name, error)
        assert "\n" not in error
    texts = [text for text in found["cache"]["warnings"] if "stops storing" in text]
    assert 1 <= len(texts) <= 2, found["cache"]  # of the stores of training and of validation images
    assert all(reason in text for text in texts), texts
    assert found["predict"]["error"] == ""
    assert len(found["predict"]["found"]) == 4
    texts = [text for text in found["predict"]["warnings"] if "picture" in text]
    assert len(texts) == 1, texts
    assert texts[0].startswith(f"the picture cannot be written to {disk}/images")
    assert found["benchmark"]["error"].startswith(f"SystemExit: the benchmark cannot write {disk}/out")
