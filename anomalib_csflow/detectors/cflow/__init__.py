"""CFLOW-AD: a conditional flow on the features at each position."""

from .detector import CFlow

__all__ = ["CFlow"]
