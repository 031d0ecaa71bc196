"""The least likely training images: a defect among them makes thresholds too high, and defects harder to find."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from anomalib.data import AnomalibDataset
from torch.utils.data import DataLoader

from .good_images import GoodImages, Seen
from .post_processing import ConformalPostProcessor
from .verdicts import levels

if TYPE_CHECKING:
    from .detector import FlowDetector

NUM_SHOWN = 5


@torch.no_grad()
def scored(detector: "FlowDetector", images: AnomalibDataset, batch_size: int = 16) -> list[Seen]:
    """Score images by a detector in its trainer, and leave its modes as they are.

    Returns:
        Path, raw score and maximum of the raw map of each image.
    """
    found = GoodImages()
    modes = [(module, module.training) for module in detector.modules()]
    detector.eval()
    loader = DataLoader(images, batch_size, collate_fn=images.collate_fn)
    for index, raw in enumerate(loader):
        batch = detector.trainer.strategy.batch_to_device(raw)
        if detector.pre_processor:
            detector.pre_processor.on_validation_batch_start(detector.trainer, detector, batch, index)
        found.add(batch.update(**detector.evaluate(batch)._asdict()))
    for module, mode in modes:
        module.training = mode
    return found.seen


def least_likely(seen: Sequence[Seen], processor: ConformalPostProcessor, *, is_out_of_fold: bool) -> str:
    """Name the training images with the highest calibrated scores, in lines.

    Args:
        seen: of the training images.
        processor: calibrated.
        is_out_of_fold: whether the scores come from refits that had not seen them.
    """
    maxima = [maximum for _, _, maximum in seen if maximum is not None]
    has_maps = bool(maxima) and processor.map_scale.is_calibrated
    scores = processor.score_scale(torch.tensor([score for _, score, _ in seen]).to(processor.score_scale.good))
    highest = levels(scores, processor.map_scale(torch.tensor(maxima).to(scores)) if has_maps else None)
    order = highest.argsort(descending=True)[:NUM_SHOWN].tolist()
    lines = [f"  {highest[index]:.2f}  {seen[index][0]}" for index in order]
    how = "by refits that had not seen them" if is_out_of_fold else "by the detector itself"
    return "\n".join(
        [
            f"The least likely of {len(seen)} training images, scored {how} (0.5 is the threshold). Is a defect among "
            "them? Then take it out, and fit again:",
            *lines,
        ]
    )
