"""The feature cache in anomalib's engine: when it is safe, and which features are whose."""

from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, cast

import torch
from anomalib.data import AnomalibDataset, Batch, ImageBatch, ImageItem
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2

from anomalib_csflow.features import weights
from anomalib_csflow.features.store import FeatureStore, default_directory, image_key
from anomalib_csflow.flows.pyramid import Pyramid

from .model import FlowModel

Dtype = Literal["float32", "float16", "bfloat16"]

FIXED_TRANSFORMS = (
    v2.CenterCrop,
    v2.Grayscale,
    v2.Identity,
    v2.Normalize,
    v2.Pad,
    v2.RGB,
    v2.Resize,
    v2.ToDtype,
    v2.ToImage,
    v2.ToPureTensor,
)
"""Transforms that do the same to an image every time, and whose repr says all that they do."""


class FeatureCache(Callback):
    """Computes the features of training and validation images once, and reads them back from then on.

    The detectors bring one along. Give the trainer another to choose its settings, or to switch it off::

        trainer:
          callbacks:
            - class_path: anomalib_csflow.FeatureCache
              init_args: {max_gb: 0}

    It is used while fitting with one of anomalib's datamodules whose images are not changed at random; else it
    says why not. Batches whose features are all known have images of a single NaN pixel: nothing was decoded.

    Args:
        directory: where features are kept; else ``$ANOMALIB_CSFLOW_CACHE``, or the user's cache folder.
        dtype: in which they are kept. With ``float32`` nothing changes but the time.
        max_gb: bound of all that is kept there, in 10^9 bytes; 0 switches the cache off.

    Raises:
        ValueError: if max_gb is negative, or the dtype is none of the three.
    """

    def __init__(self, directory: str | Path | None = None, dtype: Dtype = "float32", max_gb: float = 20) -> None:
        dtypes = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
        if dtype not in dtypes or max_gb < 0:
            msg = f"the feature cache keeps one of {', '.join(dtypes)} and max_gb >= 0, got {dtype!r} and {max_gb}"
            raise ValueError(msg)
        self.directory = Path(directory).expanduser() if directory else default_directory()
        self.dtype = dtypes[dtype]
        self.max_gb = max_gb
        self._sets: dict[str, _CachedSet] = {}

    # -- when: from the beginning of fit to its end -------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take over the data sets of a fit, if that is safe."""
        datamodule = getattr(trainer, "datamodule", None)
        if stage != "fit" or self.max_gb == 0 or datamodule is None:
            return
        if not isinstance(pl_module.model, FlowModel):
            rank_zero_info(f"FeatureCache does nothing for {type(pl_module).__name__}: it is for flows on features.")
            return
        views = getattr(pl_module, "cached_views", ("",))
        if not views:
            rank_zero_info(
                f"Features are computed in every epoch: {type(pl_module).__name__} changes images at random."
            )
            return
        names = [name for name in ("train_data", "val_data") if getattr(datamodule, name, None) is not None]
        transform = getattr(getattr(pl_module, "pre_processor", None), "transform", None)
        for name in names:
            changing = next(changing_transforms([getattr(datamodule, name).augmentations, transform]), None)
            if changing is not None:
                rank_zero_info(f"Features are computed in every epoch: {changing} may change images from time to time.")
                return
        common = _context(trainer, pl_module) | {"transform": repr(transform)}
        for name in names:
            dataset = getattr(datamodule, name)
            context = common | {"augmentations": repr(dataset.augmentations)}
            store = FeatureStore(self.directory, context, self.dtype, int(self.max_gb * 1e9))
            self._sets[name] = _CachedSet(dataset, store, views)
            setattr(datamodule, name, self._sets[name])
        cast("Any", pl_module).feature_cache = self

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Decode nothing if all features are there from an earlier run."""
        self.on_train_epoch_start(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Decode nothing in this epoch if all features are there."""
        del trainer, pl_module
        if "train_data" in self._sets:
            self._sets["train_data"].look()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the data sets back, as they were."""
        del stage
        for name, cached in self._sets.items():
            setattr(trainer.datamodule, name, cached.dataset)  # type: ignore[attr-defined]
        self._sets = {}
        cast("Any", pl_module).feature_cache = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the data sets back here too: Lightning leaves teardown out."""
        del exception
        self.teardown(trainer, pl_module, "fit")

    # -- what: features of a batch ------------------------------------------------------------------

    def holds(self, path: str) -> bool:
        """Whether the image's features are known, and so the image could be read."""
        key = image_key(path)
        return key is not None and any(key in cached.store for cached in self._sets.values())

    def features(
        self, batch: Batch[Any], compute: Callable[[Tensor], Pyramid], trainer: Trainer, view: str = ""
    ) -> Pyramid:
        """Read the features of a batch's images, and compute those that are not there.

        Args:
            batch: pre-processed, with the paths of its images.
            compute: images to features.
            trainer: that runs the batch.
            view: names a fixed transform which ``compute`` does first: each has features of its own.

        Returns:
            Maps ``(N, C, H, W)``, or vectors ``(N, D)``, on the batch's device.
        """
        cached = self._sets.get("val_data" if trainer.validating or trainer.sanity_checking else "train_data")
        paths = getattr(batch, "image_path", None)
        if cached is None or not paths:
            return compute(cast("Tensor", batch.image))
        keys = [image_key(path, view) for path in paths]
        found = [cached.store.get(key) if key else None for key in keys]
        missing = [index for index, pyramid in enumerate(found) if pyramid is None]
        if missing:
            images = cast("Tensor", batch.image)
            if len(images) == len(paths):
                images = images[missing]
            else:  # nothing was decoded, and now something is gone
                images = self._decode([paths[index] for index in missing], cached, trainer, images)
            levels = compute(images)
            for row, index in enumerate(missing):
                pyramid = tuple(level[row] for level in levels)
                found[index] = pyramid
                key = keys[index]
                if key is not None and cached.is_unchanged(paths[index]):  # else it may not be what was decoded
                    cached.store.put(key, pyramid)
        device, dtype = cast("Tensor", batch.image).device, torch.get_default_dtype()
        whole = cast("list[Pyramid]", found)
        return tuple(
            torch.stack([level.to(device, dtype, non_blocking=True) for level in levels])
            for levels in zip(*whole, strict=True)
        )

    @staticmethod
    def _decode(paths: Sequence[str], cached: "_CachedSet", trainer: Trainer, like: Tensor) -> Tensor:
        images = torch.stack([cached.read(path) for path in paths]).to(like.device)
        transform = getattr(getattr(trainer.lightning_module, "pre_processor", None), "transform", None)
        return transform(images) if transform else images


class _CachedSet(Dataset[ImageItem]):
    """A data set that leaves the decoding out of batches whose features are all in the store."""

    def __init__(self, dataset: AnomalibDataset, store: FeatureStore, views: Sequence[str] = ("",)) -> None:
        self.dataset = dataset
        self.store = store
        self.views = views
        self.is_known = False
        self.paths = [str(path) for path in dataset.samples.image_path]
        self.keys = {path: image_key(path) for path in self.paths}  # of the files before anything is decoded

    def look(self) -> None:
        """See whether all features are there; only of plain images can the decoding be left out."""
        is_plain = type(self.dataset).__getitem__ is AnomalibDataset.__getitem__
        self.is_known = is_plain and all(
            (key := image_key(path, view)) and key in self.store for path in self.paths for view in self.views
        )

    def is_unchanged(self, path: str) -> bool:
        """Whether a file is still what it was before anything was decoded."""
        return image_key(path) == self.keys.get(path)

    def read(self, path: str) -> Tensor:
        """Decode an image as the data set does."""
        return cast("Tensor", self.dataset[self.paths.index(path)].image)

    def __getitem__(self, index: int) -> ImageItem:
        """Read a sample, or leave out what is not needed."""
        if not self.is_known:
            return cast("ImageItem", self.dataset[index])
        return ImageItem(image=torch.full((3, 1, 1), torch.nan), image_path=self.paths[index])

    def collate_fn(self, items: list[ImageItem]) -> Batch[Any]:
        """Collate; a batch without images gets a single one, which costs its transforms nothing."""
        if not self.is_known:
            return cast("Batch[Any]", self.dataset.collate_fn(items))
        return ImageBatch(image=cast("Any", items[0].image)[None], image_path=[str(item.image_path) for item in items])

    def __len__(self) -> int:
        """Count the samples."""
        return len(self.dataset)

    def __getattr__(self, name: str) -> Any:
        """Everything else is the data set's."""
        if name == "dataset":  # while it is being unpickled in a worker
            raise AttributeError(name)
        return getattr(self.dataset, name)


def changing_transforms(transforms: Sequence[Any]) -> Iterator[str]:
    """Names of those among transforms, and of those within them, that are not known to be fixed."""
    for transform in transforms:
        if isinstance(transform, v2.Compose):
            yield from changing_transforms(transform.transforms)
        elif transform is not None and type(transform) not in FIXED_TRANSFORMS:
            yield type(transform).__name__


def _context(trainer: Trainer, module: LightningModule) -> dict[str, str]:
    """All that features depend on beside the image and its transforms."""
    features = cast("FlowModel", module.model).features
    return {
        "backbone": str(module.hparams.get("backbone")),
        "features": f"{type(features).__name__}({features.extra_repr()})",
        "weights": weights.fingerprint(features),
        "precision": str(trainer.precision),
        "versions": " ".join(f"{name} {version(name)}" for name in ("anomalib-csflow", "timm", "torchvision")),
    }
