"""The network that all detectors share: a frozen backbone, an invertible flow, a score."""

from abc import ABC
from collections.abc import Mapping, Sequence

from anomalib.data import InferenceBatch
from torch import Tensor, nn

from anomalib_csflow import scoring
from anomalib_csflow.features import FeaturePyramid
from anomalib_csflow.flows import ChannelStandardization, ChannelWhitening, PyramidFlow
from anomalib_csflow.flows.pyramid import Pyramid


class FlowModel(nn.Module, ABC):
    """A frozen backbone, an invertible flow, and a score of the latents.

    Args:
        features: images to a pyramid of features.
        flow: features to latents.

    A method defines its :meth:`score` of the latents; if the score needs more than latents, it overrides :meth:`judge`.
    A method that sees an image in several views overrides :meth:`views` and :meth:`per_image`.

    Shape:
        images ``(N, 3, H, W)``, already normalized, to ``pred_score (N,)`` and ``anomaly_map (N, 1, H, W)``.
    """

    def __init__(self, features: FeaturePyramid, flow: PyramidFlow) -> None:
        super().__init__()
        self.features = features
        self.flow = flow

    def forward(self, images: Tensor) -> InferenceBatch:
        """Score images; a score only depends on its own image."""
        return self.judge(self.features(self.views(images)), (images.shape[2], images.shape[3]))

    def judge(self, features: Pyramid, size: tuple[int, int]) -> InferenceBatch:
        """Image score and map of the given size, from features."""
        latents, _ = self.transform(features, jac=False)
        return self.score(latents, size)

    def views(self, images: Tensor) -> Tensor:
        """The views of each image that go through the backbone: by default, the image itself."""
        return images

    def per_image(self, values: Tensor) -> Tensor:
        """Reduce one value per view to one value per image."""
        return values

    def latents(self, images: Tensor, *, jac: bool = True) -> tuple[Pyramid, Tensor]:
        """Latents of each view's features, and the log-det ``(N,)`` of the flow (zeros if not ``jac``)."""
        return self.transform(self.features(self.views(images)), jac=jac)

    def transform(self, features: Pyramid, *, jac: bool = True) -> tuple[Pyramid, Tensor]:
        """Latents of features, and the log-det ``(N,)`` (zeros if not ``jac``)."""
        latents, log_det = self.flow(features, jac=jac)
        return latents, log_det

    def nll(self, images: Tensor) -> Tensor:
        """Exact negative log-likelihood of each image's features in nats, ``(N,)``; the mean over its views."""
        return self.per_image(scoring.nll(*self.latents(images)))

    def score(self, latents: Sequence[Tensor], size: tuple[int, int]) -> InferenceBatch:
        """Image score ``(N,)`` and map ``(N, 1, H, W)`` of the given size (or None), from latents."""
        raise NotImplementedError

    @property
    def standardization(self) -> ChannelStandardization | ChannelWhitening | None:
        """The layer that standardizes or whitens the features, if the flow begins with one."""
        first = self.flow[0]
        return first if isinstance(first, (ChannelStandardization, ChannelWhitening)) else None

    def load_flow(self, converted: Mapping[str, Tensor]) -> None:
        """Load a flow trained elsewhere, whose tensors have this package's names and which has no standardization.

        Args:
            converted: tensors by their names in :class:`~anomalib_csflow.flows.PyramidFlow`; the first layer is 0.

        Raises:
            ValueError: if the tensors do not fit this flow's.
        """
        offset = 0 if self.standardization is None else 1
        own = {key: value for key, value in self.flow.state_dict().items() if int(key.partition(".")[0]) >= offset}
        renamed = {}
        for key, value in converted.items():
            index, _, rest = key.partition(".")
            renamed[f"{int(index) + offset}.{rest}"] = value
        wrong = [key for key in own if key not in renamed or renamed[key].shape != own[key].shape]
        if wrong or len(own) != len(renamed):
            msg = (
                f"the reference weights have {len(renamed)} tensors, this detector's flow {len(own)}"
                + (f", and {wrong[0]!r} does not fit" if wrong else "")
                + ": use the number of blocks, channels and kernel sizes that the weights were trained with"
            )
            raise ValueError(msg)
        self.flow.load_state_dict(renamed, strict=False)
