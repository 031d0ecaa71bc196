"""The network of CFLOW-AD, and its absolute scores; see :mod:`anomalib_csflow.detectors.cflow`."""

from collections.abc import Sequence
from typing import Literal, cast, get_args

import torch
from anomalib.data import InferenceBatch
from torch import Tensor

from anomalib_csflow import scoring
from anomalib_csflow.features import LayerPyramid
from anomalib_csflow.flows import ChannelStandardization, FiberFlow, PyramidFlow
from anomalib_csflow.flows.pyramid import Pyramid

from .flow_model import FlowModel

ScoreBy = Literal["density", "energy"]
"""What cells are judged by: their log-density, or their latents' energy alone."""
SCORES_BY: tuple[str, ...] = get_args(ScoreBy)


class CFlowModel(FlowModel):
    """The network of CFLOW-AD: several layers of a backbone, a flow of their cells, relative densities.

    Args:
        features: images to the layers' maps.
        num_blocks: of each layer's decoder.
        condition_channels: of the positional encoding.
        clamp: bound of the log-scales.
        permute_soft: rotate between blocks instead of permuting.
        standardize: begin with a layer that standardizes each channel.
        score_by: what cells are judged by, see :class:`~anomalib_csflow.detectors.cflow.CFlow`.
        top_share: share of the map's cells, those least likely, of which the image score is taken.

    Attributes:
        highest: the highest log-density per dimension of a training cell, of each layer; 0, and so a plain
            density, until it was measured. Energies need none: theirs is 0.
        is_measured: whether it was.
    """

    highest: Tensor
    is_measured: Tensor

    def __init__(
        self,
        features: LayerPyramid,
        num_blocks: int,
        condition_channels: int,
        clamp: float,
        permute_soft: bool,
        standardize: bool,
        score_by: ScoreBy,
        top_share: float,
    ) -> None:
        dims = [(channels, 1, 1) for channels in features.channels]  # only the channels count
        fiber_flow = FiberFlow(
            dims, num_blocks=num_blocks, condition_channels=condition_channels, clamp=clamp, permute_soft=permute_soft
        )
        layers = [ChannelStandardization(dims)] if standardize else []
        super().__init__(features, PyramidFlow([*layers, fiber_flow]))
        self.score_by = score_by
        self.top_share = top_share
        self.register_buffer("highest", torch.zeros(len(dims)))
        self.register_buffer("is_measured", torch.zeros((), dtype=torch.bool))

    @property
    def fiber_flow(self) -> FiberFlow:
        """The decoders of all layers, behind the standardization if there is one."""
        return cast("FiberFlow", self.flow[-1])

    def judge(self, features: Pyramid, size: tuple[int, int]) -> InferenceBatch:
        """From features to the image score and the map of this size."""
        cells = self.log_densities(features) if self.score_by == "density" else self.log_likenesses(features)
        return self.score(cells, size)

    def decoder_inputs(self, features: Pyramid) -> Pyramid:
        """The features, standardized if the flow begins so."""
        return features if self.standardization is None else self.standardization(features, jac=False)[0]

    def log_densities(self, features: Pyramid) -> Pyramid:
        """Log-density of each cell of the decoders' inputs, in nats per channel: maps ``(N, 1, H_i, W_i)``."""
        latents, log_dets = self.fiber_flow.cells(self.decoder_inputs(features))
        return tuple(
            scoring.log_density(level, log_det[:, 0])[:, None] / level.shape[1]
            for level, log_det in zip(latents, log_dets, strict=True)
        )

    def log_likenesses(self, features: Pyramid) -> Pyramid:
        """``-1/2 mean_c z^2`` of each cell: its log-density without the log-det, and without the constant."""
        latents, _ = self.fiber_flow.cells(self.decoder_inputs(features))
        return tuple(-0.5 * level.square().mean(1, keepdim=True) for level in latents)

    def score(self, latents: Sequence[Tensor], size: tuple[int, int]) -> InferenceBatch:
        """From cells' log-densities, or log-likenesses, to the map, and the score of its least likely cells.

        The map is in nats: 0 where all layers are as likely as the likeliest training cell, or as can be.
        """
        excess = [level - highest for level, highest in zip(latents, self.highest, strict=True)]
        # no layer may hide what another finds: likelier than all that was seen counts as likely as that
        relative = [torch.where(self.is_measured, level.clamp(max=0), level).exp() for level in excess]
        anomaly_map = scoring.surprise(scoring.upsampled(relative, size, align_corners=True))
        return InferenceBatch(pred_score=scoring.least_likely(anomaly_map, self.top_share), anomaly_map=anomaly_map)
