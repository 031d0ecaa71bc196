"""RealNVP on pooled features: the density of a backbone's embedding, instead of the pixels'.

Polina Kirichenko, Pavel Izmailov, Andrew Gordon Wilson, "Why Normalizing Flows Fail to Detect
Out-of-Distribution Data", NeurIPS 2020, https://arxiv.org/abs/2006.08545, section 8: a flow of pixels
rates foreign images as likely as its own, a flow of embeddings does not. The pixels' flow is
:class:`anomalib_csflow.flows.PixelFlow`; ``notebooks/real_nvp.ipynb`` shows both.

Differs from the published code:

- width and depth of the perceptrons, learning rate and number of epochs are ours: it names none for embeddings;
- the embeddings are of the images at hand, at the backbone's own image size, and not of CIFAR-10's;
- weight decay on all of the flow's parameters; the rescaling has no weight norm;
- any backbone, layer and image size.
"""

from collections.abc import Sequence
from functools import partial

from anomalib.data import InferenceBatch
from anomalib.metrics import Evaluator
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import Visualizer
from torch import Tensor

from anomalib_csflow import scoring
from anomalib_csflow.engine.detector import FlowDetector
from anomalib_csflow.engine.model import FlowModel
from anomalib_csflow.engine.optimization import Schedule, check_schedule
from anomalib_csflow.features import FrozenBackbone, PooledPyramid
from anomalib_csflow.features.weights import create_backbone
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
        """From features to the image score, which is their likelihood and so takes the log-det too."""
        latents, log_det = self.transform(features)
        return self.score((scoring.nll(latents, log_det) / scoring.num_dims(latents),), size)

    def score(self, latents: Sequence[Tensor], size: tuple[int, int]) -> InferenceBatch:
        """The negative log-likelihood in nats per feature, which stands for the latents here; no map."""
        del size
        return InferenceBatch(pred_score=latents[0])


class RealNVP(FlowDetector):
    """RealNVP on pooled features in anomalib, an image-level detector; ``configs/`` has a recipe for a CPU.

    ``forward``, and so every exported model, gives the image score: the exact negative log-likelihood of
    the image's embedding, in nats per feature. There is no anomaly map, in the engine neither: the
    average over the image has no places.

    Args:
        backbone: a timm model with its tag, or ``torchvision/NAME``; the paper's is EfficientNet-B4.
        layer: whose maps are averaged; of an EfficientNet ``bn2`` is the last (1792 channels).
        weights: ``hub``, ``package``, ``random`` or a file: :func:`~anomalib_csflow.features.weights.create_backbone`.
        image_size: height and width to which images are resized, or one number for both.
        antialias: of the resizing in the engine. Exported models resize without it: where images are
            larger than ``image_size``, False makes both see the same pixels, and so give the same scores.
        num_blocks: number of couplings (the published code's default); they transform the halves in turn.
        hidden_channels: width of the couplings' perceptrons (not published for embeddings).
        num_hidden: hidden layers of the couplings' perceptrons (not published for embeddings).
        standardize: put a fixed layer before the flow that standardizes each feature with statistics
            of the training features; the likelihood stays that of the features. Not in the paper.
        lr: Adam's learning rate (not published for embeddings).
        weight_decay: Adam's.
        gradient_clip_norm: bound of the gradient's norm, unless the trainer is given one.
        schedule: of the learning rate: ``constant`` (the paper's) or another of
            :data:`anomalib_csflow.engine.optimization.Schedule`.
        max_epochs: overrides the trainer's, if given: ``anomalib benchmark`` has no other way to set it.
        pre_processor: or True for one made from ``image_size`` and the backbone's own mean and std.
        post_processor: or True for anomalib's.
        evaluator: or True for image AUROC and F1.
        visualizer: or True for anomalib's.

    Raises:
        ValueError: on an unknown backbone or layer, no couplings, or an image too small for the backbone.
        WeightsError: if the weights cannot be had.

    Example:
        >>> import torch
        >>> detector = RealNVP("tf_efficientnet_lite0", "blocks.4", "random", image_size=128, hidden_channels=16)
        >>> detector = detector.eval()
        >>> images = torch.rand(2, 3, 128, 128)
        >>> detector.nll(images).shape, detector(images).anomaly_map
        (torch.Size([2]), None)
    """

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
        gradient_clip_norm: float = 100.0,
        schedule: Schedule = "constant",
        max_epochs: int | None = None,
        pre_processor: PreProcessor | bool = True,
        post_processor: PostProcessor | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        if num_blocks < 2:
            msg = f"num_blocks must be 2 or more, since each coupling transforms one half: got {num_blocks}"
            raise ValueError(msg)
        check_schedule(schedule)
        super().__init__(pre_processor, post_processor, evaluator, visualizer)
        self.keep_backbone = weights == "random"
        features = PooledPyramid(FrozenBackbone(create_backbone(backbone, weights), layer), num_scales=1)
        if self.input_size is not None:
            features.check_size(*self.input_size)
        self.model = RealNVPModel(features, num_blocks, hidden_channels, num_hidden, standardize)
