"""The frozen backbone in OpenVINO: torch's features to a few parts in 10^6, faster on a CPU."""

import warnings
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from anomalib_csflow.features import FeaturePyramid
from anomalib_csflow.flows.pyramid import Pyramid

LEAST_IMAGES = 200
"""Features of fewer images are computed in torch: converting the backbone takes about 2 s, which 200 images save."""

TOLERANCE = 1e-3
"""Largest relative difference from torch's features with which OpenVINO is used; 1e-6 to 1e-5 is usual."""


class ImageByImage:
    """A model of one image in OpenVINO, for batches: several images one by one take less time than at once.

    As many images are computed at the same time as OpenVINO finds best for torch's number of threads.

    Args:
        model: of images ``(1, 3, H, W)``.
    """

    def __init__(self, model: Any) -> None:
        import openvino  # noqa: PLC0415 (optional)

        settings = {
            "INFERENCE_PRECISION_HINT": "f32",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "PERFORMANCE_HINT": "THROUGHPUT",
        }
        compiled = openvino.Core().compile_model(model, "CPU", settings)
        self.shapes = [tuple(output.shape)[1:] for output in compiled.outputs]
        self.queue = openvino.AsyncInferQueue(compiled)

    def __call__(self, images: Tensor) -> Pyramid:
        """Outputs of images ``(N, 3, H, W)``."""
        found = [np.empty((len(images), *shape), dtype=np.float32) for shape in self.shapes]

        def keep(request: Any, place: int) -> None:
            for index, output in enumerate(found):
                output[place] = request.get_output_tensor(index).data[0]

        self.queue.set_callback(keep)
        for place, image in enumerate(images.contiguous().numpy()):
            self.queue.start_async({0: image[None]}, place)
        self.queue.wait_all()
        return tuple(map(torch.from_numpy, found))


class CompiledFeatures:
    """A frozen backbone that OpenVINO computes in float32, or torch where OpenVINO cannot.

    It is converted at the first batch of each image size, after weights were loaded from a checkpoint, and compared
    with torch on that batch's first image.

    Args:
        features: the backbone in torch, on the CPU.
    """

    def __init__(self, features: FeaturePyramid) -> None:
        self.features = features
        self._compiled: dict[tuple[int, int], ImageByImage | None] = {}

    def __call__(self, images: Tensor) -> Pyramid:
        """The backbone's maps ``(N, C, H, W)``, or its vectors, of pre-processed images ``(N, 3, H, W)``."""
        size = (images.shape[2], images.shape[3])
        if size not in self._compiled:
            self._compiled[size] = self._compile(images[:1])
        model = self._compiled[size]
        return self.features.few_at_once(images) if model is None else model(images)

    def _compile(self, image: Tensor) -> ImageByImage | None:
        """A compiled model for images of this size; None if torch must compute."""
        import openvino  # noqa: PLC0415 (optional)

        expected = self.features(image)  # also raises the backbone's errors, such as for a wrong image size
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a warning that the size becomes a constant, as intended
                model = openvino.convert_model(self.features, example_input=image, input=list(image.shape))
            compiled = ImageByImage(model)
            pairs = zip(compiled(image), expected, strict=True)
            difference = max(float((found - wanted).norm() / wanted.norm()) for found, wanted in pairs)
        except Exception as error:  # whatever it is, torch can compute the features
            rank_zero_info(f"Torch computes the features: OpenVINO cannot convert the backbone ({error}).")
            return None
        if not difference <= TOLERANCE:
            rank_zero_info(f"Torch computes the features: OpenVINO's have a relative difference of {difference:.1e}.")
            return None
        return compiled


def compiled(
    features: FeaturePyramid, num_images: int, device: torch.device, precision: str
) -> CompiledFeatures | None:
    """A backbone in OpenVINO, if it is installed and faster than torch: on a CPU, for enough images; otherwise None.

    Args:
        features: the backbone in torch.
        num_images: number of images whose features will be computed.
        device: of the trainer.
        precision: of the trainer; OpenVINO is only used for float32.
    """
    pays = (
        num_images >= LEAST_IMAGES
        and device.type == "cpu"
        and precision == "32-true"
        and torch.get_default_dtype() == torch.float32
        and find_spec("openvino") is not None
    )
    return CompiledFeatures(features) if pays else None


def computed_by(compute: Callable[[Tensor], Pyramid]) -> str:
    """Library and version that compute the features; a cache does not mix features of two libraries."""
    name = "openvino" if isinstance(compute, CompiledFeatures) else "torch"
    return f"{name} {version(name)}"
