"""Normalizing-flow anomaly detectors for anomalib, with exact likelihoods.

``anomalib fit --model anomalib_csflow.CSFlow`` needs no registration. Importing the package also lets
``anomalib.models.get_model({"class_path": "anomalib_csflow.CSFlow"})`` and ``anomalib benchmark`` find
the detectors; it changes nothing for anomalib's own models.
"""

from importlib.metadata import version

import anomalib.models

from anomalib_csflow.detectors.cflow import CFlow
from anomalib_csflow.detectors.cs_flow import CSFlow
from anomalib_csflow.detectors.differ_net import DifferNet
from anomalib_csflow.engine.feature_cache import FeatureCache

from .detectors.fast_flow import FastFlow
from .detectors.ms_flow import MSFlow
from .detectors.real_nvp import RealNVP

__version__ = version("anomalib-csflow")
__all__ = ["CFlow", "CSFlow", "DifferNet", "FastFlow", "FeatureCache", "MSFlow", "RealNVP"]

anomalib.models.ALLOWED_MODULES.add("anomalib_csflow")
