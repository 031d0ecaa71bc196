"""The charts of the benchmark's page: accuracy against cost, and curves over the false positive rate."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree import ElementTree as ET

import numpy as np
from numpy.typing import NDArray

from anomalib_csflow.benchmark import overview

from .drawing import Box, Style, add, axes, canvas, log_ticks, marker, plain, ticks

LETTER = 7.0  # mean width of a letter at the labels' size, 12 px, in a wide font


@dataclass(frozen=True)
class Point:
    """A detector in the chart of accuracy against cost; `remark` follows its name."""

    name: str
    style: Style
    cost: float
    gain: float
    std: float | None = None
    remark: str = ""


def overlap(one: Box, other: Box) -> float:
    """Area of the overlap of two boxes."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(width, 0) * max(height, 0)


def place(at: Sequence[tuple[float, float]], texts: Sequence[str], box: Box) -> list[Box]:
    """Boxes for labels near their points: each where it hides least and, among those, nearest."""
    taken: list[Box] = [(x - 6, y - 6, x + 6, y + 6) for x, y in at]
    placed: list[Box] = []
    for (x, y), text in zip(at, texts, strict=True):
        width, best, cost = LETTER * len(text), taken[0], math.inf
        for distance in (9.0, 16.0, 26.0, 38.0, 52.0):
            for turn in range(16):
                dx, dy = math.cos(turn * math.pi / 8), math.sin(turn * math.pi / 8)
                left = x + distance * dx - width * (1 - dx) / 2
                middle = y + (distance + 2) * dy
                label = (left, middle - 7, left + width, middle + 7)
                outside = width * 14 - overlap(label, box)
                hidden = sum(overlap(label, other) for other in taken) + 4 * outside + 0.4 * distance
                if hidden < cost - 1e-6:
                    best, cost = label, hidden
        taken.append(best)
        placed.append(best)
    return placed


def trade(points: Sequence[Point], titles: tuple[str, str], label: str) -> str:
    """Accuracy (up) against cost (right, logarithmic), with the Pareto front as filled markers on a dashed line."""
    width, height, box = 460, 340, (46.0, 28.0, 448.0, 292.0)
    left, top, right, bottom = box
    front = overview.pareto([p.cost for p in points], [p.gain for p in points])
    on_front = sorted({(p.cost, p.gain) for p, on in zip(points, front, strict=True) if on})
    described = ", ".join(p.name for p, on in zip(points, front, strict=True) if on)
    svg = canvas(width, height, f"{label}. On the Pareto front: {described}.")
    low, high = min(p.cost for p in points), max(p.cost for p in points)
    low, high = low / 1.35, high * 1.35 if high > low else high * 2
    least, most = min(p.gain for p in points), max(p.gain for p in points)
    margin = 0.08 * (most - least) or 0.02
    least, most = max(least - margin, 0) if least > 0 else least - margin, most + margin

    def place_x(value: float) -> float:
        return left + (right - left) * math.log(value / low) / math.log(high / low)

    def place_y(value: float) -> float:
        return bottom - (bottom - top) * (value - least) / (most - least)

    axes(
        svg,
        box,
        {place_x(value): plain(value) for value in log_ticks(low, high)},
        {place_y(value): plain(value) for value in ticks(least, most) if value <= 1},
        titles,
    )
    corners = [(place_x(on_front[0][0]), bottom)]
    for cost, gain in on_front:  # a staircase: points below it and to its right are beaten
        corners += [(place_x(cost), corners[-1][1]), (place_x(cost), place_y(gain))]
    corners.append((right, corners[-1][1]))
    add(svg, "polyline", points=" ".join(f"{x:.1f},{y:.1f}" for x, y in corners), class_="front")
    at = [(place_x(p.cost), place_y(p.gain)) for p in points]
    texts = [f"{p.name} {p.remark}".strip() for p in points]
    for text, (x, y), spot in zip(texts, at, place(at, texts, box), strict=True):
        near = min(max(x, spot[0]), spot[2]), min(max(y, spot[1]), spot[3])
        if math.dist(near, (x, y)) > 14:
            add(svg, "line", x1=x, y1=y, x2=near[0], y2=near[1], class_="leader")
        side = (spot[0] >= x) - (spot[2] <= x)  # a narrower font stays beside its marker
        anchor, end = {1: ("start", spot[0]), -1: ("end", spot[2]), 0: ("middle", (spot[0] + spot[2]) / 2)}[side]
        add(svg, "text", text, x=end, y=spot[3] - 3, text_anchor=anchor, class_="name")
    for point, text, on, (x, y) in zip(points, texts, front, at, strict=True):  # last, so that no label hides a marker
        group = add(svg, "g")
        if point.std:
            reach = (bottom - top) * point.std / (most - least)
            bottom_end, top_end = min(y + reach, bottom), max(y - reach, top)
            add(group, "line", x1=x, y1=bottom_end, x2=x, y2=top_end, class_=f"line {point.style.hue}")
        marker(group, point.style, x, y, filled=on)
        add(group, "title", f"{text}: {plain(round(point.gain, 4))} at {overview.written(point.cost, None)}")
    return ET.tostring(svg, encoding="unicode")


Curve = tuple[str, Style, NDArray[np.float64]]  # name, style, (2, K)


def mean_curve(curves: Sequence[NDArray[np.float32]], limit: float) -> NDArray[np.float64]:
    """Mean over seeds at equal false positive rates, dense where curves rise: (2, 121) from several (2, K)."""
    grid = limit * np.linspace(0, 1, 121) ** 2
    values = [np.interp(grid, curve[0], curve[1]) for curve in curves]
    start = [[0.0], [0.0]]  # so that a rise at a rate of 0 is drawn too
    return np.concatenate([start, np.stack([grid, np.mean(values, axis=0)])], axis=1)


def rates(curves: Sequence[Curve], limit: float, titles: tuple[str, str], label: str) -> str:
    """Curves over the false positive rate, each with its dashes and some markers."""
    width, height, box = 340, 340, (40.0, 28.0, 330.0, 292.0)
    left, top, right, bottom = box
    svg = canvas(width, height, f"{label}: {', '.join(name for name, _, _ in curves)}.")
    spots = ticks(0, limit)
    axes(
        svg,
        box,
        {left + (right - left) * value / limit: plain(value) for value in spots},
        {bottom - (bottom - top) * value: plain(value) for value in ticks(0, 1)},
        titles,
    )
    for order, (name, style, curve) in enumerate(curves):
        x, y = left + (right - left) * curve[0] / limit, bottom - (bottom - top) * curve[1]
        group = add(svg, "g", class_="curve", data_detector=name)
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
        add(group, "polyline", points=points, class_=f"line {style.hue}", stroke_dasharray=style.dash)
        for part in (0.22, 0.62):  # staggered, so that markers of neighbouring curves do not hide each other
            index = int(np.searchsorted(curve[0], limit * (part + 0.3 * order / len(curves))))
            marker(group, style, float(x[min(index, len(x) - 1)]), float(y[min(index, len(y) - 1)]))
        add(group, "title", name)
    return ET.tostring(svg, encoding="unicode")
