"""Errors of a user end a command with one sentence; a program's own faults keep their traceback."""

import argparse
import shutil
from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest
import torch

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
        (["--trainer.strategy", "foo"], "invalid strategy name"),
        (["--trainer.devices", "x"], "`devices` selected with `CPUAccelerator` should be an int > 0"),
        (["-c", "latin.yaml"], "utf-8"),
        (["--data.train_batch_size", "0"], "train_batch_size must be 1 or more, got 0"),
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
    (tmp_path / "latin.yaml").write_bytes("model: größe".encode("latin-1"))
    shutil.copytree(image_folder / "train/good", tmp_path / "größe/train/good")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(SystemExit) as stopped:
        fit(image_folder, *options)
    code = stopped.value.code
    assert not list(tmp_path.rglob("latest"))
    line = code if isinstance(code, str) else capsys.readouterr().err.strip().splitlines()[-1]
    assert said in line
    assert "\n" not in line
    assert "Namespace" not in line


def _fail(arguments: Any, error: Exception) -> None:
    raise error


def _add_shapes() -> None:
    torch.zeros(2) + torch.zeros(3)


def _call() -> None:
    Path("/none").read_text(nothing=3)  # type: ignore[call-arg]


def _count() -> None:
    list(zip([1], [1, 2], strict=True))


def _look_up() -> None:
    try:
        Path("/none").read_text()
    except OSError:
        {}["x"]


def _refuse() -> None:
    msg = "a part is missing"
    raise NotImplementedError(msg)


@pytest.mark.parametrize("fault", [_add_shapes, _call, _count, _look_up, _refuse, lambda: 1 // 0])
def test_faults_keep_their_traceback(monkeypatch: pytest.MonkeyPatch, fault: Callable[[], None]) -> None:
    """In this package's code too, and where they come up while a user's error is looked at."""
    own = FunctionType(fault.__code__, {**fault.__globals__, "__name__": "anomalib_csflow.engine.images"})
    monkeypatch.setattr(cli, "run", lambda arguments: own())
    with pytest.raises(Exception, match=r".*") as raised:
        cli.main(["fit"])
    assert not isinstance(raised.value, SystemExit)


def test_what_another_library_raises_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "run", lambda arguments: _fail(arguments, ValueError("raised in these tests")))
    with pytest.raises(ValueError, match="raised in these tests"):
        cli.main(["fit"])


@pytest.mark.parametrize(("error", "said"), [(TimeoutError(), "TimeoutError"), (OSError("gone"), "gone")])
def test_a_sentence_is_never_empty(error: Exception, said: str) -> None:
    assert user_errors.sentence(error) == said


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


def test_a_refused_fit_leaves_latest_at_the_last_checkpoint(tmp_path: Path) -> None:
    """Whatever was refused since; an empty version folder goes, one with files stays."""
    latest = tmp_path / "latest"
    for name in ("v0", "v1", "v2", "v9", "v10"):
        (tmp_path / name).mkdir()
    (tmp_path / "v9" / "model.ckpt").touch()
    (tmp_path / "v1" / "model.ckpt").touch()
    for name in ("v10", "v11"):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "config.yaml").touch()
        latest.unlink(missing_ok=True)
        latest.symlink_to(tmp_path / name)
        host_cli.forget(tmp_path / name)
        assert latest.resolve() == tmp_path / "v9"
        assert (tmp_path / name / "config.yaml").is_file()
    host_cli.forget(tmp_path / "v9")
    host_cli.forget(tmp_path / "v2")  # not the latest
    host_cli.forget(tmp_path)
    assert latest.resolve() == tmp_path / "v9"
    assert (tmp_path / "v2").is_dir()
    (tmp_path / "v12").mkdir()
    latest.unlink()
    latest.symlink_to(tmp_path / "v12")
    host_cli.forget(tmp_path / "v12")
    assert not (tmp_path / "v12").exists()
    assert latest.resolve() == tmp_path / "v9"


def test_too_little_memory_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "run", lambda arguments: torch.empty(2**60))
    with pytest.raises(SystemExit, match=r"can't allocate memory: .* \(lower data.train_batch_size"):
        cli.main(["fit"])
