"""Who gives a detector the features of a batch's images: its backbone, or a store of what it computed before."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, cast

import torch
from anomalib.data import AnomalibDataset, Batch, ImageBatch, ImageItem
from torch import Tensor
from torch.utils.data import Dataset

from anomalib_csflow.features.store import FeatureStore, image_key
from anomalib_csflow.flows.pyramid import Pyramid


class View(NamedTuple):
    """A fixed transform of pre-processed images, ``(N, 3, H, W)`` to as many, whose features are kept by its name."""

    name: str
    show: Callable[[Tensor], Tensor]


PLAIN = View("", lambda images: images)
"""Images as they are."""


class FeatureProvider(Protocol):
    """Gives features of a batch's images; in training and evaluation a detector asks nobody else.

    Attributes:
        keeps: whether what was computed once is read back from then on.
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
    """Computes features with the frozen backbone, whenever it is asked."""

    keeps = False

    def __init__(self, compute: Callable[[Tensor], Pyramid]) -> None:
        self.compute = compute

    def features(self, batch: Batch[Any], view: View = PLAIN) -> Pyramid:
        """Compute; see :class:`FeatureProvider`."""
        return self.compute(view.show(cast("Tensor", batch.image)))

    def holds(self, path: str) -> bool:
        """Nothing is kept."""
        del path
        return False


class CachedFeatures:
    """Reads features from the stores of a fit's data sets; see :class:`FeatureProvider`.

    Args:
        compute: the frozen backbone, for what is not there.
        transform: the pre-processor's, for images that were not decoded.
        sets: ``train_data`` and ``val_data``, where there are such.
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
        """Whether the image's features are known, and so the image could be read."""
        key = image_key(path)
        return key is not None and any(key in cached.store for cached in self.sets.values())

    def features(self, batch: Batch[Any], view: View = PLAIN) -> Pyramid:
        """Read the features of a batch's images, and compute those that are not there."""
        images = cast("Tensor", batch.image)
        paths = getattr(batch, "image_path", None) or [""]
        cached = next((one for one in self.sets.values() if paths[0] in one.keys), None)
        if cached is None:
            return self.compute(view.show(images))
        keys = [image_key(path, view.name) for path in paths]
        found = [cached.store.get(key) if key else None for key in keys]
        missing = [index for index, pyramid in enumerate(found) if pyramid is None]
        if missing:
            if len(images) == len(paths):
                unknown = images[missing]
            else:  # nothing was decoded, and now something is gone
                unknown = self._decode([paths[index] for index in missing], cached, images.device)
            levels = self.compute(view.show(unknown))
            for row, index in enumerate(missing):
                pyramid = tuple(level[row] for level in levels)
                found[index] = pyramid
                key = keys[index]
                if key is not None and cached.is_unchanged(paths[index]):  # else it may not be what was decoded
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
    """A data set that leaves the decoding out of batches of which the store has all features, in all views."""

    def __init__(self, dataset: AnomalibDataset, store: FeatureStore, views: Sequence[str]) -> None:
        self.dataset = dataset
        self.store = store
        self.views = views
        self.is_known = False
        self.paths = [str(path) for path in dataset.samples.image_path]
        self.keys = {path: image_key(path) for path in self.paths}  # of the files before anything is decoded

    def look(self) -> None:
        """See whether all features are there; only of plain images can the decoding be left out."""
        is_plain = type(self.dataset).__getitem__ is AnomalibDataset.__getitem__  # LOCO's has masks of its own
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


class RepeatedSet(Dataset[ImageItem]):
    """A data set as often as an epoch of a given number of steps needs it; its samples are drawn in random order.

    Args:
        dataset: with one sample or more.
        length: samples of an epoch.
    """

    def __init__(self, dataset: AnomalibDataset | CachedSet, length: int) -> None:
        self.dataset = dataset
        self.length = length

    def __getitem__(self, index: int) -> ImageItem:
        """Read a sample."""
        return cast("ImageItem", self.dataset[index % len(self.dataset)])

    def __len__(self) -> int:
        """Count the samples of an epoch."""
        return self.length

    def __getattr__(self, name: str) -> Any:
        """Everything else is the data set's."""
        if name == "dataset":  # while it is being unpickled in a worker
            raise AttributeError(name)
        return getattr(self.dataset, name)
