"""CS-Flow: the cross-scale flow."""

from .detector import CSFlow

__all__ = ["CSFlow"]
