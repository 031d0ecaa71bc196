"""Scores of good images, and the scale that is calibrated on them, as parts of a detector."""

from collections.abc import Callable
from typing import Any

import torch
from anomalib.data import Batch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from anomalib_csflow.calibration import Scale

NAN = float("nan")


class GoodScale(nn.Module):
    """:class:`~anomalib_csflow.calibration.Scale` as part of a graph, with the good images' values that it comes from.

    Attributes:
        good: ``(n,)``, raw values of the good images used for calibration; empty before.
        threshold: raw value that is mapped to 0.5.
        width: the scale's unit, a distance in raw values.
    """

    good: Tensor
    threshold: Tensor
    width: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("good", torch.empty(0))
        self.register_buffer("threshold", torch.tensor(NAN))
        self.register_buffer("width", torch.tensor(NAN))

    @property
    def is_calibrated(self) -> bool:
        """Whether a scale has been set."""
        return self.good.numel() > 0

    def calibrate(self, scale: Scale | None, good: Tensor | None) -> None:
        """Set a scale and the values ``(n,)`` that it was made from; or None and None to remove it."""
        self.good = torch.empty(0, device=self.good.device) if good is None else good.to(self.good.device)
        self.threshold.fill_(NAN if scale is None else scale.threshold)
        self.width.fill_(NAN if scale is None else scale.width)

    def forward(self, raw: Tensor) -> Tensor:
        """Calibrated values, within (0, 1) and 0.5 at the threshold, from raw values of any shape."""
        unit = (raw - self.threshold) / self.width
        log = unit.abs().log1p()
        return 0.5 + 0.5 * unit.sign() * (log / (1 + log))

    def raw(self, calibrated: Tensor) -> Tensor:
        """Raw values, in float64, from calibrated values of any shape."""
        scale = Scale(self.threshold.item(), self.width.item())
        return torch.from_numpy(scale.raw(calibrated.detach().cpu().numpy()))

    def p_values(self, calibrated: Tensor) -> Tensor:
        """Share of good images that are at least as unusual: ``p = (1 + #{good >= value}) / (n + 1)``.

        Args:
            calibrated: of any shape.

        Returns:
            Of the same shape, from 1 / (n + 1) to 1; all are 1 if there was no calibration.
        """
        ordered = self(self.good.sort().values)
        below = torch.searchsorted(ordered, calibrated.to(ordered).contiguous())
        return (1 + ordered.numel() - below) / (ordered.numel() + 1)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Resize the buffer to the checkpoint's number of calibration images; 0 if the checkpoint has no scale."""
        if not any(key.startswith(prefix) for key in state_dict):
            self.calibrate(None, None)
            state_dict.update({f"{prefix}{name}": buffer for name, buffer in self.named_buffers()})
        elif f"{prefix}good" in state_dict:
            self.good = self.good.new_empty(state_dict[f"{prefix}good"].shape)
        super()._load_from_state_dict(state_dict, prefix, *args)


Seen = tuple[str, float, float | None]
"""Path, raw score and the raw map's maximum of a good image; None without a map."""


class GoodImages:
    """Collects the raw scores and the maxima of the maps of all good validation images."""

    def __init__(self) -> None:
        self._seen: list[Seen] = []

    @property
    def seen(self) -> list[Seen]:
        """What was collected, in its order."""
        return [*self._seen]

    def add(self, batch: Batch[Any]) -> None:
        """Add a batch; without labels, all its images count as good."""
        score = image_scores(batch.pred_score, batch.anomaly_map).detach().float().tolist()
        maps = batch.anomaly_map
        maxima = [None] * len(score) if maps is None else maps.detach().float().flatten(1).amax(1).tolist()
        labels = getattr(batch, "gt_label", None)
        defective = [False] * len(score) if labels is None else labels.tolist()
        paths = [str(path) for path in getattr(batch, "image_path", None) or [""] * len(score)]
        images = zip(paths, score, maxima, defective, strict=True)
        self._seen += [(path, value, maximum) for path, value, maximum, is_defective in images if not is_defective]

    def keep_last(self) -> None:
        """Keep the last scores of each image, where images were validated several times."""
        self._seen = [*{path: (path, score, maximum) for path, score, maximum in self._seen}.values()]

    def take(self, world_size: int = 1, counts: Callable[[str], bool] = lambda _: True) -> tuple[Tensor, Tensor | None]:
        """Return scores ``(n,)`` and maxima ``(n,)`` (None without maps) of all processes, and forget them.

        Args:
            world_size: number of processes.
            counts: whether an image is returned, by its path.
        """
        seen, self._seen = self._seen, []
        if world_size > 1:
            parts: list[list[Seen]] = [[] for _ in range(world_size)]
            torch.distributed.all_gather_object(parts, seen)
            # a sampler gives some images to two processes, so that all have the same number
            images = [image for part in parts for image in part]
            seen = [*{image[0] or index: image for index, image in enumerate(images)}.values()]
        seen = [image for image in seen if counts(image[0])]
        maxima = [maximum for _, _, maximum in seen if maximum is not None]
        return torch.tensor([score for _, score, _ in seen]), torch.tensor(maxima) if maxima else None


class CollectedScores(Callback):
    """Collects the raw scores of the images that a trainer validates or predicts."""

    def __init__(self) -> None:
        self.images = GoodImages()

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any) -> None:
        """Collect a batch's."""
        del trainer, pl_module, args
        self.images.add(outputs)

    on_predict_batch_end = on_validation_batch_end  # type: ignore[assignment] # whose other arguments are not used


def image_scores(score: Tensor | None, anomaly_map: Tensor | None) -> Tensor:
    """Scores ``(N,)``, or the maxima of the maps if a detector has no scores.

    Raises:
        ValueError: if there is neither.
    """
    if score is not None:
        return score
    if anomaly_map is None:
        msg = "predictions have neither a score nor a map: there is nothing to post-process"
        raise ValueError(msg)
    return anomaly_map.flatten(1).amax(1)
