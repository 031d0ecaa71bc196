"""Lines, markers and axes of the benchmark's charts: inline SVG in the page's colours, so that it follows dark mode.

A detector is identified by its marker, its dashes and its name; its colour only repeats this.

By hand: matplotlib's SVG of the same charts is 2.4 to 5 times as large, takes about 80 times as long, and has fixed
colours where dark mode needs the page's CSS classes. Placing labels, most of `charts.py`, would remain.
"""

import math
from dataclasses import dataclass
from xml.etree import ElementTree as ET

DASHES = ("none", "7 3", "2 2.5", "9 3 2 3")
HUES = 7  # in page.css: the text colour, then Okabe and Ito's, without yellow, which cannot be seen on white
Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True)
class Style:
    """How one detector looks in every chart; its number gives hue, marker and dashes."""

    number: int

    @property
    def hue(self) -> str:
        """The class that sets the colour."""
        return f"hue{self.number % HUES}"

    @property
    def dash(self) -> str:
        """The pattern of its lines."""
        return DASHES[self.number % len(DASHES)]


def add(parent: ET.Element, tag: str, text: str | None = None, **attributes: float | str) -> ET.Element:
    """A child with rounded numbers; `_` in names of attributes is `-`, `class_` is `class`."""
    named = {
        key.rstrip("_").replace("_", "-"): value if isinstance(value, str) else f"{value:.1f}".removesuffix(".0")
        for key, value in attributes.items()
    }
    child = ET.SubElement(parent, tag, named)
    child.text = text
    return child


def canvas(width: int, height: int, label: str) -> ET.Element:
    """An empty drawing with a description for screen readers."""
    return ET.Element("svg", {"viewBox": f"0 0 {width} {height}", "role": "img", "aria-label": label})


def regular(corners: int, radius: float, inner: float | None = None) -> list[tuple[float, float]]:
    """A regular polygon with a corner at the top, or a star with an inner radius."""
    count = corners if inner is None else 2 * corners
    turns = ((index, 2 * math.pi * index / count - math.pi / 2) for index in range(count))
    return [
        ((r := radius if inner is None or index % 2 == 0 else inner) * math.cos(angle), r * math.sin(angle))
        for index, angle in turns
    ]


def cross(thin: float, wide: float) -> list[tuple[float, float]]:
    """An upright cross."""
    quarter = [(thin, -wide), (thin, -thin), (wide, -thin)]
    turns = ((1, 0, 0, 1), (0, -1, 1, 0), (-1, 0, 0, -1), (0, 1, -1, 0))
    return [(a * x + b * y, c * x + d * y) for a, b, c, d in turns for x, y in quarter]


SHAPES: tuple[list[tuple[float, float]], ...] = (
    regular(24, 4.6),  # a circle
    [(-4.2, -4.2), (4.2, -4.2), (4.2, 4.2), (-4.2, 4.2)],
    regular(3, 5.8),
    regular(4, 6),
    [(x, -y) for x, y in regular(3, 5.8)],
    regular(5, 6.6, 2.8),
    cross(1.9, 5.4),
    [(y, x) for x, y in regular(3, 5.8)],
    regular(6, 5.2),
    regular(4, 6.6, 2.4),
    [(-y, x) for x, y in regular(3, 5.8)],
    [(-6, -2.6), (6, -2.6), (6, 2.6), (-6, 2.6)],
)


def marker(parent: ET.Element, style: Style, x: float, y: float, *, filled: bool = True) -> ET.Element:
    """A detector's marker, filled or hollow."""
    shape = SHAPES[style.number % len(SHAPES)]
    points = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in shape)
    return add(parent, "polygon", points=points, class_=f"marker {style.hue}{'' if filled else ' hollow'}")


def swatch(style: Style) -> str:
    """A detector's marker and line, for tables and legends."""
    svg = ET.Element("svg", {"viewBox": "0 0 34 16", "class": "swatch", "aria-hidden": "true"})
    add(svg, "line", x1=1, y1=8, x2=33, y2=8, class_=f"line {style.hue}", stroke_dasharray=style.dash)
    marker(svg, style, 17, 8)
    return ET.tostring(svg, encoding="unicode")


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers between two ends.

    >>> ticks(0.912, 1.0)
    [0.92, 0.94, 0.96, 0.98, 1.0]
    """
    raw = (high - low) / count
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * m for m in (1, 2, 5, 10) if unit * m >= raw * 0.999)
    return [
        round(index * step, 10) for index in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    ]


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers for a logarithmic axis: only decades if there are many, steps of one digit if there are few.

    >>> log_ticks(8, 120), log_ticks(0.5, 20000), log_ticks(22, 41)
    ([10.0, 20.0, 50.0, 100.0], [1.0, 10.0, 100.0, 1000.0, 10000.0], [25.0, 30.0, 35.0, 40.0])
    """
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1,), (1, 2, 5), (1, 2, 3, 4, 5, 7)):
        within = [m * 10.0**decade for decade in decades for m in digits if low <= m * 10.0**decade <= high]
        if len(within) > 2:
            return within
    return ticks(low, high)


def plain(value: float) -> str:
    """The number of a tick, as short as possible."""
    return f"{value:,.10f}".rstrip("0").rstrip(".")


def axes(svg: ET.Element, box: Box, x: dict[float, str], y: dict[float, str], titles: tuple[str, str]) -> None:
    """Grid lines, numbers and titles; x and y have pixels as keys."""
    left, top, right, bottom = box
    for at, number in y.items():
        add(svg, "line", x1=left, y1=at, x2=right, y2=at, class_="grid")
        add(svg, "text", number, x=left - 6, y=at + 4, text_anchor="end", class_="tick")
    for at, number in x.items():
        add(svg, "line", x1=at, y1=top, x2=at, y2=bottom, class_="grid")
        add(svg, "text", number, x=at, y=bottom + 16, text_anchor="middle", class_="tick")
    add(svg, "line", x1=left, y1=bottom, x2=right, y2=bottom, class_="axis")
    add(svg, "text", titles[0], x=(left + right) / 2, y=bottom + 34, text_anchor="middle", class_="title")
    add(svg, "text", titles[1], x=left, y=top - 10, class_="title", text_anchor="start")
