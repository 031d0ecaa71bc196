"""Invertible layers over pyramids of maps or vectors: torch and FrEIA only, no images, no anomalib.

Every layer is a FrEIA ``InvertibleModule``. Beyond FrEIA's contract: inputs and outputs are tuples of
tensors, finest level first; the log-det is always a tensor ``(N,)`` in nats, for the direction that was
called; sample ``n`` of the output depends only on sample ``n`` of the input; everything random is a
buffer; ``jac=False`` skips computing the log-det.
"""

from .chain import PyramidFlow
from .cross_convolution import CrossConvolution
from .cross_scale import CrossScaleCoupling
from .fibers import FiberFlow
from .fusion import FusionConditioner, normalized_convolutions
from .glow_coupling import GlowCoupling
from .masked_coupling import MaskedCoupling
from .parallel import ParallelFlow
from .perceptron import Perceptron
from .permutation import ScalePermutation
from .pixel_flow import PixelFlow, ResidualConvolutions
from .standardization import ChannelStandardization
from .whitening import ChannelWhitening

__all__ = [
    "ChannelStandardization",
    "ChannelWhitening",
    "CrossConvolution",
    "CrossScaleCoupling",
    "FiberFlow",
    "FusionConditioner",
    "GlowCoupling",
    "MaskedCoupling",
    "ParallelFlow",
    "Perceptron",
    "PixelFlow",
    "PyramidFlow",
    "ResidualConvolutions",
    "ScalePermutation",
    "normalized_convolutions",
]
