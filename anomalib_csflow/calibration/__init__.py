"""Good images only -> p-values, thresholds with a promise, drift: pure functions on scores.

numpy alone at run time: a line that judges and watches with these needs neither torch nor anomalib. scipy is
imported where Beta quantiles are asked for.
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
