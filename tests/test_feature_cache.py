"""The feature cache: never a stale or damaged feature, never anything but time gained."""

import hashlib
import itertools
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from anomalib.data import Folder
from anomalib.engine import Engine
from conftest import DETECTORS, SMALL, folder_arguments
from lightning.pytorch import Callback, seed_everything
from torch import Tensor
from torchvision.transforms import v2

from anomalib_csflow import CSFlow, FeatureCache
from anomalib_csflow.engine.providers import CachedFeatures, CachedSet, ComputedFeatures, View
from anomalib_csflow.features.store import FeatureStore, default_directory, image_key

PYRAMID = (torch.randn(6, 4, 5), torch.randn(6, 2, 3))


def key(name: str) -> str:
    """A key as images have."""
    return hashlib.sha256(name.encode()).hexdigest()


def files(directory: Path) -> list[Path]:
    """Of stored pyramids."""
    return sorted(directory.rglob("*.safetensors"))


# -- the store -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_was_stored_is_read_by_another_process_object(tmp_path: Path, dtype: torch.dtype) -> None:
    FeatureStore(tmp_path, {"a": "b"}, dtype).put(key("key"), PYRAMID)
    read = FeatureStore(tmp_path, {"a": "b"}, dtype).get(key("key"))
    torch.testing.assert_close(read, tuple(level.to(dtype) for level in PYRAMID), rtol=0, atol=0)


def test_another_context_or_dtype_is_another_store(tmp_path: Path) -> None:
    FeatureStore(tmp_path, {"a": "b"}).put(key("key"), PYRAMID)
    assert FeatureStore(tmp_path, {"a": "c"}).get(key("key")) is None
    assert FeatureStore(tmp_path, {"a": "b"}, torch.float16).get(key("key")) is None
    assert FeatureStore(tmp_path, {"a": "b"}).get(key("another")) is None


@pytest.mark.parametrize("damage", ["truncated", "zeros", "one bit", "empty"])
def test_a_damaged_file_is_not_read_and_is_replaced(tmp_path: Path, damage: str) -> None:
    store = FeatureStore(tmp_path, {})
    store.put(key("key"), PYRAMID)
    path = store.path(key("key"))
    data = bytearray(path.read_bytes())
    if damage == "one bit":
        data[-3] ^= 16
    path.write_bytes({"truncated": data[:-40], "zeros": bytes(len(data)), "empty": b""}.get(damage, data))
    fresh = FeatureStore(tmp_path, {})
    assert fresh.get(key("key")) is None
    fresh.put(key("key"), PYRAMID)
    torch.testing.assert_close(FeatureStore(tmp_path, {}).get(key("key")), PYRAMID)


def test_a_full_disk_warns_once_and_leaves_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = FeatureStore(tmp_path, {})
    store.put(key("first"), PYRAMID)

    def fill_up(partial: Path, path: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", fill_up)
    with pytest.warns(UserWarning, match=r"stops storing: .*No space left.*max_gb"):
        store.put(key("second"), PYRAMID)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        store.put(key("third"), PYRAMID)
    assert store.get(key("second")) is None
    assert [path.stem for path in files(tmp_path)] == [store.path(key("first")).stem]
    assert not list(tmp_path.rglob("*.partial"))


def test_the_limit_holds_and_the_longest_unused_go_first(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("not the cache's")
    FeatureStore(tmp_path, {}).put(key("size"), PYRAMID)
    size = files(tmp_path)[0].stat().st_size
    files(tmp_path)[0].unlink()
    for age, name in enumerate(["oldest", "older", "new"]):
        FeatureStore(tmp_path, {}).put(key(name), PYRAMID)
        os.utime(FeatureStore(tmp_path, {}).path(key(name)), (age, age))
    FeatureStore(tmp_path, {}).get(key("oldest"))  # used: now the newest
    store = FeatureStore(tmp_path, {"other": "run"}, max_bytes=4 * size)
    for name in ("1", "2"):
        store.put(key(name), PYRAMID)
    assert FeatureStore(tmp_path, {}).get(key("oldest")) is not None
    assert FeatureStore(tmp_path, {}).get(key("older")) is None
    store.put(key("3"), PYRAMID)
    store.put(key("4"), PYRAMID)
    with pytest.warns(UserWarning, match="limit of"):
        store.put(key("5"), PYRAMID)
    store.put(key("6"), PYRAMID)
    assert len(files(tmp_path)) <= 4
    assert store.get(key("1")) is not None  # what a run uses itself is kept
    assert (tmp_path / "mine.txt").exists()


def write_forever(directory: Path) -> None:
    """Store fifty pyramids over and over."""
    store = FeatureStore(directory, {})
    for turn in itertools.count():
        value = turn % 50
        store.put(f"{value:064d}", tuple(torch.full((64, 16, 16), float(value)) for _ in range(3)))


def test_processes_that_write_at_once_and_are_killed_leave_a_valid_cache(tmp_path: Path) -> None:
    writers = [multiprocessing.get_context("fork").Process(target=write_forever, args=(tmp_path,)) for _ in range(2)]
    for writer in writers:
        writer.start()
    deadline = time.monotonic() + 30
    while len(files(tmp_path)) < 50 and time.monotonic() < deadline:
        time.sleep(0.01)
    for writer in writers:
        writer.kill()
        writer.join()
    pyramids = [FeatureStore(tmp_path, {}).get(f"{value:064d}") for value in range(50)]
    assert all(bool((level == value).all()) for value, pyramid in enumerate(pyramids) for level in pyramid)


def test_a_key_changes_with_the_file_though_its_time_is_set_back(tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    path.write_bytes(b"good")
    status = path.stat()
    before = image_key(path)
    assert before == image_key(path) != image_key(path, view="rotated by 90 degrees")
    time.sleep(0.02)
    path.write_bytes(b"evil")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert image_key(path) != before
    assert image_key(tmp_path / "missing.png") is None


# -- in the engine -------------------------------------------------------------------------------------


class Watch(Callback):
    """Counts images that go through the backbone, and keeps the losses."""

    def __init__(self) -> None:
        self.images = 0
        self.losses: list[float] = []
        self.blank: list[bool] = []

    def setup(self, trainer: Any, pl_module: CSFlow, stage: str) -> None:
        """Count what the backbone is given."""

        def count(module: Any, inputs: tuple[Tensor, ...]) -> None:
            self.images += len(inputs[0])
            assert bool(inputs[0].isfinite().all())

        self.handle = pl_module.model.features.register_forward_pre_hook(count)

    def on_train_batch_end(self, trainer: Any, pl_module: CSFlow, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Keep the loss, and whether images were left out."""
        self.losses.append(float(outputs["loss"]))
        self.blank.append(bool(batch.image.isnan().all()))

    def teardown(self, trainer: Any, pl_module: CSFlow, stage: str) -> None:
        """Stop counting."""
        self.handle.remove()


def fit(
    root: Path,
    tmp_path: Path,
    cache: FeatureCache,
    detector: dict[str, Any] | None = None,
    max_epochs: int = 3,
    **arguments: Any,
) -> Watch:
    """Train and validate."""
    seed_everything(0, verbose=False)
    watch = Watch()
    engine = Engine(
        default_root_dir=tmp_path / "results",
        max_epochs=max_epochs,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[watch, cache],
    )
    model = CSFlow(**{**SMALL, "image_size": (96, 128), "hidden_channels": 8, **(detector or {})})
    datamodule = Folder(**{**folder_arguments(root), **arguments})
    engine.fit(model, datamodule=datamodule)
    watch.metrics = dict(engine.trainer.callback_metrics)
    watch.datamodule = datamodule
    return watch


def test_the_backbone_sees_each_image_once_and_nothing_else_changes(image_folder: Path, tmp_path: Path) -> None:
    off = fit(image_folder, tmp_path, FeatureCache(max_gb=0))
    first = fit(image_folder, tmp_path, FeatureCache(tmp_path / "cache"))
    again = fit(image_folder, tmp_path, FeatureCache(tmp_path / "cache"))
    assert off.images == 12 * 4 + 8 * 3  # the statistics are an epoch of their own
    assert (first.images, again.images) == (12 + 8, 0)
    assert first.losses == pytest.approx(off.losses, rel=1e-5)
    assert again.losses == pytest.approx(off.losses, rel=1e-5)
    for name, value in off.metrics.items():
        torch.testing.assert_close(first.metrics[name], value, rtol=1e-4, atol=1e-4)
    assert not any(off.blank)
    assert all(first.blank)  # the statistics came first: no epoch decoded anything
    assert type(first.datamodule.train_data).__module__.startswith("anomalib.")


@pytest.mark.parametrize("name", DETECTORS)
def test_every_detector_trains_alike_with_features_that_are_known(
    name: str, image_folder: Path, tmp_path: Path
) -> None:
    flows = []
    for cache in (FeatureCache(max_gb=0), FeatureCache(tmp_path / "cache"), FeatureCache(tmp_path / "cache")):
        seed_everything(0, verbose=False)
        kind, arguments = DETECTORS[name]
        detector = kind(**arguments | {"image_size": 64})
        engine = Engine(
            default_root_dir=tmp_path / "results",
            max_epochs=2,
            accelerator="cpu",
            limit_val_batches=0,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[cache],
        )
        engine.fit(detector, datamodule=Folder(**folder_arguments(image_folder)))
        flows.append(detector.model.flow.state_dict())
    for flow in flows[1:]:
        for key, value in flows[0].items():
            torch.testing.assert_close(flow[key], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_smaller_dtypes_train_alike(image_folder: Path, tmp_path: Path, dtype: Any) -> None:
    off = fit(image_folder, tmp_path, FeatureCache(max_gb=0))
    rounded = fit(image_folder, tmp_path, FeatureCache(tmp_path / "cache", dtype=dtype))
    assert rounded.losses == pytest.approx(off.losses, rel=0.02)
    assert rounded.losses != off.losses


SCRIPT = """
import json, sys, warnings
from pathlib import Path
warnings.simplefilter("ignore")
import torch
torch.set_num_threads(1)
from anomalib.data import Folder
from anomalib.engine import Engine
from lightning.pytorch import Callback
from anomalib_csflow import CSFlow, FeatureCache

class Count(Callback):
    images = 0
    def setup(self, trainer, pl_module, stage):
        def count(module, inputs):
            self.images += len(inputs[0])
        pl_module.model.features.register_forward_pre_hook(count)
    def on_train_end(self, trainer, pl_module):
        loss = float(trainer.callback_metrics["train_loss_epoch"])
        mean = float(pl_module.model.standardization.mean_0.sum())
        Path(results, f"process_{trainer.global_rank}.json").write_text(json.dumps([self.images, loss, mean]))

root, results, cache, max_gb, devices, num_workers = sys.argv[1:]
data = Folder("textures", "train/good", root=root, normal_test_dir="test/good", val_split_mode="none",
              train_batch_size=3,
              num_workers=int(num_workers))
model = CSFlow("tf_efficientnet_lite0", "blocks.4", "package", image_size=128, num_blocks=1, hidden_channels=8,
               kernel_sizes=[3], standardize=True)
torch.manual_seed(0)
Engine(default_root_dir=results, max_epochs=3, accelerator="cpu", devices=int(devices), limit_val_batches=0,
       strategy="ddp" if devices == "2" else "auto", enable_progress_bar=False, enable_model_summary=False,
       callbacks=[Count(), FeatureCache(cache, max_gb=float(max_gb))]
).fit(model, datamodule=data)
"""


@pytest.mark.parametrize("count", [1, 2])
def test_features_damaged_since_are_computed_again(datamodule: Folder, tmp_path: Path, count: int) -> None:
    """With one image too, whose placeholder has the shape of a batch of one decoded image."""
    datamodule.setup()
    store = FeatureStore(tmp_path, {"a": "b"})
    cached = CachedSet(datamodule.train_data, store, [""])
    provider = CachedFeatures(lambda images: (images[:, :, :2, :2],), None, {"train_data": cached})
    for path in cached.paths[:count]:
        store.put(image_key(path, ""), (torch.zeros(3, 2, 2),))
    cached.is_known = True
    batch = cached.collate_fn([cached[index] for index in range(count)])
    for path in files(tmp_path):
        path.write_bytes(b"damaged")
    (level,) = provider.features(batch)
    assert level.shape == (count, 3, 2, 2)
    assert level.isfinite().all()


def fit_in_a_process_of_its_own(
    root: Path, tmp_path: Path, *, max_gb: int = 1, devices: int = 1, num_workers: int = 0
) -> list[tuple[int, float, float]]:
    """Images, last loss and features' mean of each process: forking this one, with all it runs, may fail."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    options = [root, tmp_path, tmp_path / "cache", max_gb, devices, num_workers]
    command = [sys.executable, str(script), *map(str, options)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    # Files, since what two processes print at once may share a line.
    found = [path.read_text() for path in sorted(tmp_path.glob("process_*.json"))]
    for path in tmp_path.glob("process_*.json"):
        path.unlink()
    return [tuple(json.loads(text)) for text in found]


@pytest.mark.slow
def test_workers_share_the_work(image_folder: Path, tmp_path: Path) -> None:
    ((images, loss, _),) = fit_in_a_process_of_its_own(image_folder, tmp_path, num_workers=2)
    ((images_off, loss_off, _),) = fit_in_a_process_of_its_own(image_folder, tmp_path, max_gb=0, num_workers=2)
    assert (images, images_off) == (12, 48)
    assert loss == pytest.approx(loss_off, rel=1e-4)


@pytest.mark.slow
def test_distributed_processes_share_the_work(image_folder: Path, tmp_path: Path) -> None:
    processes = fit_in_a_process_of_its_own(image_folder, tmp_path, devices=2)
    assert len(processes) == 2
    assert 12 <= sum(images for images, _, _ in processes) <= 16  # and not 48; both may compute an image at once
    assert len(files(tmp_path / "cache")) == 12
    ((_, _, mean),) = fit_in_a_process_of_its_own(image_folder, tmp_path)
    assert [found for _, _, found in processes] == pytest.approx([mean, mean], rel=1e-5)  # of all images, not a share


@pytest.mark.parametrize(
    "changed",
    [
        {"layer": "blocks.3"},
        {"num_scales": 2},
        {"image_size": (96, 160)},
        {"antialias": False},
        {"backbone": "tf_efficientnet_lite1"},
        {"weights": "random"},
    ],
    ids=str,
)
def test_a_change_of_what_features_depend_on_computes_them_again(
    image_folder: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, changed: dict[str, Any]
) -> None:
    cache = tmp_path_factory.getbasetemp() / "changes"  # one for all cases: nor do they serve one another
    if not cache.exists():
        fit(image_folder, tmp_path, FeatureCache(cache), max_epochs=1)
    assert fit(image_folder, tmp_path, FeatureCache(cache), changed, max_epochs=1).images == 12 + 8


def test_a_changed_image_is_computed_again(image_folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "copy"
    shutil.copytree(image_folder, root)
    fit(root, tmp_path, FeatureCache(tmp_path / "cache"), max_epochs=1)
    path = root / "train" / "good" / "000.png"
    path.write_bytes((root / "train" / "good" / "001.png").read_bytes())
    assert fit(root, tmp_path, FeatureCache(tmp_path / "cache"), max_epochs=1).images == 1


def test_features_that_vanish_are_computed_from_the_file(image_folder: Path, tmp_path: Path) -> None:
    class Vandal(FeatureCache):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            super().on_train_epoch_start(trainer, pl_module)
            if trainer.current_epoch == 1:
                for number, path in enumerate(files(self.directory)):
                    path.unlink() if number % 2 else path.write_bytes(b"\0" * 100)

    whole = fit(image_folder, tmp_path, FeatureCache(tmp_path / "a"))
    vandalised = fit(image_folder, tmp_path, Vandal(tmp_path / "b"))
    assert vandalised.images > whole.images
    assert vandalised.losses == pytest.approx(whole.losses, rel=1e-5)


def test_random_augmentations_switch_it_off_and_say_so(
    image_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    flip = v2.Compose([v2.RandomHorizontalFlip(), v2.Grayscale(3)])
    watch = fit(image_folder, tmp_path, FeatureCache(tmp_path / "cache"), train_augmentations=flip)
    assert watch.images == 12 * 4 + 8 * 3
    assert not files(tmp_path / "cache")
    assert "RandomHorizontalFlip may change images" in caplog.text


def test_each_fixed_transform_has_features_of_its_own(image_folder: Path, tmp_path: Path) -> None:
    """As DifferNet's rotations: more angles cost only the new ones."""
    seen: list[str] = []

    class Turned(CSFlow):
        angles = (0, 90)

        def features(self, batch: Any) -> tuple[Tensor, ...]:
            def turned(angle: int, images: Tensor) -> Tensor:
                seen.extend([f"rotated by {angle}"] * len(images))
                return images.rot90(angle // 90, (2, 3))

            shown = [View(f"turned {angle}", partial(turned, angle)) for angle in self.angles]
            views = [self.provider.features(batch, view) for view in shown]
            return tuple(torch.cat(levels) for levels in zip(*views, strict=True))

    def run(angles: tuple[int, ...]) -> dict[str, int]:
        seen.clear()
        model = Turned(**{**SMALL, "image_size": 128, "hidden_channels": 8})
        model.angles = angles
        arguments = {**folder_arguments(image_folder), "val_split_mode": "none"}
        Engine(
            default_root_dir=tmp_path / "results",
            max_epochs=2,
            accelerator="cpu",
            limit_val_batches=0,
            enable_progress_bar=False,
            callbacks=[FeatureCache(tmp_path / "cache")],
        ).fit(model, datamodule=Folder(**arguments))
        return {name: seen.count(name) for name in sorted(set(seen))}

    assert run((0, 90)) == {"rotated by 0": 12, "rotated by 90": 12}
    assert run((0, 90, 180)) == {"rotated by 180": 12}


def test_it_is_on_by_default_and_ends_with_the_fit(image_folder: Path, tmp_path: Path) -> None:
    detector = CSFlow(**{**SMALL, "image_size": (96, 128), "hidden_channels": 8})
    engine = Engine(default_root_dir=tmp_path, max_epochs=1, accelerator="cpu", enable_progress_bar=False)
    engine.fit(detector, datamodule=Folder(**folder_arguments(image_folder)))
    assert len([c for c in engine.trainer.callbacks if isinstance(c, FeatureCache)]) == 1
    assert len(files(default_directory())) >= 12
    assert isinstance(detector.provider, ComputedFeatures)  # tests and predictions compute


@pytest.mark.parametrize("arguments", [{"max_gb": -1}, {"dtype": "int8"}], ids=str)
def test_bad_settings_are_named(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="needs a dtype of float32, float16, bfloat16 and max_gb >= 0"):
        FeatureCache(**arguments)
