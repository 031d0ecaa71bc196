"""Pictures of tested and predicted images, which mean the same from image to image, and charts of their scores."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
from anomalib.data import ImageBatch, ImageItem, NumpyImageBatch, NumpyImageItem
from anomalib.utils.path import generate_output_filename
from anomalib.visualization import ImageVisualizer
from anomalib.visualization.image.functional import visualize_image
from anomalib.visualization.image.item_visualizer import visualize_image_item
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from PIL import Image

from . import charts, drawing
from .post_processing import ConformalPostProcessor
from .verdicts import verdict
from .whole_files import whole_file


class CalibratedVisualizer(ImageVisualizer):
    """Draws what was found in an image, on the scale that good images gave.

    Two panels: the image, with the outline of the true mask in green if there is one; and the image with

    - the heat map: a calibrated value has one colour in all images and of all detectors, yellow at the threshold
      (0.5), red and then purple far beyond it, and none below 0.4;
    - the contour of the mask, at the map's threshold, in red;
    - a box around each defect, in cyan; parts of the mask within 4 % of the image's side are one.

    Above them stands the verdict, such as "good: like 43 of 100 good parts", where 43 of the 100 good images that were
    calibrated on are at least as unusual as this one, in score or map. Detectors without maps have one panel.

    A fit ends with ``thresholds.png`` in the results' folder: a histogram of the good images that were calibrated on,
    the threshold, and what it promises. A test with good and defective images, in one process, ends with ``test.png``:
    histograms of both, the ROC curve, the PRO curve if there are true masks, and false alarms and recall at the
    threshold.

    Pictures of detectors that are not calibrated (``post_processor=False``, anomalib's own, ``threshold="f1"``) are
    anomalib's.

    Args:
        size: longer side of a panel in pixels.
        output_dir: folder of the pictures; by default ``images`` in the results' folder.
        **kwargs: of anomalib's ``ImageVisualizer``, for pictures without a calibration.

    Raises:
        ValueError: if the size is not positive.
    """

    def __init__(self, size: int = 400, output_dir: str | Path | None = None, **kwargs: Any) -> None:
        if size < 1:
            msg = f"the size of a panel is a number of pixels above 0, got {size}"
            raise ValueError(msg)
        super().__init__(output_dir=output_dir, **kwargs)
        self.size = size
        self.post_processor: ConformalPostProcessor | None = None
        self._tested = charts.ScoredTest()
        self._is_keeping = True

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Know whose predictions will be drawn."""
        del trainer, stage
        processor = getattr(pl_module, "post_processor", None)
        self.post_processor = processor if isinstance(processor, ConformalPostProcessor) else None
        self._tested = charts.ScoredTest()
        self._is_keeping = True

    @property
    def calibrated(self) -> ConformalPostProcessor | None:
        """What calibrates the predictions; None if nothing does."""
        processor = self.post_processor
        return processor if processor is not None and processor.gives_calibrated else None

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the good images that were calibrated on, and the threshold."""
        del pl_module
        if self.calibrated is not None and trainer.is_global_zero:
            good, made, path = self.calibrated.good_levels, str(self.calibrated.made), _chart(trainer, "thresholds.png")
            if self._keep(path, lambda file: charts.draw_good(file, good.cpu().numpy(), made)):
                rank_zero_info(f"The scores of good images and the threshold are drawn in {path}.")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the scores of good and defective images."""
        del pl_module
        if self.calibrated is not None and self._tested.has_both and trainer.world_size == 1:
            made, path = str(self.calibrated.made), _chart(trainer, "test.png")
            is_kept = self._keep(path, lambda file: charts.draw_tested(file, self._tested, made))
            rank_zero_info(f"{self._tested} Drawn in {path}." if is_kept else str(self._tested))

    def on_test_batch_end(  # type: ignore[override] # anomalib's own signature is not Lightning's
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: ImageBatch,
        batch: ImageBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Draw a batch's images and write them; anomalib's hook for predictions comes here too."""
        del pl_module, outputs, batch_idx, dataloader_idx
        if self.calibrated is not None:
            self._tested.add(batch)
        datamodule = getattr(trainer, "datamodule", None)
        root = Path(self.output_dir or Path(trainer.default_root_dir) / "images")
        for item in batch:
            picture = self.draw(item) if self._is_keeping else None
            if picture is None:
                continue
            try:
                path = generate_output_filename(
                    input_path=item.image_path or "",
                    output_path=root,
                    dataset_name=getattr(datamodule, "name", None),
                    category=getattr(datamodule, "category", None),
                )
            except OSError:  # of a folder that cannot be made
                path = root / Path(item.image_path or "").name
            kind = Image.registered_extensions()[path.suffix.lower()]
            self._keep(path, lambda file, picture=picture, kind=kind: picture.save(file, kind))

    def _keep(self, path: Path, write: Callable[[Path], None]) -> bool:
        """Write a picture, or say why not and go on without any: the predictions are worth more."""
        try:
            with whole_file("the picture", path) as partial:
                write(partial)
        except OSError as error:
            self._is_keeping = False
            rank_zero_warn(f"{error}. No more pictures are written.")
            return False
        return True

    def visualize(
        self, predictions: ImageItem | NumpyImageItem | ImageBatch | NumpyImageBatch
    ) -> Image.Image | list[Image.Image | None] | None:
        """Draw predictions of the detector that was tested or predicted with last.

        Returns:
            A picture of an item or of a batch of one, else a list of pictures.
        """
        if isinstance(predictions, (ImageItem, NumpyImageItem)):
            return self.draw(predictions)
        drawn = [self.draw(cast("ImageItem", item)) for item in predictions]
        return drawn[0] if len(drawn) == 1 else drawn

    def draw(self, item: ImageItem | NumpyImageItem) -> Image.Image | None:
        """Draw one image; as anomalib does where there is no calibration."""
        processor = self.calibrated
        if processor is None or item.pred_score is None:
            return visualize_image_item(
                item,
                fields=self.fields,
                overlay_fields=self.overlay_fields,
                field_size=self.field_size,
                fields_config=self.fields_config,
                overlay_fields_config=self.overlay_fields_config,
                text_config=self.text_config,
            )
        heat = _array(item.anomaly_map) if processor.map_scale.is_calibrated else None
        level = max(float(item.pred_score), -1.0 if heat is None else float(heat.max()))
        label = None if item.pred_label is None else bool(item.pred_label)
        mask, truth = _array(item.pred_mask), _array(item.gt_mask)
        true_label = getattr(item, "gt_label", None)
        notes = ["no single place stands out"] if label and mask is not None and not mask.any() else []
        if true_label is not None:
            notes.append(f"labelled {'defective' if bool(true_label) else 'good'}")
        return drawing.picture(
            visualize_image(cast("str", item.image_path or item.image)),
            str(verdict(label, level, processor.good_levels)),
            is_defect=label,
            heat=heat,
            mask=None if mask is None else mask > 0,
            truth=truth > 0 if truth is not None and truth.any() else None,
            note=f"({'; '.join(notes)})" if notes else "",
            size=self.size,
        )


def _chart(trainer: Trainer, name: str) -> Path:
    """Where a chart goes."""
    return Path(trainer.default_root_dir) / name


def _array(values: Any) -> Any:
    """A map or mask as an array ``(h, w)``; None of none."""
    if values is None:
        return None
    return np.asarray(values.detach().float().cpu() if hasattr(values, "detach") else values, np.float32).squeeze()
