"""Fits on 10^3, 10^4 and 10^5 images: time, memory and cache of 400 steps beside one epoch.

The images are variations (crops, mirrored, darker and lighter) of a folder's, or of noise. Every point is a fit in its
own process, with thresholds, from an empty feature cache.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from anomalib.data import Folder
from anomalib.engine import Engine
from lightning.pytorch import seed_everything
from matplotlib.figure import Figure
from PIL import Image, ImageEnhance
from side_by_side import RESULTS, begin, parser, write

from anomalib_csflow import FeatureCache
from anomalib_csflow.benchmark.run.timing import peak_mb
from anomalib_csflow.recipe_files import from_recipe

SIDE = 64
BATCH = 16
STEPS = 400
NUMBERS = [10**3, 10**4, 10**5]
WAYS: dict[str, dict[str, Any]] = {"steps": {"max_steps": STEPS}, "epoch": {"max_steps": None, "max_epochs": 1}}
TINY = {"max_steps": 2}
SOURCES = 200  # images that are varied


def variations(sources: Path | None, folder: Path, count: int) -> None:
    """Write so many different crops of a folder's images; of noise, if there is no folder."""
    generator = np.random.default_rng(0)
    files = islice(sorted(sources.rglob("*.*")), SOURCES) if sources else ()
    known = [Image.open(file).convert("RGB") for file in files if file.suffix in Image.registered_extensions()]
    known = known or [Image.fromarray(generator.integers(0, 255, (128, 128, 3), dtype=np.uint8))]
    folder.mkdir(parents=True)
    for index in range(count):
        image = known[index % len(known)]
        side = int(generator.uniform(0.5, 1) * min(image.size))
        left, top = (int(generator.integers(0, size - side + 1)) for size in image.size)
        crop = image.resize((SIDE, SIDE), box=(left, top, left + side, top + side))
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if generator.uniform() < 0.5 else crop
        crop = ImageEnhance.Brightness(crop).enhance(generator.uniform(0.8, 1.2))
        crop.save(folder / f"{index:07d}.jpg", quality=90)


def one(way: str, root: Path, *, quick: bool) -> dict[str, float]:
    """Fit once on a folder's images: seconds, the increase of the process's peak memory, and the cache's size."""
    seed_everything(0, verbose=False)
    changes = WAYS[way] | (TINY if quick and way == "steps" else {})
    detector = from_recipe("cs_flow_small", backbone="tf_efficientnet_lite0", image_size=SIDE, **changes)
    data = Folder(name="many", root=root, normal_dir="good", train_batch_size=BATCH, eval_batch_size=64, num_workers=0)
    with tempfile.TemporaryDirectory() as folder:
        engine = Engine(
            default_root_dir=folder,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[FeatureCache(Path(folder) / "cache")],
        )
        before, start = peak_mb(), time.perf_counter()
        engine.fit(detector, datamodule=data)
        seconds = time.perf_counter() - start
        cached = sum(file.stat().st_size for file in Path(folder, "cache").rglob("*.safetensors"))
        return {"s": seconds, "MB": peak_mb() - before, "cache MB": cached / 1e6}


def plot(frame: pd.DataFrame) -> Figure:
    """Time, memory and cache over the number of images."""
    units = ("s", "MB", "cache MB")
    figure, axes = plt.subplots(1, len(units), figsize=(12, 3.5), constrained_layout=True)
    for ax, unit in zip(axes, units, strict=True):
        for marker, (way, line) in zip(("o-", "s--"), frame.groupby("way", sort=False), strict=False):
            ax.loglog(line["images"], line[unit], marker, label=way)
        ax.set(xlabel="images", ylabel={"s": "fit, s", "MB": "memory of the fit, MB", "cache MB": "cache, MB"}[unit])
        ax.grid(alpha=0.3)
    axes[0].legend()
    return figure


def table(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Both ways side by side, with their ratio."""
    rows = []
    for number, both in frame.groupby("images"):
        steps, epoch = (both[both["way"] == way].iloc[0] for way in WAYS)
        row: dict[str, Any] = {"images": number}
        for unit in ("s", "MB", "cache MB"):
            row |= {f"{way}, {unit}": f"{side[unit]:.0f}" for way, side in (("steps", steps), ("epoch", epoch))}
        rows.append(row | {"time, steps / epoch": f"{steps['s'] / epoch['s']:.2f}"})
    return rows


def measure(arguments: argparse.Namespace, root: Path) -> pd.DataFrame:
    """Fit at each number of images, in both ways, each in its own process."""
    numbers = [8] if arguments.quick else [number for number in NUMBERS if number <= arguments.most]
    variations(arguments.data, root / "all", numbers[-1])
    rows = []
    for number in numbers:
        good = root / str(number) / "good"
        good.mkdir(parents=True)
        for file in islice(sorted((root / "all").iterdir()), number):
            os.link(file, good / file.name)
        for way in WAYS:
            options = [f"--threads={arguments.threads}", "--one", way, str(good.parent)]
            options += ["--quick"] if arguments.quick else []
            command = [sys.executable, "-W", "ignore", __file__, *options]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout  # noqa: S603
            rows.append({"images": number, "way": way} | json.loads(output[output.rindex("{") :]))
            sys.stderr.write(f"{rows[-1]}\n")
    return pd.DataFrame(rows)


def main() -> None:
    """Measure every point in its own process."""
    own = parser(__doc__)
    own.add_argument("--data", type=Path, help="a folder of images to vary; else noise")
    own.add_argument("--most", type=int, default=NUMBERS[-1], help="leave out the points with more images")
    own.add_argument("--one", nargs=2, metavar=("WAY", "FOLDER"), help="measure and print one point")
    arguments = own.parse_args()
    begin(arguments)
    if arguments.one:
        measured = one(arguments.one[0], Path(arguments.one[1]), quick=arguments.quick)
        sys.stdout.write(json.dumps(measured))
        return
    with tempfile.TemporaryDirectory() as folder:
        frame = measure(arguments, Path(folder))
    if not arguments.quick:
        RESULTS.mkdir(exist_ok=True)
        plot(frame).savefig(RESULTS / "many.png", dpi=110)
    write("many", table(frame), arguments)


if __name__ == "__main__":
    main()
