"""Errors of a user end a command with one sentence; a program's own faults keep their traceback."""

import argparse
import shutil
from pathlib import Path
from typing import Any

import pytest

from anomalib_csflow import cli, host_cli, user_errors
from anomalib_csflow.engine.images import UnreadableImageError
from anomalib_csflow.recipe_files import recipe_path


def fit(image_folder: Path, *options: str) -> None:
    """Begin a fit of the small recipe, with other options."""
    folder = ["--data.root", str(image_folder), "--data.normal_dir", "train/good"]
    cli.main(["fit", "-c", str(recipe_path("cs_flow_small")), *folder, *options])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--model.init_args.lr", "abc"], "model.lr: Expected float. Got value: abc"),
        (["--model.init_args.learning", "3"], "model: Option 'learning' is not accepted by anomalib_csflow.CSFlow"),
        (["--trainer.max_epochs", "x"], "trainer.max_epochs: Expected int, got x"),
        (["--nothing", "3"], "Unrecognized arguments: --nothing 3"),
    ],
)
def test_parser_errors_are_one_line_and_end_with_2(
    image_folder: Path, options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        fit(image_folder, *options)
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err.splitlines()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--model.init_args.layers", "[blocks.9]"], "the backbone has no layer 'blocks.9'; near names are"),
        (["--model.init_args.kernel_sizes", "[3,3]"], "give one of kernel_sizes for each of num_blocks: got 1"),
        (["--data.normal_dir", "nowhere"], "Path does not exist"),
        (["--data.root", "größe"], "größe/train/good (anomalib takes only ASCII characters in paths"),
        (["--trainer.accelerator", "gpu"], "No supported gpu backend found"),
        (["-c", "none.yaml"], "config: File does not exist"),
    ],
)
def test_errors_of_a_fit_are_one_line(
    image_folder: Path,
    tmp_path: Path,
    options: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(image_folder / "train/good", tmp_path / "größe/train/good")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(SystemExit) as stopped:
        fit(image_folder, *options)
    code = stopped.value.code
    assert not list(tmp_path.rglob("latest"))
    assert not list(tmp_path.rglob("v0"))
    line = code if isinstance(code, str) else capsys.readouterr().err.strip().splitlines()[-1]
    assert said in line
    assert "\n" not in line
    assert "Namespace" not in line


def _fail(arguments: Any, error: Exception) -> None:
    raise error


@pytest.mark.parametrize("error", [KeyError("x"), TypeError("x"), ZeroDivisionError("x")])
def test_faults_keep_their_traceback(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    monkeypatch.setattr(cli, "run", lambda arguments: _fail(arguments, error))
    with pytest.raises(type(error)) as raised:
        cli.main(["fit"])
    assert raised.value is error


def test_a_value_error_of_another_library_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "run", lambda arguments: _fail(arguments, ValueError("raised in these tests")))
    with pytest.raises(ValueError, match="raised in these tests"):
        cli.main(["fit"])


def test_the_debug_variable_keeps_every_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "run", lambda arguments: _fail(arguments, OSError("no space")))
    with pytest.raises(SystemExit, match="no space"):
        cli.main(["fit"])
    monkeypatch.setenv(user_errors.DEBUG, "1")
    with pytest.raises(OSError, match="no space"):
        cli.main(["fit"])


def test_an_error_of_a_loaders_worker_is_said_without_its_traceback() -> None:
    text = (
        "Caught UnreadableImageError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
        '  File "images.py", line 1, in f\nanomalib_csflow.engine.images.UnreadableImageError: /a/b.png is cut off\n'
    )
    assert user_errors.sentence(UnreadableImageError(text)) == "/a/b.png is cut off"


def test_a_parser_of_anomalib_raises_instead_of_exiting() -> None:
    with pytest.raises(argparse.ArgumentError):
        host_cli.anomalib(["fit", "--model", "NoSuchDetector"])


def test_a_refused_fit_leaves_latest_as_it_was(image_folder: Path, tmp_path: Path) -> None:
    """Its empty version folder goes; one with a checkpoint, or with other files, stays."""
    for name in ("v0", "v1", "v9", "v10"):
        (tmp_path / name).mkdir()
    (tmp_path / "v9" / "model.ckpt").touch()
    (tmp_path / "v10" / "log.txt").touch()
    latest = tmp_path / "latest"
    latest.symlink_to(tmp_path / "v10")
    host_cli.forget(tmp_path / "v10")
    assert latest.resolve() == tmp_path / "v9"
    host_cli.forget(tmp_path / "v9")
    assert latest.resolve() == tmp_path / "v9"
    host_cli.forget(tmp_path / "v1")
    assert latest.resolve() == tmp_path / "v9"
    assert {path.name for path in tmp_path.iterdir()} == {"v0", "v9", "v10", "latest"}
    host_cli.forget(tmp_path)
    assert tmp_path.is_dir()
