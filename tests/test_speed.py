"""The scripts that compare speeds still run: each in its quick form, which writes nothing."""

import subprocess
import sys
from pathlib import Path

import pytest

SPEED = Path(__file__).parents[1] / "speed"
SCRIPTS = sorted(path.stem for path in SPEED.glob("*.py") if path.stem != "side_by_side")


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_runs_and_prints_both_sides(name: str) -> None:
    kept = {path: path.stat().st_mtime_ns for path in (SPEED / "results").iterdir()}
    command = [sys.executable, "-W", "ignore", str(SPEED / f"{name}.py"), "--quick", "--threads=1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    header, rule, first = [line for line in done.stdout.splitlines() if line.startswith("|")][:3]
    assert set(rule) <= set("|-: ")
    assert len(first.split("|")) == len(header.split("|"))
    assert "threads: 1; anomalib-csflow " in done.stdout  # what the figures depend on
    assert {path: path.stat().st_mtime_ns for path in (SPEED / "results").iterdir()} == kept


def test_all_are_run() -> None:
    assert SCRIPTS == [
        "coupling",
        "false_alarms",
        "fit",
        "growth",
        "inference",
        "large",
        "line",
        "many",
        "memory",
        "training",
    ]
