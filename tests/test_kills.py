"""Kills at random instants leave what was there before, or what came instead, and it is whole."""

import os
import re
import secrets
import subprocess
import sys
from pathlib import Path

import pytest

SHORT = {"fit": 2, "checkpoint": 3, "torch": 3}
LONG = {"fit": 50, "checkpoint": 60, "torch": 60, "export": 20}


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system neither forks nor kills")
@pytest.mark.parametrize(
    "kills", [SHORT, *(pytest.param({kind: count}, marks=pytest.mark.long) for kind, count in LONG.items())], ids=str
)
def test_kills_leave_all_whole(kills: dict[str, int], image_folder: Path, tmp_path: Path) -> None:
    """Checkpoints load, features are right, and exports are of one detector."""
    seed = 0 if kills == SHORT else secrets.randbelow(10**6)  # other instants in every long run
    options = [str(seed), str(image_folder), str(tmp_path), *(f"{kind}={count}" for kind, count in kills.items())]
    other = {"TMPDIR": "/dev/shm"} if Path("/dev/shm").is_dir() else {}  # noqa: S108 (from which nothing is renamed to here)
    environment = os.environ | other | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("kills.py")), *options]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=3600, env=environment)
    assert done.returncode == 0, (seed, done.stderr[-3000:])
    found = re.findall(r"(\w+): (\d+) kills, (\d+) files looked at", done.stdout)
    assert {kind: int(count) for kind, count, _ in found} == kills
    assert all(int(looked) for _, _, looked in found), done.stdout
