"""From images to features: the image size, checks before any long work, and where features come from."""

from collections.abc import Callable
from dataclasses import replace

from anomalib.data import AnomalibDataModule
from anomalib.pre_processing import PreProcessor
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from anomalib_csflow.flows.pyramid import Pyramid

from .compiled import CompiledFeatures, compiled
from .feature_cache import FeatureCache
from .images import (
    ImageOptions,
    as_large_as_square,
    check_images,
    check_number,
    check_variety,
    image_files,
    mask_files,
    size_like,
    training_files,
)
from .model import FlowModel
from .providers import PLAIN, ComputedFeatures, FeatureProvider, View


class FlowInputs(LightningModule):
    """A detector's way from images to features: the image size, the checks, and where features come from."""

    model: FlowModel
    image_options: ImageOptions
    pre_processor: PreProcessor | None
    compiled: CompiledFeatures | None
    check_read_checkpoints: Callable[[], None]
    repeat_training_set: Callable[[], None]

    # -- size -------------------------------------------------------------------------------------

    def configure_pre_processor(  # anomalib's is static, but called on the instance
        self, image_size: tuple[int, int] | None = None
    ) -> PreProcessor:
        """Resize to ``image_size`` and normalize with the mean and standard deviation of the backbone's training."""
        return self.image_options.pre_processor(image_size)

    def take_size(self, size: tuple[int, int]) -> None:
        """Resize images to this height and width from now on; checkpoints and exported models do so too."""
        self.model.features.check_size(*size)
        self.image_options = replace(self.image_options, image_size=size)
        self.hparams["image_size"] = size
        processor = self.image_options.pre_processor()
        if self.pre_processor is not None:
            self.pre_processor.transform = processor.transform
            self.pre_processor.export_transform = processor.export_transform
        rank_zero_info(f"Images are resized to a height of {size[0]} and a width of {size[1]} pixels.")

    def follow_aspect(self) -> None:
        """When a fit begins, take the size from the training images' aspect ratio, if the options leave it open."""
        if not self.image_options.is_open or self.trainer.state.fn != "fit":
            return
        data, side = getattr(self.trainer, "datamodule", None), self.image_options.size[0]
        if self.image_options.keep_aspect != "auto":
            self.take_size(size_like(training_files(data), side, self.model.features.strides[-1]))
        elif isinstance(data, AnomalibDataModule):
            self.take_size(as_large_as_square(training_files(data), side, self.model.features.strides[-1]))

    # -- features ---------------------------------------------------------------------------------

    @property
    def fixed_views(self) -> tuple[View, ...]:
        """All views of an image that training uses, if they are fixed; empty if not, so that no features are cached."""
        return (PLAIN,)

    @property
    def feature_cache(self) -> FeatureCache | None:
        """The trainer's feature cache, if it has one."""
        callbacks = getattr(self._trainer, "callbacks", ())
        return next((callback for callback in callbacks if isinstance(callback, FeatureCache)), None)

    @property
    def compute(self) -> Callable[[Tensor], Pyramid]:
        """The backbone, or the same in OpenVINO if that is faster: pre-processed images to features."""
        return self.compiled or self.model.features.few_at_once

    @property
    def provider(self) -> FeatureProvider:
        """The trainer's feature cache while it is open, else the backbone."""
        cache = self.feature_cache
        return cache.opened if cache and cache.opened else ComputedFeatures(self.compute)

    # -- before a stage ---------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Check the number of good images here, since the datamodule's ``setup`` runs before the detector's."""
        check_number(getattr(self.trainer, "datamodule", None))

    def setup(self, stage: str) -> None:
        """Open the feature cache for a fit, and check a stage's images before any long work starts."""
        self.check_read_checkpoints()
        datamodule = getattr(self.trainer, "datamodule", None)
        names = {"fit": ("train_data", "val_data"), "validate": ("val_data",), "test": ("test_data",)}.get(stage, ())
        self._compile(sum(len(getattr(datamodule, name, None) or ()) for name in names))
        if stage == "fit" and self.feature_cache:
            self.feature_cache.open(
                self.trainer, self.model.features, self.compute, self.image_options.backbone, self.fixed_views
            )
        if stage == "fit":
            self.repeat_training_set()
        if self.trainer.is_global_zero:
            provider = self.provider
            sets = [getattr(datamodule, name, None) for name in names]
            files = [file for data in sets for file in image_files(data) if not provider.holds(file)]
            check_images(files, [file for data in sets for file in mask_files(data)])
            if stage == "fit":
                check_variety([*image_files(getattr(datamodule, "train_data", None))])

    def on_predict_start(self) -> None:
        """Check the images to predict."""
        loaders = self.trainer.predict_dataloaders
        loaders = loaders if isinstance(loaders, list) else [loaders]  # a datamodule gives a single loader
        files = [file for loader in loaders for file in image_files(getattr(loader, "dataset", None))]
        check_images(files)
        self._compile(len(files))

    def on_predict_end(self) -> None:
        """Wait for the other processes: if one has failed, this one fails too, because images are missing."""
        self.trainer.strategy.barrier()

    def _compile(self, num_images: int) -> None:
        """Let OpenVINO compute the features of a stage, if the stage has enough images."""
        if self.compiled is None:  # a refit uses its detector's
            device, precision = self.trainer.strategy.root_device, str(self.trainer.precision)
            self.compiled = compiled(self.model.features, num_images, device, precision)
