"""From scores of good images to p-values, thresholds with a promise, and drift: pure functions.

Only numpy is needed at run time: a production line that uses these needs neither torch nor anomalib. scipy is only
imported for Beta quantiles.
"""

from .drift import DriftMonitor, DriftState
from .joint import JointThresholds, joint_thresholds
from .promises import KINDS, Kind, Promise, images_needed
from .scale import Scale
from .thresholds import p_values, threshold

__all__ = [
    "KINDS",
    "DriftMonitor",
    "DriftState",
    "JointThresholds",
    "Kind",
    "Promise",
    "Scale",
    "images_needed",
    "joint_thresholds",
    "p_values",
    "threshold",
]
