"""CS-Flow: a fully convolutional cross-scale flow on the features of three image sizes.

Marco Rudolph, Tom Wehrbein, Bodo Rosenhahn, Bastian Wandt, "Fully Convolutional Cross-Scale-Flows
for Image-based Defect Detection", WACV 2022, https://arxiv.org/abs/2110.02855.

Differs from the published code:

- the inverse inverts (the published one reads the wrong maps);
- latents are not clamped to +-1e6, which would break the inverse: instead, training stops at a loss that is not finite;
- any backbone, layer, number of scales and image size;
- TensorFlow's "same" padding is computed for the actual image size, not for 456 pixels.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import torch
from anomalib.data import InferenceBatch
from anomalib.metrics import Evaluator
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import Visualizer
from torch import Tensor, nn

from anomalib_csflow import scoring
from anomalib_csflow.engine.arguments import check_arguments
from anomalib_csflow.engine.detector import FlowDetector
from anomalib_csflow.engine.images import ImageOptions, KeepAspect
from anomalib_csflow.engine.levels import LevelScale
from anomalib_csflow.engine.model import FlowModel
from anomalib_csflow.engine.optimization import Noise, OptimizerName, Schedule, Steps, TrainingOptions
from anomalib_csflow.features import CrossScalePyramid, FeaturePyramid, FrozenBackbone, FrozenLayers, ImagePyramid
from anomalib_csflow.flows import (
    ChannelStandardization,
    ChannelWhitening,
    CrossScaleCoupling,
    PyramidFlow,
    ScalePermutation,
)
from anomalib_csflow.flows.pyramid import Pyramid

from .reference import convert_reference_flow

ImageScore = Literal["energy", "map", "levels", "score_test"]
"""What the image score is computed from: the latents' mean energy, or the highest positions of the map, or those of the
levels' mean, which are also high where only some levels find a position unusual, or those of the mean of the levels'
score tests, in which precise predictions count more."""
NOISE_EXPONENT = 1 / 2
"""Of ``noise: auto``. This is more noise than in the other detectors: maps improve, and mean image AUROC stays."""

SCALE_IMAGES = 256
"""Training images that the levels' scale is measured on, at most: each has many positions."""


class CSFlowModel(FlowModel):
    """The network of CS-Flow: features of an image pyramid, cross-scale couplings, mean energy.

    Args:
        features: images to a pyramid of features.
        kernel_sizes: of the convolutions of each block, a permutation and a coupling.
        hidden_channels: of the couplings' convolutions.
        clamp: bound of the couplings' log-scales.
        standardize: begin with a layer that standardizes each channel.
        whiten: let that layer decorrelate the channels too.
        map_mode: how levels are combined into a map, see :func:`anomalib_csflow.scoring.anomaly_map`.
        image_score: what the image score is computed from, see :class:`CSFlow`.
        top_share: share of the positions that the image score is computed from, unless it is the energy.
        recompute: see :class:`~anomalib_csflow.flows.PyramidFlow`.
        coarse_kernel_size: of the convolutions of all levels but the finest; by default the block's.
        output_kernel_size: of the links between levels and the finest level's second convolutions; by default the
            block's.
        conditioner_clamp: bound of what the couplings' convolutions see; by default none.
    """

    def __init__(
        self,
        features: FeaturePyramid,
        kernel_sizes: Sequence[int],
        hidden_channels: int,
        clamp: float,
        standardize: bool,
        whiten: bool,
        map_mode: scoring.MapMode,
        image_score: ImageScore,
        top_share: float,
        *,
        recompute: bool = False,
        coarse_kernel_size: int | None = None,
        output_kernel_size: int | None = None,
        conditioner_clamp: float | None = None,
    ) -> None:
        # only the channels matter: the couplings take maps of any size
        side = 2 ** (len(features.channels) - 1)
        dims = [(channels, side >> s, side >> s) for s, channels in enumerate(features.channels)]
        first = ChannelWhitening if whiten else ChannelStandardization
        layers = [first(dims)] if standardize else []
        for block, kernel_size in enumerate(kernel_sizes):
            layers.append(ScalePermutation(dims, seed=block))
            layers.append(
                CrossScaleCoupling(
                    dims,
                    hidden_channels=hidden_channels,
                    kernel_size=kernel_size,
                    coarse_kernel_size=coarse_kernel_size,
                    output_kernel_size=output_kernel_size,
                    clamp=clamp,
                    conditioner_clamp=conditioner_clamp,
                )
            )
        super().__init__(features, PyramidFlow(layers, recompute=recompute))
        self.map_mode = map_mode
        self.image_score = image_score
        self.top_share = top_share
        self.level_scale = LevelScale(len(dims)) if map_mode == "soft_minimum" else None
        self.test_scale = LevelScale(len(dims)) if image_score == "score_test" else None

    def judge(self, features: Pyramid, size: tuple[int, int]) -> InferenceBatch:
        """Image score and map of the given size, from features."""
        if self.test_scale is None:
            return super().judge(features, size)
        latents, log_scales = self.with_log_scales(features)
        tests = self.test_scale(scoring.score_tests(latents, log_scales))
        return InferenceBatch(pred_score=self._highest(tests), anomaly_map=self._map(self._levels(latents), size))

    def score(self, latents: Sequence[Tensor], size: tuple[int, int]) -> InferenceBatch:
        """Score: mean energy of all levels (eq. 8), or the highest positions. Map: mean squares (section 3.4).

        Raises:
            ValueError: if the image score is that of score tests, which need more than latents: see :meth:`judge`.
        """
        levels = self._levels(latents)
        anomaly_map = self._map(levels, size)
        if self.image_score == "energy":
            return InferenceBatch(pred_score=scoring.mean_energy(latents), anomaly_map=anomaly_map)
        if self.image_score == "map":
            return InferenceBatch(pred_score=scoring.top_mean(anomaly_map, self.top_share), anomaly_map=anomaly_map)
        if self.image_score == "levels":
            return InferenceBatch(pred_score=self._highest(levels), anomaly_map=anomaly_map)
        msg = "score tests need the flow's log-scales, and not only latents: call judge with the features"
        raise ValueError(msg)

    def with_log_scales(self, features: Pyramid) -> tuple[Pyramid, Pyramid]:
        """Latents of features, and in maps of the same shapes the log of what the couplings multiplied each number by.

        These are the logarithms of the Jacobian's diagonal as far as numbers do not depend on one another, in units of
        standardized features if the flow begins with a standardization.
        """
        pyramid = features
        total: Pyramid = ()
        for layer in self.flow:
            if isinstance(layer, CrossScaleCoupling):
                pyramid, log_scales = layer.with_log_scales(pyramid)
                total = tuple(map(torch.add, total, log_scales)) if total else log_scales
            else:
                pyramid, _ = layer(pyramid, jac=False)
                total = layer(total, jac=False)[0] if total else ()  # after a coupling, only permutations come
        return pyramid, total

    def _levels(self, latents: Sequence[Tensor]) -> Pyramid:
        levels = scoring.mean_squares(latents)
        return levels if self.level_scale is None else self.level_scale(levels)

    def _map(self, levels: Pyramid, size: tuple[int, int]) -> Tensor:
        return scoring.anomaly_map(levels, size, self.map_mode)

    def _highest(self, levels: Pyramid) -> Tensor:
        """The image score: mean over the highest positions of the levels' mean, at the finest level's resolution."""
        finest = (levels[0].shape[2], levels[0].shape[3])
        return scoring.top_mean(scoring.anomaly_map(levels, finest, "mean"), self.top_share)


class CSFlow(FlowDetector):
    """CS-Flow in anomalib. The defaults are the paper's; the recipe ``cs_flow_small`` is for a CPU.

    The default backbone has the weights (AutoAugment, TensorFlow) and the padding of the paper's EfficientNet-B5; its
    layer has 304 channels at stride 32. The paper's ``kernel_sizes`` are 3, and 5 in the last block. With
    ``standardize``, which is not in the paper, training needs far fewer steps.

    ``layers``, if given, replaces ``layer``: the pyramid then has several layers from one pass of the backbone, and
    the last of them at ``num_scales`` image sizes.

    Args:
        backbone: a timm model with its tag, or ``torchvision/NAME``.
        layer: name of the backbone's layer whose maps are used.
        weights: ``hub``, ``package``, ``random`` or a file: :func:`~anomalib_csflow.features.weights.create_backbone`.
        image_size: height and width in pixels to which images are resized, or one number for both.
        antialias: whether the engine resizes with antialiasing. Exported models resize without it: if images are
            larger than ``image_size``, False gives both the same pixels, and so the same scores.
        num_scales: number of image sizes, each half the one before.
        num_blocks: number of the flow's blocks, or of each layer's flow.
        kernel_sizes: of the convolutions of each block or step; the paper's, if not given.
        hidden_channels: width of the couplings' networks.
        clamp: bound of the log-scales.
        standardize: begin the flow with a fixed layer that standardizes each channel with the training features'
            mean and standard deviation; likelihoods remain those of the features.
        map_mode: ``finest`` (the paper's), ``mean`` or ``product`` of the levels, or their ``soft_minimum``, each
            level in standard deviations of the training images' maps.
        lr: learning rate.
        betas: Adam's.
        eps: Adam's.
        weight_decay: Adam's.
        gradient_clip_norm: limit of the gradient's norm, unless the trainer sets one; None for no limit.
        schedule: of the learning rate, see :data:`anomalib_csflow.engine.optimization.Schedule`.
        bfloat16: train the flow's convolutions in bfloat16 if the device supports it (AMX, AVX512-BF16, GPUs
            from Ampere on); log-dets, losses and scores stay in float32.
        recompute: recompute activations in the backward pass instead of keeping them: memory hardly grows with
            num_blocks, and a step takes about a third longer.
        max_epochs: overrides the trainer's, if given; for ``anomalib benchmark``, which cannot set it otherwise.
        max_steps: number of batches to train for, as one epoch, or ``auto``, see
            :data:`anomalib_csflow.engine.optimization.Steps`.
        noise: Gaussian noise on the training features, see :data:`anomalib_csflow.engine.optimization.Noise`.
        layers: names of the backbone's layers whose maps are used, from fine to coarse.
        keep_aspect: True: when a fit begins, take ``image_size`` (one number) as the shorter side, and the other from
            the training images' aspect ratio, both as multiples of the coarsest level's stride. ``auto``: if images
            are at least 1.5 times as long as wide, keep their aspect ratio, with about as many pixels as a square of
            ``image_size`` has.
        crop_size: train on random squares of this many pixels of each image's features; scores and maps are of whole
            images. So a step on large images costs no more than one on small ones.
        whiten: let the layer that ``standardize`` adds decorrelate the channels too.
        image_score: ``energy`` (the paper's), the mean over all latents; ``map``, the mean over the map's highest
            positions; ``levels``, the same of the levels' mean, whatever the map's fusion; or ``score_test``, the same
            of the mean of the levels' score tests, each in standard deviations of the training images':
            :func:`anomalib_csflow.scoring.score_tests`.
        top_share: share of the map's positions, the most unusual ones, that the image score is computed from; 0 takes
            only the most unusual position.
        coarse_kernel_size: of the convolutions of all levels but the finest, instead of ``kernel_sizes``. Larger ones
            see more of an image for little more time. On parts that vary, they find more defects, and outline them
            less closely.
        output_kernel_size: of the links between levels and the finest level's second convolutions, instead of
            ``kernel_sizes``; other levels' second kernels differ from this as their first ones do from the finest's.
            With 1 instead of 3, a step of the small recipe takes 0.6 of the time.
        conditioner_clamp: bound of what the couplings' convolutions see, in the channels' standard deviations, so that
            a defect has less effect on the map around it. None, the paper's, for no bound.
        region: file of a black and white image, as large as the images are or smaller: only what is white in it is
            inspected. The rest of each image is painted over, in training too; checkpoints contain the mask.
        optimizer: ``adam`` (the paper's) or ``muon``, which needs about half the steps, see
            :data:`anomalib_csflow.engine.optimization.OptimizerName`.
        pre_processor: True creates one from ``image_size`` and the backbone's own mean and standard deviation.
        post_processor: True creates one that sets thresholds from good images, see :doc:`/thresholds`.
        evaluator: True creates one with AUROC and F1 of images, and of pixels if there are maps.
        visualizer: True creates one whose pictures use the scale of good images, see :doc:`/thresholds`.

    Raises:
        ValueError: on an unknown backbone, layer or map mode, or an image too small for the scales.
        WeightsError: if the weights are not available.

    Example:
        >>> import torch
        >>> detector = CSFlow("tf_efficientnet_lite0", "blocks.4", "random", image_size=128,
        ...                   num_blocks=1, hidden_channels=16)
        >>> detector = detector.eval()
        >>> images = torch.rand(2, 3, 128, 128)
        >>> detector.nll(images).shape, detector(images).anomaly_map.shape
        (torch.Size([2]), torch.Size([2, 1, 128, 128]))
    """

    output_arguments = (
        *("layer", "layers", "num_scales", "num_blocks", "kernel_sizes", "hidden_channels", "clamp", "standardize"),
        *("whiten", "map_mode", "image_score", "top_share", "coarse_kernel_size", "output_kernel_size"),
        "conditioner_clamp",
    )
    free_arguments = ("recompute",)
    model: CSFlowModel

    def __init__(
        self,
        backbone: str = "tf_efficientnet_b5.aa_in1k",
        layer: str = "blocks.5",
        weights: str = "hub",
        image_size: int | tuple[int, int] = 768,
        antialias: bool = True,
        num_scales: int = 3,
        num_blocks: int = 4,
        kernel_sizes: Sequence[int] | None = None,
        hidden_channels: int = 1024,
        clamp: float = 3.0,
        standardize: bool = False,
        map_mode: scoring.MapMode = "finest",
        lr: float = 2e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-4,
        weight_decay: float = 1e-5,
        gradient_clip_norm: float | None = 1.0,
        schedule: Schedule = "constant",
        bfloat16: bool = False,
        recompute: bool = False,
        max_epochs: int | None = None,
        max_steps: Steps | None = None,
        noise: Noise = 0.0,
        layers: Sequence[str] = (),
        keep_aspect: KeepAspect = False,
        crop_size: int | None = None,
        whiten: bool = False,
        image_score: ImageScore = "energy",
        top_share: float = 0.0,
        coarse_kernel_size: int | None = None,
        output_kernel_size: int | None = None,
        conditioner_clamp: float | None = None,
        region: str | None = None,
        optimizer: OptimizerName = "adam",
        pre_processor: PreProcessor | bool = True,
        post_processor: PostProcessor | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        check_arguments(locals())
        if kernel_sizes is None:
            kernel_sizes = [3] * (num_blocks - 1) + [5]
        if len(kernel_sizes) != num_blocks:
            msg = f"give one of kernel_sizes for each of num_blocks: got {num_blocks}, {list(kernel_sizes)}"
            raise ValueError(msg)
        if map_mode not in scoring.MAP_MODES:
            msg = f"unknown map_mode {map_mode!r}: choose one of {', '.join(scoring.MAP_MODES)}"
            raise ValueError(msg)

        if image_score not in get_args(ImageScore):
            msg = f"unknown image_score {image_score!r}: choose one of {', '.join(get_args(ImageScore))}"
            raise ValueError(msg)
        if whiten and not standardize:
            msg = "whiten=True needs standardize=True: the channels are standardized before they are decorrelated"
            raise ValueError(msg)
        if conditioner_clamp is not None and not standardize:
            msg = "conditioner_clamp needs standardize=True: it is in standard deviations of the channels"
            raise ValueError(msg)
        scoring.check_top_share(top_share)

        def build(network: nn.Module) -> CSFlowModel:
            features: FeaturePyramid
            if layers:
                features = CrossScalePyramid(FrozenLayers(network, layers), num_scales)
            else:
                features = ImagePyramid(FrozenBackbone(network, layer), num_scales)
            scores = (map_mode, image_score, top_share)
            widths = (kernel_sizes, hidden_channels, clamp, standardize, whiten)
            return CSFlowModel(
                features,
                *widths,
                *scores,
                recompute=recompute,
                coarse_kernel_size=coarse_kernel_size,
                output_kernel_size=output_kernel_size,
                conditioner_clamp=conditioner_clamp,
            )

        images = ImageOptions(backbone, weights, image_size, antialias, keep_aspect, region)
        training = TrainingOptions(
            *(lr, schedule, max_epochs, gradient_clip_norm, weight_decay, betas, eps, bfloat16, max_steps, noise),
            crop_size=crop_size,
            optimizer=optimizer,
            noise_exponent=NOISE_EXPONENT,
        )
        super().__init__(build, images, training, pre_processor, post_processor, evaluator, visualizer)
        self.hparams["kernel_sizes"] = list(kernel_sizes)  # what None stood for

    def measure(self) -> None:
        """Measure the scales of the levels' maps and score tests on training images' features, without noise."""
        model, is_training = self.model, self.model.training
        if model.level_scale is None and model.test_scale is None:
            return
        maps, tests = [], []
        with torch.no_grad():
            model.eval()
            for features in self.training_features(SCALE_IMAGES):
                latents, log_scales = model.with_log_scales(features)
                maps.append(scoring.mean_squares(latents))
                tests.append(scoring.score_tests(latents, log_scales))
            model.train(is_training)
        for scale, measured in ((model.level_scale, maps), (model.test_scale, tests)):
            if scale is not None:
                scale.fit(measured, gather=self.gather)

    def load_reference_state_dict(
        self, state_dict: Mapping[str, Tensor], permutations: Mapping[str, Tensor] | None = None
    ) -> None:
        """Load a flow that was trained with the authors' code or with anomalib's ``Csflow``.

        The features must be the same too: create the detector with the backbone that the flow was
        trained on (anomalib's is ``torchvision/efficientnet_b5`` with layer ``features.6.8``, whose
        weights are loaded from ``state_dict`` if it contains them).

        Args:
            state_dict: of the authors' ``CSFlow`` model, or the ``state_dict`` of anomalib's
                checkpoint or torch model.
            permutations: by name, if they are not those that the original code draws.

        Raises:
            ValueError: if the tensors do not fit this detector's scales, blocks or widths.
        """
        self.model.load_flow(convert_reference_flow(state_dict, permutations))
        backbone = self.model.features.backbone
        names = backbone.model.state_dict()
        found = {
            name: value
            for key, value in state_dict.items()
            if "feature_extractor." in key and (name := key.rpartition("feature_extractor.")[2]) in names
        }
        if len(found) == len(names):
            backbone.model.load_state_dict(found)
            self.keep_backbone = True
