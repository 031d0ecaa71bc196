"""The main path that all detectors share: images, features, latents, score. Read this first."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from anomalib import LearningType
from anomalib.data import Batch, InferenceBatch
from anomalib.metrics import AUROC, Evaluator
from anomalib.models.components import AnomalibModule
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.utils.serialization import anomalib_safe_globals
from anomalib.visualization import Visualizer
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, nn
from torchvision.transforms.v2 import Compose, Normalize, Resize

from anomalib_csflow import scoring, weights
from anomalib_csflow.features import ImagePyramid
from anomalib_csflow.flows import ChannelStandardization, PyramidFlow

from .images import check_images

CHECKPOINT_KEY = "anomalib_csflow"
BACKBONE_PREFIX = "model.features.backbone."


class CheckpointError(RuntimeError):
    """A checkpoint does not belong to the detector that should load it."""


class NonFiniteLossError(RuntimeError):
    """Training diverged: the loss is NaN or infinite."""


class FlowModel(nn.Module, ABC):
    """A frozen backbone, an invertible flow, and a score of the latents.

    Args:
        features: images to a pyramid of features.
        flow: features to latents.

    Shape:
        images ``(N, 3, H, W)``, already normalized, to ``pred_score (N,)`` and ``anomaly_map (N, 1, H, W)``.
    """

    def __init__(self, features: ImagePyramid, flow: PyramidFlow) -> None:
        super().__init__()
        self.features = features
        self.flow = flow

    def forward(self, images: Tensor) -> InferenceBatch:
        """Score images; a score depends on its own image alone."""
        features = self.features(images)
        latents, _ = self.flow(features, jac=False)
        return self.score(latents, (images.shape[2], images.shape[3]))

    def nll(self, images: Tensor) -> Tensor:
        """Exact negative log-likelihood of each image's features in nats, ``(N,)``."""
        return scoring.nll(*self.flow(self.features(images)))

    @abstractmethod
    def score(self, latents: Sequence[Tensor], size: tuple[int, int]) -> InferenceBatch:
        """From latents to the image score and the map of this size."""

    @property
    def standardization(self) -> ChannelStandardization | None:
        """The layer that standardizes the features, if the flow begins with one."""
        first = self.flow[0]
        return first if isinstance(first, ChannelStandardization) else None


class FlowDetector(AnomalibModule, ABC):
    """What every detector of this package does in anomalib's engine.

    It stands between ``AnomalibModule`` and the detectors so that anomalib's own lookup by short name
    (direct subclasses only) never finds a detector of ours in place of one of its own.

    A subclass passes its arguments up, then sets ``self.model`` to a :class:`FlowModel`. It must have
    init arguments ``backbone`` and ``image_size``: anomalib rebuilds a model from its checkpoint with
    the default pre-processor, which is made from them.
    """

    model: FlowModel

    def __init__(
        self,
        pre_processor: PreProcessor | bool,
        post_processor: PostProcessor | bool,
        evaluator: Evaluator | bool,
        visualizer: Visualizer | bool,
    ) -> None:
        super().__init__(pre_processor, post_processor, evaluator, visualizer)

    # -- what anomalib asks of a model ------------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int) -> STEP_OUTPUT:
        """One step of maximum likelihood."""
        del batch_idx
        loss = self.loss(batch.image)
        if not torch.isfinite(loss):
            self._stop_at_non_finite_loss(loss)
        self.log("train_loss", loss, on_step=True, on_epoch=True, prog_bar=True, batch_size=len(batch.image))
        return loss

    def loss(self, images: Tensor) -> Tensor:
        """Mean of ``1/2 ||z||^2 - log|det|`` per dimension: the nll per dimension less its constant."""
        latents, log_det = self.model.flow(self.model.features(images))
        return (scoring.energy(latents) - log_det).mean() / scoring.num_dims(latents)

    def validation_step(self, batch: Batch, batch_idx: int) -> STEP_OUTPUT:
        """Score a batch; anomalib's post-processor takes thresholds from it."""
        del batch_idx
        return batch.update(**self.model(batch.image)._asdict())

    def nll(self, images: Tensor, *, bits_per_dim: bool = False) -> Tensor:
        """Exact negative log-likelihood of each image's features.

        Args:
            images: ``(N, 3, H, W)`` in [0, 1], of any size: they are pre-processed as in training.
            bits_per_dim: give bits per dimension of the features instead of nats per image.

        Returns:
            ``(N,)``.
        """
        images = self.pre_processor(images) if self.pre_processor else images
        nats = self.model.nll(images)
        if not bits_per_dim:
            return nats
        height, width = images.shape[-2:]
        sizes = self.model.features.map_sizes(height, width)
        dims = sum(c * h * w for c, (h, w) in zip(self.model.features.channels, sizes, strict=True))
        return scoring.bits_per_dim(nats, dims)

    @property
    def learning_type(self) -> LearningType:
        """Good images only."""
        return LearningType.ONE_CLASS

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """These would override what the user asks of the trainer, so there are almost none.

        The sanity steps alone: they would take thresholds from an untrained flow.
        """
        return {"num_sanity_val_steps": 0}

    # -- components -------------------------------------------------------------------------------

    def configure_pre_processor(self, image_size: tuple[int, int] | None = None) -> PreProcessor:
        """Resize to ``image_size`` and normalize with the statistics of the backbone's own training."""
        size = image_size or self.hparams["image_size"]
        size = [size, size] if isinstance(size, int) else list(size)
        mean, std = weights.normalization(self.hparams["backbone"])
        return PreProcessor(Compose([Resize(size, antialias=True), Normalize(mean, std)]))

    @staticmethod
    def configure_evaluator() -> Evaluator:
        """anomalib's default test metrics, and validation metrics that early stopping can monitor."""
        defaults = AnomalibModule.configure_evaluator()
        return Evaluator(
            val_metrics=[
                AUROC(fields=["pred_score", "gt_label"], prefix="image_"),
                AUROC(fields=["anomaly_map", "gt_mask"], prefix="pixel_", strict=False),
            ],
            test_metrics=list(defaults.test_metrics),
        )

    # -- training ---------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Check the training images before any long work."""
        datamodule = getattr(self.trainer, "datamodule", None)
        if stage == "fit" and datamodule is not None and self.trainer.is_global_zero:
            check_images(datamodule.train_data.samples.image_path)

    @torch.no_grad()
    def on_train_start(self) -> None:
        """Measure the statistics of the training features, unless a checkpoint brought them."""
        layer = self.model.standardization
        if layer is None or layer.is_fitted:
            return
        layer.fit(self._training_features())
        if self.trainer.world_size > 1:  # every process saw its own share of the data: take the first's
            for buffer in layer.buffers():
                self.trainer.strategy.broadcast(buffer)

    def _training_features(self):  # noqa: ANN202
        """Features of each training batch, as the training steps will see them."""
        for index, batch in enumerate(self.trainer.train_dataloader):
            batch = self.trainer.strategy.batch_to_device(batch)
            if self.pre_processor:
                self.pre_processor.on_train_batch_start(self.trainer, self, batch, index)
            yield self.model.features(batch.image)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the gradient's norm as the paper does, unless the trainer was given another value."""
        if gradient_clip_val is None:
            gradient_clip_val = self.hparams.get("gradient_clip_norm")
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def _stop_at_non_finite_loss(self, loss: Tensor) -> None:
        callback = self.trainer.checkpoint_callback
        saved = getattr(callback, "best_model_path", "") or "none was written yet"
        msg = (
            f"the loss became {loss.item()} at epoch {self.current_epoch}, step {self.global_step}: training stops. "
            f"The last good checkpoint: {saved}. Lower lr, or clip the gradient harder, or look for images that are "
            "not like the others"
        )
        raise NonFiniteLossError(msg)

    # -- checkpoints ------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave out what can be had again: the frozen backbone, and the metrics' states."""
        super().on_save_checkpoint(checkpoint)
        state = checkpoint["state_dict"]
        for key in [key for key in state if key.startswith((BACKBONE_PREFIX, "evaluator."))]:
            del state[key]
        # the evaluator is a callback too, and its state there is the same tensors
        for key in [key for key in checkpoint.get("callbacks", {}) if key.startswith("Evaluator")]:
            del checkpoint["callbacks"][key]
        checkpoint[CHECKPOINT_KEY] = {
            "detector": type(self).__name__,
            "backbone": weights.fingerprint(self.model.features.backbone),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint is this detector's, and put back what was left out."""
        self._check_checkpoint(checkpoint)
        if checkpoint[CHECKPOINT_KEY]["backbone"] != weights.fingerprint(self.model.features.backbone):
            msg = (
                f"the checkpoint was trained on other weights of the backbone {self.hparams['backbone']!r} than those "
                f"loaded (weights={self.hparams['weights']!r}): pass the weights= that it was trained with"
            )
            raise CheckpointError(msg)
        super().on_load_checkpoint(checkpoint)
        own = self.state_dict()
        checkpoint["state_dict"].update(
            {key: value for key, value in own.items() if key.startswith((BACKBONE_PREFIX, "evaluator."))}
        )

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: str | Path, *args: Any, **kwargs: Any) -> "FlowDetector":  # noqa: ANN401
        """Rebuild a detector from its checkpoint; see ``AnomalibModule.load_from_checkpoint``.

        Raises:
            FileNotFoundError: if there is no such file.
            CheckpointError: if it is not a checkpoint of this detector, before anything is built.
        """
        path = Path(checkpoint_path)
        if not path.is_file():
            msg = f"there is no checkpoint at {path}"
            raise FileNotFoundError(msg)
        with anomalib_safe_globals(extra=cls.checkpoint_safe_globals()):
            cls._check_checkpoint(torch.load(path, map_location="cpu", weights_only=True, mmap=True), path)
        return super().load_from_checkpoint(checkpoint_path, *args, **kwargs)

    @classmethod
    def _check_checkpoint(cls, checkpoint: dict[str, Any], path: Path | None = None) -> None:
        """Raise CheckpointError unless this detector wrote the checkpoint."""
        writer = checkpoint.get(CHECKPOINT_KEY, {}).get("detector")
        if writer != cls.__name__:
            what = f"a checkpoint of {writer}" if writer else "not a checkpoint of this package"
            msg = f"{path or 'the file'} is {what}: {cls.__name__} cannot load it"
            raise CheckpointError(msg)
