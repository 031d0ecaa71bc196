"""The few test images that a report shows, the same for all detectors, and the heat maps of a run for them."""

import math
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from anomalib_csflow.benchmark.rows import write_json

from .accuracy import Predictions

MAX_SAMPLES = 6
LONGEST_SIDE = 256
MAP_SIDE = 128
HOTTEST = 1e-3  # share of all test pixels that heat maps show in the last colour


def choose(predictions: Predictions) -> list[int]:
    """Indices of defective images, taking each kind (a folder) in turn, and of one good image."""
    order = sorted(range(len(predictions.paths)), key=lambda i: predictions.paths[i])
    kinds: dict[str, list[int]] = {}
    for index in order:
        if predictions.labels[index]:
            kinds.setdefault(predictions.paths[index].parent.name, []).append(index)
    in_turn = [i for row in zip_longest(*kinds.values()) for i in row if i is not None]
    good = [i for i in order if not predictions.labels[i]][:1]
    return [*sorted(in_turn[: MAX_SAMPLES - len(good)]), *good]


def rarity(values: Tensor, of: Tensor) -> Tensor:
    """How few pixels of the test set are as hot, on a logarithmic scale that all detectors share.

    Args:
        values: one map or several, (..., H, W).
        of: the maps of the test set, (N, H, W).

    Returns:
        (..., H, W) in [0, 1]: 0 if all pixels are as hot, 1/3 if a tenth is, 1 if a thousandth or less is.
    """
    known = of.flatten()[:: max(1, of.numel() // 1_000_000)].sort().values
    colder = torch.searchsorted(known, values.contiguous()) / len(known)
    return (1 - colder).clamp(HOTTEST, 1).log10() / math.log10(HOTTEST)


def save(predictions: Predictions, run: Path, shared: Path) -> None:
    """Write the run's maps of the samples, and the samples themselves unless another run has written them.

    Args:
        predictions: of the whole test set.
        run: the folder of the run.
        shared: the folder of the data set's samples.
    """
    chosen = {f"{number:02d}": index for number, index in enumerate(choose(predictions))}
    if predictions.maps is not None:
        side = max(1, max(predictions.maps.shape[-2:]) // MAP_SIDE)
        heat = rarity(predictions.maps[list(chosen.values()), ::side, ::side], predictions.maps).numpy()
        maps: dict[str, Any] = dict(zip(chosen, heat, strict=True))
        np.savez_compressed(run / "maps.npz", lo=0.0, hi=1.0, **maps)
    if not (shared / "samples.json").is_file():
        shared.mkdir(parents=True, exist_ok=True)
        for name, index in chosen.items():
            with Image.open(predictions.paths[index]) as image:
                small = image.convert("RGB")
            small.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
            small.save(shared / f"{name}.jpg", quality=85)
            if predictions.masks is not None:
                mask = Image.fromarray(predictions.masks[index].numpy().astype(np.uint8) * 255)
                mask.resize(small.size, Image.Resampling.NEAREST).save(shared / f"{name}_mask.png")
        paths = {name: predictions.paths[index] for name, index in chosen.items()}
        entries = [{"id": name, "kind": path.parent.name, "name": path.name} for name, path in paths.items()]
        write_json(shared / "samples.json", entries)
