"""DifferNet: a flow on pooled features of three image sizes, averaged over several rotated views.

Marco Rudolph, Bastian Wandt, Bodo Rosenhahn, "Same Same But DifferNet: Semi-Supervised Defect Detection
with Normalizing Flows", WACV 2021, https://arxiv.org/abs/2008.12577.

Differs from the published code:

- the test's angles are always the fixed ones (the published code draws them in tests during training);
- latents are not clamped to +-1e6, which would break the inverse: instead, training stops at a loss that is not finite;
- images are rotated as tensors, to the nearest pixel as published, after they are normalized;
- any backbone, layer, number of scales, number of views and image size.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from anomalib.data import Batch, InferenceBatch
from anomalib.metrics import Evaluator
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import Visualizer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from anomalib_csflow.engine.arguments import check_arguments
from anomalib_csflow.engine.detector import FlowDetector
from anomalib_csflow.engine.images import ImageOptions
from anomalib_csflow.engine.optimization import Noise, Schedule, Steps, TrainingOptions
from anomalib_csflow.engine.providers import View
from anomalib_csflow.features import FrozenBackbone, PooledPyramid
from anomalib_csflow.features.weights import normalization
from anomalib_csflow.flows.pyramid import Pyramid

from .model import DifferNetModel
from .reference import convert_reference_flow
from .rotations import fixed_angles, rotate_all, rotate_each

NO_MAP = (
    "The exported DifferNet gives the image score and no anomaly map: the map is a gradient with respect to the image. "
    "For maps, predict in the engine with localize=True."
)


class DifferNet(FlowDetector):
    """DifferNet in anomalib. The defaults are the paper's; the recipe ``differ_net_small`` is for a CPU.

    The layer is AlexNet's last before the classifier (256 channels), whose maps are averaged; the couplings' networks
    are perceptrons of three hidden layers. ``standardize`` and ``fixed_train_rotations`` are not in the paper.

    Every image is seen in several rotated views, at random angles in training and at fixed angles in the
    test, and its score and its ``nll`` are the means over them. If orientation matters, or images are not
    square, fewer or no rotations may be better: with ``fixed_train_rotations``, 1 for both numbers of
    rotations means the image without rotation.

    ``forward``, and so every exported model, gives the image score and no anomaly map: the map is a
    gradient with respect to the image, which exported graphs do not have.

    Args:
        backbone: a timm model with its tag, or ``torchvision/NAME``.
        layer: name of the backbone's layer whose maps are used.
        weights: ``hub``, ``package``, ``random`` or a file: :func:`~anomalib_csflow.features.weights.create_backbone`.
        image_size: height and width in pixels to which images are resized, or one number for both.
        antialias: whether the engine resizes with antialiasing. Exported models resize without it: if images are
            larger than ``image_size``, False gives both the same pixels, and so the same scores.
        num_scales: number of image sizes, each half the one before.
        num_blocks: number of the flow's blocks, or of each layer's flow.
        hidden_channels: width of the couplings' networks.
        clamp: bound of the log-scales.
        standardize: begin the flow with a fixed layer that standardizes each channel with the training features'
            mean and standard deviation; likelihoods remain those of the features.
        num_train_rotations: views per image and training step.
        num_test_rotations: views per image in the test, rotated by multiples of 360 degrees over their number. All
            views of a batch go through the network at once: memory must hold the evaluation batch times this number.
        fixed_train_rotations: train on fixed angles, multiples of 360 degrees over ``num_train_rotations``, instead of
            random ones: then the features of a view are always the same, and can be cached.
        localize: also make anomaly maps in the engine's validation, test and prediction: one gradient per view.
        lr: learning rate.
        betas: Adam's.
        eps: Adam's.
        weight_decay: Adam's.
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
        ValueError: on an unknown backbone or layer, no blocks or views, or an image too small for the scales.
        WeightsError: if the weights are not available.

    Example:
        >>> detector = DifferNet("tf_efficientnet_lite0", "blocks.4", "random", image_size=128,
        ...                      num_blocks=1, hidden_channels=16, num_test_rotations=2)
        >>> detector = detector.eval()
        >>> images = torch.rand(2, 3, 128, 128)
        >>> detector.nll(images).shape, detector.model.localize(images).anomaly_map.shape
        (torch.Size([2]), torch.Size([2, 1, 128, 128]))
    """

    output_arguments = (
        *("layer", "num_scales", "num_blocks", "hidden_channels", "clamp", "standardize"),
        "num_test_rotations",
    )
    # maps can be made with every checkpoint; one that was validated without them has no scale for them, and says so
    free_arguments = ("num_train_rotations", "fixed_train_rotations", "localize")
    model: DifferNetModel

    def __init__(
        self,
        backbone: str = "torchvision/alexnet",
        layer: str = "features.12",
        weights: str = "hub",
        image_size: int | tuple[int, int] = 448,
        antialias: bool = True,
        num_scales: int = 3,
        num_blocks: int = 8,
        hidden_channels: int = 2048,
        clamp: float = 3.0,
        standardize: bool = False,
        num_train_rotations: int = 4,
        num_test_rotations: int = 64,
        fixed_train_rotations: bool = False,
        localize: bool = False,
        lr: float = 2e-4,
        betas: tuple[float, float] = (0.8, 0.8),
        eps: float = 1e-4,
        weight_decay: float = 1e-5,
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
        mean, std = normalization(backbone)
        black = [-m / s for m, s in zip(mean, std, strict=True)]

        def build(network: nn.Module) -> DifferNetModel:
            features = PooledPyramid(FrozenBackbone(network, layer), num_scales)
            return DifferNetModel(features, num_blocks, hidden_channels, clamp, standardize, num_test_rotations, black)

        images = ImageOptions(backbone, weights, image_size, antialias, region=region)
        training = TrainingOptions(
            lr, schedule, max_epochs, None, weight_decay, betas, eps, max_steps=max_steps, noise=noise
        )
        super().__init__(build, images, training, pre_processor, post_processor, evaluator, visualizer)
        self.num_train_rotations = num_train_rotations
        self.fixed_train_rotations = fixed_train_rotations
        self.localize = localize

    # -- views ------------------------------------------------------------------------------------

    @property
    def fixed_views(self) -> tuple[View, ...]:
        """The training's views, if they are fixed: features of random ones are not cached."""
        angles = fixed_angles(self.num_train_rotations) if self.fixed_train_rotations else ()
        return tuple(View(f"rotated by {angle:g} degrees", partial(self._turned, angle)) for angle in angles)

    def features(self, batch: Batch[Any]) -> Pyramid:
        """Features of the views of a training step, ``(V * N, D)``."""
        if self.fixed_train_rotations:
            views = [self.provider.features(batch, view) for view in self.fixed_views]
        else:
            images = cast("Tensor", batch.image)
            views = [self.compute(self.turned_at_random(images)) for _ in range(self.num_train_rotations)]
        return tuple(torch.cat(level) for level in zip(*views, strict=True))

    def _turned(self, angle: float, images: Tensor) -> Tensor:
        return rotate_all(images, torch.tensor([angle]).to(images), self.model.get_buffer("black"))

    def turned_at_random(self, images: Tensor) -> Tensor:
        """Each image rotated by an angle of its own."""
        degrees = images.new_empty(len(images)).uniform_(-180, 180)
        return rotate_each(images, degrees, self.model.get_buffer("black"))

    # -- maps, only in the engine -----------------------------------------------------------------

    def evaluate(self, batch: Batch[Any]) -> InferenceBatch:
        """Score a batch's images in all views of the test, with maps if ``localize`` is set."""
        images = cast("Tensor", batch.image)
        if self.localize:
            return self.model.localize(images)
        return self.model.judge(self.compute(self.model.views(images)), (images.shape[2], images.shape[3]))

    def on_test_start(self) -> None:
        """Check that maps have a scale, if ``localize`` is set."""
        self._check_map_scale()

    def on_predict_start(self) -> None:
        """Check the images to predict, and that maps have a scale, if ``localize`` is set."""
        super().on_predict_start()
        self._check_map_scale()

    def _check_map_scale(self) -> None:
        """Raise ValueError if maps would be compared with a threshold that was never set."""
        processor = self.post_processor
        if not self.localize or not isinstance(processor, PostProcessor):
            return
        if not processor.image_min.isnan() and processor.pixel_min.isnan():
            msg = (
                "localize=True, but this model was validated without maps, so they have no scale and no "
                "threshold: fit or validate it with localize=True"
            )
            raise ValueError(msg)

    # -- export -----------------------------------------------------------------------------------

    def to_onnx(  # type: ignore[override] # anomalib's own signature is not Lightning's
        self,
        export_root: Path | str,
        model_file_name: str = "model",
        input_size: tuple[int, int] | None = None,
        **kwargs: Any,
    ) -> Path:
        """Export the image score to ONNX; see :meth:`FlowDetector.to_onnx`."""
        rank_zero_info(NO_MAP)
        return super().to_onnx(export_root, model_file_name, input_size, **kwargs)

    def to_torch(self, export_root: Path | str, model_file_name: str = "model") -> Path:
        """Export the whole module, whose ``forward`` gives the image score; see :meth:`FlowDetector.to_torch`."""
        rank_zero_info(NO_MAP)
        return super().to_torch(export_root, model_file_name)

    def load_reference_state_dict(
        self, state_dict: Mapping[str, Tensor], permutations: Mapping[str, Tensor] | None = None
    ) -> None:
        """Load a flow that was trained with the authors' code, on the same backbone's features.

        Args:
            state_dict: of the authors' ``DifferNet`` model.
            permutations: by name, if they are not those that the authors' code draws.

        Raises:
            ValueError: if the tensors do not fit this detector's features, blocks or widths.
        """
        self.model.load_flow(convert_reference_flow(state_dict, permutations))
