"""The benchmark's page: what it says, what it escapes, and what it does without."""

import json
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from benchmark_output import ODD
from PIL import Image

from anomalib_csflow.benchmark import overview, standings
from anomalib_csflow.benchmark.page import charts, drawing, pictures, report
from anomalib_csflow.benchmark.rows import Row

VOID = {"meta", "link", "img", "input", "br"}


class Page(HTMLParser):
    """Checks that every tag is closed in order, and gathers attributes and texts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Called by the parser."""
        self.tags.append((tag, {key: value or "" for key, value in attrs}))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Called by the parser."""
        self.tags.append((tag, {key: value or "" for key, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        """Called by the parser."""
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        """Called by the parser."""
        if self.stack and self.stack[-1] not in {"style", "script"}:
            self.texts.append(data.strip())


@pytest.fixture(scope="module")
def page(output: Path) -> Page:
    """The page, parsed."""
    return Page((output / "report.html").read_text(encoding="utf-8"))


def rewritten(output: Path, target: Path, change: Any) -> str:
    """The page after a change of the rows; runs and samples stay where they are."""
    results = json.loads((output / "results.json").read_text())
    results["rows"] = change(results["rows"])
    for folder in ("runs", "samples"):
        (target / folder).symlink_to(output / folder)
    (target / "results.json").write_text(json.dumps(results))
    text = report.write(target).read_text(encoding="utf-8")
    Page(text)
    return text


def test_needs_nothing_from_elsewhere(page: Page) -> None:
    sources = [value for _, attrs in page.tags for key, value in attrs.items() if key in {"src", "href", "srcset"}]
    assert len(sources) > 60
    assert all(source.startswith(("data:", "#")) for source in sources)
    identifiers = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(identifiers) == len(set(identifiers))
    assert {source for source in sources if source.startswith("#")} <= {f"#{name}" for name in identifiers}


def test_is_small(output: Path) -> None:
    assert (output / "report.html").stat().st_size < 5e6


def test_names_are_escaped(page: Page, output: Path) -> None:
    assert ODD in page.texts
    assert "<b>&" not in (output / "report.html").read_text(encoding="utf-8")
    assert f"bottle {ODD}" in page.texts
    assert any(f"it ran out of memory {ODD} in epoch 3." in text for text in page.texts)


def test_every_image_has_a_text(page: Page) -> None:
    images = [attrs for tag, attrs in page.tags if tag == "img"]
    assert all(attrs["alt"] and attrs["loading"] == "lazy" for attrs in images)
    heats = sum(attrs["alt"].startswith("Heat map of") for attrs in images)
    assert sum(attrs["alt"].startswith("True mask of") for attrs in images) == 2
    assert page.texts.count("no mask") == 1  # of the good image, where the others have one
    assert heats == 3 * (10 + 10)  # samples, and detectors with maps: not RealNVP, nor what failed


def test_table_has_means_and_failures(output: Path, page: Page) -> None:
    rows = json.loads((output / "results.json").read_text())["rows"]
    values = [json.loads(attrs["data-values"]) for tag, attrs in page.tags if tag == "tr" and "data-values" in attrs]
    assert len(values) == 12 + 11 + 2  # one failed on all seeds, one on a single one
    chosen = next(value for value in values if (value["detector"], value["data"]) == ("MSFlow", "tiles"))
    expected = np.mean([r["AUPRO"] for r in rows if (r["detector"], r["data"]) == ("MSFlow", "tiles")])
    assert chosen["AUPRO"] == pytest.approx(expected)
    assert "2 of 2" not in page.texts
    assert "1 of 2" in page.texts


def test_all_data_sets_together(page: Page) -> None:
    assert standings.OVER_ALL + "." in page.texts
    assert standings.BESIDE + "." in page.texts
    assert sum(text.endswith(" tiles") and text.startswith("0.") for text in page.texts) > 12  # the worst sets
    assert sum(text.count("[") for text in page.texts) == 10 + 11  # not PatchCore; EfficientAD failed on one set


def test_summary_leaves_out_failures_and_what_is_missing() -> None:
    rows = [
        Row("", "A", "", "x", seed, status, figures={"image_AUROC": value, "AUPRO": None})
        for seed, status, value in [(0, "done", 0.8), (1, "done", 0.9), (2, "failed", None)]
    ]
    (spreads,) = overview.summary(rows).values()
    assert set(spreads) == {"image_AUROC"}
    assert spreads["image_AUROC"].mean == pytest.approx(0.85)
    assert spreads["image_AUROC"].std == pytest.approx(0.1 / 2**0.5)
    assert overview.failures(rows) == {("A", "x"): {"no reason was written": ["2"]}}


def test_best_is_what_is_written() -> None:
    rows = [
        Row("", name, "", "x", 0, "done", figures={"image_AUROC": value, "fit_s": value})
        for name, value in {"A": 0.9801, "B": 0.9802, "C": 0.9}.items()
    ]
    figures, columns = overview.summary(rows), {column.key: column for column in overview.COLUMNS}
    assert overview.best(figures, "x", columns["image_AUROC"]) == {"A", "B"}
    assert overview.best(figures, "x", columns["fit_s"]) == {"C"}
    assert overview.best(overview.summary(rows[:1]), "x", columns["fit_s"]) == set()


def test_pareto_front_by_hand() -> None:
    #         beaten by the second, front, front (equal twins), beaten at the same gain, front
    costs = [10.0, 10.0, 20.0, 20.0, 30.0, 50.0]
    gains = [0.70, 0.80, 0.90, 0.90, 0.90, 0.95]
    assert overview.pareto(costs, gains) == [False, True, True, True, False, True]
    assert overview.pareto([], []) == []


def test_front_is_drawn_filled() -> None:
    points = [
        charts.Point("good", drawing.Style(0), 10, 0.9),
        charts.Point("beaten", drawing.Style(1), 20, 0.8),
    ]
    svg = charts.trade(points, ("ms", "AUROC"), "AUROC against latency")
    assert 'class="marker hue0"' in svg
    assert 'class="marker hue1 hollow"' in svg
    assert "On the Pareto front: good." in svg


def test_detectors_differ_without_colour() -> None:
    looks = {
        (tuple(drawing.SHAPES[n % len(drawing.SHAPES)]), drawing.Style(n).dash, drawing.Style(n).hue) for n in range(28)
    }
    assert len(looks) == 28
    assert len({shape for shape, *_ in list(looks)}) == 12


def test_labels_do_not_hide_each_other() -> None:
    generator = np.random.default_rng(0)
    at = [(float(x), float(y)) for x, y in generator.uniform((80, 60), (400, 260), (11, 2))]
    box = (46.0, 28.0, 448.0, 292.0)
    spots = charts.place(at, ["a detector"] * len(at), box)
    assert sum(charts.overlap(a, b) for i, a in enumerate(spots) for b in spots[:i]) == 0
    assert all(charts.overlap(spot, box) == pytest.approx(70 * 14) for spot in spots)


def test_mean_curve_is_the_mean() -> None:
    rate = np.linspace(0, 1, 50, dtype=np.float32)
    curve = charts.mean_curve([np.stack([rate, rate]), np.stack([rate, np.ones_like(rate)])], limit=1.0)
    assert curve[:, 0].tolist() == [0, 0]
    np.testing.assert_allclose(curve[1, 1:], (1 + curve[0, 1:]) / 2, atol=1e-6)


def test_heat_rises_in_lightness() -> None:
    image = Image.new("RGB", (90, 20), (120, 120, 120))
    uri = pictures.overlay(image, np.linspace(0, 1, 90)[None].repeat(20, 0), None)
    grey = np.asarray(decoded(uri).convert("L"), dtype=float)[10]
    assert (np.diff(grey[30::10]) > 0).all()
    assert grey[-1] > 220
    mask = Image.new("L", (45, 10))
    mask.paste(255, (20, 3, 30, 7))
    outlined = np.asarray(decoded(pictures.overlay(image, np.zeros((8, 8)), mask)).convert("RGB"), dtype=int)
    assert abs(outlined[5, 50] - np.array(pictures.OUTLINE)).max() < 40
    assert abs(outlined[10, 50] - 54).max() < 30  # the defect's inside is seen


def decoded(uri: str) -> Image.Image:
    """The image of a data URI."""
    import base64
    import io

    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


def test_other_formats_are_refused(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(json.dumps({"format": 7, "rows": []}))
    with pytest.raises(ValueError, match=r"results\.json has format 7, but this version reads format 2: run"):
        report.write(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no results\.json in .*nothing: run"):
        report.write(tmp_path / "nothing")


def test_all_failed(output: Path, tmp_path: Path) -> None:
    def fail(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [row | {"status": "failed", "reason": "no memory"} for row in rows]

    text = rewritten(output, tmp_path, fail)
    assert text.count("<b>Failed</b> with seeds 0, 1: no memory") == 24
    assert 'id="trade"' not in text
    assert "No run left a curve." in text


def test_one_seed_one_data_set_no_runs(output: Path, tmp_path: Path) -> None:
    text = rewritten(output, tmp_path, lambda rows: [r for r in rows if r["seed"] == 0 and r["data"] == "tiles"])
    assert "on 1 data set," in text
    assert " ± " not in text
    shutil.copy(tmp_path / "results.json", bare := tmp_path / "bare.json")
    (alone := tmp_path / "alone").mkdir()
    bare.rename(alone / "results.json")
    text = report.write(alone).read_text(encoding="utf-8")
    Page(text)
    assert "No sample images were kept for this data set." in text
    assert "No run left a curve." in text


def test_no_rows(output: Path, tmp_path: Path) -> None:
    assert "The benchmark has no rows yet." in rewritten(output, tmp_path, lambda rows: [])
