"""The network that all detectors share: a frozen backbone, an invertible flow, a score."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from anomalib.data import InferenceBatch
from torch import Tensor, nn

from anomalib_csflow import scoring
from anomalib_csflow.features import FeaturePyramid
from anomalib_csflow.flows import ChannelStandardization, PyramidFlow
from anomalib_csflow.flows.pyramid import Pyramid


class FlowModel(nn.Module, ABC):
    """A frozen backbone, an invertible flow, and a score of the latents.

    Args:
        features: images to a pyramid of features.
        flow: features to latents.

    Shape:
        images ``(N, 3, H, W)``, already normalized, to ``pred_score (N,)`` and ``anomaly_map (N, 1, H, W)``.
    """

    def __init__(self, features: FeaturePyramid, flow: PyramidFlow) -> None:
        super().__init__()
        self.features = features
        self.flow = flow

    def forward(self, images: Tensor) -> InferenceBatch:
        """Score images; a score depends on its own image alone."""
        return self.judge(self.features(images), (images.shape[2], images.shape[3]))

    def judge(self, features: Pyramid, size: tuple[int, int]) -> InferenceBatch:
        """From features to the image score and the map of this size."""
        latents, _ = self.transform(features, jac=False)
        return self.score(latents, size)

    def latents(self, images: Tensor, *, jac: bool = True) -> tuple[Pyramid, Tensor]:
        """Latents of each image's features, and the log-det ``(N,)`` of the flow (zeros if not ``jac``)."""
        return self.transform(self.features(images), jac=jac)

    def transform(self, features: Pyramid, *, jac: bool = True) -> tuple[Pyramid, Tensor]:
        """Latents of features, and the log-det ``(N,)`` (zeros if not ``jac``)."""
        latents, log_det = self.flow(features, jac=jac)
        return latents, log_det

    def nll(self, images: Tensor) -> Tensor:
        """Exact negative log-likelihood of each image's features in nats, ``(N,)``."""
        return scoring.nll(*self.latents(images))

    @abstractmethod
    def score(self, latents: Sequence[Tensor], size: tuple[int, int]) -> InferenceBatch:
        """From latents to the image score and the map of this size."""

    @property
    def standardization(self) -> ChannelStandardization | None:
        """The layer that standardizes the features, if the flow begins with one."""
        first = self.flow[0]
        return first if isinstance(first, ChannelStandardization) else None
