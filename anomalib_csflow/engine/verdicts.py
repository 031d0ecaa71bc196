"""What is said of an image: how many of the good images are as unusual, in words."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Verdict:
    """A label and what supports it.

    Attributes:
        is_defect: the image's label; None where it has none.
        num_alike: good images at least as unusual as this one.
        num_good: good images that were calibrated on.
    """

    is_defect: bool | None
    num_alike: int
    num_good: int

    def __str__(self) -> str:
        """What an operator reads; counts of images alone, so that few images claim little.

        Example:
            >>> print(Verdict(False, 43, 100))
            good: like 43 of 100 good parts
            >>> print(Verdict(True, 0, 60))
            defect: more unusual than all 60 good parts
        """
        word = {None: "no label", True: "defect", False: "good"}[self.is_defect]
        good = "the one good part" if self.num_good == 1 else f"all {self.num_good} good parts"
        below = self.num_good - self.num_alike
        if self.num_alike == 0:
            return f"{word}: more unusual than {good}"
        if self.is_defect:
            return f"{word}: more unusual than {below} of {self.num_good} good parts"
        return f"{word}: like {good if not below else f'{self.num_alike} of {self.num_good} good parts'}"


def levels(scores: Tensor, maxima: Tensor | None) -> Tensor:
    """What decides the label: the larger of calibrated score ``(N,)`` and calibrated maximum of the map ``(N,)``."""
    return scores if maxima is None else torch.maximum(scores, maxima.to(scores))


def verdict(label: bool | None, level: float, good: Tensor) -> Verdict:
    """Rank an image among good ones.

    Args:
        label: whether it was called anomalous; None if it has no label.
        level: of the image, see :func:`levels`.
        good: ``(n,)``, levels of the good images that were calibrated on, n at least 1.
    """
    return Verdict(label, int((good >= level).sum()), good.numel())
