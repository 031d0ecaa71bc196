"""DifferNet: a flow on the pooled features of rotated views."""

from .detector import DifferNet

__all__ = ["DifferNet"]
