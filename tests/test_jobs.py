"""Jobs: each ends alone, all end with their caller, and a wrong cluster is said before any work."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from anomalib_csflow import jobs

pytestmark = pytest.mark.skipif(os.name != "posix", reason="submitit is for POSIX")
HERE = f"{__name__}:"
FOREVER = f"""
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background, a shell has it ignored
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from anomalib_csflow import jobs
root = Path(sys.argv[1])
calls = {{str(n): [str(root / str(n))] for n in range(2)}}
for _ in jobs.run(calls, "test_jobs:work_forever", root / "jobs", jobs.Cluster(jobs=2)):
    pass
"""


def work(path: str, fate: str) -> None:
    """Write the environment, or end badly."""
    if fate == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if fate == "wrong":
        msg = "it is wrong"
        raise ValueError(msg)
    Path(path).write_text(os.environ["OMP_NUM_THREADS"])


def work_forever(path: str) -> None:
    """Write now and then."""
    while True:
        Path(path).write_text(str(time.time()))
        time.sleep(0.05)


def test_a_job_that_fails_does_not_stop_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    calls = {name: (str(tmp_path / name), name) for name in ("killed", "wrong", "whole")}
    events = [*jobs.run(calls, f"{HERE}work", tmp_path / "jobs", jobs.Cluster())]
    assert [event for event in events if event[1] is None] == [(name, None) for name in calls]
    reasons = {name: reason for name, reason in events if reason is not None}
    assert "its process was killed (is there enough memory?)" in str(reasons["killed"])
    assert "ValueError: it is wrong" in str(reasons["wrong"])
    assert reasons["whole"] == ""
    assert (tmp_path / "whole").read_text() == "3"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_jobs_end_with_their_caller(number: int, tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    with subprocess.Popen(
        [sys.executable, "-c", FOREVER, str(tmp_path)], env=environment, stderr=subprocess.PIPE
    ) as one:
        files = [tmp_path / str(n) for n in range(2)]
        while not all(file.is_file() for file in files):
            assert one.poll() is None
            time.sleep(0.1)
        one.send_signal(number)
        one.wait(20)
        assert one.stderr is not None
        one.stderr.read()  # to the end of all who hold it open: of submitit's own processes too
    before = [file.read_text() for file in files]
    time.sleep(0.5)
    assert [file.read_text() for file in files] == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "cloud"}, "jobs run on one of local, slurm"),
        ({"jobs": 0}, "1 or more at once, got 'local' and 0"),
        ({"options": {"no_such": 1}}, "submitit refuses the cluster's options {'no_such': 1}"),
    ],
)
def test_a_wrong_cluster_is_said_before_any_work(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        jobs.Cluster(**arguments)


def test_slurm_that_is_not_here_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="there is no SLURM here, as srun is not found"):
        jobs.Cluster("slurm")


@pytest.mark.parametrize(("visible", "expected"), [("", "012"), ("4,6,7", "467")])
def test_each_job_has_a_device(visible: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    found = [jobs.environment(place, jobs=4)["CUDA_VISIBLE_DEVICES"] for place in range(4)]
    assert found == [*expected, expected[0]]


@pytest.mark.parametrize(("number", "expected"), [(1, "6"), (2, "3"), (9, "1")])
def test_jobs_share_the_processors_that_may_be_used(
    number: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    assert jobs.environment(0, number)["OMP_NUM_THREADS"] == expected
