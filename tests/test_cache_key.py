"""The key of cached features: it holds all that they depend on, and what it cannot hold is not cached."""

from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from anomalib.data import Folder, ImageBatch, ImageItem
from anomalib.data.datasets.base.image import AnomalibDataset
from anomalib.data.datasets.image.folder import FolderDataset
from anomalib.data.datasets.image.mvtec_loco import MVTecLOCODataset
from anomalib.pipelines.tiled_ensemble.components.utils.ensemble_tiling import EnsembleTiler, TileCollater
from anomalib.pre_processing import PreProcessor
from test_feature_cache import files, fit
from torchvision import tv_tensors
from torchvision.transforms import v2

from anomalib_csflow import FeatureCache
from anomalib_csflow.engine.cache_key import (
    UnkeyedError,
    check_datamodule,
    data_key,
    pre_processor_key,
    transform_key,
)

ALL_DIFFER = [
    v2.ToDtype(torch.float32, scale=True),
    v2.ToDtype(torch.float16, scale=True),
    v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True),
    v2.ToDtype({tv_tensors.Image: torch.float16, "others": None}, scale=True),
    v2.Pad(3, fill=0),
    v2.Pad(3, fill={tv_tensors.Image: 0.25}),
    v2.Pad(3, fill={tv_tensors.Image: 0.5}),
    v2.Normalize(torch.tensor([0.5]), torch.tensor([0.2])),
    v2.Normalize(torch.tensor([0.5]), torch.tensor([0.200001])),
    v2.Normalize([0.5], [0.2]),
    v2.Resize(8),
    v2.Resize(8, antialias=False),
    v2.Resize(8, interpolation=v2.InterpolationMode.NEAREST),
    v2.Compose([v2.Resize(8), v2.CenterCrop(4)]),
    v2.Compose([v2.CenterCrop(4), v2.Resize(8)]),
    None,
]


def test_transforms_that_differ_in_anything_have_keys_that_differ() -> None:
    for one, other in combinations(ALL_DIFFER, 2):
        assert transform_key(one) != transform_key(other), (one, other)


def test_equal_transforms_have_equal_keys() -> None:
    def made() -> v2.Compose:
        return v2.Compose([v2.Pad(3, fill={tv_tensors.Image: 0.25}), v2.Normalize(torch.ones(3) / 3, [1.0])])

    assert transform_key(made()) == transform_key(made())


class Darker(v2.Resize):
    """A transform whose code is not known."""


def altered() -> v2.Resize:
    """A fixed transform of which one object does something else."""
    transform = v2.Resize(8)
    transform.transform = lambda image, params: image
    return transform


def hooked() -> v2.Resize:
    """A fixed transform with something after it."""
    transform = v2.Resize(8)
    transform.register_forward_hook(lambda module, inputs, output: output / 2)
    return transform


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (v2.RandomCrop(4), "RandomCrop may change images from time to time"),
        (v2.Compose([v2.Resize(8), v2.Compose([v2.GaussianBlur(3)])]), "GaussianBlur may change images"),
        (v2.Lambda(lambda image: image), "Lambda may change images"),
        (Darker(8), "Darker may change images"),
        (type("Own", (v2.Compose,), {})([v2.Resize(8)]), "Own may change images"),
        (torch.nn.Sequential(v2.Resize(8)), "Sequential may change images"),
        (altered(), "an argument of Resize is a function"),
        (hooked(), "an argument of Resize is a OrderedDict|an argument of Resize is a function"),
    ],
    ids=str,
)
def test_a_transform_that_is_not_known_to_be_fixed_has_no_key(transform: Any, message: str) -> None:
    with pytest.raises(UnkeyedError, match=message):
        transform_key(transform)


class Negative(FolderDataset):
    """Reads other images of the same files."""

    def __getitem__(self, index: int) -> ImageItem:
        """Turn the image's values round."""
        item = super().__getitem__(index)
        item.image = 1 - item.image
        return item


class Halved(PreProcessor):
    """Shows the network other images."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Halve after the transform."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        batch.image = batch.image / 2


class Dimmed(Folder):
    """A datamodule that changes batches on their way."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Dim."""
        batch.image = batch.image * 0.5
        return batch


class Own(Folder):
    """A datamodule whose training set reads its images itself."""

    def _setup(self, _stage: str | None = None) -> None:
        super()._setup(_stage)
        self.train_data.__class__ = Negative


def test_classes_of_the_hosts_alone_have_keys() -> None:
    class Listed(FolderDataset):  # finds files in another way, and reads them as ever
        pass

    def empty(cls: type[AnomalibDataset]) -> AnomalibDataset:
        dataset = cls.__new__(cls)
        dataset.augmentations = v2.Resize(8)
        return dataset

    assert data_key(empty(Listed)) == data_key(empty(FolderDataset)) != data_key(empty(MVTecLOCODataset))
    with pytest.raises(UnkeyedError, match="Negative has a __getitem__ of its own"):
        data_key(empty(Negative))
    with pytest.raises(UnkeyedError, match="the pre-processor is a Halved"):
        pre_processor_key(Halved(v2.Resize(8)))
    assert pre_processor_key(PreProcessor(v2.Resize(8))) != pre_processor_key(None)
    check_datamodule(Folder("a", "b"))
    with pytest.raises(UnkeyedError, match="Dimmed has a on_after_batch_transfer of its own"):
        check_datamodule(Dimmed("a", "b"))
    tiled = Folder("a", "b")
    tiled.external_collate_fn = TileCollater(EnsembleTiler(8, 8, 16), (0, 1), default_collate_fn=ImageBatch.collate)
    with pytest.raises(UnkeyedError, match="the datamodule's batches are made by TileCollater"):
        check_datamodule(tiled)


@pytest.mark.parametrize("kind", ["data set", "pre-processor"])
def test_what_cannot_be_keyed_is_not_cached_and_that_is_said(
    kind: str, image_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plain run has filled the cache, of which nothing may be taken."""
    fit(image_folder, tmp_path, FeatureCache(tmp_path / "cache"), max_epochs=1)
    before = files(tmp_path / "cache")
    detector = {}
    if kind == "data set":
        monkeypatch.setattr("test_feature_cache.Folder", Own)
    else:
        plain = v2.Compose([v2.Resize((96, 128)), v2.Normalize([0.5] * 3, [0.5] * 3)])
        detector = {"pre_processor": Halved(plain)}
    caplog.set_level("INFO")
    watch = fit(image_folder, tmp_path, FeatureCache(tmp_path / "cache"), detector, max_epochs=1)
    assert watch.images == 12 * 2 + 8
    assert files(tmp_path / "cache") == before
    assert "Features are computed in every epoch: " in caplog.text
    assert {"data set": "Negative has a __getitem__", "pre-processor": "is a Halved"}[kind] in caplog.text
