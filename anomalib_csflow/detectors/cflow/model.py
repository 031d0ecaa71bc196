"""The network of CFLOW-AD, and its absolute scores; see :mod:`anomalib_csflow.detectors.cflow`."""

from collections.abc import Sequence
from typing import Literal, cast, get_args

import torch
from anomalib.data import InferenceBatch
from torch import Tensor

from anomalib_csflow import scoring
from anomalib_csflow.engine.model import FlowModel
from anomalib_csflow.features import LayerPyramid
from anomalib_csflow.flows import ChannelStandardization, FiberFlow, PyramidFlow
from anomalib_csflow.flows.pyramid import Pyramid
from anomalib_csflow.flows.running_statistics import RunningStatistics

ScoreBy = Literal["density", "energy"]
"""What positions are judged by: their log-density, or only their latents' energy."""
SCORES_BY: tuple[str, ...] = get_args(ScoreBy)


class CFlowModel(FlowModel):
    """The network of CFLOW-AD: several layers of a backbone, a flow on their positions, relative densities.

    Args:
        features: images to the layers' maps.
        num_blocks: of each layer's decoder.
        condition_channels: of the positional encoding.
        clamp: bound of the log-scales.
        permute_soft: rotate between blocks instead of permuting.
        standardize: begin with a layer that standardizes each channel.
        score_by: what positions are judged by, see :class:`~anomalib_csflow.detectors.cflow.CFlow`.
        top_share: share of the map's positions, the least likely ones, that the image score is computed from.

    Attributes:
        reference: what each layer's positions are compared with, in nats per channel: the highest log-density of a
            training position; with energies, minus their mean. 0 until it is measured.
        unit: 1; with energies, the standard deviation of the training positions' energies.
        is_measured: whether these have been measured; before, positions are not compared with anything.
    """

    reference: Tensor
    unit: Tensor
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
        dims = [(channels, 1, 1) for channels in features.channels]  # only the channels matter
        fiber_flow = FiberFlow(
            dims, num_blocks=num_blocks, condition_channels=condition_channels, clamp=clamp, permute_soft=permute_soft
        )
        layers = [ChannelStandardization(dims)] if standardize else []
        super().__init__(features, PyramidFlow([*layers, fiber_flow]))
        self.score_by = score_by
        self.top_share = top_share
        self.register_buffer("reference", torch.zeros(len(dims)))
        self.register_buffer("unit", torch.ones(len(dims)))
        self.register_buffer("is_measured", torch.zeros((), dtype=torch.bool))

    @property
    def fiber_flow(self) -> FiberFlow:
        """The decoders of all layers, after the standardization if there is one."""
        return cast("FiberFlow", self.flow[-1])

    def judge(self, features: Pyramid, size: tuple[int, int]) -> InferenceBatch:
        """Image score and map of the given size, from features."""
        return self.compare(self.plausibilities(features), size)

    def decoder_inputs(self, features: Pyramid) -> Pyramid:
        """The features, standardized if the flow begins with a standardization."""
        return features if self.standardization is None else self.standardization(features, jac=False)[0]

    def plausibilities(self, features: Pyramid) -> Pyramid:
        """:meth:`plausibility` of each position of features: maps ``(N, 1, H_i, W_i)``."""
        latents, log_dets = self.fiber_flow.positions(self.decoder_inputs(features))
        pairs = zip(latents, log_dets, strict=True)
        return tuple(self.plausibility(level, log_det[:, 0])[:, None] for level, log_det in pairs)

    def log_density(self, latents: Tensor, log_det: Tensor) -> Tensor:
        """Log-density of positions in nats per channel, from latents ``(N, C, ...)`` and log-dets ``(N, ...)``."""
        return scoring.log_density(latents, log_det) / latents.shape[1]

    def plausibility(self, latents: Tensor, log_det: Tensor) -> Tensor:
        """What positions are judged by, in nats per channel: their log-density, or minus their latents' energy.

        Args:
            latents: ``(N, C, ...)``.
            log_det: of each position, ``(N, ...)``.

        Returns:
            ``(N, ...)``.
        """
        if self.score_by == "energy":
            return -0.5 * latents.square().mean(1)
        return self.log_density(latents, log_det)

    @torch.no_grad()
    def compare_with(self, seen: Sequence[RunningStatistics]) -> None:
        """From now on, compare positions with training positions.

        Args:
            seen: for each layer, statistics of the training positions' :meth:`plausibility`, as one channel.
        """
        for level, statistics in enumerate(seen):
            if self.score_by == "energy":
                self.reference[level] = statistics.mean.item()
                self.unit[level] = statistics.variance.sqrt().clamp(min=1e-6).item()
            else:
                self.reference[level] = statistics.highest.item()
        self.is_measured.fill_(value=True)

    def compare(self, plausibilities: Sequence[Tensor], size: tuple[int, int]) -> InferenceBatch:
        """Map and image score, from the :meth:`plausibility` of positions, ``(N, 1, H_i, W_i)`` per layer.

        By density, it is in nats: 0 where all layers are as likely as the most likely training position. By energy, it
        is in standard deviations of the training positions: 0 where all layers are as likely as these on average.
        """
        levels = zip(plausibilities, self.reference, self.unit, strict=True)
        excess = [(level - reference) / unit for level, reference, unit in levels]
        # no layer may hide what another finds, so a position more likely than the reference counts as equally likely
        relative = [torch.where(self.is_measured, level.clamp(max=0), level) for level in excess]
        if self.score_by == "energy":  # upsampled as logarithms, which distinguish 1000 standard deviations from 100
            anomaly_map = -scoring.log_mean_exp(scoring.upsampled(relative, size, align_corners=True), dim=0)
        else:
            densities = [level.exp() for level in relative]
            anomaly_map = scoring.surprise(scoring.upsampled(densities, size, align_corners=True))
        return InferenceBatch(pred_score=scoring.least_likely(anomaly_map, self.top_share), anomaly_map=anomaly_map)
