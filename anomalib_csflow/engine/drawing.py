"""Pictures of an image and what was found in it, on a scale of colours that is the same for all images."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

Mask = NDArray[np.bool_]

COLOURS = (  # calibrated value, opacity, red, green, blue
    (0.40, 0.00, 255, 230, 0),
    (0.50, 0.30, 255, 220, 0),
    (0.65, 0.60, 255, 120, 0),
    (0.80, 0.70, 220, 20, 20),
    (0.95, 0.75, 130, 0, 70),
)
"""Of the heat map: nothing up to 0.4, yellow at the threshold, 0.5, red far beyond it, and then purple."""
CONTOUR, BOX, TRUTH = (255, 0, 0), (0, 220, 255), (0, 255, 0)
STRIPS = {None: (90, 90, 90), True: (170, 20, 30), False: (20, 110, 50)}
JOINED = 0.04
"""Share of the longer side: parts of a mask that are nearer to each other than this are one defect."""
GAP = 8
"""Pixels between panels."""
LEAST_WIDTH = 280
"""Pixels of a picture, so that words can be read above a narrow panel."""


def picture(
    image: Image.Image,
    caption: str,
    *,
    is_defect: bool | None = None,
    heat: NDArray[np.floating[Any]] | None = None,
    mask: Mask | None = None,
    truth: Mask | None = None,
    note: str = "",
    size: int = 400,
) -> Image.Image:
    """Draw an image as it is, beside it what was found, and above both a strip with the verdict.

    Args:
        image: of any size.
        caption: the verdict.
        is_defect: colour of the strip: red, or green if it is false, or grey if it is None.
        heat: ``(h, w)``, the calibrated map; None for no heat map.
        mask: ``(h, w)``, where it is above its threshold: outlined, with a box around each defect.
        truth: ``(h, w)``, the true mask: outlined in the image as it is.
        note: at the right of the strip.
        size: longer side of a panel in pixels.

    Returns:
        One panel wide if there is neither a map nor a mask, else two; and as wide as words need.
    """
    plain = image.convert("RGB")
    scale = size / max(plain.size)
    width, height = (max(1, round(side * scale)) for side in plain.size)
    plain = plain.resize((width, height), Image.Resampling.LANCZOS)
    panels = [plain if truth is None else outlined(plain, truth, TRUTH)]
    if heat is not None or mask is not None:
        found = plain if heat is None else heated(plain, heat)
        panels.append(found if mask is None else boxed(outlined(found, mask, CONTOUR), mask))
    total = max(len(panels) * width + (len(panels) - 1) * GAP, LEAST_WIDTH)
    strip = _strip(caption, note, total, STRIPS[is_defect])
    canvas = Image.new("RGB", (total, strip.height + height), "white")
    canvas.paste(strip, (0, 0))
    for index, panel in enumerate(panels):
        canvas.paste(panel, (index * (width + GAP), strip.height))
    return canvas


def colours(heat: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """Opacity in [0, 1] and colour in [0, 255] of calibrated values ``(h, w)``: ``(h, w, 4)``, the same everywhere."""
    values, *channels = np.asarray(COLOURS).T
    return np.stack([np.interp(heat, values, channel) for channel in channels], axis=-1)


def heated(image: Image.Image, heat: NDArray[np.floating[Any]]) -> Image.Image:
    """An image under the heat map of calibrated values ``(h, w)``."""
    smooth = Image.fromarray(np.asarray(heat, np.float32)).resize(image.size, Image.Resampling.BILINEAR)
    found = colours(np.asarray(smooth))
    opacity, colour = found[..., :1], found[..., 1:]
    return Image.fromarray(((1 - opacity) * np.asarray(image) + opacity * colour).round().astype(np.uint8))


def outlined(image: Image.Image, mask: Mask, colour: tuple[int, int, int]) -> Image.Image:
    """An image with the outline of a mask ``(h, w)``."""
    large = Image.fromarray(mask.astype(np.uint8) * 255).resize(image.size, Image.Resampling.BILINEAR)
    inside = np.asarray(large) > 127
    edge = ndimage.binary_dilation(inside, iterations=2) & ~inside
    pixels = np.array(image)
    pixels[edge] = colour
    return Image.fromarray(pixels)


def defects(mask: Mask) -> list[tuple[slice, slice]]:
    """Rows and columns of each defect in a mask ``(h, w)``; near parts are one."""
    reach = max(1, round(JOINED * max(mask.shape) / 2))
    joined, _ = ndimage.label(ndimage.binary_dilation(mask, np.ones((3, 3)), iterations=reach))
    return [place for place in ndimage.find_objects(joined * mask) if place is not None]


def boxed(image: Image.Image, mask: Mask, margin: int = 6) -> Image.Image:
    """An image with a box around each defect of a mask ``(h, w)``, some pixels away from it."""
    boxed = image.copy()
    draw = ImageDraw.Draw(boxed)
    across, down = image.width / mask.shape[1], image.height / mask.shape[0]
    for rows, columns in defects(mask):
        left, right = columns.start * across - margin, columns.stop * across + margin
        top, bottom = rows.start * down - margin, rows.stop * down + margin
        corners = (max(left, 0), max(top, 0), min(right, image.width - 1), min(bottom, image.height - 1))
        draw.rectangle(corners, outline=BOX, width=2)
    return boxed


def _strip(caption: str, note: str, width: int, colour: tuple[int, int, int]) -> Image.Image:
    """Text on a colour, as large as fits; two lines if it would be too small to read."""
    lines: Sequence[str] = [f"{caption}    {note}".rstrip()]
    if _width(lines[0], 13) > width - 2 * GAP:
        head, _, rest = caption.partition(": ")
        lines = [line for line in (head, rest, note) if line]
    points = next((p for p in range(20, 7, -1) if max(_width(line, p) for line in lines) <= width - 2 * GAP), 7)
    step = round(1.4 * points)
    strip = Image.new("RGB", (width, step * len(lines) + GAP), colour)
    draw = ImageDraw.Draw(strip)
    for index, line in enumerate(lines):
        draw.text((GAP, GAP // 2 + index * step), line, "white", ImageFont.load_default(points))
    return strip


def _width(text: str, points: int) -> float:
    return float(ImageDraw.Draw(Image.new("L", (1, 1))).textlength(text, ImageFont.load_default(points)))
