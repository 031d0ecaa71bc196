"""Exports: what anomalib's own exports lack for flows."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from anomalib.data import AnomalibDataModule
from anomalib.models.components.base.export_mixin import ExportMixin
from anomalib.post_processing import PostProcessor
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.utils.data import RandomSampler
from torchvision.transforms.v2.functional import resize

from anomalib_csflow.runtime.precision import keep_float32

from .images import ImageOptions
from .quantization import CALIBRATION_IMAGES, quantized
from .whole_files import whole_export


class FlowExports(ExportMixin, LightningModule):
    """Exports of detectors: frozen torch modules, ONNX, OpenVINO and its 8-bit models."""

    image_options: ImageOptions

    def to_onnx(  # type: ignore[override] # anomalib's own signature is not Lightning's
        self,
        export_root: Path | str,
        model_file_name: str = "model",
        input_size: tuple[int, int] | None = None,
        **kwargs: Any,
    ) -> Path:
        """Export to ONNX; see ``AnomalibModule.to_onnx``.

        The default operator set is the one that torch's exporter writes. With anomalib's default of 14, it would try
        to convert the model down, and fail with a page of warnings. A model without a pre-processor is exported for
        images of ``image_size``, unless ``input_size`` says another.
        """
        if input_size is None and not self.pre_processor:
            height, width = self.image_options.size
            input_size = height, width
        kwargs.setdefault("opset_version", 18)
        kwargs.setdefault("verbose", False)  # otherwise the exporter prints every step
        export = super().to_onnx
        with self._without_unknown_ranges(), self._without_in_place_changes():
            return whole_export(Path(export_root), lambda root: export(root, model_file_name, input_size, **kwargs))

    def to_openvino(self, export_root: Path | str, *args: Any, **kwargs: Any) -> Path:
        """Export to OpenVINO, for float32 on all processors; see ``AnomalibModule.to_openvino``."""
        export = super().to_openvino

        def write(root: Path) -> Path:
            path = export(root, *args, **kwargs)
            keep_float32(path)
            return path

        return whole_export(Path(export_root), write)

    def to_torch(self, export_root: Path | str, model_file_name: str = "model") -> Path:
        """Export the whole module; see ``AnomalibModule.to_torch``.

        The exported flow is frozen, because the inferencer does not disable gradients and would keep all
        activations for them.
        """
        trainable = [parameter for parameter in self.parameters() if parameter.requires_grad]
        for parameter in trainable:
            parameter.requires_grad = False
        try:
            export = super().to_torch
            return whole_export(Path(export_root), lambda root: export(root, model_file_name))
        finally:
            for parameter in trainable:
                parameter.requires_grad = True

    @contextmanager
    def _without_unknown_ranges(self) -> Iterator[None]:
        """Leave out the normalization of scores if no scores have been seen to set its range.

        It would do nothing, and its NaN constants would keep OpenVINO from compiling 8-bit models.
        """
        post_processor = self.post_processor
        if (
            not isinstance(post_processor, PostProcessor)
            or not post_processor.enable_normalization
            or not post_processor.image_min.isnan()
        ):
            yield
            return
        post_processor.enable_normalization = False
        try:
            yield
        finally:
            post_processor.enable_normalization = True

    @contextmanager
    def _without_in_place_changes(self) -> Iterator[None]:
        """Let activations write to new memory: torch's exporter takes half as long again to write in-place ones."""
        changing = [module for module in self.modules() if getattr(module, "inplace", False)]
        for module in changing:
            module.inplace = False  # type: ignore[assignment]
        try:
            yield
        finally:
            for module in changing:
                module.inplace = True  # type: ignore[assignment]

    @staticmethod
    def _post_training_quantization_ov(model: Any, datamodule: AnomalibDataModule | None = None) -> Any:
        """Make an 8-bit model; overrides anomalib's step of this name.

        anomalib calibrates with validation images, which users who only have good images may not have, and at the
        files' own sizes, which a model of a fixed size refuses. This calibrates with training images, and leaves
        in float what :func:`~.quantization.float_operations` names.

        Raises:
            ValueError: if there is no datamodule.
        """
        if datamodule is None:
            msg = "INT8_PTQ measures activations on training images: give the export a datamodule (--data)"
            raise ValueError(msg)
        datamodule.setup("fit")
        dataset = datamodule.train_data
        height, width = (model.input(0).partial_shape[axis] for axis in (2, 3))
        size = None if height.is_dynamic or width.is_dynamic else [height.get_length(), width.get_length()]

        def read(index: int) -> Any:
            image = cast("Tensor", dataset[index].image)
            return (resize(image, size, antialias=False) if size else image)[None].numpy()

        order = RandomSampler(range(len(dataset)), generator=torch.Generator().manual_seed(0))
        return quantized(model, [*islice(order, CALIBRATION_IMAGES)], read)
