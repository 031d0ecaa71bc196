"""The main path that all detectors share: images, features, latents, score. Read this first."""

import inspect
from abc import ABC
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

from anomalib import LearningType
from anomalib.data import Batch, InferenceBatch
from anomalib.metrics import AUROC, Evaluator
from anomalib.metrics.base import AnomalibMetric
from anomalib.models.components import AnomalibModule
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import ImageVisualizer, Visualizer
from lightning.pytorch import Callback
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, nn

from anomalib_csflow import scoring
from anomalib_csflow.features.weights import create_backbone
from anomalib_csflow.flows.pyramid import Pyramid

from .checkpoints import LeanCheckpoints
from .compiled import compiled
from .crops import random_crops
from .exports import FlowExports
from .feature_cache import FeatureCache
from .fitting import FlowFitting
from .images import (
    ImageOptions,
    check_images,
    check_number,
    check_variety,
    image_files,
    mask_files,
    size_like,
    training_files,
)
from .model import FlowModel
from .optimization import FlowOptimization, TrainingOptions
from .post_processing import ConformalPostProcessor
from .precision import bfloat16
from .providers import PLAIN, ComputedFeatures, FeatureProvider, View
from .roles import SeenImages
from .step_images import StepImages
from .visualizer import CalibratedVisualizer


class FlowDetector(FlowFitting, FlowOptimization, LeanCheckpoints, FlowExports, AnomalibModule, ABC):
    """What all detectors of this package do in anomalib's engine.

    It stands between ``AnomalibModule`` and the detectors, because anomalib looks up short names among direct
    subclasses only, and must not find a detector of ours instead of one of its own.

    Args:
        build: makes the network around a backbone; called once.
        image_options: the backbone, and how images are pre-processed for it.
        training_options: how the flow is trained.
        pre_processor, post_processor, evaluator, visualizer: anomalib's components, or True for the defaults.

    A subclass declares in ``output_arguments`` which of its other arguments must be the same in a checkpoint that it
    loads, and in ``free_arguments`` which may differ.
    """

    model: FlowModel

    def __init__(
        self,
        build: Callable[[nn.Module], FlowModel],
        image_options: ImageOptions,
        training_options: TrainingOptions,
        pre_processor: PreProcessor | bool,
        post_processor: PostProcessor | bool,
        evaluator: Evaluator | bool,
        visualizer: Visualizer | bool,
    ) -> None:
        self.image_options = image_options  # first, since the pre-processor is made from it
        self.training_options = training_options
        self.roles = {}
        if image_options.keep_aspect and isinstance(pre_processor, PreProcessor):
            msg = "keep_aspect=True makes the pre-processor when a fit begins: leave out pre_processor"
            raise ValueError(msg)
        super().__init__(pre_processor, post_processor, evaluator, visualizer)
        self.keep_backbone = image_options.weights == "random"  # which cannot be loaded again
        self.model = build(create_backbone(image_options.backbone, image_options.weights))
        if self.input_size is not None:
            self.model.features.check_size(*self.input_size)
        if training_options.noise and self.model.standardization is None:
            msg = (
                "noise is in standard deviations of the features, which only a detector with standardize=True measures"
            )
            raise ValueError(msg)

    def save_hyperparameters(self, *args: Any, ignore: Sequence[str] | str | None = None, **kwargs: Any) -> None:
        """Save the arguments of a detector, but not what it makes of them for this class."""
        ignored = [ignore] if isinstance(ignore, str) else [*(ignore or ())]
        frame = inspect.currentframe()  # Lightning looks for the arguments in its caller's frame
        kwargs.setdefault("frame", frame and frame.f_back)
        super().save_hyperparameters(*args, ignore=[*ignored, "build", "image_options", "training_options"], **kwargs)

    # -- what anomalib requires of a model --------------------------------------------------------

    def training_step(self, batch: Batch[Any], batch_idx: int) -> STEP_OUTPUT:
        """One step of maximum likelihood."""
        del batch_idx
        features, side = self.features(batch), self.training_options.crop_size
        if side is not None:
            features = random_crops(features, side, self.model.features.strides)
        features = self.noisy(features)
        with bfloat16(features[0].device, wanted=self.training_options.bfloat16):
            loss = self.loss(features)
        return self.checked(loss, batch)

    def features(self, batch: Batch[Any]) -> Pyramid:
        """Features of a training batch of pre-processed images."""
        return self.provider.features(batch)

    def loss(self, features: Pyramid) -> Tensor:  # type: ignore[override] # anomalib declares an unused module
        """Mean of ``1/2 ||z||^2 - log|det|`` per dimension: the nll per dimension without its constant."""
        latents, log_det = self.model.transform(features)
        return (scoring.energy(latents) - log_det).mean() / scoring.num_dims(latents)

    def evaluate(self, batch: Batch[Any]) -> InferenceBatch:
        """Score a batch's images, in validation, test and prediction; a method with another way overrides it.

        Returns:
            Image scores ``(N,)``, and maps ``(N, 1, H, W)`` or none.
        """
        height, width = cast("Tensor", batch.image).shape[-2:]
        return self.model.judge(self.provider.features(batch), (height, width))

    def validation_step(self, batch: Batch[Any], batch_idx: int, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Score a batch, for the post-processor to set thresholds; also the step of test and prediction."""
        del batch_idx, args, kwargs
        return batch.update(**self.evaluate(batch)._asdict())

    test_step = predict_step = validation_step

    def nll(self, images: Tensor, *, bits_per_dim: bool = False) -> Tensor:
        """Exact negative log-likelihood of each image's features; the mean over its views, if the method uses several.

        Args:
            images: ``(N, 3, H, W)`` in [0, 1], of any size: they are pre-processed as in ``forward`` and
                in exported models.
            bits_per_dim: return bits per dimension of the features instead of nats per image.

        Returns:
            ``(N,)``.
        """
        images = self.pre_processor(images) if self.pre_processor else images
        latents, log_det = self.model.latents(images)
        nats = self.model.per_image(scoring.nll(latents, log_det))
        return scoring.bits_per_dim(nats, scoring.num_dims(latents)) if bits_per_dim else nats

    @property
    def learning_type(self) -> LearningType:
        """Training uses good images only."""
        return LearningType.ONE_CLASS

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """Settings that override the user's trainer, and so as few as possible.

        No sanity steps, because they would set thresholds from an untrained flow; and the number of epochs, if the
        detector was given ``max_epochs``, or ``max_steps``, which are one epoch.
        """
        options = self.training_options
        max_epochs = options.max_epochs or (1 if options.max_steps else None)
        return {"num_sanity_val_steps": 0} | ({} if max_epochs is None else {"max_epochs": max_epochs})

    # -- components -------------------------------------------------------------------------------

    def configure_pre_processor(  # type: ignore[override] # anomalib's is static, but called on the instance
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

    def configure_post_processor(self) -> PostProcessor:
        """Labels and masks with a promised false-alarm rate, from good images only."""
        return ConformalPostProcessor()

    @staticmethod
    def configure_evaluator() -> Evaluator:
        """Anomalib's default test metrics, and validation metrics that early stopping can monitor."""
        defaults = AnomalibModule.configure_evaluator()
        for metric in cast("list[AnomalibMetric]", list(defaults.test_metrics)):
            metric.strict = False  # a detector that was not calibrated has scores but no labels
        return Evaluator(
            val_metrics=[
                AUROC(fields=["pred_score", "gt_label"], prefix="image_"),
                AUROC(fields=["anomaly_map", "gt_mask"], prefix="pixel_", strict=False),
            ],
            test_metrics=[*defaults.test_metrics],
        )

    @classmethod
    def configure_visualizer(cls) -> ImageVisualizer:
        """Pictures on the scale that good images gave."""
        return CalibratedVisualizer()

    def configure_callbacks(self) -> list[Callback]:
        """Anomalib's components, notes of what was seen, and a feature cache unless the trainer has one already."""
        if self.image_options.is_open and self.trainer.state.fn == "fit":  # before a datamodule reads the size
            files = training_files(getattr(self.trainer, "datamodule", None))
            self.take_size(size_like(files, self.image_options.size[0], self.model.features.strides[-1]))
        callbacks = [*cast("list[Callback]", super().configure_callbacks())]
        return [*callbacks, SeenImages(), *([] if self.feature_cache else [FeatureCache()]), StepImages()]

    # -- features ---------------------------------------------------------------------------------

    @property
    def fixed_views(self) -> tuple[View, ...]:
        """All views of an image that training uses, if they are fixed; else empty, and features are not cached."""
        return (PLAIN,)

    @property
    def feature_cache(self) -> FeatureCache | None:
        """The trainer's feature cache, if it has one."""
        callbacks = getattr(self._trainer, "callbacks", ())
        return next((callback for callback in callbacks if isinstance(callback, FeatureCache)), None)

    @property
    def compute(self) -> Callable[[Tensor], Pyramid]:
        """Computes features of pre-processed images with the backbone, in OpenVINO where that is faster."""
        return self.compiled or self.model.features

    @property
    def provider(self) -> FeatureProvider:
        """The trainer's feature cache while it is open, else the backbone."""
        cache = self.feature_cache
        return cache.opened if cache and cache.opened else ComputedFeatures(self.compute)

    # -- training ---------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Check the number of good images, since the datamodule's ``setup`` comes before ours."""
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
        loaders = loaders if isinstance(loaders, list) else [loaders]  # a single loader if it came from a datamodule
        files = [file for loader in loaders for file in image_files(getattr(loader, "dataset", None))]
        check_images(files)
        self._compile(len(files))

    def on_predict_end(self) -> None:
        """Wait for the other processes: if one has failed, so does this, since its images are missing."""
        self.trainer.strategy.barrier()

    def _compile(self, num_images: int) -> None:
        """Let OpenVINO compute the features of a stage, if the stage has enough images."""
        if self.compiled is None:  # a refit uses that of the detector
            device, precision = self.trainer.strategy.root_device, str(self.trainer.precision)
            self.compiled = compiled(self.model.features, num_images, device, precision)
