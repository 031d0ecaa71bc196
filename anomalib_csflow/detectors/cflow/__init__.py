"""CFLOW-AD: a conditional flow of each position's features."""

from .detector import CFlow

__all__ = ["CFlow"]
