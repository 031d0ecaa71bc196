"""A bundle: made from a checkpoint, refused when it was changed, the detector's own verdicts without torch."""

import base64
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

import jsonschema
import numpy as np
import openvino
import pytest
import torch
from anomalib.data import Folder
from anomalib.data.utils import read_image
from anomalib.engine import Engine
from conftest import SMALL, folder_arguments
from PIL import Image
from scipy import ndimage

from anomalib_csflow import CSFlow, RealNVP, bundling, cli, from_recipe
from anomalib_csflow.bundling.manifest import licence
from anomalib_csflow.engine.images import UnreadableImageError
from anomalib_csflow.engine.post_processing import ConformalPostProcessor
from anomalib_csflow.runtime import Bundle, BundleError, Detector
from anomalib_csflow.runtime import validate as validation
from anomalib_csflow.runtime.__main__ import main
from anomalib_csflow.runtime.boxes import boxes
from anomalib_csflow.runtime.bundle import digest, sha256
from anomalib_csflow.runtime.detector import ImageError, read
from anomalib_csflow.runtime.engines import planes
from anomalib_csflow.runtime.validate import Case, Measured, validate
from anomalib_csflow.runtime.watch import Watch

pytestmark = pytest.mark.slow  # a bundle is exported first

ROOT = Path(__file__).parents[1]
JSON = "application/json"


@pytest.fixture(scope="module")
def checkpoint(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a CS-Flow whose thresholds come from four good images."""
    engine = Engine(max_epochs=4, accelerator="cpu", default_root_dir=tmp_path_factory.mktemp("fit"))
    torch.manual_seed(0)
    engine.fit(
        CSFlow(**SMALL, image_size=(64, 96), antialias=False), datamodule=Folder(**folder_arguments(image_folder))
    )
    return Path(engine.best_model_path)


@pytest.fixture(scope="module")
def made(checkpoint: Path, image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle for both runtimes."""
    out = tmp_path_factory.mktemp("bundles") / "part"
    return bundling.bundle(checkpoint, out, image_folder / "test/good", ["openvino", "onnx"])


@pytest.fixture
def images(image_folder: Path) -> list[Path]:
    return sorted((image_folder / "test").rglob("*.png"))


# -- verdicts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("runtime", ["openvino", "onnx"])
def test_verdicts_are_the_detectors(runtime: str, made: Path, checkpoint: Path, images: list[Path]) -> None:
    reference = bundling.load_detector(checkpoint)
    detector = Detector(made, runtime)
    labels = set()
    for path, streamed in zip(images, detector.stream(images), strict=True):
        with torch.no_grad():
            expected = reference(read_image(path, as_tensor=True)[None])
        for result in (detector(path), streamed):
            assert result.score == pytest.approx(expected.pred_score.item(), abs=1e-4)
            assert result.label == bool(expected.pred_label)
            np.testing.assert_allclose(result.anomaly_map, expected.anomaly_map[0, 0].numpy(), atol=1e-4)
            assert np.array_equal(result.mask, expected.pred_mask[0, 0].numpy())
            p_value = reference.post_processor.score_scale.p_values(expected.pred_score).item()
            # the image is among those that were calibrated on: rounding puts it before or after itself
            assert result.p_value == pytest.approx(p_value, abs=1 / (reference.post_processor.num_good + 1) + 1e-6)
            assert bool(result.boxes) == bool(result.mask.any())
        labels.add(result.label)
    assert labels == {True, False}


def test_an_image_is_a_file_an_array_or_a_pil_image(made: Path, images: list[Path]) -> None:
    detector = Detector(made)
    opened = Image.open(images[0])
    scores = {detector(image).score for image in (images[0], str(images[0]), opened, np.asarray(opened.convert("RGB")))}
    assert len(scores) == 1
    grey = np.asarray(opened.convert("L"))
    assert {detector(grey).score} == scores  # the images are grey


def test_images_of_several_sizes_in_a_stream(made: Path) -> None:
    generator = np.random.default_rng(0)
    shapes = [(80, 90), (80, 90), (120, 70), (80, 90), (64, 96)]
    images = [generator.integers(0, 255, (*shape, 3), dtype=np.uint8) for shape in shapes]
    detector = Detector(made)
    streamed = list(detector.stream(images))
    assert [result.size for result in streamed] == shapes
    assert [r.score for r in streamed] == pytest.approx([detector(image).score for image in images], abs=1e-5)


def test_boxes_are_those_of_connected_regions() -> None:
    generator = np.random.default_rng(0)
    for share in (0.05, 0.2, 0.5, 0.8) * 100:
        mask = generator.random(generator.integers(1, 16, 2)) < share
        found = ndimage.find_objects(ndimage.label(mask, np.ones((3, 3)))[0])
        assert sorted(boxes(mask)) == sorted((x.start, y.start, x.stop, y.stop) for y, x in found)


def test_a_threshold_can_be_moved(made: Path, checkpoint: Path, images: list[Path]) -> None:
    strict, loose = Detector(made), Detector(made, false_alarm_rate=0.8)
    assert "At most 80 %" in str(loose.promise)
    rejected = [[detector(image).label for image in images].count(True) for detector in (strict, loose)]
    assert rejected[0] < rejected[1]
    processor = bundling.load_detector(checkpoint).post_processor
    scores, maxima = processor.score_scale.good, processor.map_scale.good
    processor.calibrate(scores, maxima)
    unmoved = Detector(made, false_alarm_rate=processor.false_alarm_rate)  # the same rate: the same labels
    assert [unmoved(image).label for image in images] == [strict(image).label for image in images]


def test_a_detector_without_maps(image_folder: Path, tmp_path: Path) -> None:
    detector = RealNVP(**SMALL, image_size=64, antialias=False)
    engine = Engine(max_epochs=1, accelerator="cpu", default_root_dir=tmp_path)
    engine.fit(detector, datamodule=Folder(**folder_arguments(image_folder)))
    made = bundling.bundle(engine.best_model_path, tmp_path / "part.zip")
    result = Detector(made)(image_folder / "test/good/000.png")
    assert (result.anomaly_map, result.mask, result.boxes) == (None, None, [])
    assert 0 < result.score < 1
    assert all(one.keeps(1e-3) for one in validate(Bundle(made)))
    assert Bundle(made).manifest["reference"]["kind"] == "test patterns"


# -- what is refused --------------------------------------------------------------------------------


def change(name: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[len(data) // 2] ^= 1
        (folder / name).write_bytes(data)

    return apply


def edit(**changes: object) -> Callable[[Path], None]:
    """As another program would write it, with its own digest."""

    def apply(folder: Path) -> None:
        manifest = json.loads((folder / "bundle.json").read_text()) | changes
        (folder / "bundle.json").write_text(json.dumps(manifest | {"sha256": digest(manifest)}))

    return apply


def lower_threshold(folder: Path) -> None:
    """As a hand may edit it."""
    manifest = json.loads((folder / "bundle.json").read_text())
    manifest["calibration"]["score"]["threshold"] -= 1
    (folder / "bundle.json").write_text(json.dumps(manifest, indent=1))


BAD_BUNDLES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a changed model": (change("model.bin"), r"model\.bin is not the file that the bundle was made with"),
    "a changed image": (change("reference/0.png"), r"reference/0\.png is not the file"),
    "a missing file": (lambda folder: (folder / "model.xml").unlink(), r"the bundle lacks model\.xml"),
    "no manifest": (lambda folder: (folder / "bundle.json").unlink(), r"has no bundle\.json"),
    "half a manifest": (lambda folder: os.truncate(folder / "bundle.json", 700), "cannot be read"),
    "a changed threshold": (lower_threshold, r"bundle\.json of .* was changed or damaged: copy the bundle again"),
    "another version": (edit(version=2), "version 2, and this package reads version 1"),
    "another format": (edit(format="x"), "is not a bundle of anomalib-csflow"),
    "no models": (edit(models={}), "no runtime for this bundle"),
    "a file outside": (edit(files={"../x": {"sha256": "0"}}), "outside the bundle"),
    "a model that is not listed": (edit(files={}), "does not list"),
}


def encrypt(archive: bytearray) -> None:
    """Set the flag of encryption of all files, in both of their headers."""
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        position = archive.find(signature)
        while position >= 0:
            archive[position + offset] |= 1
            position = archive.find(signature, position + 4)


def overwrite(archive: bytearray) -> None:
    archive[2000:2400] = bytes(400)


@pytest.mark.parametrize("damage", [encrypt, overwrite, lambda archive: archive.__delitem__(slice(-5000, None))])
def test_a_damaged_zip_is_refused_in_a_sentence(
    damage: Callable[[bytearray], None], made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(shutil.make_archive(str(tmp_path / "part"), "zip", made))
    data = bytearray(path.read_bytes())
    damage(data)
    path.write_bytes(data)
    with pytest.raises(SystemExit) as stopped:
        main(["validate", str(path)])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "copy it again" in line


@pytest.mark.parametrize("name", BAD_BUNDLES)
def test_a_damaged_bundle_is_refused_in_a_sentence(
    name: str, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, message = BAD_BUNDLES[name]
    folder = tmp_path / "part"
    shutil.copytree(made, folder)
    damage(folder)
    with pytest.raises(BundleError, match=message) as info:
        Detector(folder)
    assert "\n" not in str(info.value)
    with pytest.raises(SystemExit) as stopped:
        main(["validate", str(folder)])
    assert stopped.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_truncated_or_hostile_zip_is_refused(made: Path, tmp_path: Path) -> None:
    whole = Path(shutil.make_archive(str(tmp_path / "part"), "zip", made))
    assert Detector(whole).promise == Detector(made).promise
    cut = tmp_path / "cut.zip"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    with pytest.raises(BundleError, match="not a readable zip"):
        Bundle(cut)
    with zipfile.ZipFile(tmp_path / "out.zip", "w") as archive:
        archive.writestr("../outside", "x")
    with pytest.raises(BundleError, match="outside the bundle"):
        Bundle(tmp_path / "out.zip")
    assert not (tmp_path.parent / "outside").exists()


def test_other_bad_input(made: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no bundle at"):
        Detector(tmp_path / "nothing")
    with pytest.raises(BundleError, match="unknown runtime 'tensorrt': choose one of openvino, onnx"):
        Detector(made, "tensorrt")  # type: ignore[arg-type]
    detector = Detector(made)
    Image.fromarray(np.zeros((9, 9), np.uint16)).save(tmp_path / "deep.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    for name, message in {"deep.png": "more than 8 bits", "broken.png": "cannot be read", "no.png": "no image"}.items():
        with pytest.raises(ImageError, match=message):
            detector(tmp_path / name)
    with pytest.raises(ImageError, match=r"\(H, W, 3\) of uint8"):
        detector(np.zeros((9, 9, 3), np.float32))  # type: ignore[arg-type]
    with pytest.raises(ImageError, match=r"not empty, got \(0, 4, 3\)"):
        read(np.zeros((0, 4, 3), np.uint8))
    with pytest.raises(ImageError, match="an image is a file, a PIL image or an array, got NoneType"):
        read(None)  # type: ignore[arg-type]


def test_a_bundle_is_not_written_over(checkpoint: Path, made: Path, tmp_path: Path) -> None:
    with pytest.raises(FileExistsError, match="exists already"):
        bundling.bundle(checkpoint, made)
    with pytest.raises(SystemExit, match="is not a readable checkpoint"):
        cli.main(["bundle", "--ckpt_path", __file__, "--out", str(tmp_path / "x")])
    with pytest.raises(SystemExit, match="there is no checkpoint"):
        cli.main(["bundle", "--ckpt_path", "nothing.ckpt", "--out", str(tmp_path / "x")])
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere: give one with good images"):
        bundling.bundle(tmp_path / "none.ckpt", tmp_path / "new", reference=tmp_path / "nowhere")
    with pytest.raises(ValueError, match="unknown format 'tensorrt'"):
        bundling.bundle(checkpoint, tmp_path / "x", formats=["tensorrt"])  # type: ignore[list-item]
    assert list(tmp_path.iterdir()) == []


def test_bundling_says_that_antialiased_thresholds_do_not_fit(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = torch.load(checkpoint, weights_only=False)
    written["hyper_parameters"]["antialias"] = written["anomalib_csflow"]["arguments"]["antialias"] = True
    torch.save(written, tmp_path / "antialiased.ckpt")
    for path in (checkpoint, tmp_path / "antialiased.ckpt"):
        cli.main(["bundle", "--ckpt_path", str(path), "--out", str(tmp_path / path.stem)])
        assert ("the thresholds do not fit" in capsys.readouterr().out) == (path != checkpoint)


def test_a_reference_image_that_cannot_be_read(checkpoint: Path, image_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(image_folder / "test/good", tmp_path / "good")
    os.truncate(next((tmp_path / "good").iterdir()), 100)
    with pytest.raises(UnreadableImageError, match="good"):
        bundling.bundle(checkpoint, tmp_path / "new", tmp_path / "good")
    assert not (tmp_path / "new").exists()


def test_scores_that_are_not_normalized(image_folder: Path, tmp_path: Path) -> None:
    processor = ConformalPostProcessor(enable_normalization=False, num_folds=0)
    detector = RealNVP(**SMALL, image_size=64, antialias=False, post_processor=processor)
    engine = Engine(max_epochs=1, accelerator="cpu", default_root_dir=tmp_path)
    engine.fit(detector, datamodule=Folder(**folder_arguments(image_folder)))
    with pytest.raises(ValueError, match="a bundle needs calibrated scores: fit again without enable_normalization"):
        bundling.bundle(engine.best_model_path, tmp_path / "new")


def test_the_licence_is_that_of_these_weights() -> None:
    of_one_architecture = ("vit_base_patch16_224.mae", "vit_base_patch16_224.augreg_in21k")
    assert [licence(name, "hub") for name in of_one_architecture] == ["cc-by-nc-4.0", "apache-2.0"]
    assert licence("tf_efficientnet_lite2", "/a/file.pth") == "unknown"


# -- validate ---------------------------------------------------------------------------------------


def test_validate_compares_all_runtimes(made: Path, image_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["validate", str(made), "--images", str(image_folder / "test"), "--threads", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[0] == "runtime"
    kept = [line for line in lines if line.endswith("kept")]
    assert [line.split()[0] for line in kept] == ["openvino", "onnx"]
    assert all(line.split()[2] == str(4 + 8) for line in kept)  # the reference images and the folder's


def _killed(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_validate_says_that_a_runtime_was_killed(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validation, "_run", _killed)
    measured = validate(Bundle(made))
    assert {one.error for one in measured} == {"its process ended without a result: was it killed, for want of memory?"}
    assert not any(one.keeps(1) for one in measured if one.case.precision == "f32")


def test_validate_fails_where_the_promise_is_broken(made: Path, tmp_path: Path) -> None:
    folder = tmp_path / "part"
    shutil.copytree(made, folder)
    manifest = json.loads((folder / "bundle.json").read_text())
    path = folder / manifest["reference"]["outputs"]
    with np.load(path) as outputs:
        changed = {name: outputs[name] for name in outputs.files}
    changed["pred_score"] = changed["pred_score"] + 0.01
    np.savez(path, **changed)
    manifest["files"][manifest["reference"]["outputs"]]["sha256"] = sha256(path)
    edit(**manifest)(folder)
    with pytest.raises(SystemExit) as stopped:
        main(["validate", str(folder), "--threads", "1"])
    assert stopped.value.code == 1


def test_what_counts_as_kept() -> None:
    case = Case("openvino")
    assert Measured(case, score=1e-4, map=1e-4).keeps(1e-3)
    assert Measured(case, score=1e-4).keeps(1e-3)  # without maps
    assert not Measured(case, score=1e-4, map=1e-4, flips=1).keeps(1e-3)
    assert not Measured(case, score=float("nan"), map=1e-4).keeps(1e-3)
    assert not Measured(case, error="no").keeps(1e-3)
    assert Measured(Case("openvino", "bf16"), score=0.1, flips=3).keeps(1e-3)  # which promises nothing


# -- watch ------------------------------------------------------------------------------------------


def record(out: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def test_watch_judges_each_image_once(made: Path, image_folder: Path, tmp_path: Path) -> None:
    folder, out = tmp_path / "incoming", tmp_path / "results"
    shutil.copytree(image_folder / "test", folder)
    (folder / "broken.png").write_bytes(b"no image")
    (folder / "note.txt").write_text("no image either")
    said: list[str] = []
    assert Watch(Detector(made), folder, out, said.append).run(once=True) == 9
    assert Watch(Detector(made), folder, out, said.append).run(once=True) == 0
    assert any("going on after 9 images" in line for line in said)
    lines = record(out)
    assert len({line["image"] for line in lines}) == len(lines) == 9
    assert ["error" in line for line in lines].count(True) == 1
    rejected = [line["image"] for line in lines if line.get("label")]
    assert rejected
    assert {path.name for path in (out / "rejected").iterdir()} == {f"{r.replace('/', '__')}.png" for r in rejected}
    assert len((out / "results.csv").read_text().splitlines()) == 10


def test_watch_does_not_judge_its_own_pictures(made: Path, image_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "incoming"
    shutil.copytree(image_folder / "test", folder)
    assert Watch(Detector(made), folder, folder / "results", lambda _: None).run(once=True) == 8
    assert list((folder / "results" / "rejected").iterdir())
    assert Watch(Detector(made), folder, folder / "results", lambda _: None).run(once=True) == 0


def test_a_line_that_was_cut_off_is_judged_again(made: Path, image_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "results"
    Watch(Detector(made), image_folder / "test", out, lambda _: None).run(once=True)
    whole = record(out)
    os.truncate(out / "results.jsonl", (out / "results.jsonl").stat().st_size - 9)
    assert Watch(Detector(made), image_folder / "test", out, lambda _: None).run(once=True) == 1
    assert sorted(str(line["image"]) for line in record(out)) == sorted(str(line["image"]) for line in whole)


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "stopped"])
def test_nothing_is_lost_and_nothing_twice_after_a_stop(
    number: signal.Signals, made: Path, image_folder: Path, tmp_path: Path
) -> None:
    folder, out = tmp_path / "incoming", tmp_path / "results"
    folder.mkdir()
    source = sorted((image_folder / "test").rglob("*.png"))
    for index in range(40):
        shutil.copy(source[index % len(source)], folder / f"{index:03d}.png")
    command = [sys.executable, "-m", "anomalib_csflow.runtime", "watch", str(made), "--folder", str(folder)]
    command += ["--out", str(out), "--threads", "1", "--settle", "0"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=ROOT) as process:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if (out / "results.jsonl").exists() and len((out / "results.jsonl").read_bytes().splitlines()) > 3:
                break
            time.sleep(0.01)
        process.send_signal(number)
        status = process.wait(timeout=60)
    assert status == (-number if number is signal.SIGKILL else 0)
    subprocess.run([*command, "--once"], check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
    assert sorted(str(line["image"]) for line in record(out)) == sorted(path.name for path in folder.iterdir())


def promising(kind: str, made: Path, folder: Path) -> Path:
    """A bundle whose good scores come from refits ("estimated"), or from held-out images ("marginal")."""
    shutil.copytree(made, folder)
    calibration = json.loads((folder / "bundle.json").read_text())["calibration"]
    edit(calibration=calibration | {"promise": calibration["promise"] | {"kind": kind}})(folder)
    return folder


def test_watch_says_when_the_line_drifts(made: Path, tmp_path: Path) -> None:
    made = promising("marginal", made, tmp_path / "held out")
    folder = tmp_path / "incoming"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for index in range(60):  # nothing like the good images
        Image.fromarray(generator.integers(0, 255, (64, 96), dtype=np.uint8)).save(folder / f"{index}.png")
    said: list[str] = []
    watch = Watch(Detector(made), folder, tmp_path / "out", said.append, alarm_rate=0.2)
    assert watch.run(once=True) == 60
    assert [line[:5] for line in said].count("DRIFT") == 1
    again: list[str] = []
    assert Watch(Detector(made), folder, tmp_path / "out", again.append, alarm_rate=0.2).run(once=True) == 0
    assert [line[:5] for line in again] == ["going", "DRIFT"]  # the line has not been mended by the restart
    other = tmp_path / "calibrated again"
    shutil.copytree(made, other)
    edit(tolerance=2e-3)(other)
    again.clear()
    assert Watch(Detector(other), folder, tmp_path / "out", again.append, alarm_rate=0.2).run(once=True) == 0
    assert [line[:5] for line in again] == ["going"]  # other scores


@pytest.mark.parametrize("kind", ["marginal", "estimated"])
def test_an_unchanged_line_does_not_drift(kind: str, made: Path, image_folder: Path, tmp_path: Path) -> None:
    folder, good = tmp_path / "incoming", sorted((image_folder / "test/good").iterdir())
    folder.mkdir()
    for index in range(60):
        shutil.copy(good[index % len(good)], folder / f"{index}.png")
    said: list[str] = []
    detector = Detector(promising(kind, made, tmp_path / "part"))
    assert Watch(detector, folder, tmp_path / "out", said.append, alarm_rate=0.01).run(once=True) == 60
    assert [line for line in said if line.startswith("DRIFT")] == []


def test_with_good_scores_of_refits_the_line_itself_is_what_drift_is_measured_from(
    made: Path, image_folder: Path, tmp_path: Path
) -> None:
    folder, good = tmp_path / "incoming", sorted((image_folder / "test/good").iterdir())
    folder.mkdir()
    generator = np.random.default_rng(0)
    for index in range(240):
        path = folder / f"{index}.png"
        if index < 120:
            shutil.copy(good[index % len(good)], path)
        else:
            Image.fromarray(generator.integers(0, 255, (64, 96), dtype=np.uint8)).save(path)
        os.utime(path, (index, index))
    said: list[str] = []
    detector = Detector(promising("estimated", made, tmp_path / "part"))
    Watch(detector, folder, tmp_path / "out", said.append).run(once=True)
    (line,) = [line for line in said if line.startswith("DRIFT")]
    assert 110 < int(line.split("image ")[1].split()[0]) < 130


def test_another_image_under_the_same_name_is_judged_too(made: Path, image_folder: Path, tmp_path: Path) -> None:
    folder, out = tmp_path / "incoming", tmp_path / "out"
    folder.mkdir()
    first, second = sorted((image_folder / "test/blob").iterdir())[:2]
    for image, count in ((first, 1), (first, 0), (second, 1)):
        if count:
            shutil.copy(image, folder / "current.png")
        assert Watch(Detector(made), folder, out, lambda _: None).run(once=True) == count
    scores = {line["score"] for line in record(out)}
    assert len(scores) == 2
    digest = sha256(folder / "current.png")[:8]
    assert {path.name for path in (out / "rejected").iterdir()} == {"current.png.png", f"current.png_{digest}.png"}
    os.utime(folder / "current.png", (7, 7))  # the same image, touched
    assert Watch(Detector(made), folder, out, lambda _: None).run(once=True) == 0
    assert Watch(Detector(made), folder, out, lambda _: None).run(once=True) == 0
    assert len(record(out)) == 2


def test_two_watches_do_not_share_a_record(made: Path, image_folder: Path, tmp_path: Path) -> None:
    detector = Detector(made)
    tried: list[str] = []

    def try_another(_: str) -> None:
        with pytest.raises(OSError, match=r"another watch writes into .*: stop it, or choose another --out"):
            Watch(detector, image_folder / "test", tmp_path, print).run(once=True)
        tried.append("")

    assert Watch(detector, image_folder / "test", tmp_path, try_another).run(once=True) == len(tried) == 8
    assert Watch(detector, image_folder / "test", tmp_path, print).run(once=True) == 0


def test_a_damaged_record_is_named(made: Path, image_folder: Path, tmp_path: Path) -> None:
    Watch(Detector(made), image_folder / "test", tmp_path, print).run(once=True)
    lines = (tmp_path / "results.jsonl").read_bytes().splitlines(keepends=True)
    for bad in (b"{\n", b"[]\n", b'{"image": 3}\n', b"\xff\n"):
        (tmp_path / "results.jsonl").write_bytes(b"".join([*lines[:2], bad, *lines[3:]]))
        with pytest.raises(ValueError, match=r"line 3 of .*results\.jsonl is damaged: delete it"):
            Watch(Detector(made), image_folder / "test", tmp_path, print).run(once=True)
    (tmp_path / "results.jsonl").write_bytes(b"".join([*lines[:2], *lines[3:]]))
    assert Watch(Detector(made), image_folder / "test", tmp_path, print).run(once=True) == 1


def test_a_record_that_cannot_be_written(made: Path, image_folder: Path, tmp_path: Path) -> None:
    def block(_: str) -> None:
        """After the first image."""
        (tmp_path / "results.jsonl").rename(tmp_path / "kept.jsonl")
        (tmp_path / "results.jsonl").mkdir()

    with pytest.raises(OSError, match=r"the record in .* cannot be written .*: make room .* goes on with") as raised:
        Watch(Detector(made), image_folder / "test", tmp_path, block).run(once=True)
    next_one = str(raised.value).rpartition("goes on with ")[2]
    (tmp_path / "results.jsonl").rmdir()
    (tmp_path / "kept.jsonl").rename(tmp_path / "results.jsonl")
    assert Watch(Detector(made), image_folder / "test", tmp_path, lambda _: None).run(once=True) == 7
    assert [line["image"] for line in record(tmp_path)][1] == next_one


def test_a_table_that_cannot_be_written_stops_nothing(made: Path, image_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "results.csv").mkdir()  # as a spreadsheet that has it open
    said: list[str] = []
    assert Watch(Detector(made), image_folder / "test", tmp_path, said.append).run(once=True) == 8
    assert ["results.jsonl has all lines" in line for line in said].count(True) == 1
    (tmp_path / "results.csv").rmdir()
    Watch(Detector(made), image_folder / "test", tmp_path, said.append).run(once=True)
    assert len((tmp_path / "results.csv").read_text().splitlines()) == 9


def test_a_disk_that_cannot_lock_is_said(
    made: Path, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fcntl = pytest.importorskip("fcntl")

    def flock(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(OSError, match=r"cannot be locked \(No locks available\): choose an --out on a disk of this"):
        Watch(Detector(made), image_folder / "test", tmp_path, print).run(once=True)


class Meddling(Detector):
    """A detector during whose work something happens to the image."""

    def __init__(self, detector: Detector, meddle: Callable[[], None]) -> None:
        self.__dict__ = {**detector.__dict__, "meddle": meddle}

    def __call__(self, image: object) -> object:  # type: ignore[override]
        """Meddle, then judge."""
        self.__dict__["meddle"]()
        return super().__call__(image)  # type: ignore[arg-type]


def test_an_image_that_is_moved_away_after_it_was_read(made: Path, image_folder: Path, tmp_path: Path) -> None:
    folder, out = tmp_path / "incoming", tmp_path / "out"
    folder.mkdir()
    shutil.copy(sorted((image_folder / "test/blob").iterdir())[0], folder / "a.png")
    detector = Meddling(Detector(made), (folder / "a.png").unlink)
    assert Watch(detector, folder, out, lambda _: None).run(once=True) == 1
    assert [line["label"] for line in record(out)] == [True]
    assert (out / "rejected" / "a.png.png").is_file()


def test_an_image_that_changes_while_it_is_read_is_judged_afterwards(
    made: Path, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from anomalib_csflow.runtime import watch

    folder, out = tmp_path / "incoming", tmp_path / "out"
    folder.mkdir()
    first, second = sorted((image_folder / "test/blob").iterdir())[:2]
    shutil.copy(first, folder / "a.png")
    digests = []

    def changing(path: Path) -> str:
        if not digests:
            shutil.copy(second, path)
            os.utime(path, (7, 7))
        digests.append(sha256(path))
        return digests[-1]

    monkeypatch.setattr(watch, "sha256", changing)
    once = Watch(Detector(made), folder, out, lambda _: None)
    assert once.run(once=True) == 0
    assert once.run(once=True) == 1
    assert record(out)[0]["score"] == Detector(made)(second).score


def test_names_that_no_disk_or_table_takes(made: Path, image_folder: Path, tmp_path: Path) -> None:
    folder, out = tmp_path / "incoming", tmp_path / "out"
    deep = folder / ("a" * 120) / ("b" * 130)
    deep.mkdir(parents=True)
    image = sorted((image_folder / "test/blob").iterdir())[0]
    shutil.copy(image, deep / "long.png")
    try:
        shutil.copy(image, os.fsencode(folder) + b"/caf\xe9.png")
    except (OSError, UnicodeError):  # as on macOS
        shutil.copy(image, folder / "other.png")
    said: list[str] = []
    assert Watch(Detector(made), folder, out, said.append).run(once=True) == 2
    assert Watch(Detector(made), folder, out, said.append).run(once=True) == 0
    assert "".join(said).encode()
    assert len(list((out / "rejected").iterdir())) == 2


def test_scores_in_another_precision_are_not_compared(made: Path, image_folder: Path, tmp_path: Path) -> None:
    made = promising("marginal", made, tmp_path / "held out")
    watch = Watch(Detector(made), image_folder / "test", tmp_path, lambda _: None)
    watch.run(once=True)
    assert watch._monitor is not None
    assert watch._monitor.num_images == 8
    detector = Detector(made)
    detector.precision = "bf16"
    watch = Watch(detector, image_folder / "test", tmp_path, lambda _: None)
    assert watch.run(once=True) == 0
    assert watch._monitor is None


def test_an_empty_file_is_reported_and_a_pdf_is_no_image(made: Path, tmp_path: Path) -> None:
    folder, out = tmp_path / "incoming", tmp_path / "out"
    folder.mkdir()
    (folder / "empty.png").touch()
    (folder / "report.pdf").write_bytes(b"%PDF")
    said: list[str] = []
    assert Watch(Detector(made), folder, out, said.append).run(once=True) == 1
    assert ["error" in line for line in record(out)] == [True]
    assert "empty.png" in said[0]


def test_the_model_says_what_it_is_to_openvino_model_api(made: Path) -> None:
    model = openvino.Core().read_model(made / "model.xml")
    assert model.get_rt_info(["model_info", "model_type"]).astype(str) == "AnomalyDetection"
    assert float(model.get_rt_info(["model_info", "image_threshold"]).astype(str)) == 0.5
    assert {name for output in model.outputs for name in output.names} >= {"pred_score", "pred_label", "anomaly_map"}


# -- without torch ----------------------------------------------------------------------------------

BLOCKED = """
import sys
class Block:
    def find_spec(self, name, *args):
        if name.partition(".")[0] in {"torch", "anomalib", "lightning", "timm", "scipy", "pandas", "matplotlib"}:
            raise ImportError(name)
sys.meta_path.insert(0, Block())
"""


def test_the_line_needs_neither_torch_nor_anomalib(made: Path, image_folder: Path, tmp_path: Path) -> None:
    for command in (
        ["validate", made],
        ["watch", made, "--folder", image_folder / "test", "--once", "--out", tmp_path],
    ):
        arguments = [str(part) for part in command]
        code = f"{BLOCKED}\nfrom anomalib_csflow import cli\nif __name__ == '__main__': cli.main({arguments!r})"
        (tmp_path / "run.py").write_text(code)  # a file, since validate starts processes that import it
        subprocess.run([sys.executable, str(tmp_path / "run.py")], check=True, stdout=subprocess.DEVNULL)


def test_its_import_takes_less_than_half_a_second() -> None:
    code = (
        "import time; start = time.perf_counter(); import anomalib_csflow.runtime; print(time.perf_counter() - start)"
    )
    run = [sys.executable, "-c", code]
    assert min(float(subprocess.run(run, check=True, capture_output=True).stdout) for _ in range(3)) < 0.5


# -- a checkpoint is enough -------------------------------------------------------------------------


def test_test_predict_and_export_take_all_from_the_checkpoint(
    checkpoint: Path, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shared = ["--ckpt_path", str(checkpoint), "--default_root_dir", str(tmp_path)]
    cli.main(["predict", *shared, "--data", str(image_folder / "test/blob")])
    cli.main(["export", f"--ckpt_path={checkpoint}", "--export_type", "onnx", "--default_root_dir", str(tmp_path)])
    assert list(tmp_path.rglob("*.onnx"))
    with pytest.raises(SystemExit, match=r"there is no checkpoint at nothing\.ckpt"):
        cli.main(["export", "--ckpt_path", "nothing.ckpt", "--export_type", "onnx"])


def test_the_manifest_keeps_its_schema(made: Path) -> None:
    schema = json.loads((ROOT / "anomalib_csflow/runtime/bundle.schema.json").read_text())
    manifest = Bundle(made).manifest
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(manifest, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(manifest | {"version": 2}, schema)


def output_of(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_in_an_environment_with_nothing_else(made: Path, image_folder: Path, tmp_path: Path) -> None:
    """As the documentation says: ``pip install --no-deps``, and what the bundle's requirements.txt lists."""
    venv.create(tmp_path / "line", with_pip=True)
    python = tmp_path / "line" / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    try:
        output_of(python, "-m", "pip", "install", "--quiet", "-r", made / "requirements.txt")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no package index: {error.stderr.splitlines()[-1]}")
    source = tmp_path / "source"  # a copy: building leaves files
    for name in ("anomalib_csflow", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("README.md", "LICENSE", "pyproject.toml"):
        shutil.copy(ROOT / name, source)
    output_of(python, "-m", "pip", "install", "--quiet", "--no-deps", source)
    installed = output_of(python, "-m", "pip", "list", "--format=freeze")
    assert "torch" not in installed
    assert "anomalib==" not in installed
    program = python.with_name("anomalib-csflow")
    assert "kept" in output_of(program, "validate", made)
    output_of(program, "watch", made, "--folder", image_folder / "test", "--out", tmp_path / "out", "--once")
    assert len(record(tmp_path / "out")) == 8


@pytest.mark.skipif(not (shutil.which("cmake") and shutil.which("g++")), reason="needs cmake and g++")
def test_the_program_in_cpp_gives_the_same_numbers(made: Path, images: list[Path], tmp_path: Path) -> None:
    found = output_of(sys.executable, "-c", "import openvino.utils; print(openvino.utils.get_cmake_path())").strip()
    source, build = ROOT / "examples/cpp", tmp_path / "build"
    assert len((source / "judge.cpp").read_text().splitlines()) < 150
    output_of("cmake", "-S", source, "-B", build, f"-DOpenVINO_DIR={found}")
    output_of("cmake", "--build", build)
    files = [tmp_path / f"{index}.ppm" for index in range(len(images))]
    for image, file in zip(images, files, strict=True):
        Image.open(image).convert("RGB").save(file)
    lines = output_of(build / "judge", made / "model.xml", *files).splitlines()
    detector = Detector(made)
    for line, image in zip(lines, images, strict=True):
        label, score, highest, masked, _ = line.split()
        expected = detector(image)
        assert label == ("reject" if expected.label else "good")
        assert float(score) == pytest.approx(expected.score, abs=1e-4)
        assert float(highest) == pytest.approx(expected.anomaly_map.max(), abs=1e-4)
        assert float(masked) == pytest.approx(expected.mask.mean(), abs=1e-4)
    files[0].write_bytes(b"P6 9")
    refused = subprocess.run(
        [build / "judge", made / "model.xml", files[0]], capture_output=True, text=True, check=False
    )
    assert (refused.returncode, len(refused.stderr.splitlines())) == (1, 1)


def test_a_file_that_is_still_being_written_waits(made: Path, image_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "incoming"
    folder.mkdir()
    data = (image_folder / "test/good/000.png").read_bytes()
    watch = Watch(Detector(made), folder, tmp_path / "out", lambda _: None)
    path = folder / "slow.png"
    path.write_bytes(data[:100])
    os.utime(path, (0, 0))  # as a copy that keeps its source's time
    assert watch._arrived(0.05) == []
    time.sleep(0.06)
    path.write_bytes(data)
    os.utime(path, (0, 0))
    assert watch._arrived(0.05) == []
    time.sleep(0.06)
    assert [one for one, _ in watch._arrived(0.05)] == [path]


# -- 8 bits -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def eight_bit(checkpoint: Path, image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with an 8-bit model."""
    out = tmp_path_factory.mktemp("bundles") / "part_8"
    arguments = ["--ckpt_path", checkpoint, "--out", out, "--reference", image_folder / "train/good"]
    cli.main(["bundle", *map(str, arguments), "--formats", "int8"])
    return out


def test_an_8_bit_model_keeps_the_verdicts_on_good_images(eight_bit: Path, image_folder: Path) -> None:
    manifest = Bundle(eight_bit).manifest
    jsonschema.validate(manifest, json.loads((ROOT / "anomalib_csflow/runtime/bundle.schema.json").read_text()))
    assert 0 < manifest["int8"]["shift"] <= manifest["int8"]["max_shift"]
    assert manifest["models"] == {"openvino": "model.xml", "int8": "model_int8.xml"}
    sizes = [(eight_bit / name).stat().st_size for name in ("model_int8.bin", "model.bin")]
    assert sizes[0] < 0.5 * sizes[1]
    exact, fast = Detector(eight_bit), Detector(eight_bit, precision="int8")
    units = exact.score_scale.scale.raw if exact.score_scale else None
    assert units is not None
    changes = []
    for path in sorted((image_folder / "train/good").iterdir()):
        found, wanted = fast(path), exact(path)
        assert found.label == wanted.label
        changes.append(abs(float(units(found.score) - units(wanted.score))) / exact.score_scale.scale.width)
    assert 0 < max(changes) < 2 * manifest["int8"]["max_shift"]  # another model, nearly the same scores


def test_validate_shows_8_bits_beside_float(eight_bit: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["validate", str(eight_bit), "--threads", "1"])
    rows = {line.split()[1]: line for line in capsys.readouterr().out.splitlines()[1:]}
    assert rows["int8"].endswith("none")
    assert rows["f32"].endswith("kept")


def test_an_8_bit_model_that_loses_too_much_is_refused(
    checkpoint: Path, made: Path, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from anomalib_csflow.bundling import int8

    monkeypatch.setattr(int8, "MAX_SHIFT", 1e-6)
    monkeypatch.setattr(int8, "NUM_FIRST", (1,))
    out = ["--out", str(tmp_path / "x"), "--formats", "openvino", "int8"]
    for folder, message in {
        "train/good": "in 8 bits, a tenth of the good images",
        "test/good": "10 good images",
    }.items():
        with pytest.raises(SystemExit, match=message) as stopped:
            cli.main(["bundle", "--ckpt_path", str(checkpoint), *out, "--reference", str(image_folder / folder)])
        assert "\n" not in str(stopped.value)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(BundleError, match="no model for 'int8', only for openvino, onnx"):
        Detector(made, precision="int8")


# -- servers ----------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform == "win32", reason="groups of processes")
def test_litserve_gives_the_same_verdicts(made: Path, images: list[Path]) -> None:
    pytest.importorskip("litserve")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, ROOT / "examples/serve.py", made, "--port", str(port), "--threads", "1"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, **quiet, start_new_session=True) as process:
        try:
            deadline = time.monotonic() + 120
            while ask(port, "/health")[0] != 200 and time.monotonic() < deadline:
                time.sleep(0.2)
            status, body = ask(port, "/predict", {"image": base64.b64encode(images[-1].read_bytes()).decode()})
            answer, expected = json.loads(body), Detector(made)(images[-1])
            assert (status, answer["label"]) == (200, expected.label)
            assert answer["score"] == pytest.approx(expected.score, abs=1e-5)
            assert answer["p_value"] == pytest.approx(expected.p_value)
            assert [tuple(box) for box in answer["boxes"]] == expected.boxes
            for wrong in ({"image": "bm8gaW1hZ2U="}, {}):
                status, body = ask(port, "/predict", wrong)
                assert (status, b"give an image file in base64" in body) == (400, True)
        finally:
            os.killpg(process.pid, signal.SIGKILL)  # the server and its workers


def ask(port: int, path: str, request: object = None) -> tuple[int, bytes]:
    """Status and body of an answer; status 0 if nobody listens yet."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("GET" if request is None else "POST", path, json.dumps(request), {"Content-Type": JSON})
        answer = connection.getresponse()
        return answer.status, answer.read()
    except OSError:
        return 0, b""
    finally:
        connection.close()


def test_a_bundle_becomes_a_repository_of_openvino_model_server(made: Path, images: list[Path], tmp_path: Path) -> None:
    """The commands in docs/line.md write the layout that the server documents, and its model is whole."""
    page = (ROOT / "docs/line.md").read_text()
    commands = [line for line in page.splitlines() if line.startswith(("mkdir -p models/", "cp part_42/"))]
    assert len(commands) == 2
    (tmp_path / "part_42").symlink_to(made)
    subprocess.run([shutil.which("sh") or "sh", "-ec", "\n".join(commands)], check=True, cwd=tmp_path)
    version = tmp_path / "models/part_42/1"
    assert sorted(path.name for path in version.iterdir()) == ["model.bin", "model.xml"]
    model = openvino.Core().compile_model(version / "model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    assert len(model.inputs) == 1
    assert model(planes(read(images[0])))["pred_score"].item() == pytest.approx(
        Detector(made)(images[0]).score, abs=1e-5
    )


# -- real images ------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("name", ["bottle", "metal_plate", "mtd", "cookie", "fabric", "ball_screw", "pill"])
def test_no_label_differs_from_torch_on_real_images(name: str, test_data: Path, tmp_path: Path) -> None:
    root = test_data / "data" / name
    detector = from_recipe("cs_flow_small", max_steps=100)
    engine = Engine(accelerator="cpu", default_root_dir=tmp_path)
    split = {"val_split_mode": "from_train", "val_split_ratio": 0.25}
    engine.fit(
        detector,
        datamodule=Folder(
            name, root=root, normal_dir="train/good", normal_test_dir="test/good", num_workers=0, **split
        ),
    )
    made = bundling.bundle(engine.best_model_path, tmp_path / "part", formats=["openvino", "onnx"])
    reference = bundling.load_detector(engine.best_model_path)
    line = [Detector(made, "openvino"), Detector(made, "onnx")]
    images = sorted(path for path in (root / "test").rglob("*") if path.is_file())
    with torch.no_grad():
        expected = [bool(reference(read_image(path, as_tensor=True)[None]).pred_label) for path in images]
    assert set(expected) == {True, False}
    for one in line:
        assert [one(path).label for path in images] == expected
