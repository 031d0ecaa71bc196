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
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, nn

from anomalib_csflow import scoring
from anomalib_csflow.features.weights import create_backbone
from anomalib_csflow.flows.pyramid import Pyramid

from .checkpoints import LeanCheckpoints
from .crops import random_crops
from .exports import FlowExports
from .feature_cache import FeatureCache
from .fitting import FlowFitting
from .images import ImageOptions
from .inputs import FlowInputs
from .model import FlowModel
from .optimization import FlowOptimization, TrainingOptions
from .post_processing import ConformalPostProcessor
from .precision import bfloat16
from .roles import SeenImages
from .step_images import StepImages
from .visualizer import CalibratedVisualizer


class FlowDetector(FlowInputs, FlowFitting, FlowOptimization, LeanCheckpoints, FlowExports, AnomalibModule, ABC):
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
        if image_options.keep_aspect == "auto" and isinstance(pre_processor, PreProcessor):
            image_options = replace(image_options, keep_aspect=False)  # which has its own size
        self.image_options = image_options  # first, since the pre-processor is made from it
        self.training_options = training_options
        self.roles = {}
        made_here = "keep_aspect=True" if image_options.keep_aspect else "region" if image_options.region else None
        if made_here and isinstance(pre_processor, PreProcessor):
            msg = f"{made_here} needs the detector's own pre-processor: leave out pre_processor"
            raise ValueError(msg)
        super().__init__(pre_processor, post_processor, evaluator, visualizer)
        if "region" in self.hparams:
            self.hparams["region"] = image_options.region  # and not a file that may be gone when a checkpoint is loaded
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
        """Anomalib's components, digests of images, a feature cache if there is none, and images for ``max_steps``."""
        self.follow_aspect()  # before a datamodule reads the size
        callbacks = [*cast("list[Callback]", super().configure_callbacks())]
        return [*callbacks, SeenImages(), *([] if self.feature_cache else [FeatureCache()]), StepImages()]
