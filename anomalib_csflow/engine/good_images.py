"""What good images leave in a detector: their scores, and the scale that is calibrated on them."""

from typing import Any

import torch
from anomalib.data import Batch
from torch import Tensor, nn

from anomalib_csflow.calibration import Scale

NAN = float("nan")


class GoodScale(nn.Module):
    """:class:`~anomalib_csflow.calibration.Scale` as a part of a graph, with the values of good images behind it.

    Attributes:
        good: ``(n,)``, raw values of the good images that were calibrated on; none before, and of any number after.
        threshold: raw value that is mapped to 0.5.
        width: distance in raw values that is the scale's unit.
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
        """Whether there is a scale."""
        return self.good.numel() > 0

    def calibrate(self, scale: Scale | None, good: Tensor | None) -> None:
        """Take a scale and the values ``(n,)`` that it was made of; or None, and none."""
        self.good = torch.empty(0, device=self.good.device) if good is None else good.to(self.good.device)
        self.threshold.fill_(NAN if scale is None else scale.threshold)
        self.width.fill_(NAN if scale is None else scale.width)

    def forward(self, raw: Tensor) -> Tensor:
        """Calibrated values, within (0, 1) and 0.5 at the threshold, of raw ones of any shape."""
        unit = (raw - self.threshold) / self.width
        log = unit.abs().log1p()
        return 0.5 + 0.5 * unit.sign() * (log / (1 + log))

    def raw(self, calibrated: Tensor) -> Tensor:
        """Raw values, in float64, of calibrated ones of any shape."""
        scale = Scale(self.threshold.item(), self.width.item())
        return torch.from_numpy(scale.raw(calibrated.detach().cpu().numpy()))

    def p_values(self, calibrated: Tensor) -> Tensor:
        """Share of good images that are as unusual: ``p = (1 + #{good >= value}) / (n + 1)``.

        Args:
            calibrated: of any shape.

        Returns:
            Of the same shape, from 1 / (n + 1) to 1; all are 1 if there was no calibration.
        """
        ordered = self(self.good.sort().values)
        below = torch.searchsorted(ordered, calibrated.to(ordered).contiguous())
        return (1 + ordered.numel() - below) / (ordered.numel() + 1)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Make room for as many images as were calibrated on; none in a checkpoint that knows no scale."""
        if not any(key.startswith(prefix) for key in state_dict):
            self.calibrate(None, None)
            state_dict.update({f"{prefix}{name}": buffer for name, buffer in self.named_buffers()})
        elif f"{prefix}good" in state_dict:
            self.good = self.good.new_empty(state_dict[f"{prefix}good"].shape)
        super()._load_from_state_dict(state_dict, prefix, *args)


Seen = tuple[str, float, float | None]
"""Path, raw score and the raw map's maximum of a good image; None without a map."""


class GoodImages:
    """Collects the raw scores and the maxima of the maps of the good images among those that are validated."""

    def __init__(self) -> None:
        self._seen: list[Seen] = []

    @property
    def seen(self) -> list[Seen]:
        """What was collected, in its order."""
        return [*self._seen]

    def add(self, batch: Batch[Any]) -> None:
        """Take in a batch; without labels, all its images are good."""
        score = image_scores(batch.pred_score, batch.anomaly_map).detach().float().tolist()
        maps = batch.anomaly_map
        maxima = [None] * len(score) if maps is None else maps.detach().float().flatten(1).amax(1).tolist()
        labels = getattr(batch, "gt_label", None)
        defective = [False] * len(score) if labels is None else labels.tolist()
        paths = [str(path) for path in getattr(batch, "image_path", None) or [""] * len(score)]
        images = zip(paths, score, maxima, defective, strict=True)
        self._seen += [(path, value, maximum) for path, value, maximum, is_defective in images if not is_defective]

    def take(self, world_size: int = 1) -> tuple[Tensor, Tensor | None]:
        """Give scores ``(n,)`` and maxima ``(n,)``, None without maps, of all processes, and forget them."""
        seen, self._seen = self._seen, []
        if world_size > 1:
            parts: list[list[Seen]] = [[] for _ in range(world_size)]
            torch.distributed.all_gather_object(parts, seen)
            # a sampler gives some images to two processes, so that all have as many
            images = [image for part in parts for image in part]
            seen = [*{image[0] or index: image for index, image in enumerate(images)}.values()]
        maxima = [maximum for _, _, maximum in seen if maximum is not None]
        return torch.tensor([score for _, score, _ in seen]), torch.tensor(maxima) if maxima else None


def image_scores(score: Tensor | None, anomaly_map: Tensor | None) -> Tensor:
    """Scores ``(N,)``; of a detector without any, the maxima of its maps.

    Raises:
        ValueError: if there is neither.
    """
    if score is not None:
        return score
    if anomaly_map is None:
        msg = "predictions have neither a score nor a map: there is nothing to post-process"
        raise ValueError(msg)
    return anomaly_map.flatten(1).amax(1)
