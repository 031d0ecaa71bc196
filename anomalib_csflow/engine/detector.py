"""The main path that all detectors share: images, features, latents, score. Read this first."""

import inspect
from abc import ABC
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
from anomalib import LearningType
from anomalib.data import Batch, InferenceBatch
from anomalib.metrics import AUROC, Evaluator
from anomalib.models.components import AnomalibModule
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import Visualizer
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import STEP_OUTPUT, OptimizerLRScheduler
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler

from anomalib_csflow import scoring
from anomalib_csflow.features.weights import create_backbone
from anomalib_csflow.flows import ChannelWhitening
from anomalib_csflow.flows.pyramid import Pyramid

from . import optimization
from .checkpoints import LeanCheckpoints
from .exports import FlowExports
from .feature_cache import FeatureCache
from .images import ImageOptions, check_images, image_files
from .model import FlowModel
from .optimization import TrainingOptions
from .precision import bfloat16
from .providers import PLAIN, ComputedFeatures, FeatureProvider, RepeatedSet, View


class NonFiniteLossError(RuntimeError):
    """Training diverged: the loss or its gradient is NaN or infinite."""


class FlowDetector(LeanCheckpoints, FlowExports, AnomalibModule, ABC):
    """What every detector of this package does in anomalib's engine.

    It stands between ``AnomalibModule`` and the detectors so that anomalib's own lookup by short name
    (direct subclasses only) never finds a detector of ours in place of one of its own.

    Args:
        build: makes the network around a backbone; called once.
        image_options: what the backbone is, and what it sees of an image.
        training_options: how the flow is trained.
        pre_processor: or True for one made from the image options.
        post_processor: or True for anomalib's.
        evaluator: or True for anomalib's metrics.
        visualizer: or True for anomalib's.

    Attributes:
        output_arguments: names of a subclass's own arguments that must be those of a checkpoint that it loads.
        free_arguments: names of its own that may differ. Each of its arguments is in one of the two, a field of the
            options, or a component.
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
        super().__init__(pre_processor, post_processor, evaluator, visualizer)
        self.keep_backbone = image_options.weights == "random"  # which can be had nowhere again
        self.model = build(create_backbone(image_options.backbone, image_options.weights))
        if self.input_size is not None:
            self.model.features.check_size(*self.input_size)
        if training_options.noise and self.model.standardization is None:
            msg = (
                "noise is in standard deviations of the features, which only a detector with standardize=True measures"
            )
            raise ValueError(msg)
        self._noise = 0.0
        self._saved_step = self._measured_step = -1

    def save_hyperparameters(self, *args: Any, ignore: Sequence[str] | str | None = None, **kwargs: Any) -> None:
        """Save the arguments that a detector is given, and not what it makes of them for this class."""
        ignored = [ignore] if isinstance(ignore, str) else [*(ignore or ())]
        frame = inspect.currentframe()  # the host looks for arguments in its caller's
        kwargs.setdefault("frame", frame and frame.f_back)
        super().save_hyperparameters(*args, ignore=[*ignored, "build", "image_options", "training_options"], **kwargs)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Adam on the flow's parameters, with the detector's schedule."""
        is_mixed = self._trainer is not None and isinstance(self.trainer.precision_plugin, MixedPrecision)
        return optimization.adam(
            self.model.flow.parameters(),
            self.training_options,
            lambda: self.trainer.estimated_stepping_batches,
            fused=not is_mixed,
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Remember that the flow as it is now was saved."""
        super().on_save_checkpoint(checkpoint)
        self._saved_step = self.global_step

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Resume a schedule where it stood, over as many steps as are planned now."""
        super().on_load_checkpoint(checkpoint)
        optimization.forget_length(checkpoint)

    # -- what anomalib asks of a model ------------------------------------------------------------

    def training_step(self, batch: Batch[Any], batch_idx: int) -> STEP_OUTPUT:
        """One step of maximum likelihood."""
        del batch_idx
        features = self.noisy(self.features(batch))
        with bfloat16(features[0].device, wanted=self.training_options.bfloat16):
            loss = self.loss(features)
        return self.checked(loss, batch)

    def checked(self, loss: Tensor, batch: Batch[Any]) -> Tensor:
        """Log a batch's loss, and stop if it is not finite."""
        if not torch.isfinite(loss):
            self._stop("the loss", loss)
        self.log(
            "train_loss", loss, on_step=True, on_epoch=True, prog_bar=True, batch_size=len(cast("Tensor", batch.image))
        )
        return loss

    def features(self, batch: Batch[Any]) -> Pyramid:
        """Features of a training batch's images, which are pre-processed already."""
        return self.provider.features(batch)

    def noisy(self, features: Pyramid) -> Pyramid:
        """Training features with the noise that the training options ask for."""
        if not self._noise:
            return features
        layer = self.model.standardization
        assert layer is not None  # noqa: S101 (checked when the detector was built)
        pairs = zip(features, layer.stds, strict=True)
        return tuple(x + torch.randn_like(x) * (self._noise * std.view(-1, *[1] * (x.ndim - 2))) for x, std in pairs)

    def loss(self, features: Pyramid) -> Tensor:  # type: ignore[override] # anomalib declares a module, and never reads it
        """Mean of ``1/2 ||z||^2 - log|det|`` per dimension: the nll per dimension less its constant."""
        latents, log_det = self.model.transform(features)
        return (scoring.energy(latents) - log_det).mean() / scoring.num_dims(latents)

    def evaluate(self, batch: Batch[Any]) -> InferenceBatch:
        """Score a batch's images, in validation, test and prediction alike: what a method overrides to do it otherwise.

        Returns:
            Image scores ``(N,)``, and maps ``(N, 1, H, W)`` or none.
        """
        height, width = cast("Tensor", batch.image).shape[-2:]
        return self.model.judge(self.provider.features(batch), (height, width))

    def validation_step(self, batch: Batch[Any], batch_idx: int, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Score a batch, of which anomalib's post-processor takes thresholds; the steps of test and prediction too."""
        del batch_idx, args, kwargs
        return batch.update(**self.evaluate(batch)._asdict())

    test_step = predict_step = validation_step

    def nll(self, images: Tensor, *, bits_per_dim: bool = False) -> Tensor:
        """Exact negative log-likelihood of each image's features; the mean over its views, where a method has several.

        Args:
            images: ``(N, 3, H, W)`` in [0, 1], of any size: they are pre-processed as by ``forward`` and
                in exported models.
            bits_per_dim: give bits per dimension of the features instead of nats per image.

        Returns:
            ``(N,)``.
        """
        images = self.pre_processor(images) if self.pre_processor else images
        latents, log_det = self.model.latents(images)
        nats = self.model.per_image(scoring.nll(latents, log_det))
        return scoring.bits_per_dim(nats, scoring.num_dims(latents)) if bits_per_dim else nats

    @property
    def learning_type(self) -> LearningType:
        """Good images only."""
        return LearningType.ONE_CLASS

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """What the trainer must be given, whatever else it is asked for: so as little as possible.

        No sanity steps, which would take thresholds from an untrained flow; and the number of epochs where the
        detector has it, or has the number of steps, which are one epoch.
        """
        options = self.training_options
        max_epochs = options.max_epochs or (1 if options.max_steps else None)
        return {"num_sanity_val_steps": 0} | ({} if max_epochs is None else {"max_epochs": max_epochs})

    # -- components -------------------------------------------------------------------------------

    def configure_pre_processor(  # type: ignore[override] # anomalib's is static, but called on the instance
        self, image_size: tuple[int, int] | None = None
    ) -> PreProcessor:
        """Resize to ``image_size`` and normalize with the statistics of the backbone's own training."""
        return self.image_options.pre_processor(image_size)

    @staticmethod
    def configure_evaluator() -> Evaluator:
        """Anomalib's default test metrics, and validation metrics that early stopping can monitor."""
        defaults = AnomalibModule.configure_evaluator()
        return Evaluator(
            val_metrics=[
                AUROC(fields=["pred_score", "gt_label"], prefix="image_"),
                AUROC(fields=["anomaly_map", "gt_mask"], prefix="pixel_", strict=False),
            ],
            test_metrics=[*defaults.test_metrics],
        )

    def configure_callbacks(self) -> list[Callback]:
        """Anomalib's components, and a feature cache unless the trainer has one already."""
        callbacks = [*cast("list[Callback]", super().configure_callbacks())]
        return callbacks if self.feature_cache else [*callbacks, FeatureCache()]

    # -- features ---------------------------------------------------------------------------------

    @property
    def fixed_views(self) -> tuple[View, ...]:
        """All that training sees of an image, where that is always the same; else none, and nothing can be kept."""
        return (PLAIN,)

    @property
    def feature_cache(self) -> FeatureCache | None:
        """The trainer's, if it has one."""
        callbacks = getattr(self._trainer, "callbacks", ())
        return next((callback for callback in callbacks if isinstance(callback, FeatureCache)), None)

    @property
    def provider(self) -> FeatureProvider:
        """The trainer's feature cache while it is open, else the backbone."""
        cache = self.feature_cache
        return cache.opened if cache and cache.opened else ComputedFeatures(self.model.features)

    # -- training ---------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Open the feature cache for a fit, and check the images of a stage before any long work."""
        if stage == "fit" and self.feature_cache:
            self.feature_cache.open(self.trainer, self.model.features, self.image_options.backbone, self.fixed_views)
        datamodule: Any = getattr(self.trainer, "datamodule", None)
        if stage == "fit" and self.training_options.max_steps and datamodule is not None:
            processes = self.trainer.world_size * self.trainer.accumulate_grad_batches
            length = self.training_options.max_steps * datamodule.train_batch_size * processes
            datamodule.train_data = RepeatedSet(datamodule.train_data, length)  # where its loaders look
        names = {"fit": ("train_data", "val_data"), "validate": ("val_data",), "test": ("test_data",)}.get(stage, ())
        if self.trainer.is_global_zero:
            provider = self.provider
            files = [file for name in names for file in image_files(getattr(datamodule, name, None))]
            check_images([file for file in files if not provider.holds(file)])

    def on_predict_start(self) -> None:
        """Check the images to predict."""
        loaders = self.trainer.predict_dataloaders
        loaders = loaders if isinstance(loaders, list) else [loaders]  # one alone if it came from a datamodule
        check_images([file for loader in loaders for file in image_files(getattr(loader, "dataset", None))])

    def teardown(self, stage: str) -> None:
        """Give the data set back, as it was."""
        del stage
        datamodule: Any = getattr(self.trainer, "datamodule", None)
        data = getattr(datamodule, "train_data", None)
        if isinstance(data, RepeatedSet):
            datamodule.train_data = data.dataset

    def on_exception(self, exception: BaseException) -> None:
        """Give the data set back here too: Lightning leaves teardown out."""
        del exception
        self.teardown("fit")

    @torch.no_grad()
    def on_train_start(self) -> None:
        """Measure the statistics of the training features, unless a checkpoint brought them."""
        loader = self.trainer.train_dataloader
        data = getattr(loader, "dataset", None)
        num_images = len(data.dataset if isinstance(data, RepeatedSet) else data) if data is not None else 0
        self._noise = self.training_options.noise_for(num_images)
        layer = self.model.standardization
        if layer is not None and not layer.is_fitted:
            rank_zero_info("Measuring the statistics of the training images' features, once, before the first step.")
            options = {"shrinkage": max(self._noise, 0.1)} if isinstance(layer, ChannelWhitening) else {}
            layer.fit(self.training_features(), gather=self.gather, **options)
        elif isinstance(data, RepeatedSet) and self.provider.keeps:
            for _ in self.training_features():  # each image is computed once, and not decoded in every step
                pass

    @property
    def gather(self) -> Callable[[Tensor], Iterable[Tensor]] | None:
        """A tensor of this process to those of all; None where there is but one process."""
        return self.all_gather if self.trainer.world_size > 1 else None

    def training_features(self) -> Iterator[Pyramid]:
        """Features of all training images, each once, in this process's share of batches."""
        loader: Any = self.trainer.train_dataloader
        data = getattr(loader, "dataset", None)
        if isinstance(data, RepeatedSet):
            share: Any = DistributedSampler(data.dataset, shuffle=False) if self.gather else None
            options = {"batch_size": loader.batch_size, "num_workers": loader.num_workers}
            loader = DataLoader(data.dataset, sampler=share, collate_fn=loader.collate_fn, **options)
        for index, raw in enumerate(loader or ()):
            batch = self.trainer.strategy.batch_to_device(raw)
            if self.pre_processor:
                cast("PreProcessor", self.pre_processor).on_train_batch_start(self.trainer, self, batch, index)
            yield self.features(batch)

    def measure(self) -> None:
        """Measure of the trained flow what scores need; called before each validation and each checkpoint of a fit."""

    def _measure_once(self) -> None:
        if self.trainer.state.fn == "fit" and self._measured_step != self.global_step:
            self._measured_step = self.global_step
            self.measure()

    def on_validation_start(self) -> None:
        """Measure what scores need, before thresholds are taken."""
        self._measure_once()

    def on_train_epoch_end(self) -> None:
        """Measure what scores need, before a checkpoint is written."""
        self._measure_once()

    def on_train_end(self) -> None:
        """Write a checkpoint, if the last step has none yet: so a fit never ends without one."""
        self._measure_once()
        checkpoint = self.trainer.checkpoint_callback
        if isinstance(checkpoint, ModelCheckpoint) and checkpoint.dirpath and self._saved_step != self.global_step:
            path = Path(checkpoint.dirpath) / f"{checkpoint.filename or 'model'}.ckpt"
            self.trainer.save_checkpoint(path)
            checkpoint.best_model_path = str(path)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the gradient's norm as the paper does, unless the trainer was given another value."""
        if getattr(self.trainer.precision_plugin, "scaler", None) is None:  # a scaler skips such steps itself
            norm = torch.nn.utils.get_total_norm([p.grad for p in self.model.flow.parameters() if p.grad is not None])
            if not torch.isfinite(norm):
                self._stop("the gradient", norm)
        if gradient_clip_val is None:
            gradient_clip_val = self.training_options.gradient_clip_norm
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def _stop(self, what: str, value: Tensor) -> NoReturn:
        """Raise before the step is taken, and so before a checkpoint could hold what is not finite."""
        saved = getattr(self.trainer.checkpoint_callback, "best_model_path", "") or "none was written yet"
        msg = (
            f"{what} became {value.item()} at epoch {self.current_epoch}, step {self.global_step}: training stops. "
            f"The last good checkpoint: {saved}. Lower lr, or clip the gradient harder, or look for images that are "
            "not like the others"
        )
        raise NonFiniteLossError(msg)
