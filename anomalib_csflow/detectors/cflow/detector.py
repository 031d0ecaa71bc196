"""CFLOW-AD: a conditional flow of each cell's features, given where the cell is.

Denis Gudovskiy, Shun Ishizaka, Kazuki Kozuka, "CFLOW-AD: Real-Time Unsupervised Anomaly Detection with
Localization via Conditional Normalizing Flows", WACV 2022, https://arxiv.org/abs/2107.12571.

Differs from the published code:

- scores are absolute: densities are taken relative to the highest of the training's last epoch, which the
  checkpoint holds, and not of the test set, on which the published scores of an image depend;
- the map is -log of the mean over layers of these relative densities, which orders cells as the published
  sum does, but does not run out of float32's digits;
- ``score_by: energy`` is ours: energies in standard deviations of the training cells' give each layer the same say;
- the schedule is laid out over the steps and not over meta-epochs of 8;
- a training batch with fewer cells than ``fibers_per_step`` gives one smaller step and not an error;
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
from anomalib_csflow.engine.optimization import Noise, Schedule, TrainingOptions
from anomalib_csflow.features import FrozenLayers, LayerPyramid
from anomalib_csflow.flows.pyramid import Pyramid
from anomalib_csflow.flows.running_statistics import RunningStatistics

from .model import SCORES_BY, CFlowModel, ScoreBy


class CFlow(FlowDetector):
    """CFLOW-AD in anomalib. The defaults are the paper's; ``configs/`` has a recipe for a CPU.

    A training batch of images gives many optimizer steps: one for each ``fibers_per_step`` cells of each layer,
    in random order, and what is left over is passed over. The trainer counts and logs batches, and its
    gradient clipping holds for each step. The published results have image sizes of their own per category, from
    128 to 512; ``standardize`` is not in the paper; the image score is the paper's with a ``top_share`` of 0.

    Args:
        backbone: a timm model with its tag, or ``torchvision/NAME``.
        layers: of the backbone, whose maps are used, from fine to coarse.
        weights: ``hub``, ``package``, ``random`` or a file: :func:`~anomalib_csflow.features.weights.create_backbone`.
        image_size: height and width in pixels to which images are resized, or one number for both.
        antialias: of the resizing in the engine. Exported models resize without it: where images are
            larger than ``image_size``, False makes both see the same pixels, and so give the same scores.
        num_blocks: number of the flow's blocks, or of each layer's flow.
        condition_channels: of the positional encoding, a multiple of 4.
        clamp: bound of the log-scales.
        permute_soft: rotate features by random matrices between blocks (the paper's), or permute them.
        standardize: put a fixed layer before the flow that standardizes each channel with statistics
            of the training features; the likelihood stays that of the features.
        score_by: ``density`` judges cells by their log-density, the log-det included, relative to the training's
            highest (the paper's); ``energy`` by their latents alone, as FastFlow and MSFlow do, in standard
            deviations of the training cells': a density also falls where good cells vary much, and the highest
            density weighs the layers by chance.
        top_share: share of the map's positions, the most unusual, of which the image score is taken; 0 for the most
            unusual alone.
        fibers_per_step: cells per optimizer step.
        lr: Adam's learning rate.
        gradient_clip_norm: bound of the gradient's norm, unless the trainer is given one; None for none.
        schedule: of the learning rate, see :data:`anomalib_csflow.engine.optimization.Schedule`.
        max_epochs: overrides the trainer's, if given: ``anomalib benchmark`` has no other way to set it.
        max_steps: train for so many batches, as one epoch, however many images there are.
        noise: on the training features, see :data:`anomalib_csflow.engine.optimization.Noise`.
        pre_processor: or True for one made from ``image_size`` and the backbone's own mean and std.
        post_processor: or True for thresholds that are taken from good images, see :doc:`/thresholds`.
        evaluator: or True for AUROC and F1 of images, and of pixels where there are maps.
        visualizer: or True for anomalib's.

    Raises:
        ValueError: on an unknown backbone, layer or schedule, or an image too small for the layers.
        WeightsError: if the weights cannot be had.

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
        max_steps: int | None = None,
        noise: Noise = 0.0,
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

        images = ImageOptions(backbone, weights, image_size, antialias)
        training = TrainingOptions(lr, schedule, max_epochs, gradient_clip_norm, max_steps=max_steps, noise=noise)
        super().__init__(build, images, training, pre_processor, post_processor, evaluator, visualizer)
        self.fibers_per_step = fibers_per_step
        self._pending: list[tuple[int, Tensor, Tensor]] = []
        self._seen = self._nothing_seen()

    def training_step(self, batch: Batch[Any], batch_idx: int) -> STEP_OUTPUT:
        """One step on a batch of fibers: the next of those that wait, or the first of new images.

        The loss is their mean of ``-log sigmoid(log p / C)``.
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
            whole = max(len(order) // count * count, min(count, len(order)))  # the rest is passed over, as published
            batches += [(index, fibers[chosen], conditions[chosen]) for chosen in order[:whole].split(count)]
        return batches[::-1]  # taken from the end: the first layer first

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: torch.optim.Optimizer | LightningOptimizer,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """Step until no fibers wait: the closure runs the training step on the next."""
        self._pending = []
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        while self._pending:
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)

    def on_train_start(self) -> None:
        """Refuse what would pass fibers over silently, or what would wait for ever."""
        if self.trainer.world_size > 1:  # whose processes would have to agree on each step's layer
            msg = "CFlow trains on one device, since a step is on one layer's fibers: set the trainer's devices to 1"
            raise ValueError(msg)
        if self.trainer.accumulate_grad_batches > 1:
            msg = "CFlow steps on fibers and not on images: raise fibers_per_step instead of accumulate_grad_batches"
            raise ValueError(msg)
        super().on_train_start()

    def on_train_epoch_start(self) -> None:
        """Forget the cells of the epoch before: the decoders were others."""
        self._seen = self._nothing_seen()

    def _nothing_seen(self) -> list[RunningStatistics]:
        return [RunningStatistics(1) for _ in self.model.reference]

    def measure(self) -> None:
        """Set what cells are compared with."""
        if all(statistics.count for statistics in self._seen):
            self.model.compare_with(self._seen)

    def load_reference_state_dict(self, state_dicts: Sequence[Mapping[str, Tensor]]) -> None:
        """Load decoders that were trained with the authors' code.

        Build the detector with the backbone, layers and blocks that they were trained with. The highest
        density is not in those files: until it is measured, in a training, scores are plain densities.

        Args:
            state_dicts: of each layer's decoder, with FrEIA's names such as ``module_list.0.w_perm``.

        Raises:
            ValueError: if the tensors do not fit this detector's layers, blocks or widths.
        """
        decoders = self.model.fiber_flow.decoders
        shapes = [{name: tensor.shape for name, tensor in state.items()} for state in state_dicts]
        own = [{name: tensor.shape for name, tensor in decoder.state_dict().items()} for decoder in decoders]
        if shapes != own:
            msg = (
                f"the weights of {len(shapes)} decoders do not fit this detector's {len(own)}: give the layers, "
                "num_blocks and condition_channels that they were trained with"
            )
            raise ValueError(msg)
        for decoder, state in zip(decoders, state_dicts, strict=True):
            decoder.load_state_dict(dict(state))
