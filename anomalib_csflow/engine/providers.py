"""Where a detector's features come from: the backbone, or a store of features that it computed before."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, cast

import torch
from anomalib.data import AnomalibDataset, Batch, ImageBatch, ImageItem
from torch import Tensor
from torch.utils.data import Dataset

from anomalib_csflow.features.store import FeatureStore, image_key
from anomalib_csflow.flows.pyramid import Pyramid


class View(NamedTuple):
    """A fixed transform of pre-processed images, ``(N, 3, H, W)`` to N images; features are stored under its name."""

    name: str
    show: Callable[[Tensor], Tensor]


PLAIN = View("", lambda images: images)
"""Images without any transform."""


class FeatureProvider(Protocol):
    """Gives features of a batch's images; the only source of features in training and evaluation.

    Attributes:
        keeps: whether features are stored, so that each image's are computed only once.
    """

    keeps: bool

    def features(self, batch: Batch[Any], view: View = PLAIN) -> Pyramid:
        """Features of a view of N pre-processed images.

        Returns:
            Maps ``(N, C, H, W)``, finest first, or one of vectors ``(N, D)``, on the batch's device.
        """

    def holds(self, path: str) -> bool:
        """Whether an image file need not be decoded."""


class ComputedFeatures:
    """Computes features with the frozen backbone at every call."""

    keeps = False

    def __init__(self, compute: Callable[[Tensor], Pyramid]) -> None:
        self.compute = compute

    def features(self, batch: Batch[Any], view: View = PLAIN) -> Pyramid:
        """Compute; see :class:`FeatureProvider`."""
        return self.compute(view.show(cast("Tensor", batch.image)))

    def holds(self, path: str) -> bool:
        """Nothing is stored."""
        del path
        return False


class CachedFeatures:
    """Reads features from the stores of a fit's data sets; see :class:`FeatureProvider`.

    Args:
        compute: the frozen backbone, for features that are not stored.
        transform: the pre-processor's, for images that were not decoded.
        sets: ``train_data`` and ``val_data``, those that exist.
    """

    keeps = True

    def __init__(
        self,
        compute: Callable[[Tensor], Pyramid],
        transform: Callable[[Tensor], Tensor] | None,
        sets: Mapping[str, "CachedSet"],
    ) -> None:
        self.compute = compute
        self.transform = transform
        self.sets = sets

    def holds(self, path: str) -> bool:
        """Whether the image's features are stored, which means that the image could be read."""
        key = image_key(path)
        return key is not None and any(key in cached.store for cached in self.sets.values())

    def features(self, batch: Batch[Any], view: View = PLAIN) -> Pyramid:
        """Read the features of a batch's images, and compute those that are not stored."""
        images = cast("Tensor", batch.image)
        paths = getattr(batch, "image_path", None) or [""]
        cached = next((one for one in self.sets.values() if paths[0] in one.keys), None)
        if cached is None:
            return self.compute(view.show(images))
        keys = [image_key(path, view.name) for path in paths]
        found = [cached.store.get(key) if key else None for key in keys]
        missing = [index for index, pyramid in enumerate(found) if pyramid is None]
        if missing:
            if not images.isnan().any():
                unknown = images[missing]
            else:  # nothing was decoded, and a stored file has disappeared or been damaged since
                unknown = self._decode([paths[index] for index in missing], cached, images.device)
            levels = self.compute(view.show(unknown))
            for row, index in enumerate(missing):
                pyramid = tuple(level[row] for level in levels)
                found[index] = pyramid
                key = keys[index]
                if key is not None and cached.is_unchanged(paths[index]):  # else the decoded image may be another
                    cached.store.put(key, pyramid)
        dtype, whole = torch.get_default_dtype(), cast("list[Pyramid]", found)
        return tuple(
            torch.stack([level.to(images.device, dtype, non_blocking=True) for level in levels])
            for levels in zip(*whole, strict=True)
        )

    def _decode(self, paths: Sequence[str], cached: "CachedSet", device: torch.device) -> Tensor:
        images = torch.stack([cached.read(path) for path in paths]).to(device)
        return self.transform(images) if self.transform else images


class CachedSet(Dataset[ImageItem]):
    """A data set that does not decode images if the store has the features of all of them, in all views."""

    def __init__(self, dataset: AnomalibDataset, store: FeatureStore, views: Sequence[str]) -> None:
        self.dataset = dataset
        self.store = store
        self.views = views
        self.is_known = False
        self.paths = [str(path) for path in dataset.samples.image_path]
        self.keys = {path: image_key(path) for path in self.paths}  # of the files before anything is decoded

    def look(self) -> None:
        """Look whether all features are stored; decoding can only be skipped if the data set just reads images."""
        is_plain = type(self.dataset).__getitem__ is AnomalibDataset.__getitem__  # LOCO's has masks of its own
        self.is_known = is_plain and all(
            (key := image_key(path, view)) and key in self.store for path in self.paths for view in self.views
        )

    def is_unchanged(self, path: str) -> bool:
        """Whether a file is still the same as before decoding began."""
        return image_key(path) == self.keys.get(path)

    def read(self, path: str) -> Tensor:
        """Decode an image as the data set does."""
        return cast("Tensor", self.dataset[self.paths.index(path)].image)

    def __getitem__(self, index: int) -> ImageItem:
        """Read a sample, without its image if that is not needed."""
        if not self.is_known:
            return cast("ImageItem", self.dataset[index])
        return ImageItem(image=torch.full((3, 1, 1), torch.nan), image_path=self.paths[index])

    def collate_fn(self, items: list[ImageItem]) -> Batch[Any]:
        """Collate; a batch without images gets a single pixel, so that transforms cost almost nothing."""
        if not self.is_known:
            return cast("Batch[Any]", self.dataset.collate_fn(items))
        return ImageBatch(image=cast("Any", items[0].image)[None], image_path=[str(item.image_path) for item in items])

    def __len__(self) -> int:
        """Count the samples."""
        return len(self.dataset)

    def __getattr__(self, name: str) -> Any:
        """All other attributes are those of the data set."""
        if name == "dataset":  # while it is being unpickled in a worker
            raise AttributeError(name)
        return getattr(self.dataset, name)


class RepeatedSet(Dataset[ImageItem]):
    """A data set, repeated to fill an epoch of a given number of steps; its samples are drawn in random order.

    Args:
        dataset: with one sample or more.
        steps: number of steps in an epoch.
        step_size: number of samples in a step, of all processes together.
    """

    def __init__(self, dataset: AnomalibDataset | CachedSet, steps: int, step_size: int) -> None:
        self.dataset = dataset
        self.steps = steps
        self.step_size = step_size

    def __getitem__(self, index: int) -> ImageItem:
        """Read a sample."""
        return cast("ImageItem", self.dataset[index % len(self.dataset)])

    def __len__(self) -> int:
        """Count the samples of an epoch."""
        return self.steps * self.step_size

    def __getattr__(self, name: str) -> Any:
        """All other attributes are those of the data set."""
        if name == "dataset":  # while it is being unpickled in a worker
            raise AttributeError(name)
        return getattr(self.dataset, name)
