"""The benchmark and the demo, on a small scale."""

import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from conftest import SMALL
from filelock import FileLock
from huggingface_hub import constants
from killing import end_killed_at_random
from PIL import Image
from rich.console import Console
from sklearn.metrics import roc_auc_score

from anomalib_csflow import CSFlow, demo
from anomalib_csflow.benchmark import __main__ as command_line
from anomalib_csflow.benchmark import results
from anomalib_csflow.benchmark.rows import Row, write_json
from anomalib_csflow.benchmark.run import accuracy, build, config, execute, job, plan, samples, stage, timing

SHARED = {"backbone": "tf_efficientnet_lite0", "weights": "package", "image_size": 96, "antialias": False}
REAL_NVP = {
    "class_path": "RealNVP",
    "init_args": {"layer": "blocks.4", "hidden_channels": 16, "num_blocks": 2, "standardize": True, "lr": 1e-3},
    "epochs": 2,
    "train_batch_size": 4,
}
PATCHCORE = {"class_path": "Patchcore", "name": "PatchCore", "init_args": {"layers": ["blocks.4"]}}


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


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub's cache of the test's own, for this process and those that it starts, and no network."""
    folder = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_CACHE", str(folder))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return folder


def one_run(root: Path, detector: dict) -> plan.Run:
    (data,) = config.read_data(str(root))
    (made,) = plan.runs([config.read_detector(detector, Path())], [data], [0], SHARED, "cpu")
    return made


def predictions(count: int = 20, side: int = 32) -> accuracy.Predictions:
    """Of a detector that is right but for noise: defects score 1 more, in a square of the map."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 2 == 1
    masks = torch.zeros(count, side, side, dtype=torch.bool)
    masks[labels, 8:16, 8:16] = True
    maps = masks + 0.3 * torch.randn(masks.shape, generator=generator)
    scores = labels + 0.3 * torch.randn(count, generator=generator)
    paths = [Path(("good", "hole", "good", "crack")[i % 4]) / f"{i:02d}.png" for i in range(count)]
    return accuracy.Predictions(paths, scores, labels, maps, masks)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_model_is_timed_at_the_size_that_its_fit_gave_it(mvtec_layout: Path, tmp_path: Path, hub: Path) -> None:
    arguments = SMALL | {"image_size": 96, "keep_aspect": True, "num_scales": 1, "max_steps": 2}
    made = one_run(mvtec_layout, {"class_path": "CSFlow", "train_batch_size": 4, "init_args": arguments})
    folder = tmp_path / "out" / "runs" / made.slug
    folder.mkdir(parents=True)
    assert stage.fit(made, folder)["image_size"] == [96, 112]  # of images of 150 x 180 pixels
    stage.export(made, folder)
    with np.load(folder / "batches.npz") as batches:
        assert batches["b1"].shape == (1, 3, 96, 112)


@pytest.mark.filterwarnings("ignore")
def test_a_fit_ends_after_its_steps(mvtec_layout: Path, tmp_path: Path, hub: Path) -> None:
    steps = {key: value for key, value in REAL_NVP.items() if key != "epochs"} | {"steps": 7}
    made = one_run(mvtec_layout, steps)
    folder = tmp_path / "out" / "runs" / made.slug
    folder.mkdir(parents=True)
    row = stage.fit(made, folder)
    assert (row["steps"], row["epochs"]) == (7, 3)  # of 3 steps each; the last one was begun
    with np.load(folder / "scores.npz") as kept:
        assert list(kept["paths"]) == sorted(kept["paths"])
        assert kept["labels"].tolist() == ["blob" in path for path in kept["paths"]]
        assert roc_auc_score(kept["labels"], kept["scores"]) == pytest.approx(row["image_AUROC"])
    silent = {key: value for key, value in steps.items() if key != "steps"}
    with pytest.raises(ValueError, match="RealNVP does not say how long it trains: set epochs or steps"):
        stage.fit(one_run(mvtec_layout, silent), folder)


@pytest.mark.slow
def test_command_line_measures_goes_on_and_reports(mvtec_layout: Path, tmp_path: Path, hub: Path) -> None:
    path, out = tmp_path / "benchmark.yaml", tmp_path / "out"
    broken = REAL_NVP | {"name": "Broken", "init_args": REAL_NVP["init_args"] | {"layer": "blocks.99"}}
    entries = {"detectors": [REAL_NVP, broken], "shared": SHARED, "seeds": [3], "accelerator": "cpu"}
    path.write_text(yaml.safe_dump(entries))
    command = [sys.executable, "-W", "ignore", "-m", "anomalib_csflow.benchmark", f"--config={path}", f"--out={out}"]
    command.append(f"--data={mvtec_layout}")

    def run(*options: str) -> str:
        done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "2 of 2 runs to be measured" in run("--dry_run")
    assert not out.exists()
    printed = run()
    assert "2 of 2 runs" in printed
    assert "failed: ValueError" in printed
    assert "blocks.99" in printed
    done, failed = json.loads((out / "results.json").read_text())["rows"]
    assert (done["status"], failed["status"]) == ("done", "failed")
    assert "blocks.99" in failed["reason"]
    assert done["image_AUROC"] > 0.8
    assert done["pixel_AUROC"] is None
    assert done["notes"] == ["no heat maps: no pixel figures"]
    assert (done["epochs"], done["train_images"], done["origin"]) == (2, 12, "anomalib_csflow")
    for name in ("fit_s", "fit_peak_mb", "export_s", "compile_s", "file_mb", "inference_peak_mb", "parameters"):
        assert done[name] > 0, name
    for engine in ("torch", "openvino"):
        for size in (1, 8):
            assert 0 < done[f"{engine}_b{size}_p50_ms"] <= done[f"{engine}_b{size}_p95_ms"]
            assert done[f"{engine}_b{size}_per_s"] > 0
    assert done["inference_peak_mb"] < done["torch_peak_mb"]  # without torch
    assert (out / "report.html").is_file()
    assert "RealNVP" in (out / "results.md").read_text()
    table = pd.read_csv(out / "results.csv")
    assert list(table["status"]) == ["done", "failed"]
    # given again, it measures only what failed
    before = (out / "runs" / one_slug(out, "RealNVP") / "result.json").read_text()
    assert "1 of 2 runs to be measured" in run("--dry_run")
    assert "1 of 1 runs" in run()
    assert (out / "runs" / one_slug(out, "RealNVP") / "result.json").read_text() == before
    # a result of another version is not mixed in
    result = out / "runs" / one_slug(out, "RealNVP") / "result.json"
    result.write_text(json.dumps(json.loads(before) | {"format": 0}))
    other = subprocess.run([*command, "--dry_run"], capture_output=True, text=True, check=False)
    assert other.returncode == 1
    assert other.stderr.strip().splitlines()[-1].endswith("choose another --out, or move that folder away")


@pytest.mark.long
def test_eight_runs_killed_at_random_end_in_the_same_table(mvtec_layout: Path, tmp_path: Path, hub: Path) -> None:
    shutil.copytree(mvtec_layout / "textures", mvtec_layout / "copies")
    detectors = [REAL_NVP | {"name": "A"}, REAL_NVP | {"name": "B", "epochs": 3}]
    path = tmp_path / "benchmark.yaml"
    path.write_text(yaml.safe_dump({"detectors": detectors, "shared": SHARED, "seeds": [0, 1], "accelerator": "cpu"}))
    command = [sys.executable, "-W", "ignore", "-m", "anomalib_csflow.benchmark", f"--config={path}"]
    command += [f"--data={mvtec_layout}", "--jobs=2"]
    outs = [tmp_path / "whole", tmp_path / "killed"]
    subprocess.run([*command, f"--out={outs[0]}"], check=True, capture_output=True)
    broken, jobs = [*command, f"--out={outs[1]}"], outs[1] / "jobs"
    generator = np.random.default_rng(0)
    assert end_killed_at_random(broken, jobs, generator, 60, is_done=lambda: no_run_failed(outs[1])) > 0
    tables = [pd.read_csv(out / "results.csv") for out in outs]
    same = ["detector", "data", "seed", "status", "epochs", "steps", "train_images", "parameters"]
    assert len(tables[0]) == 8
    pd.testing.assert_frame_equal(tables[0][same], tables[1][same])
    figures = [name for name in tables[0].columns if name.startswith(("image_", "pixel_"))]
    pd.testing.assert_frame_equal(tables[0][figures], tables[1][figures], atol=1e-3)


def test_a_model_for_another_number_of_images_is_not_left_out_silently(tmp_path: Path) -> None:
    ov = pytest.importorskip("openvino")
    images = ov.opset13.parameter([2, 3, 8, 8], np.float32)
    ov.save_model(ov.Model([ov.opset13.relu(images)], [images]), tmp_path / "model.xml")
    np.savez(tmp_path / "batches.npz", b1=np.zeros((1, 3, 8, 8), np.float32))
    with pytest.raises(ValueError, match=r"its input is \[2,3,8,8\], which no batch of the benchmark has"):
        timing.time_openvino(str(tmp_path / "model.xml"), str(tmp_path / "batches.npz"), 1)


def no_run_failed(out: Path) -> bool:
    rows = json.loads((out / "results.json").read_text())["rows"]
    return all(row["status"] == "done" for row in rows)


def one_slug(out: Path, name: str) -> str:
    (folder,) = (out / "runs").glob(f"{name}-*")
    return folder.name


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # a run ignores those of anomalib's models too
def test_run_of_anomalibs_model(mvtec_layout: Path, tmp_path: Path, hub: Path) -> None:
    made = one_run(mvtec_layout, PATCHCORE)
    folder = tmp_path / "out" / "runs" / made.slug
    folder.mkdir(parents=True)
    row = stage.fit(made, folder)
    assert row["origin"] == "anomalib"
    assert (row["backbone"], row["weights"], row["image_size"], row["notes"]) == (
        "tf_efficientnet_lite0",
        "package",
        [96, 96],
        [],
    )
    assert row["image_AUROC"] > 0.9
    assert row["pixel_AUROC"] > 0.8
    assert 0 < row["AUPRO"] <= 1
    with np.load(folder / "curves.npz") as curves:
        for name in ("roc", "pro"):
            assert curves[name].shape[0] == 2
            assert (np.diff(curves[name][0]) >= 0).all()
    names = json.loads((tmp_path / "out" / "samples" / "textures" / "samples.json").read_text())
    with np.load(folder / "maps.npz") as maps:
        assert sorted(maps.files) == sorted([*(entry["id"] for entry in names), "lo", "hi"])
        assert maps["lo"] < maps["hi"]
        for entry in names:  # the defect is the brightest part
            mask_path = tmp_path / "out" / "samples" / "textures" / f"{entry['id']}_mask.png"
            mask = np.asarray(Image.open(mask_path).resize(maps[entry["id"]].shape[::-1])) > 0
            if mask.any():
                assert maps[entry["id"]][mask].mean() > maps[entry["id"]][~mask].mean()
    exported = stage.export(made, folder)
    assert exported["notes"] == ["exported for single images"]  # with so small a memory
    command = [sys.executable, timing.__file__, exported["xml"], str(folder / "batches.npz"), "1"]
    timed = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert timed["openvino_b1_p50_ms"] > 0
    assert "openvino_b8_p50_ms" not in timed


@pytest.mark.filterwarnings("ignore")
def test_a_data_set_without_masks(mvtec_layout: Path, tmp_path: Path, hub: Path) -> None:
    (mvtec_layout / "textures" / "ground_truth" / "blob").unlink()
    made = one_run(mvtec_layout, PATCHCORE)
    folder = tmp_path / "out" / "runs" / made.slug
    folder.mkdir(parents=True)
    row = stage.fit(made, folder)
    assert row["image_AUROC"] > 0.9
    assert np.isnan(row["pixel_AUROC"])
    assert row["notes"] == ["no masks: no pixel figures"]
    with np.load(folder / "curves.npz") as curves:
        assert curves.files == ["roc"]
    assert not list((tmp_path / "out" / "samples").rglob("*_mask.png"))


def test_all_get_the_same_preparation_and_differences_are_said(mvtec_layout: Path, hub: Path) -> None:
    ours = REAL_NVP | {"init_args": REAL_NVP["init_args"] | {"image_size": [64, 96], "antialias": True}}
    made = one_run(mvtec_layout, ours)
    found = build.settings(made, build.model(made))
    assert found["notes"] == ["images of 64 x 96 pixels", "resized with antialiasing"]
    same = one_run(mvtec_layout, REAL_NVP)
    patchcore = one_run(mvtec_layout, PATCHCORE)
    image = torch.rand(1, 3, 200, 150)
    assert build.settings(same, build.model(same))["notes"] == []
    torch.testing.assert_close(build.model(same).pre_processor(image), build.model(patchcore).pre_processor(image))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("Patchcor", "unknown detector 'Patchcor'; is it Patchcore"),
        ("no.such.Thing", "unknown detector 'no.such.Thing'"),
        ({"name": "x"}, "needs a class_path"),
        ({"class_path": "Patchcore", "epoch": 1}, "has no key 'epoch'"),
        ({"class_path": "Patchcore", "init_args": {"layer": "x"}}, "Patchcore has no argument 'layer'"),
        ({"config": "no/such.yaml"}, "no recipe"),
        ({"config": "csflow_small"}, "there is no recipe 'csflow_small'; near names are cs_flow_small"),
    ],
)
def test_bad_detectors_are_said_before_the_work(entry: object, message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        config.read_detector(entry, Path())


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"class_path": "MVTec"}, "unknown datamodule 'MVTec'; is it MVTec"),
        ({"class_path": "anomalib.data.Folder", "root": "x"}, "has no key 'root'"),
    ],
)
def test_bad_data_is_said_before_the_work(entry: object, message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        config.read_data(entry)


def test_a_recipe_may_say_steps(tmp_path: Path) -> None:
    recipe = {"model": {"class_path": "RealNVP"}, "trainer": {"max_steps": 30, "max_epochs": -1}}
    (tmp_path / "steps.yaml").write_text(yaml.safe_dump(recipe))

    def read(**changes: int) -> plan.Detector:
        return config.read_detector({"config": "steps.yaml"} | changes, tmp_path)

    assert (read().epochs, read().steps) == (None, 30)
    assert read().length == {"max_steps": 30, "max_epochs": -1}
    assert read(steps=5).length == {"max_steps": 5, "max_epochs": -1}
    assert read(epochs=2).length == {"max_epochs": 2}  # in the place of the recipe's steps
    assert read(epochs=2, steps=5).length == {"max_steps": 5, "max_epochs": 2}
    assert plan.Detector("RealNVP").length == {}
    seen = [read(**changes).images_seen(100) for changes in ({}, {"epochs": 2}, {"epochs": 2, "steps": 5})]
    assert seen == [30 * 16, 200, 5 * 16]
    own = plan.Detector("CSFlow", {"max_steps": 10}, epochs=1)  # repeats few images
    assert own.images_seen(3) == own.images_seen(1000) == 10 * 16


def test_data_that_cannot_be_had_fails_alone(mvtec_layout: Path, tmp_path: Path, hub: Path) -> None:
    (tmp_path / "empty" / "train" / "good").mkdir(parents=True)
    missing = {"class_path": "MVTecAD", "init_args": {"root": str(tmp_path), "category": "bottle"}}
    entries = (missing, str(tmp_path / "empty"), str(tmp_path / "nowhere"), str(mvtec_layout))
    sets = [data for entry in entries for data in config.read_data(entry)]
    assert [data.name for data in sets] == ["bottle", "empty", "nowhere", "textures"]
    runs = plan.runs([config.read_detector(REAL_NVP, Path())], sets, [0], SHARED, "cpu")
    images, broken = command_line.count_images(runs)
    assert images == {"textures": 12}
    assert "Error" in broken["bottle"]
    assert "needs a folder good" in broken["empty"]
    assert "no data set in MVTec AD's layout" in broken["nowhere"]
    out = tmp_path / "out"
    seconds = command_line.estimate(runs, images, [])
    assert seconds[runs[3].slug] > 60 > seconds[runs[0].slug]
    execute.measure_all(runs[:3], out, seconds, broken, Console(quiet=True))
    rows = command_line.read(runs, out)
    assert [(row.data, row.status, row.reason) for row in rows] == [
        (name, "failed", broken[name]) for name in ("bottle", "empty", "nowhere")
    ]
    results.save(rows, out)
    assert "needs a folder good" in (out / "results.md").read_text()
    with pytest.raises(
        ValueError, match=r"data set empty: .*; data set nowhere: .*; data set bottle: "
    ):  # then there is nothing to do
        command_line.count_images(runs[:3])


@pytest.mark.parametrize("fault", ["missing", "too many"])
def test_masks_that_do_not_match_are_a_row(fault: str, mvtec_layout: Path, tmp_path: Path) -> None:
    root = tmp_path / "bad masks"
    shutil.copytree(mvtec_layout / "textures", root)
    masks = sorted((root / "ground_truth").rglob("*.png"))
    if fault == "missing":
        masks[0].unlink()
    else:
        shutil.copy(masks[0], masks[0].with_name("zzz.png"))
    sets = [*config.read_data(str(root)), *config.read_data(str(mvtec_layout))]
    runs = plan.runs([config.read_detector(REAL_NVP, Path())], sets, [0], {}, "cpu")
    images, broken = command_line.count_images(runs)
    assert (set(images), set(broken)) == ({sets[1].name}, {"bad masks"})
    assert "Error: " in broken["bad masks"]
    execute.measure_all(runs[:1], tmp_path / "out", {runs[0].slug: 1.0}, broken, Console(quiet=True))
    (row,) = command_line.read(runs[:1], tmp_path / "out")
    assert (row.status, row.reason) == ("failed", broken["bad masks"])


@pytest.mark.parametrize("name", ["../../x", "..", "a" * 250, "a\\b", "漢" * 80])
def test_names_that_name_no_folder_are_refused(name: str, mvtec_layout: Path) -> None:
    detector, (data,) = config.read_detector(REAL_NVP, Path()), config.read_data(str(mvtec_layout))
    with pytest.raises(ValueError, match=r"in data sets cannot be a folder name: use up to 80 letters and no slash"):
        plan.runs([detector], [replace(data, name=name)], [0], {}, "cpu")
    with pytest.raises(ValueError, match="in detectors cannot be a folder name"):
        plan.runs([replace(detector, name=name)], [data], [0], {}, "cpu")
    longest = replace(data, name="漢" * 26)
    (run,) = plan.runs([replace(detector, name="b" * 80)], [longest], [0], {}, "cpu")
    assert len(run.slug.encode()) < 255


def test_two_benchmarks_in_one_folder_are_refused(
    mvtec_layout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(execute, "measure_all", lambda *_: pytest.fail("the folder is another's"))
    with FileLock(tmp_path / "lock"), pytest.raises(ValueError, match="another benchmark is running in"):
        command_line.benchmark([REAL_NVP], str(mvtec_layout), shared=SHARED, out=tmp_path)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="parents are known on POSIX only")
def test_a_stage_ends_with_the_benchmark_that_started_it(tmp_path: Path) -> None:
    child = f"""
import sys, time
sys.path.insert(0, {str(Path(timing.__file__).parent)!r})
import timing
timing.end_with_parent()
print("ready", flush=True)
time.sleep(60)
"""
    code = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', sys.argv[1]]); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code, child], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "ready\n"
        parent.kill()
        start = time.monotonic()
        assert parent.stdout.read() == ""  # to the end of the child, which holds the pipe open
    assert time.monotonic() - start < 20


def test_one_name_is_one_thing(mvtec_layout: Path) -> None:
    detector, (data,) = config.read_detector(REAL_NVP, Path()), config.read_data(str(mvtec_layout))
    with pytest.raises(ValueError, match="two detectors are called 'RealNVP'"):
        plan.runs([detector, detector], [data], [0], {}, "cpu")
    with pytest.raises(ValueError, match="two data sets are called 'textures'"):
        plan.runs([detector], [data, data], [0], {}, "cpu")
    with pytest.raises(ValueError, match="shared has no 'layers'"):
        plan.runs([detector], [data], [0], {"layers": []}, "cpu")
    one, other = plan.runs([detector], [data], [0, 1], {}, "cpu")
    assert one.slug != other.slug
    assert (one.in_full, other.in_full) == (True, False)


def test_recipes_of_the_default_configuration() -> None:
    root = Path(__file__).parents[1]
    entries = yaml.safe_load((root / "configs" / "benchmark.yaml").read_text())
    elsewhere = Path("/nowhere")  # recipes are named, so that they are found without a checkout too
    found = [config.read_detector(entry, elsewhere) for entry in entries["detectors"]]
    packages = {d.class_path.partition(".")[0] for d in found}
    assert packages == {"anomalib_csflow"}
    assert len({d.name for d in found}) == len(found)
    cs_flow = next(d for d in found if d.class_path == "anomalib_csflow.CSFlow")
    assert (cs_flow.epochs, cs_flow.init_args["max_steps"]) == (1, "auto")
    shared = {key: cs_flow.init_args[key] for key in plan.SHARED}
    assert shared == entries["shared"] | {"image_size": 320}  # its own, which the rivals do not get


def test_each_row_of_the_ablation_is_one_change_to_the_recipe() -> None:
    entries = yaml.safe_load((Path(__file__).parents[1] / "configs" / "ablation.yaml").read_text())
    recipe, *rows = (config.read_detector(entry, Path("/nowhere")) for entry in entries["detectors"])
    assert len(rows) > 3
    assert len({row.name for row in rows}) == len(rows)
    for row in rows:
        changed = [key for key, value in row.init_args.items() if recipe.init_args.get(key, "default") != value]
        assert len(changed) == 1, row.name
        detector = CSFlow(**row.init_args)
        assert detector.hparams[changed[0]] == row.init_args[changed[0]]


def test_metrics_against_a_case_that_is_known() -> None:
    found = accuracy.evaluate(predictions())
    few = {"AUPIMO", "recall_1", "false_alarms_1", "recall_5", "false_alarms_5"}  # too few good images for these
    assert all(0.5 < found[name] <= 1 for name in found if name not in few), found
    perfect = accuracy.Predictions(
        predictions().paths, predictions().labels.float(), predictions().labels, None, predictions().masks
    )
    found = accuracy.evaluate(perfect)
    assert (found["image_AUROC"], found["image_AP"], found["image_F1"]) == (1, 1, 1)
    assert np.isnan(found["pixel_AUROC"])


def test_f1_thresholds_come_from_the_other_half() -> None:
    # one half's scores are shifted by 10: its best threshold calls all of the other half good, and the reverse
    labels = torch.tensor([0, 1] * 10).bool()
    paths = [Path(f"{i:02d}.png") for i in range(20)]
    order = torch.tensor(sorted(range(20), key=lambda i: (bool(labels[i]), str(paths[i]))))
    scores = labels.float()
    scores[order[1::2]] += 10
    found = accuracy.evaluate(accuracy.Predictions(paths, scores, labels, None, None))
    assert found["image_F1"] == pytest.approx(2 / 4)  # all 5 defects of a half by 5 false alarms, none of the other's


def test_f1_has_no_value_where_a_half_has_no_defect() -> None:
    labels = torch.tensor([0] * 10 + [1]).bool()
    found = accuracy.evaluate(
        accuracy.Predictions([Path(f"{i:02d}.png") for i in range(11)], labels.float(), labels, None, None)
    )
    assert found["image_AUROC"] == 1
    assert np.isnan(found["image_F1"])  # and not 0.18, of a threshold that no defect chose


def judged(good: int, shift: float) -> dict[str, float]:
    """The calibrated verdicts on normal scores of good images, and of 100 defective ones that are ``shift`` higher."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([0] * good + [1] * 100).bool()
    scores = torch.randn(good + 100, generator=generator) + shift * labels
    paths = [Path(f"{i:04d}.png") for i in range(len(labels))]
    return accuracy.verdicts(accuracy.Predictions(paths, scores, labels, None, None))


def test_calibrated_verdicts() -> None:
    found = judged(2000, 2.0)
    for percent, quantile in ((1, 2.326), (5, 1.645)):
        rate = percent / 100
        assert found[f"false_alarms_{percent}"] == pytest.approx(rate, abs=3 * (2 * rate / 2000) ** 0.5)
        expected = float(torch.distributions.Normal(0.0, 1.0).cdf(torch.tensor(2 - quantile)))
        assert found[f"recall_{percent}"] == pytest.approx(expected, abs=0.15)
    assert judged(2000, 9.0)["recall_1"] == 1


@pytest.mark.parametrize(("good", "promised"), [(0, []), (23, []), (24, [5]), (123, [5]), (124, [1, 5])])
def test_verdicts_promise_no_more_than_the_good_images_allow(good: int, promised: list[int]) -> None:
    found = judged(good, 2.0)
    assert [percent for percent in (1, 5) if not np.isnan(found[f"recall_{percent}"])] == promised


def test_scores_keep_their_order() -> None:
    scores = torch.tensor([-3.0, -0.5, 0.4, 40.0, 41.0, 1e5, 1e5 + 1])
    squashed = accuracy.comparable(scores)
    assert (squashed.diff() > 0).all()
    assert (squashed.min(), squashed.max()) == (0, 1)
    assert accuracy.comparable(torch.ones(3)).tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="not finite"):
        accuracy.comparable(torch.tensor([1.0, float("nan")]))


def test_samples_show_each_kind_and_a_good_image() -> None:
    found = predictions()
    kinds = [found.paths[i].parent.name for i in samples.choose(found)]
    assert len(kinds) == samples.MAX_SAMPLES
    assert kinds[-1] == "good"
    assert set(kinds) == {"crack", "hole", "good"}


def test_heat_is_how_rare_a_pixel_is() -> None:
    maps = torch.rand(10, 100, 100, generator=torch.Generator().manual_seed(0)) ** 8  # most are near 0
    heat = samples.rarity(maps[0], maps)
    assert heat.min() < 1e-3
    assert heat.max() == 1
    assert (heat > 1 / 3).float().mean() == pytest.approx(0.1, abs=0.01)
    assert (heat > 2 / 3).float().mean() == pytest.approx(0.01, abs=0.003)
    torch.testing.assert_close(heat, samples.rarity(maps[0].log(), maps.log()))  # whatever the scale of the scores


def test_a_result_of_other_versions_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    assert results.read(path) is None
    row = Row(
        "x", "RealNVP", "RealNVP", "tiles", 0, "done", versions=results.versions(), figures={"fit_s": float("nan")}
    )
    write_json(path, row.flat())
    assert results.read(path) == replace(row, figures={"fit_s": None})
    write_json(path, row.flat() | {"versions": row.versions | {"torch": "1.0"}})
    with pytest.raises(ValueError, match=r"measured with torch 1\.0, but here is torch"):
        results.read(path)
    path.write_text("{}")
    with pytest.raises(ValueError, match="of format None, but this version writes 2"):
        results.read(path)


def test_a_missing_extra_is_said_before_the_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(command_line, "find_spec", lambda name: None if name == "tabulate" else name)
    with pytest.raises(ModuleNotFoundError, match=r"needs tabulate: pip install 'anomalib-csflow\[benchmark\]'"):
        command_line.benchmark([], "x", out=tmp_path)


def test_an_interrupted_stage_has_not_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, -2))
    with pytest.raises(KeyboardInterrupt):
        job._stage("fit", tmp_path)


def test_reasons_are_one_sentence(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    log.write_text("Testing\nTraceback:\n  File x\nlightning.fabric.utilities.SomeError: it is wrong\n\n")
    assert job._reason(1, log) == "SomeError: it is wrong"
    assert job._reason(-9, log) == "killed by SIGKILL (is there enough memory?)"
    log.write_text("no words of Python's\n")
    assert job._reason(2, log) == "no words of Python's"


@pytest.mark.slow
def test_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(demo, "TEXTURES", ("brick",))
    monkeypatch.setattr(demo, "NUM_TRAIN", 16)
    demo.run(tmp_path, steps=16)
    printed = capsys.readouterr().out
    assert "image AUROC" in printed
    assert "ms per image" in printed
    with Image.open(tmp_path / "brick.png") as picture:
        assert picture.size[0] > 1000
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
