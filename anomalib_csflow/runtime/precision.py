"""Models that OpenVINO computes in float32, though by default it takes bfloat16 if the processor can.

Thresholds are set with scores in float32. In bfloat16, scores are others, and some detectors rank images worse: score
tests count the more, the more precisely a feature is predicted, and rounding is not predicted at all. OpenVINO still
resizes images and maps in bfloat16, since it replaces that operation by another one without the mark.
"""

import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

MARK = {"name": "precise", "version": "0"}
"""OpenVINO's attribute of operations that keep their precision."""
MARKS = re.compile('<attribute name="(precise|DisablePrecisionConversion)"[^>]*/>')
"""As it is written here, and as OpenVINO writes it again."""
WITHOUT = {"Const", "Parameter", "Result"}
"""Layers that compute nothing."""


def keep_float32(path: Path) -> None:
    """Mark all operations of a model that OpenVINO has written, an ``.xml`` file, so that they keep their precision."""
    tree = ET.parse(path)  # noqa: S314 (OpenVINO wrote it, of our model)
    for layer in tree.iter("layer"):
        if layer.get("type") not in WITHOUT:
            info = layer.find("rt_info")
            ET.SubElement(ET.SubElement(layer, "rt_info") if info is None else info, "attribute", MARK)
    tree.write(path, encoding="utf-8", xml_declaration=True)


def read_model(core: Any, path: Path, precision: str) -> Any:
    """Read a model with OpenVINO, without the marks if it is to be computed in bfloat16 (``bf16``)."""
    if precision != "bf16":
        return core.read_model(path)
    text = MARKS.sub("", path.read_text(encoding="utf-8"))
    return core.read_model(text.encode(), path.with_suffix(".bin").read_bytes())
