"""Memory over many inferences: what the first ones need is all that is ever needed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import SMALL

SCRIPT = """
import json, os, sys, warnings
warnings.simplefilter("ignore")
os.environ["TRUST_REMOTE_CODE"] = "1"
from pathlib import Path
import torch
from anomalib.deploy import OpenVINOInferencer, TorchInferencer
from anomalib_csflow import CSFlow

torch.set_num_threads(1)
_, kind, options, out, images, count = sys.argv
count, detector = int(count), CSFlow(**json.loads(options)).eval()
files = [str(file) for file in sorted(Path(images).iterdir())]
if kind == "torch":
    predict = TorchInferencer(detector.to_torch(out), device="cpu").predict
else:
    predict = OpenVINOInferencer(detector.to_openvino(out), device="CPU").predict
del detector

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6

found = []
for turn in range(count + 1):
    predict(files[turn % len(files)])
    if turn >= count // 5 and turn % (count // 10) == 0:
        found.append(resident())
print("found", json.dumps(found))
"""
MOST = 20
"""MB that may be added after the first fifth; the pixels of 500 images, as the network sees them, are 25."""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="only Linux says so")
@pytest.mark.parametrize(
    ("kind", "count"),
    [("torch", 500), *(pytest.param(kind, 10_000, marks=pytest.mark.long) for kind in ("torch", "openvino"))],
)
def test_memory_is_flat_over_many_inferences(kind: str, count: int, image_folder: Path, tmp_path: Path) -> None:
    options = json.dumps({**SMALL, "image_size": 64})
    arguments = [kind, options, str(tmp_path), str(image_folder / "test/good"), str(count)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments],
        check=False,
        capture_output=True,
        text=True,
        timeout=3600,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.rpartition("found ")[2])
    assert max(found) - found[0] < MOST, found
