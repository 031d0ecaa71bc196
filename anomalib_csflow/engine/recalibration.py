"""New thresholds for a checkpoint, from new good images and without training."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from anomalib.data import PredictDataset
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader

from anomalib_csflow.calibration import Promise

from .checkpoint_files import CHECKPOINT_KEY, sum_of
from .checkpoints import read_checkpoint
from .good_images import CollectedScores
from .post_processing import ConformalPostProcessor
from .roles import TRAINED, VALIDATED, digests, met
from .whole_files import whole_file

if TYPE_CHECKING:
    from .detector import FlowDetector


def raw_scores(detector: "FlowDetector", folder: Path) -> tuple[Tensor, Tensor | None]:
    """Score all images of a folder, as ``predict`` does, and leave the scores raw.

    Args:
        detector: trained.
        folder: of images, or one image.

    Returns:
        Scores ``(n,)`` and maxima of the maps ``(n,)``, None without maps.

    Raises:
        FileNotFoundError: if there are no images.
    """
    images = PredictDataset(folder)
    collector = CollectedScores()
    components = detector.post_processor, detector.evaluator, detector.visualizer
    detector.post_processor = detector.evaluator = detector.visualizer = None
    try:
        trainer = Trainer(logger=False, enable_checkpointing=False, callbacks=[collector])
        loader = DataLoader(images, collate_fn=images.collate_fn)  # one by one, since their sizes may differ
        trainer.predict(detector, loader, return_predictions=False)
    finally:
        detector.post_processor, detector.evaluator, detector.visualizer = components
    return collector.images.take()


def recalibrate(
    detector_class: "type[FlowDetector]",
    checkpoint: Path,
    folder: Path,
    output: Path,
    rate: float | None = None,
    promise: Literal["marginal", "certified"] | None = None,
) -> Promise:
    """Write a copy of a checkpoint whose thresholds come from a folder of good images.

    Args:
        detector_class: the checkpoint's.
        checkpoint: of a trained detector, calibrated or not.
        folder: of good images that were not trained on.
        output: the copy.
        rate: of false alarms; by default that of the checkpoint.
        promise: by default that of the checkpoint.

    Returns:
        What the new thresholds promise.

    Raises:
        CheckpointError: if the checkpoint is not of this detector.
        FileNotFoundError: if there is no checkpoint, or no images.
        ValueError: if the rate or the promise is none.
    """
    detector = detector_class.load_from_checkpoint(checkpoint)
    old = detector.post_processor
    known = (
        old if isinstance(old, ConformalPostProcessor) and old.threshold == "conformal" else ConformalPostProcessor()
    )
    config = known.checkpoint_config() | {"made": None}
    config |= {key: value for key, value in {"false_alarm_rate": rate, "promise": promise}.items() if value is not None}
    processor = ConformalPostProcessor(config["false_alarm_rate"], config["promise"])  # checks them
    processor.load_checkpoint_config(config)
    images = [str(file) for file in PredictDataset(folder).image_filenames]
    trained_on = met(images, {TRAINED: detector.roles.get(TRAINED, [])})
    if trained_on:
        rank_zero_warn(f"{trained_on} The new thresholds are too low: calibrate on other good images.")
    made = processor.calibrate(*raw_scores(detector, folder))
    written = read_checkpoint(checkpoint)
    state = written["state_dict"]
    for key in [key for key in state if key.startswith("post_processor.")]:
        del state[key]
    state |= {f"post_processor.{key}": value for key, value in processor.state_dict().items()}
    # the old one is a callback too, and its state there is the same tensors
    for key in [key for key in written.get("callbacks", {}) if "PostProcessor" in key]:
        del written["callbacks"][key]
    written[CHECKPOINT_KEY]["images"] = detector.roles | {VALIDATED: digests(images)}
    written[CHECKPOINT_KEY]["tensors"] = sum_of(state)
    written["anomalib_post_processor_config"] = processor.checkpoint_config()
    written["anomalib_components_enabled"]["post_processor"] = True
    with whole_file("the checkpoint", output) as partial, partial.open("wb") as file:
        torch.save(written, file)  # whose tensors may be read from the very file that it replaces
    return made
