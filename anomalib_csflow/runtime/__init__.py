"""Running a bundle on the line: numpy, Pillow, and OpenVINO or ONNX Runtime. No torch, no anomalib.

>>> from anomalib_csflow.runtime import Detector
>>> detector = Detector("part_42/")                    # doctest: +SKIP
>>> result = detector("incoming/0001.png")             # doctest: +SKIP
>>> result.label, result.score, result.p_value         # doctest: +SKIP
(False, 0.31, 0.42)
"""

from .bundle import Bundle, BundleError
from .detector import Detector, Result

__all__ = ["Bundle", "BundleError", "Detector", "Result"]
