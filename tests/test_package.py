"""What is installed and what an import costs: lazy names, registration with anomalib, recipes in the wheel."""

import importlib.util
import logging
import shutil
import subprocess
import sys
import time
import warnings
import zipfile
from pathlib import Path

import pytest
import tomllib
from lightning_utilities.core import rank_zero
from rich.logging import RichHandler

import anomalib_csflow
from anomalib_csflow import cli, host_cli

ROOT = Path(__file__).parents[1]


def run(code: str, *options: str) -> str:
    """What a new process prints; the warnings are those of anomalib's imports."""
    command = [sys.executable, "-W", "ignore", *options, "-c", code]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_the_import_is_light() -> None:
    code = (
        "import sys, time; start = time.perf_counter(); import anomalib_csflow;"
        "print(time.perf_counter() - start, 'torch' in sys.modules, 'anomalib.models' in sys.modules)"
    )
    outputs = [run(code).split() for _ in range(3)]
    assert {tuple(output[1:]) for output in outputs} == {("False", "False")}
    assert min(float(output[0]) for output in outputs) < 0.3


def test_names() -> None:
    assert set(anomalib_csflow.__all__) <= set(dir(anomalib_csflow))
    with pytest.raises(AttributeError, match="module 'anomalib_csflow' has no attribute 'CsFlow'"):
        _ = anomalib_csflow.CsFlow


@pytest.mark.parametrize(
    "code",
    [
        "import anomalib.models, anomalib_csflow",
        "import anomalib_csflow; anomalib_csflow.RealNVP",
        "from anomalib_csflow import RealNVP; import anomalib.models",
    ],
)
def test_anomalib_may_import_from_us(code: str) -> None:
    assert run(f"{code}\nfrom anomalib.models import ALLOWED_MODULES as a; print('anomalib_csflow' in a)") == "True\n"


# -- recipes ------------------------------------------------------------------------------------


def test_every_recipe_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["recipe"])
    lines = capsys.readouterr().out.splitlines()
    files = {path.stem for path in ROOT.glob("configs/*.yaml")}
    assert {line.split()[0] for line in lines} == files
    assert max(map(len, lines)) <= 120


def test_a_recipe_is_found_within_a_second(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "anomalib_csflow.cli", "recipe", "cs_flow_small"]
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        found = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout
        seconds.append(time.perf_counter() - start)
        assert Path(found.strip()).read_text() == (ROOT / "configs" / "cs_flow_small.yaml").read_text()
    assert min(seconds) < 1


def test_near_names_of_an_unknown_recipe() -> None:
    with pytest.raises(
        SystemExit, match=r"^there is no recipe 'csflow_small'; near names are cs_flow_small, .*"
    ) as info:
        cli.main(["recipe", "csflow_small"])
    assert "\n" not in str(info.value)
    with pytest.raises(SystemExit, match="usage: anomalib-csflow recipe"):
        cli.main(["recipe", "--help"])


# -- what the command line leaves out -----------------------------------------------------------


def test_logs_without_tips_steps_and_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    root = logging.getLogger()
    rich = RichHandler()
    monkeypatch.setattr(root, "handlers", [logging.StreamHandler(), rich])
    host_cli.silence_logs()
    assert root.handlers == [rich]
    assert not logging.getLogger("onnx_ir.passes").isEnabledFor(logging.INFO)
    messages = ["💡 Tip: install litlogger", "GPU available: False"]
    records = [logging.makeLogRecord({"msg": message}) for message in messages]
    assert [bool(rank_zero.log.filter(record)) for record in records] == [False, True]


def test_warnings_that_nobody_can_act_on() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        host_cli.silence_warnings()
        warnings.warn("Importing from timm.models.layers is deprecated", FutureWarning, stacklevel=1)
        warnings.warn("Found 323 module(s) in eval mode at the start of training.", UserWarning, stacklevel=1)
        warnings.warn("the feature cache stops storing", UserWarning, stacklevel=1)
    assert [str(warning.message) for warning in caught] == ["the feature cache stops storing"]


# -- the wheel ----------------------------------------------------------------------------------


@pytest.mark.skipif(importlib.util.find_spec("setuptools") is None, reason="the wheel is built with the environment's")
def test_the_wheel_holds_all_that_is_in_the_checkout(tmp_path: Path) -> None:
    source, wheels = tmp_path / "source", tmp_path / "wheels"
    source.mkdir()
    for name in ("README.md", "LICENSE", "pyproject.toml"):
        shutil.copy(ROOT / name, source)
    for name in ("anomalib_csflow", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--wheel-dir", str(wheels)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(source)], check=True)
    (wheel,) = wheels.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
        archive.extractall(tmp_path / "site")
    here = {str(path.relative_to(source)) for path in source.glob("*/**/*") if path.is_file()}
    expected = {name.replace("configs/", "anomalib_csflow/recipes/") for name in here if ".egg-info" not in name}
    assert packed == {name for name in expected if not name.startswith("build/")}
    site = str(tmp_path / "site")
    code = f"import sys; sys.path.insert(0, {site!r}); from anomalib_csflow import cli; cli.main(['recipe', 'cs_flow'])"
    assert run(code, "-P") == f"{site}/anomalib_csflow/recipes/cs_flow.yaml\n"


def test_all_packages_are_named() -> None:
    """Like the test of the wheel, in no time: a package that pyproject.toml does not name is not installed."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {path.parent.relative_to(ROOT) for path in ROOT.glob("anomalib_csflow/**/__init__.py")}
    assert listed == sorted({".".join(folder.parts) for folder in folders} | {"anomalib_csflow.recipes"})
