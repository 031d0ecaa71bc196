"""Test images, masks and heat maps of the benchmark's page, as data URIs."""

import base64
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from anomalib_csflow.benchmark import overview
from anomalib_csflow.benchmark.rows import Row

QUALITY = 78  # of the JPEGs: about 10 KB for an image of 256 pixels
LEVELS = np.array([0.0, 0.35, 0.7, 1.0])
RAMP = np.array([(0, 0, 0), (213, 94, 0), (240, 228, 66), (255, 255, 255)])  # with rising lightness
OUTLINE = (86, 180, 233)  # sky blue: different from the ramp also for colour-blind readers


def data_uri(content: bytes, kind: str) -> str:
    """Bytes of an image as a URI that needs no file."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def opened(path: Path) -> Image.Image:
    """An image in memory, after closing its file."""
    with Image.open(path) as image:
        return image.copy()


def embedded(path: Path) -> str:
    """An image file, unchanged, as a data URI."""
    return data_uri(path.read_bytes(), "png" if path.suffix == ".png" else "jpeg")


def outline(mask: Image.Image) -> NDArray[np.bool_]:
    """The border of a mask, two pixels wide, just outside the mask: (H, W)."""
    grown = mask.filter(ImageFilter.MaxFilter(5))
    return (np.asarray(grown) > 127) & (np.asarray(mask) <= 127)


def overlay(image: Image.Image, values: NDArray[np.float64], mask: Image.Image | None) -> str:
    """A heat map over its dimmed image, with the true defect outlined.

    Args:
        image: the test image.
        values: (h, w) of any size, 0 for cold and 1 for hot; clipped.
        mask: the true mask, of any size.
    """
    heat = Image.fromarray((255 * np.clip(values, 0, 1)).astype(np.uint8)).resize(image.size, Image.Resampling.BILINEAR)
    level = np.asarray(heat, dtype=np.float64) / 255
    colour = np.stack([np.interp(level, LEVELS, channel) for channel in RAMP.T], axis=-1)
    share = (0.9 * level**0.75)[..., None]  # the image stays visible where the map is cold
    grey = 0.45 * np.asarray(image.convert("L"), dtype=np.float64)[..., None]
    picture = share * colour + (1 - share) * grey
    if mask is not None:
        picture[outline(mask.convert("L").resize(image.size, Image.Resampling.NEAREST))] = OUTLINE
    target = io.BytesIO()
    Image.fromarray(picture.round().astype(np.uint8)).save(
        target, "JPEG", quality=QUALITY, subsampling=0
    )  # no subsampling, so that the thin outline keeps its colour
    return data_uri(target.getvalue(), "jpeg")


def gallery(out: Path, data: str, rows: Sequence[Row], folders: Mapping[tuple[str, str, int], Path]) -> dict[str, Any]:
    """The sample images of one data set, with their masks and every detector's heat maps."""
    folder = out / "samples" / data
    listing = folder / "samples.json"
    listed = json.loads(listing.read_text(encoding="utf-8")) if listing.is_file() else []
    samples = [sample for sample in listed if (folder / f"{sample['id']}.jpg").is_file()]
    maps: dict[str, dict[str, Any]] = {}
    for row in rows:  # the first seed that has maps
        path = folders.get((row.detector, data, row.seed), Path()) / "maps.npz"
        if row.data == data and row.done and row.detector not in maps and path.is_file():
            with np.load(path) as arrays:
                maps[row.detector] = {key: arrays[key].astype(np.float64) for key in arrays}
    blocks = []
    for sample in samples:
        path, mask_path = folder / f"{sample['id']}.jpg", folder / f"{sample['id']}_mask.png"
        image, mask = opened(path), opened(mask_path) if mask_path.is_file() else None
        heats = {}
        for detector, arrays in maps.items():
            if sample["id"] in arrays:
                low, high = float(arrays["lo"]), float(arrays["hi"])
                scaled = (arrays[sample["id"]] - low) / max(high - low, 1e-6)
                heats[detector] = overlay(image, scaled, mask)
        blocks.append(
            {"kind": sample["kind"], "name": sample["name"], "size": image.size, "image": embedded(path)}
            | {"mask": embedded(mask_path) if mask else "", "heats": heats}
        )
    silent = [
        name for name in overview.names([row for row in rows if row.data == data], "detector") if name not in maps
    ]
    return {"data": data, "blocks": blocks, "silent": silent, "masks": any(block["mask"] for block in blocks)}
