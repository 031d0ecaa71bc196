"""DifferNet: a flow of the pooled features of turned views."""

from .detector import DifferNet

__all__ = ["DifferNet"]
