"""CFLOW-AD: a conditional flow on the features at each position, given where the position is.

Denis Gudovskiy, Shun Ishizaka, Kazuki Kozuka, "CFLOW-AD: Real-Time Unsupervised Anomaly Detection with
Localization via Conditional Normalizing Flows", WACV 2022, https://arxiv.org/abs/2107.12571.

Differs from the published code:

- scores are absolute: densities are relative to the highest one of the last training epoch, which the checkpoint
  contains; in the published code, to the highest one of the test set, so that scores depend on other images;
- the map is -log of the mean over layers of these relative densities, which ranks positions as the published
  sum does, but does not lose precision in float32;
- ``score_by: energy`` is ours: in standard deviations of the training positions, all layers have the same weight;
- the schedule is defined over steps, not over meta-epochs of 8;
- a training batch with fewer positions than ``fibers_per_step`` gives one smaller step instead of an error;
- no augmentation: add it to the data; any backbone, layers and image size.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from anomalib.data import Batch
from anomalib.metrics import Evaluator
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import Visualizer
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from anomalib_csflow import scoring
from anomalib_csflow.engine.arguments import check_arguments
from anomalib_csflow.engine.detector import FlowDetector
from anomalib_csflow.engine.images import ImageOptions
from anomalib_csflow.engine.optimization import Noise, Schedule, Steps, TrainingOptions
from anomalib_csflow.features import FrozenLayers, LayerPyramid
from anomalib_csflow.flows.pyramid import Pyramid
from anomalib_csflow.flows.running_statistics import RunningStatistics

from .model import SCORES_BY, CFlowModel, ScoreBy


class CFlow(FlowDetector):
    """CFLOW-AD in anomalib. The defaults are the paper's; the recipe ``cflow_small`` is for a CPU.

    A training batch of images gives many optimizer steps: one for every ``fibers_per_step`` positions of each layer,
    in random order; the remainder is skipped. The trainer counts and logs batches, but clips gradients at
    each optimizer step. The published results have a different image size for some categories, from 128 to
    512; ``standardize`` is not in the paper; the image score is the paper's with a ``top_share`` of 0.

    Args:
        backbone: a timm model with its tag, or ``torchvision/NAME``.
        layers: names of the backbone's layers whose maps are used, from fine to coarse.
        weights: ``hub``, ``package``, ``random`` or a file: :func:`~anomalib_csflow.features.weights.create_backbone`.
        image_size: height and width in pixels to which images are resized, or one number for both.
        antialias: whether the engine resizes with antialiasing. Exported models resize without it: if images are
            larger than ``image_size``, False gives both the same pixels, and so the same scores.
        num_blocks: number of the flow's blocks, or of each layer's flow.
        condition_channels: of the positional encoding, a multiple of 4.
        clamp: bound of the log-scales.
        permute_soft: rotate features by random matrices between blocks (the paper's), or permute them.
        standardize: begin the flow with a fixed layer that standardizes each channel with the training features'
            mean and standard deviation; likelihoods remain those of the features.
        score_by: ``density`` judges positions by their log-density, the log-det included, relative to the highest
            one in training (the paper's); ``energy`` only by their latents, as in FastFlow and MSFlow, in standard
            deviations of the training positions: a density is also low where good positions vary a lot, and dividing
            by the highest one weights the layers arbitrarily.
        top_share: share of the map's positions, the most unusual ones, that the image score is computed from; 0 takes
            only the most unusual position.
        fibers_per_step: number of positions per optimizer step.
        lr: learning rate.
        gradient_clip_norm: limit of the gradient's norm, unless the trainer sets one; None for no limit.
        schedule: of the learning rate, see :data:`anomalib_csflow.engine.optimization.Schedule`.
        max_epochs: overrides the trainer's, if given; for ``anomalib benchmark``, which cannot set it otherwise.
        max_steps: number of batches to train for, as one epoch, or ``auto``, see
            :data:`anomalib_csflow.engine.optimization.Steps`.
        noise: Gaussian noise on the training features, see :data:`anomalib_csflow.engine.optimization.Noise`.
        region: file of a black and white image, as large as the images are or smaller: only what is white in it is
            inspected. The rest of each image is painted over, in training too; checkpoints contain the mask.
        pre_processor: True creates one from ``image_size`` and the backbone's own mean and standard deviation.
        post_processor: True creates one that sets thresholds from good images, see :doc:`/thresholds`.
        evaluator: True creates one with AUROC and F1 of images, and of pixels if there are maps.
        visualizer: True creates one whose pictures use the scale of good images, see :doc:`/thresholds`.

    Raises:
        ValueError: on an unknown backbone, layer or schedule, or an image too small for the layers.
        WeightsError: if the weights are not available.

    Example:
        >>> detector = CFlow("tf_efficientnet_lite0", ["blocks.2", "blocks.4"], "random", image_size=64,
        ...                  num_blocks=1, condition_channels=16).eval()
        >>> images = torch.rand(2, 3, 64, 64)
        >>> detector.nll(images).shape, detector(images).anomaly_map.shape
        (torch.Size([2]), torch.Size([2, 1, 64, 64]))
    """

    output_arguments = (
        *("layers", "num_blocks", "condition_channels", "clamp", "permute_soft", "standardize"),
        *("score_by", "top_share"),
    )
    free_arguments = ("fibers_per_step",)
    model: CFlowModel

    def __init__(
        self,
        backbone: str = "wide_resnet50_2.tv_in1k",
        layers: Sequence[str] = ("layer2", "layer3", "layer4"),
        weights: str = "hub",
        image_size: int | tuple[int, int] = 256,
        antialias: bool = True,
        num_blocks: int = 8,
        condition_channels: int = 128,
        clamp: float = 1.9,
        permute_soft: bool = True,
        standardize: bool = False,
        score_by: ScoreBy = "density",
        top_share: float = 0.0,
        fibers_per_step: int = 256,
        lr: float = 2e-4,
        gradient_clip_norm: float | None = None,
        schedule: Schedule = "warmup_cosine",
        max_epochs: int | None = None,
        max_steps: Steps | None = None,
        noise: Noise = 0.0,
        region: str | None = None,
        pre_processor: PreProcessor | bool = True,
        post_processor: PostProcessor | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        check_arguments(locals())
        if score_by not in SCORES_BY:
            msg = f"unknown score_by {score_by!r}: choose one of {', '.join(SCORES_BY)}"
            raise ValueError(msg)
        scoring.check_top_share(top_share)

        def build(network: nn.Module) -> CFlowModel:
            features = LayerPyramid(FrozenLayers(network, layers))
            return CFlowModel(
                features, num_blocks, condition_channels, clamp, permute_soft, standardize, score_by, top_share
            )

        images = ImageOptions(backbone, weights, image_size, antialias, region=region)
        training = TrainingOptions(lr, schedule, max_epochs, gradient_clip_norm, max_steps=max_steps, noise=noise)
        super().__init__(build, images, training, pre_processor, post_processor, evaluator, visualizer)
        self.fibers_per_step = fibers_per_step
        self._pending: list[tuple[int, Tensor, Tensor]] = []
        self._seen = self._nothing_seen()

    def training_step(self, batch: Batch[Any], batch_idx: int) -> STEP_OUTPUT:
        """One step on a batch of fibers: the next pending one, or the first from new images.

        The loss is the mean of ``-log sigmoid(log p / C)``.
        """
        del batch_idx
        if not self._pending:
            self._pending = self._fiber_batches(self.features(batch))
        level, fibers, conditions = self._pending.pop()
        latents, log_det = self.model.fiber_flow.decode(level, fibers, conditions)
        log_density = self.model.log_density(latents, log_det)
        self._seen[level].update(self.model.plausibility(latents.detach(), log_det.detach())[:, None])
        return self.checked(-F.logsigmoid(log_density).mean(), batch)

    def _fiber_batches(self, features: Pyramid) -> list[tuple[int, Tensor, Tensor]]:
        """Fibers of all images in random order: level, fibers and conditions of each step."""
        flow, count = self.model.fiber_flow, self.fibers_per_step
        batches = []
        for index, level in enumerate(self.model.decoder_inputs(features)):
            fibers, conditions = flow.fibers(level)
            order = torch.randperm(len(fibers), device=fibers.device)
            whole = max(len(order) // count * count, min(count, len(order)))  # the remainder is skipped, as published
            batches += [(index, fibers[chosen], conditions[chosen]) for chosen in order[:whole].split(count)]
        return batches[::-1]  # taken from the end: the first layer first

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: torch.optim.Optimizer | LightningOptimizer,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """Step until no fibers are pending: the closure runs the training step on the next batch of them."""
        self._pending = []
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        while self._pending:
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)

    def on_train_start(self) -> None:
        """Refuse settings that would skip fibers silently, or wait forever."""
        if self.trainer.world_size > 1:  # all processes would have to agree on the layer of each step
            msg = "CFlow trains on one device, since a step is on one layer's fibers: set the trainer's devices to 1"
            raise ValueError(msg)
        if self.trainer.accumulate_grad_batches > 1:
            msg = "CFlow steps on fibers, not on images: raise fibers_per_step instead of accumulate_grad_batches"
            raise ValueError(msg)
        super().on_train_start()

    def on_train_epoch_start(self) -> None:
        """Forget the statistics of the previous epoch, because the decoders have changed."""
        self._seen = self._nothing_seen()

    def _nothing_seen(self) -> list[RunningStatistics]:
        return [RunningStatistics(1) for _ in self.model.reference]

    def measure(self) -> None:
        """Set what positions are compared with."""
        if all(statistics.count for statistics in self._seen):
            self.model.compare_with(self._seen)

    def load_reference_state_dict(self, state_dicts: Sequence[Mapping[str, Tensor]]) -> None:
        """Load decoders that were trained with the authors' code.

        Create the detector with the backbone, layers and blocks that they were trained with. Their files do not
        contain the highest density: until it is measured, in a training, scores are plain densities.

        Args:
            state_dicts: one for each layer's decoder, with FrEIA's names such as ``module_list.0.w_perm``.

        Raises:
            ValueError: if the tensors do not fit this detector's layers, blocks or widths.
        """
        decoders = self.model.fiber_flow.decoders
        shapes = [{name: tensor.shape for name, tensor in state.items()} for state in state_dicts]
        own = [{name: tensor.shape for name, tensor in decoder.state_dict().items()} for decoder in decoders]
        if shapes != own:
            msg = (
                f"the weights of {len(shapes)} decoders do not fit this detector's {len(own)}: use the layers, "
                "num_blocks and condition_channels that they were trained with"
            )
            raise ValueError(msg)
        for decoder, state in zip(decoders, state_dicts, strict=True):
            decoder.load_state_dict(dict(state))
