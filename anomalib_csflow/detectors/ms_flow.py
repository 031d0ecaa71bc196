"""MSFlow: flows of several layers side by side, then one coupling that fuses them.

Yixuan Zhou, Xing Xu, Jingkuan Song, Fumin Shen, Heng Tao Shen, "MSFlow: Multi-Scale Flow-based Framework
for Unsupervised Anomaly Detection", IEEE TNNLS 2024, https://arxiv.org/abs/2308.15300.

Differs from the published code:

- likelihoods are absolute: the published maps subtract each image's own maximum, so that neither scores nor
  map values of two images can be compared;
- the map is -log of the mean over layers of these likelihoods, the score -log of the mean of the least 3 % of
  their product: both rank as the published sum and 1 - mean do, without rounding to 1 in float32;
- the loss is per dimension, not a sum over 10^6 dimensions, so the limit of the gradient's norm applies to a
  mean: it catches diverging steps instead of shortening every step;
- log-scales of the fusion are 0.636 c atan(s / c), as in CS-Flow, instead of 0.636 c atan(s);
- permutations are seeded; any backbone, layers and image size.
"""

from collections.abc import Sequence

from anomalib.data import InferenceBatch
from anomalib.metrics import Evaluator
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import Visualizer
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from anomalib_csflow import scoring
from anomalib_csflow.engine.arguments import check_arguments
from anomalib_csflow.engine.detector import FlowDetector
from anomalib_csflow.engine.images import ImageOptions
from anomalib_csflow.engine.model import FlowModel
from anomalib_csflow.engine.optimization import Noise, Schedule, Steps, TrainingOptions
from anomalib_csflow.features import FrozenLayers, LayerPyramid
from anomalib_csflow.flows import (
    ChannelStandardization,
    CrossScaleCoupling,
    FusionConditioner,
    ParallelFlow,
    PyramidFlow,
    ScalePermutation,
    normalized_convolutions,
)


class HalvedLayers(LayerPyramid):
    """Several layers of one backbone, each averaged over 3x3 positions with stride 2.

    Args:
        backbone: with layers from fine to coarse, each with twice the stride of the one before.

    Shape:
        images ``(N, 3, H, W)`` to maps ``(N, channels[i], ceil(H / strides[i]), ceil(W / strides[i]))``.

    Raises:
        ValueError: if the layers' strides do not double.
    """

    def __init__(self, backbone: FrozenLayers) -> None:
        super().__init__(backbone)
        if any(coarser != 2 * finer for finer, coarser in zip(self.strides[:-1], self.strides[1:], strict=True)):
            msg = (
                f"the layers {backbone.layers} have strides {self.strides}, but MSFlow fuses maps that halve: name "
                "layers that each have twice the stride of the one before"
            )
            raise ValueError(msg)
        self.strides = [2 * stride for stride in self.strides]
        self.min_size *= 2
        self.what = f"layer {backbone.layers[-1]!r}, halved to stride {self.min_size}"

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Compute the layers' maps."""
        return tuple(F.avg_pool2d(level, 3, 2, 1) for level in super().forward(images))


class MSFlowModel(FlowModel):
    """The network of MSFlow: several layers of a backbone, a flow for each, one coupling for all.

    Args:
        features: images to the layers' maps.
        num_blocks: of each layer's flow.
        condition_channels: of the positional encoding.
        clamp: bound of all log-scales.
        standardize: begin with a layer that standardizes each channel.
        top_share: share of the map's positions, the least likely ones, that the image score is computed from.
    """

    def __init__(
        self,
        features: HalvedLayers,
        num_blocks: Sequence[int],
        condition_channels: int,
        clamp: float,
        standardize: bool,
        top_share: float,
    ) -> None:
        side = 2 ** len(features.channels)  # only the channels matter
        dims = [(channels, side >> level, side >> level) for level, channels in enumerate(features.channels)]
        layers = [
            ParallelFlow(
                dims,
                subnets=[[normalized_convolutions] * count for count in num_blocks],
                condition_channels=condition_channels,
                clamp=clamp,
            ),
            ScalePermutation(dims, seed=0),
            CrossScaleCoupling(dims, conditioner=FusionConditioner, clamp=clamp),
        ]
        super().__init__(features, PyramidFlow([ChannelStandardization(dims), *layers] if standardize else layers))
        self.top_share = top_share

    def score(self, latents: Sequence[Tensor], size: tuple[int, int]) -> InferenceBatch:
        """Minus the logarithms of mean relative likelihoods ``exp(-1/2 mean_c z^2)``.

        For the map, the mean over layers; for the score, the mean of the layers' product over its least positions.
        """
        energies = [0.5 * level.square().mean(1, keepdim=True) for level in latents]
        maps = scoring.upsampled(energies, size, align_corners=True)
        product = maps.sum(0)  # its negative logarithm
        return InferenceBatch(
            pred_score=scoring.least_likely(product, self.top_share), anomaly_map=-scoring.log_mean_exp(-maps, dim=0)
        )


class MSFlow(FlowDetector):
    """MSFlow in anomalib. The defaults are the paper's; the recipe ``ms_flow_small`` is for a CPU.

    Each layer has twice the stride of the one before, and its own number of blocks. The published results have 512
    pixels, and 256 for transistor; ``standardize`` is not in the paper.

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
        standardize: begin the flow with a fixed layer that standardizes each channel with the training features'
            mean and standard deviation; likelihoods remain those of the features.
        top_share: share of the map's positions, the most unusual ones, that the image score is computed from; 0 takes
            only the most unusual position.
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
        ValueError: on an unknown backbone, layer or schedule, layers that do not halve, or an image too small.
        WeightsError: if the weights are not available.

    Example:
        >>> import torch
        >>> detector = MSFlow("tf_efficientnet_lite0", ["blocks.2", "blocks.4"], "random", image_size=64,
        ...                   num_blocks=[1, 2], condition_channels=16).eval()
        >>> images = torch.rand(2, 3, 64, 64)
        >>> detector.nll(images).shape, detector(images).anomaly_map.shape
        (torch.Size([2]), torch.Size([2, 1, 64, 64]))
    """

    output_arguments = ("layers", "num_blocks", "condition_channels", "clamp", "standardize", "top_share")
    model: MSFlowModel

    def __init__(
        self,
        backbone: str = "wide_resnet50_2.tv_in1k",
        layers: Sequence[str] = ("layer1", "layer2", "layer3"),
        weights: str = "hub",
        image_size: int | tuple[int, int] = 512,
        antialias: bool = True,
        num_blocks: Sequence[int] = (2, 5, 8),
        condition_channels: int = 64,
        clamp: float = 1.9,
        standardize: bool = False,
        top_share: float = 0.03,
        lr: float = 1e-4,
        gradient_clip_norm: float | None = 2.0,
        schedule: Schedule = "warmup_steps",
        max_epochs: int | None = None,
        max_steps: Steps | None = None,
        noise: Noise = 0.0,
        region: str | None = None,
        pre_processor: PreProcessor | bool = True,
        post_processor: PostProcessor | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        check_arguments(locals(), of_each_layer=("num_blocks",))
        if len(num_blocks) != len(layers):
            msg = f"num_blocks needs one number per layer: got {list(num_blocks)} for {list(layers)}"
            raise ValueError(msg)
        scoring.check_top_share(top_share)

        def build(network: nn.Module) -> MSFlowModel:
            features = HalvedLayers(FrozenLayers(network, layers))
            return MSFlowModel(features, num_blocks, condition_channels, clamp, standardize, top_share)

        images = ImageOptions(backbone, weights, image_size, antialias, region=region)
        training = TrainingOptions(lr, schedule, max_epochs, gradient_clip_norm, max_steps=max_steps, noise=noise)
        super().__init__(build, images, training, pre_processor, post_processor, evaluator, visualizer)
