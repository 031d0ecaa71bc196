"""fit-all: one fit for each part and seed, resumed after any kill, with the same results."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import SMALL, texture
from killing import end_killed_at_random
from PIL import Image

from anomalib_csflow import CSFlow, fit_all, fit_job
from anomalib_csflow.jobs import Cluster

pytestmark = pytest.mark.skipif(os.name != "posix", reason="submitit is for POSIX")


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """Two steps of a small detector."""
    processor = "anomalib_csflow.engine.post_processing.ConformalPostProcessor"
    own = {"image_size": 64, "max_steps": 2, "post_processor": {"class_path": processor, "init_args": {"num_folds": 2}}}
    data = {"root": "elsewhere", "name": "x", "normal_dir": "y", "train_batch_size": 4, "num_workers": 0}
    path = tmp_path / "recipe.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "seed_everything": 0,
                "model": {"class_path": "anomalib_csflow.CSFlow", "init_args": SMALL | own},
                "data": {"class_path": "anomalib.data.Folder", "init_args": data},
                "trainer": {"accelerator": "cpu", "enable_model_summary": False},
            }
        )
    )
    return path


def make_part(folder: Path, seed: int = 0) -> None:
    generator = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    for index in range(8):
        Image.fromarray(texture(generator, 64, 64).astype(np.uint8)).save(folder / f"{index}.png")


def command(recipe: Path, root: Path, out: Path, *options: str) -> list[str]:
    start = [sys.executable, "-W", "ignore", "-m", "anomalib_csflow.cli", "fit-all"]
    return [*start, "-c", str(recipe), "--root", str(root), "--out", str(out), *options]


def tensors(out: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Those of each fit's checkpoint."""
    files = sorted(out.glob("*/*/model.ckpt"))
    return {str(file.relative_to(out)): torch.load(file, weights_only=True)["state_dict"] for file in files}


def check_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """To rounding: a backbone that computes what is missing in the cache sees other images beside each."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=1e-3, atol=1e-5, equal_nan=True, msg=lambda m, n=name: n + m
        )


@pytest.mark.slow
def test_a_killed_fit_is_done_again_and_a_finished_one_is_not(recipe: Path, tmp_path: Path) -> None:
    root, out = tmp_path / "parts", tmp_path / "out"
    make_part(root / "first" / "good")
    (root / "empty").mkdir()

    def run() -> subprocess.CompletedProcess:
        return subprocess.run(command(recipe, root, out), capture_output=True, text=True, check=False)

    done = run()
    assert done.returncode == 1  # as there is nothing in one part
    assert f"there are no images in {root / 'empty'}" in done.stdout
    assert "1 of 1: first 0 8 12.5 %" in done.stderr
    (root / "empty").rmdir()
    shutil.copytree(root / "first" / "good", root / "second" / "train" / "good")
    (root / "second" / "test" / "scratch").mkdir(parents=True)
    (root / "second" / "test" / "scratch" / "not an image.png").write_text("is not read")
    photos = out / "second" / "0" / "photos"  # not a fit's
    photos.mkdir(parents=True)
    written = (out / "first" / "0" / "model.ckpt").stat()
    end_killed_at_random(command(recipe, root, out), out / "jobs", np.random.default_rng(3), 25)
    assert (out / "first" / "0" / "model.ckpt").stat() == written
    check_same(*tensors(out).values())
    loaded = CSFlow.load_from_checkpoint(out / "second" / "0" / "model.ckpt")
    assert loaded.post_processor.is_calibrated
    assert photos.is_dir()
    assert "0 of 2 fits to do" in run().stderr


@pytest.mark.long
def test_eight_fits_killed_at_random_end_as_if_nothing_had_been(recipe: Path, tmp_path: Path) -> None:
    root = tmp_path / "parts"
    for number in range(4):
        make_part(root / str(number), number)
    options = ("--seeds", "0", "1", "--jobs", "2")
    assert subprocess.run(command(recipe, root, tmp_path / "whole", *options), check=False).returncode == 0
    broken = command(recipe, root, tmp_path / "killed", *options)
    assert end_killed_at_random(broken, tmp_path / "killed" / "jobs", np.random.default_rng(0), 20) > 1
    whole, killed = tensors(tmp_path / "whole"), tensors(tmp_path / "killed")
    assert len(whole) == 8
    assert whole.keys() == killed.keys()
    for name, expected in whole.items():
        check_same(killed[name], expected)


def one(root: Path, out: Path) -> fit_job.Fit:
    return fit_job.Fit("part", 0, out / "part" / "0")


def test_what_is_done_again(tmp_path: Path) -> None:
    part, recipe = tmp_path / "part", {"model": {}}
    make_part(part)
    fit = one(tmp_path, tmp_path / "out")

    def settings(options: tuple[str, ...] = ()) -> str:
        return fit_job.prepare(fit, part, recipe, options)

    first = settings()
    checkpoint = fit.folder / "model.ckpt"
    checkpoint.write_text("whole")
    result = {"status": "done", "settings": first, "digest": fit_job.sha256(checkpoint)}
    (fit.folder / "result.json").write_text(json.dumps(result))
    assert fit.is_done(settings())
    assert not fit.is_done(settings(("--model.lr", "1")))
    checkpoint.write_text("half")
    assert not fit.is_done(settings())
    checkpoint.write_text("whole")
    shutil.copy(part / "0.png", part / "another.png")
    assert not fit.is_done(settings())


@pytest.mark.parametrize(("name", "where"), [("train/good", "train/good"), ("good", "good"), (".", ".")])
def test_where_good_images_are(name: str, where: str, tmp_path: Path) -> None:
    make_part(tmp_path / "part" / name)
    folder, files = fit_job.good_images(tmp_path / "part")
    assert folder == tmp_path / "part" / where
    assert len(files) == 8
    if name == ".":
        make_part(tmp_path / "part" / "defects")
        with pytest.raises(ValueError, match="it is not clear which images of"):
            fit_job.good_images(tmp_path / "part")


def test_what_cannot_be_fitted_is_said_before_the_work(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    with pytest.raises(ValueError, match="parts needs a folder for each part"):
        fit_all.fit_all(str(recipe), tmp_path / "parts", tmp_path / "out", None, Cluster())
    (tmp_path / "parts" / "part").mkdir()
    with pytest.raises(ValueError, match="the results would be among the images"):
        fit_all.fit_all(str(recipe), tmp_path / "parts", tmp_path / "parts" / "out", None, Cluster())
    with pytest.raises(FileNotFoundError, match="there is no recipe 'csflow_small'; near names are cs_flow_small"):
        fit_all.fit_all("csflow_small", tmp_path, tmp_path / "out", None, Cluster())
    with pytest.raises(ValueError, match="the recipe benchmark is of no detector"):
        fit_all.fit_all("benchmark", tmp_path, tmp_path / "out", None, Cluster())


def test_an_option_that_anomalib_refuses_ends_all(recipe: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        make_part(tmp_path / "parts" / name)
    options = ("--model.no_such_option", "1")
    line = command(recipe, tmp_path / "parts", tmp_path / "out", *options)
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "no_such_option" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "out" / "b" / "0" / "log.txt").exists()
