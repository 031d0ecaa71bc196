"""Frozen backbones, the pyramids that they compute, their weights, and the store of computed features."""

from .backbones import FrozenBackbone, FrozenLayers
from .pyramids import CrossScalePyramid, FeaturePyramid, ImagePyramid, LayerPyramid, PooledPyramid

__all__ = [
    "CrossScalePyramid",
    "FeaturePyramid",
    "FrozenBackbone",
    "FrozenLayers",
    "ImagePyramid",
    "LayerPyramid",
    "PooledPyramid",
]
