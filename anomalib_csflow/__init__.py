"""Normalizing-flow anomaly detectors for anomalib, with exact likelihoods.

``anomalib fit --model anomalib_csflow.CSFlow`` needs no registration. Importing a detector also lets
``anomalib.models.get_model({"class_path": "anomalib_csflow.CSFlow"})`` and ``anomalib benchmark`` find
all of them; it changes nothing for anomalib's own models.
"""

import sys
from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .detectors.cflow import CFlow as CFlow
    from .detectors.cs_flow import CSFlow as CSFlow
    from .detectors.differ_net import DifferNet as DifferNet
    from .detectors.fast_flow import FastFlow as FastFlow
    from .detectors.ms_flow import MSFlow as MSFlow
    from .detectors.real_nvp import RealNVP as RealNVP
    from .engine.feature_cache import FeatureCache as FeatureCache
    from .engine.post_processing import ConformalPostProcessor as ConformalPostProcessor
    from .recipe_files import from_recipe as from_recipe

__version__ = version("anomalib-csflow")
_HOMES = {
    "CFlow": ".detectors.cflow",
    "CSFlow": ".detectors.cs_flow",
    "ConformalPostProcessor": ".engine.post_processing",
    "DifferNet": ".detectors.differ_net",
    "FastFlow": ".detectors.fast_flow",
    "FeatureCache": ".engine.feature_cache",
    "MSFlow": ".detectors.ms_flow",
    "RealNVP": ".detectors.real_nvp",
    "from_recipe": ".recipe_files",
}
"""The module of each public name. It is imported on first use: torch and anomalib take seconds to import."""

__all__ = list(_HOMES)


def __getattr__(name: str) -> object:
    """Import a public name when it is first used (PEP 562)."""
    if name not in _HOMES:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    value = getattr(import_module(_HOMES[name], __name__), name)
    _register()
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _register() -> None:
    """Let anomalib's ``get_model`` import from this package, if ``anomalib.models`` has been imported."""
    if (models := sys.modules.get("anomalib.models")) and hasattr(models, "ALLOWED_MODULES"):
        models.ALLOWED_MODULES.add(__name__)


_register()
