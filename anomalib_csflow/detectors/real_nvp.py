"""RealNVP on pooled features: the density of a backbone's embedding, instead of the pixels'.

Polina Kirichenko, Pavel Izmailov, Andrew Gordon Wilson, "Why Normalizing Flows Fail to Detect
Out-of-Distribution Data", NeurIPS 2020, https://arxiv.org/abs/2006.08545, section 8: a flow on pixels rates
images of other data sets as likely as its own, a flow on embeddings does not. The flow on pixels is
:class:`anomalib_csflow.flows.PixelFlow`; ``notebooks/real_nvp.ipynb`` shows both.

Differs from the published code:

- width and depth of the perceptrons, learning rate and number of epochs are ours: it has none for embeddings;
- the embeddings are those of the user's images at the backbone's own image size, not of CIFAR-10's images;
- weight decay on all of the flow's parameters; the rescaling has no weight norm;
- any backbone, layer and image size.
"""

from functools import partial

from anomalib.data import InferenceBatch
from anomalib.metrics import Evaluator
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import Visualizer
from torch import nn

from anomalib_csflow import scoring
from anomalib_csflow.engine.arguments import check_arguments
from anomalib_csflow.engine.detector import FlowDetector
from anomalib_csflow.engine.images import ImageOptions
from anomalib_csflow.engine.model import FlowModel
from anomalib_csflow.engine.optimization import Noise, Schedule, Steps, TrainingOptions
from anomalib_csflow.features import FrozenBackbone, PooledPyramid
from anomalib_csflow.flows import ChannelStandardization, MaskedCoupling, Perceptron, PyramidFlow
from anomalib_csflow.flows.pyramid import Pyramid


class RealNVPModel(FlowModel):
    """The network of RealNVP on embeddings: pooled features, couplings of alternating halves, the likelihood.

    Args:
        features: images to one vector.
        num_blocks: couplings.
        hidden_channels: width of the couplings' perceptrons.
        num_hidden: hidden layers of the couplings' perceptrons.
        standardize: begin with a layer that standardizes each feature.
    """

    def __init__(
        self, features: PooledPyramid, num_blocks: int, hidden_channels: int, num_hidden: int, standardize: bool
    ) -> None:
        dims = [(features.num_features,)]
        layers = [ChannelStandardization(dims)] if standardize else []
        conditioner = partial(Perceptron, hidden_features=hidden_channels, num_hidden=num_hidden)
        layers += [MaskedCoupling(dims, conditioner=conditioner, swap=block % 2 == 1) for block in range(num_blocks)]
        super().__init__(features, PyramidFlow(layers))

    def judge(self, features: Pyramid, size: tuple[int, int]) -> InferenceBatch:
        """Negative log-likelihood in nats per feature, from features, because it needs the log-det too; no map."""
        del size
        latents, log_det = self.transform(features)
        return InferenceBatch(pred_score=scoring.nll(latents, log_det) / scoring.num_dims(latents))


class RealNVP(FlowDetector):
    """RealNVP on pooled features in anomalib, an image-level detector; the recipe ``real_nvp_small`` is for a CPU.

    ``forward``, and so every exported model, gives the image score: the exact negative log-likelihood of
    the image's embedding, in nats per feature. There is no anomaly map, in the engine either: averaging over
    the image discards positions.

    The backbone is the paper's EfficientNet-B4, whose last layer is ``bn2`` (1792 channels). The number of couplings,
    which transform the halves in turn, is the published code's default. For embeddings, that code has neither the
    perceptrons' widths nor the learning rate; ``standardize`` is not in the paper.

    Args:
        backbone: a timm model with its tag, or ``torchvision/NAME``.
        layer: name of the backbone's layer whose maps are used.
        weights: ``hub``, ``package``, ``random`` or a file: :func:`~anomalib_csflow.features.weights.create_backbone`.
        image_size: height and width in pixels to which images are resized, or one number for both.
        antialias: whether the engine resizes with antialiasing. Exported models resize without it: if images are
            larger than ``image_size``, False gives both the same pixels, and so the same scores.
        num_blocks: number of the flow's blocks, or of each layer's flow.
        hidden_channels: width of the couplings' networks.
        num_hidden: hidden layers of the couplings' networks.
        standardize: begin the flow with a fixed layer that standardizes each channel with the training features'
            mean and standard deviation; likelihoods remain those of the features.
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
        ValueError: on an unknown backbone or layer, no couplings, or an image too small for the backbone.
        WeightsError: if the weights are not available.

    Example:
        >>> import torch
        >>> detector = RealNVP("tf_efficientnet_lite0", "blocks.4", "random", image_size=128, hidden_channels=16)
        >>> detector = detector.eval()
        >>> images = torch.rand(2, 3, 128, 128)
        >>> detector.nll(images).shape, detector(images).anomaly_map
        (torch.Size([2]), None)
    """

    output_arguments = ("layer", "num_blocks", "hidden_channels", "num_hidden", "standardize")
    model: RealNVPModel

    def __init__(
        self,
        backbone: str = "tf_efficientnet_b4.aa_in1k",
        layer: str = "bn2",
        weights: str = "hub",
        image_size: int | tuple[int, int] = 380,
        antialias: bool = True,
        num_blocks: int = 8,
        hidden_channels: int = 512,
        num_hidden: int = 2,
        standardize: bool = False,
        lr: float = 1e-4,
        weight_decay: float = 5e-5,
        gradient_clip_norm: float | None = 100.0,
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
        if num_blocks < 2:
            msg = f"num_blocks must be 2 or more, since each coupling transforms one half: got {num_blocks}"
            raise ValueError(msg)

        def build(network: nn.Module) -> RealNVPModel:
            features = PooledPyramid(FrozenBackbone(network, layer), num_scales=1)
            return RealNVPModel(features, num_blocks, hidden_channels, num_hidden, standardize)

        images = ImageOptions(backbone, weights, image_size, antialias, region=region)
        training = TrainingOptions(
            lr, schedule, max_epochs, gradient_clip_norm, weight_decay, max_steps=max_steps, noise=noise
        )
        super().__init__(build, images, training, pre_processor, post_processor, evaluator, visualizer)
