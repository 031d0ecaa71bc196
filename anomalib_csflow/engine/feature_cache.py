"""The feature cache in anomalib's engine: when it is safe, and which features belong to which image."""

from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from anomalib_csflow.features import FeaturePyramid, weights
from anomalib_csflow.features.store import FeatureStore, default_directory
from anomalib_csflow.features.trust import UntrustedError
from anomalib_csflow.flows.pyramid import Pyramid

from .cache_key import UnkeyedError, check_datamodule, data_key, pre_processor_key
from .compiled import computed_by
from .model import FlowModel
from .providers import CachedFeatures, CachedSet, View

Dtype = Literal["float32", "float16", "bfloat16"]

KEYED_VERSIONS = ("anomalib-csflow", "anomalib", "timm", "torchvision", "pillow")
"""Packages that read, transform or compute; their versions are part of the key."""


class FeatureCache(Callback):
    """Computes the features of training and validation images once, and then reads them back.

    Every detector adds one to the trainer. Give the trainer another to choose its settings, or to switch it off::

        trainer:
          callbacks:
            - class_path: anomalib_csflow.FeatureCache
              init_args: {max_gb: 0}

    It is used while fitting with one of anomalib's datamodules, if images are not changed at random, and are read and
    pre-processed by classes that it knows; otherwise it logs the reason. If all features of a batch are stored, its
    images are not decoded: they are a single NaN pixel.

    Args:
        directory: where features are stored; by default ``$ANOMALIB_CSFLOW_CACHE``, or the user's cache folder.
        dtype: in which they are stored; with ``float32``, results are the same as without a cache.
        max_gb: size limit of the directory, in 10^9 bytes; 0 switches the cache off.

    Attributes:
        opened: reads and writes features during a fit, if that is safe; otherwise None.

    Raises:
        ValueError: if max_gb is negative, or the dtype is not one of the three.
    """

    def __init__(self, directory: str | Path | None = None, dtype: Dtype = "float32", max_gb: float = 20) -> None:
        dtypes = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
        if dtype not in dtypes or max_gb < 0:
            msg = f"the feature cache needs a dtype of {', '.join(dtypes)} and max_gb >= 0, got {dtype!r} and {max_gb}"
            raise ValueError(msg)
        self.directory = Path(directory).expanduser() if directory else default_directory()
        self.dtype = dtypes[dtype]
        self.max_gb = max_gb
        self.opened: CachedFeatures | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Log it if the model does not use the cache."""
        del trainer
        if stage == "fit" and self.max_gb > 0 and not isinstance(pl_module.model, FlowModel):
            rank_zero_info(f"FeatureCache has no effect on {type(pl_module).__name__}: it needs a flow on features.")

    def open(
        self,
        trainer: Trainer,
        features: FeaturePyramid,
        compute: Callable[[Tensor], Pyramid],
        backbone: str,
        views: Sequence[View],
    ) -> None:
        """Take over the data sets of a fit, if that is safe; called by the detector's ``setup``.

        Args:
            trainer: with the detector and the datamodule.
            features: the frozen backbone.
            compute: computes features that are not stored: the backbone, or the same in OpenVINO.
            backbone: its name.
            views: all views of an image that training uses; empty if they change from step to step.
        """
        datamodule: Any = getattr(trainer, "datamodule", None)
        if self.max_gb == 0 or datamodule is None:
            return
        if not views:
            name = type(trainer.lightning_module).__name__
            rank_zero_info(f"Features are computed in every epoch: {name} changes images at random.")
            return
        names = [name for name in ("train_data", "val_data") if getattr(datamodule, name, None) is not None]
        pre_processor = getattr(trainer.lightning_module, "pre_processor", None)
        try:
            check_datamodule(datamodule)
            pre_processed = pre_processor_key(pre_processor)
            read = {name: data_key(getattr(datamodule, name)) for name in names}
        except UnkeyedError as reason:
            rank_zero_info(f"Features are computed in every epoch: {reason}.")
            return
        common = {  # everything that features depend on, apart from the image and the augmentations
            "backbone": backbone,
            "features": f"{type(features).__module__}.{type(features).__qualname__}({features.extra_repr()})",
            "weights": weights.fingerprint(features),
            "precision": str(trainer.precision),
            "computed by": computed_by(compute),
            "versions": " ".join(f"{name} {version(name)}" for name in KEYED_VERSIONS),
            "transform": pre_processed,
        }
        sets = {}
        for name in names:
            dataset = getattr(datamodule, name)
            context = common | {"data": read[name]}
            try:
                store = FeatureStore(self.directory, context, self.dtype, int(self.max_gb * 1e9))
            except UntrustedError as reason:
                rank_zero_warn(f"Features are computed in every epoch: {reason}.")
                return
            sets[name] = CachedSet(dataset, store, [view.name for view in views])
        for name in names:
            setattr(datamodule, name, sets[name])  # anomalib's datamodules read it whenever they make a loader
        self.opened = CachedFeatures(compute, pre_processor and pre_processor.transform, sets)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Skip decoding if all features are stored from an earlier fit."""
        self.on_train_epoch_start(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Skip decoding in this epoch if all features are stored."""
        del trainer, pl_module
        if self.opened and "train_data" in self.opened.sets:
            self.opened.sets["train_data"].look()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restore the original data sets."""
        del pl_module, stage
        for name, cached in self.opened.sets.items() if self.opened else ():
            setattr(trainer.datamodule, name, cached.dataset)  # type: ignore[attr-defined]
        self.opened = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restore the data sets here too, since Lightning does not call teardown then."""
        del exception
        self.teardown(trainer, pl_module, "fit")
