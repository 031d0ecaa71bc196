"""FastFlow: a two-dimensional flow of each of several layers' maps.

Jiawei Yu, Ye Zheng, Xiang Wang, Wei Li, Yushuang Wu, Rui Zhao, Liwei Wu, "FastFlow: Unsupervised Anomaly
Detection and Localization via 2D Normalizing Flows", 2021, https://arxiv.org/abs/2111.07677.

Differs from the published code (the authors published none: gathierry/FastFlow is the closest):

- convolutional features are standardized per channel with statistics of the training set, where that code
  learns a layer norm over channels, height and width, which is tied to one image size and left out of the
  likelihood. Here the likelihood is exact, for any image size;
- the loss is per dimension, not a sum over 10^5 dimensions;
- the map is -log of the mean over layers of exp(-1/2 mean_c z^2), instead of minus this mean: positions are
  ranked the same, but extreme defects do not all get the same score (0 in float32);
- permutations are seeded; any backbone and layers.
"""

from collections.abc import Mapping, Sequence
from itertools import cycle, islice

from anomalib.data import InferenceBatch
from anomalib.metrics import Evaluator
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import Visualizer
from torch import Tensor, nn

from anomalib_csflow import scoring
from anomalib_csflow.engine.arguments import check_arguments
from anomalib_csflow.engine.detector import FlowDetector
from anomalib_csflow.engine.images import ImageOptions
from anomalib_csflow.engine.model import FlowModel
from anomalib_csflow.engine.optimization import Noise, Schedule, Steps, TrainingOptions
from anomalib_csflow.features import FrozenLayers, LayerPyramid
from anomalib_csflow.flows import ChannelStandardization, ParallelFlow, PyramidFlow
from anomalib_csflow.flows.all_in_one import Subnet


def convolutions(kernel_size: int, hidden_ratio: float) -> Subnet:
    """Make subnets of two convolutions of one kernel size (figure 3), with a hidden width relative to the input's."""

    def subnet(in_channels: int, out_channels: int) -> nn.Module:
        hidden = max(int(in_channels * hidden_ratio), 1)
        return nn.Sequential(
            nn.Conv2d(in_channels, hidden, kernel_size, padding="same"),
            nn.ReLU(),
            nn.Conv2d(hidden, out_channels, kernel_size, padding="same"),
        )

    return subnet


class FastFlowModel(FlowModel):
    """The network of FastFlow: several layers of a backbone, a flow for each, the mean of their densities.

    Args:
        features: images to the layers' maps.
        num_steps: of each layer's flow.
        kernel_sizes: of the steps, repeated in turn.
        hidden_ratio: hidden channels of a step's convolutions, as a share of their input's.
        clamp: bound of the log-scales.
        standardize: begin with a layer that standardizes each channel.
        top_share: share of the map's positions, the least likely ones, that the image score is computed from.
    """

    def __init__(
        self,
        features: LayerPyramid,
        num_steps: int,
        kernel_sizes: Sequence[int],
        hidden_ratio: float,
        clamp: float,
        standardize: bool,
        top_share: float,
    ) -> None:
        dims = [(channels, 1, 1) for channels in features.channels]  # only the channels matter
        subnets = [convolutions(kernel_size, hidden_ratio) for kernel_size in islice(cycle(kernel_sizes), num_steps)]
        flow = ParallelFlow(dims, subnets=[subnets] * len(dims), clamp=clamp)
        super().__init__(features, PyramidFlow([ChannelStandardization(dims), flow] if standardize else [flow]))
        self.top_share = top_share

    def score(self, latents: Sequence[Tensor], size: tuple[int, int]) -> InferenceBatch:
        """Map: minus the logarithm of the mean of ``exp(-1/2 mean_c z^2)`` over layers; score: its top share."""
        anomaly_map = scoring.surprise(scoring.upsampled([scoring.likeness(level) for level in latents], size))
        return InferenceBatch(pred_score=scoring.least_likely(anomaly_map, self.top_share), anomaly_map=anomaly_map)


class FastFlow(FlowDetector):
    """FastFlow in anomalib. The defaults are the paper's with Wide-ResNet-50-2; its other backbones have recipes.

    These are ``resnet18.tv_in1k``, ``deit_base_distilled_patch16_384.fb_in1k`` and ``cait_m48_448.fb_dist_in1k``. A
    transformer's tokens pass its final norm, so they do not need ``standardize``. ``kernel_sizes`` are repeated
    in turn: 3 and 1, but only 3 with ResNet-18 in the paper, whose image score has a ``top_share`` of 0.

    Args:
        backbone: a timm model with its tag, or ``torchvision/NAME``.
        layers: names of the backbone's layers whose maps are used, from fine to coarse.
        weights: ``hub``, ``package``, ``random`` or a file: :func:`~anomalib_csflow.features.weights.create_backbone`.
        image_size: height and width in pixels to which images are resized, or one number for both.
        antialias: whether the engine resizes with antialiasing. Exported models resize without it: if images are
            larger than ``image_size``, False gives both the same pixels, and so the same scores.
        num_steps: of each layer's flow: 8 with ResNets, 20 with transformers in the paper.
        kernel_sizes: of the convolutions of each block or step; the paper's, if not given.
        hidden_ratio: hidden channels of a step's convolutions, as a share of their input's: 1 with ResNets,
            0.16 with transformers.
        clamp: bound of the log-scales.
        standardize: begin the flow with a fixed layer that standardizes each channel with the training features'
            mean and standard deviation; likelihoods remain those of the features.
        top_share: share of the map's positions, the most unusual ones, that the image score is computed from; 0 takes
            only the most unusual position.
        lr: learning rate.
        weight_decay: Adam's.
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
        ValueError: on an unknown backbone, layer or schedule, or an image size that the layers cannot take.
        WeightsError: if the weights are not available.

    Example:
        >>> import torch
        >>> detector = FastFlow("tf_efficientnet_lite0", ["blocks.2", "blocks.4"], "random", image_size=64, num_steps=2)
        >>> images = torch.rand(2, 3, 64, 64)
        >>> detector.nll(images).shape, detector.eval()(images).anomaly_map.shape
        (torch.Size([2]), torch.Size([2, 1, 64, 64]))
    """

    output_arguments = ("layers", "num_steps", "kernel_sizes", "hidden_ratio", "clamp", "standardize", "top_share")
    model: FastFlowModel

    def __init__(
        self,
        backbone: str = "wide_resnet50_2.tv_in1k",
        layers: Sequence[str] = ("layer1", "layer2", "layer3"),
        weights: str = "hub",
        image_size: int | tuple[int, int] = 256,
        antialias: bool = True,
        num_steps: int = 8,
        kernel_sizes: Sequence[int] | None = (3, 1),
        hidden_ratio: float = 1.0,
        clamp: float = 2.0,
        standardize: bool = True,
        top_share: float = 0.0,
        lr: float = 1e-3,
        weight_decay: float = 1e-5,
        gradient_clip_norm: float | None = None,
        schedule: Schedule = "constant",
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
        if kernel_sizes is None:
            kernel_sizes = [3, 1]
        scoring.check_top_share(top_share)

        def build(network: nn.Module) -> FastFlowModel:
            features = LayerPyramid(FrozenLayers(network, layers, final_norm=True))
            return FastFlowModel(features, num_steps, kernel_sizes, hidden_ratio, clamp, standardize, top_share)

        images = ImageOptions(backbone, weights, image_size, antialias, region=region)
        training = TrainingOptions(
            lr, schedule, max_epochs, gradient_clip_norm, weight_decay, max_steps=max_steps, noise=noise
        )
        super().__init__(build, images, training, pre_processor, post_processor, evaluator, visualizer)
        self.hparams["kernel_sizes"] = list(kernel_sizes)  # what None stood for

    def load_reference_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Load flows that were trained with gathierry/FastFlow or with anomalib's ``Fastflow`` on a transformer.

        Create the detector with the backbone, layers and steps that they were trained with. Flows trained on
        ResNets have layer norms, which are tied to one image size and are not part of this flow.

        Args:
            state_dict: its names end like ``0.module_list.0.subnet.0.weight``: level, step and tensor.

        Raises:
            ValueError: if the tensors do not fit this detector's layers, steps or widths.
        """
        flow = self.model.flow[-1]
        if any(".norm" in f".{name}" and "feature_extractor" not in name for name in state_dict):
            msg = (
                "these weights have layer norms that are tied to one image size: only flows on transformers, which "
                "have none, can be loaded"
            )
            raise ValueError(msg)
        renamed = {}
        for name, tensor in state_dict.items():
            before, found, after = name.partition(".module_list.")
            if found:
                renamed[f"levels.{before.rpartition('.')[2]}.module_list.{after}"] = tensor
        own = {name: tensor.shape for name, tensor in flow.state_dict().items()}
        if {name: tensor.shape for name, tensor in renamed.items()} != own:
            msg = (
                f"the {len(renamed)} tensors of these weights do not fit this detector's flow of {len(own)}: use the "
                "layers, num_steps, kernel_sizes and hidden_ratio that they were trained with"
            )
            raise ValueError(msg)
        flow.load_state_dict(renamed)
