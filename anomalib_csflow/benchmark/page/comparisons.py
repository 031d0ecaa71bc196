"""What the charts of the benchmark's page compare: accuracy with cost, detectors on each data set, curves."""

from collections.abc import Mapping, Sequence
from typing import Any

from anomalib_csflow.benchmark import overview
from anomalib_csflow.benchmark.overview import Figures

from . import charts
from .drawing import Style

LATENCY = ("openvino_b1_p50_ms", "torch_b1_p50_ms")


def trades(figures: Figures, styles: Mapping[str, Style], data_sets: Sequence[str]) -> list[dict[str, Any]]:
    """Charts of accuracy against latency and size: one per metric, data set and cost."""
    found = []
    for metric in overview.metrics(figures):
        for data in data_sets:
            own = {
                detector: spreads for (detector, of), spreads in figures.items() if of == data and metric.key in spreads
            }
            for cost, title, keys in (
                ("latency", "ms per image, batch of 1 (median)", LATENCY),
                ("size", "OpenVINO file, MB", ("file_mb",)),
            ):
                points = []
                for detector, spreads in own.items():
                    key = next((key for key in keys if key in spreads and spreads[key].mean > 0), None)
                    if key:
                        gain, remark = spreads[metric.key], "(torch)" if key == LATENCY[1] else ""
                        points.append(
                            charts.Point(detector, styles[detector], spreads[key].mean, gain.mean, gain.std, remark)
                        )
                label = f"{metric.title} against {cost} on {data}"
                names = {point.name for point in points}
                if own:
                    found.append(
                        {
                            "metric": metric.key,
                            "data": data,
                            "cost": cost,
                            "label": label,
                            "svg": charts.trade(points, (title, metric.title), label) if points else "",
                            "missing": [detector for detector in own if detector not in names],
                        }
                    )
    return found


def bars(figures: Figures, data_sets: Sequence[str]) -> list[dict[str, Any]]:
    """Bars of each metric and data set, longest first; lengths and spreads in percent of a perfect score."""
    found = []
    for metric in overview.metrics(figures):
        for data in data_sets:
            own = [
                (name, spreads[metric.key])
                for (name, of), spreads in figures.items()
                if of == data and metric.key in spreads
            ]
            lines = []
            for detector, spread in sorted(own, key=lambda item: -item[1].mean):
                mean, std = overview.written_spread(spread, metric)
                half = spread.std or 0.0
                low, high = max(spread.mean - half, 0.0), min(spread.mean + half, 1.0)
                lines.append(
                    {"detector": detector, "mean": mean, "std": std, "length": f"{100 * max(spread.mean, 0):.2f}"}
                    | {
                        "low": f"{100 * low:.2f}",
                        "reach": f"{100 * max(high - low, 0):.2f}",
                        "count": len(spread.values),
                    }
                )
            found.append({"metric": metric, "data": data, "lines": lines})
    return found


def curve_charts(
    found: Mapping[tuple[str, str, str], list[Any]],
    figures: Figures,
    styles: Mapping[str, Style],
    data_sets: Sequence[str],
) -> list[dict[str, Any]]:
    """ROC and PRO curves of each data set, with a legend that gives the areas."""
    kinds = {
        "roc": ("ROC of images", "false positive rate", "true positive rate", "image_AUROC"),
        "pro": ("PRO of pixels", "false positive rate of pixels", "mean overlap per defect", "AUPRO"),
    }
    charted = []
    for data in data_sets:
        drawings, legend = [], [name for name in styles if any((kind, data, name) in found for kind in kinds)]
        for kind, (title, x, y, _) in kinds.items():
            own = {name: found[kind, data, name] for name in styles if (kind, data, name) in found}
            if own:
                widest = max(float(curve[0].max()) for seeds in own.values() for curve in seeds)
                limit = 1.0 if widest > 0.31 else 0.3  # AUPRO is an area up to 0.3: curves may end there
                lines = [(name, styles[name], charts.mean_curve(seeds, limit)) for name, seeds in own.items()]
                drawings.append({"title": title, "svg": charts.rates(lines, limit, (x, y), f"{title} on {data}")})
        columns = [
            overview.BY_KEY[area]
            for kind, (*_, area) in kinds.items()
            if any((kind, data, name) in found for name in legend)
        ]
        areas = {
            name: [
                overview.written(spreads[c.key].mean, c.digits) if c.key in spreads else overview.NONE for c in columns
            ]
            for name in legend
            if (spreads := figures.get((name, data), {})) is not None
        }
        if drawings:
            charted.append({"data": data, "charts": drawings, "columns": columns, "areas": areas})
    return charted
