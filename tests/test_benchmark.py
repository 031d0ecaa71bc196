"""The table on real images and the demo, on a small scale."""

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from anomalib.data import ImageBatch
from conftest import SMALL
from huggingface_hub import constants
from PIL import Image

from anomalib_csflow import demo
from anomalib_csflow.benchmark import __main__ as table
from anomalib_csflow.benchmark import measure


@pytest.fixture
def mvtec_layout(image_folder: Path, tmp_path: Path) -> Path:
    """The test images under the names of MVTec AD's layout."""
    root = tmp_path / "data" / "textures"
    root.mkdir(parents=True)
    for folder in ("train", "test"):
        (root / folder).symlink_to(image_folder / folder)
    (root / "ground_truth").mkdir()
    (root / "ground_truth" / "blob").symlink_to(image_folder / "masks")
    return root.parent


def test_table(mvtec_layout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    recipe = {
        "model": {"class_path": "anomalib_csflow.CSFlow", "init_args": SMALL | {"image_size": 96}},
        "data": {"init_args": {"train_batch_size": 4, "eval_batch_size": 4, "num_workers": 0}},
        "trainer": {"max_epochs": 8},
    }
    config = tmp_path / "recipe.yaml"
    config.write_text(yaml.safe_dump(recipe))
    out = tmp_path / "out"
    argv = ["benchmark", str(mvtec_layout), f"--config={config}", f"--out={out}", "--seeds", "0", "1"]
    monkeypatch.setattr("sys.argv", argv)
    table.main()
    text = (out / "table.md").read_text()
    assert text.count("textures") == 2
    assert "commit" in text
    rows = table.pd.read_csv(out / "rows.csv")
    assert list(rows["model"]) == ["CSFlow", "CSFlow", "Patchcore", "Patchcore"]
    assert (rows["image AUROC"] > 0.9).all()
    assert (rows["pixel AUROC"] > 0.8).all()
    assert rows["AUPRO"].between(0, 1).all()


def test_no_data_set_is_said(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no data set in MVTec AD's layout"):
        table.data_sets(tmp_path)


def test_scores_keep_their_order() -> None:
    scores = torch.tensor([-3.0, -0.5, 0.4, 40.0, 41.0])
    batch = ImageBatch(
        image=torch.zeros(5, 3, 2, 2), pred_score=scores, anomaly_map=scores[:, None, None].expand(5, 2, 2)
    )
    measure.ComparableScores().post_process_batch(batch)
    assert (batch.pred_score.diff() > 0).all()
    assert batch.pred_score.min() >= 0
    assert batch.anomaly_map.max() < 1


def test_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(demo, "TEXTURES", ("brick",))
    monkeypatch.setattr(demo, "NUM_TRAIN", 16)
    demo.run(tmp_path, epochs=4)
    printed = capsys.readouterr().out
    assert "image AUROC" in printed
    assert "ms per image" in printed
    with Image.open(tmp_path / "brick.png") as picture:
        assert picture.size[1] > 800
        assert np.asarray(picture).std() > 20
    assert len(list((tmp_path / "CSFlow" / "brick" / "latest" / "images").rglob("*.png"))) == 30
    assert (tmp_path / "exported" / "brick" / "weights" / "openvino" / "model.xml").is_file()


def test_masks_of_the_demo_are_exact() -> None:
    generator = np.random.default_rng(0)
    flat, other = np.full((demo.CROP, demo.CROP), 120.0), np.full((demo.CROP, demo.CROP), 200.0)
    for kind in range(3):
        image, mask = demo.damage(flat, other, kind, generator)
        changed = np.abs(image - flat) > 5
        assert mask.mean() > 0.002
        assert (changed & mask).sum() > 0.9 * mask.sum()
        assert not (image != flat)[~mask].any()
