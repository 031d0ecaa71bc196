"""The network of CFLOW-AD, and its absolute scores; see :mod:`anomalib_csflow.detectors.cflow`."""

from collections.abc import Sequence
from typing import cast

import torch
from anomalib.data import InferenceBatch
from torch import Tensor

from anomalib_csflow import scoring
from anomalib_csflow.features import LayerPyramid
from anomalib_csflow.flows import ChannelStandardization, FiberFlow, PyramidFlow
from anomalib_csflow.flows.pyramid import Pyramid

from .flow_model import FlowModel


class CFlowModel(FlowModel):
    """The network of CFLOW-AD: several layers of a backbone, a flow of their cells, relative densities.

    Args:
        features: images to the layers' maps.
        num_blocks: of each layer's decoder.
        condition_channels: of the positional encoding.
        clamp: bound of the log-scales.
        permute_soft: rotate between blocks instead of permuting.
        standardize: begin with a layer that standardizes each channel.

    Attributes:
        highest: the highest log-density per dimension of a training cell, of each layer; 0, and so a plain
            density, until it was measured.
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
    ) -> None:
        dims = [(channels, 1, 1) for channels in features.channels]  # only the channels count
        fiber_flow = FiberFlow(
            dims, num_blocks=num_blocks, condition_channels=condition_channels, clamp=clamp, permute_soft=permute_soft
        )
        layers = [ChannelStandardization(dims)] if standardize else []
        super().__init__(features, PyramidFlow([*layers, fiber_flow]))
        self.register_buffer("highest", torch.zeros(len(dims)))
        self.register_buffer("is_measured", torch.zeros((), dtype=torch.bool))

    @property
    def fiber_flow(self) -> FiberFlow:
        """The decoders of all layers, behind the standardization if there is one."""
        return cast("FiberFlow", self.flow[-1])

    def judge(self, features: Pyramid, size: tuple[int, int]) -> InferenceBatch:
        """From features to the image score and the map of this size: by densities, and not by latents alone."""
        return self.score(self.log_densities(features), size)

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

    def score(self, latents: Sequence[Tensor], size: tuple[int, int]) -> InferenceBatch:
        """From cells' log-densities to the map, and its maximum.

        The map is in nats: 0 where all layers are as likely as the likeliest training cell.
        """
        excess = [level - highest for level, highest in zip(latents, self.highest, strict=True)]
        # no layer may hide what another finds: likelier than all that was seen counts as likely as that
        relative = [torch.where(self.is_measured, level.clamp(max=0), level).exp() for level in excess]
        anomaly_map = scoring.surprise(scoring.upsampled(relative, size, align_corners=True))
        return InferenceBatch(pred_score=anomaly_map.amax((1, 2, 3)), anomaly_map=anomaly_map)
