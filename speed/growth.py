"""Plots of how time and memory of a fit grow with image size, blocks, width and training images.

Every point is a fit in its own process, on noise. A flow's memory does not depend on the number of images;
PatchCore's memory bank and the time to choose it do.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from anomalib.data import Folder
from anomalib.engine import Engine
from lightning.pytorch import seed_everything
from matplotlib.figure import Figure
from side_by_side import RESULTS, begin, parser, write
from training import images

from anomalib_csflow import CSFlow, FeatureCache
from anomalib_csflow.benchmark.run.baselines import patchcore

BASE = {"image_size": 256, "num_blocks": 1, "hidden_channels": 128, "images": 64}
POINTS = {
    "image_size": [128, 256, 384, 512],
    "num_blocks": [1, 2, 4, 8],
    "hidden_channels": [64, 128, 256, 512],
    "images": [32, 64, 128, 256],
}
TINY = {"image_size": [128]}
OF_PATCHCORE = ("image_size", "images")
EPOCHS = 3
CORESET = 0.01


def one(model: str, settings: dict[str, int]) -> dict[str, float]:
    """Fit once: seconds, and the increase of the process's peak memory."""
    seed_everything(0, verbose=False)
    backbone: dict[str, Any] = {
        "backbone": "tf_efficientnet_lite2",
        "weights": "package",
        "image_size": settings["image_size"],
    }
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        data = Folder(
            name="noise",
            root=images(root, settings["images"], 256),
            normal_dir="good",
            train_batch_size=16,
            val_split_mode="none",
            test_split_mode="none",
            num_workers=0,
        )
        if model == "CSFlow":
            detector: Any = CSFlow(
                **backbone,
                layer="blocks.5",
                num_blocks=settings["num_blocks"],
                hidden_channels=settings["hidden_channels"],
                standardize=True,
                bfloat16=True,
            )
        else:
            detector = patchcore(**backbone, layers=["blocks.4"], coreset_sampling_ratio=CORESET)
        engine = Engine(
            default_root_dir=root,
            max_epochs=EPOCHS if model == "CSFlow" else 1,
            accelerator="cpu",
            limit_val_batches=0,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[FeatureCache(root / "cache")],
        )
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.perf_counter()
        engine.fit(detector, datamodule=data)
        elapsed = time.perf_counter() - start
        return {"s": elapsed, "MiB": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024}


def plot(frame: pd.DataFrame, points: dict[str, list[int]]) -> Figure:
    """Time and memory over each setting."""
    figure, axes = plt.subplots(2, len(points), figsize=(14, 6), constrained_layout=True, squeeze=False)
    for column, setting in enumerate(points):
        for line, unit in enumerate(("s", "MiB")):
            ax = axes[line, column]
            for (model, line_of), marker in zip(
                frame[frame["setting"] == setting].groupby("model"), ("o-", "s--"), strict=False
            ):
                ax.plot(line_of["value"], line_of[unit], marker, label=model)
            ax.set_ylim(bottom=0)
            ax.set_xticks(points[setting])
            ax.set_xlabel(setting.replace("_", " "))
            ax.set_ylabel(
                {"s": f"fit, s ({EPOCHS} epochs)", "MiB": "memory of the fit, MiB"}[unit] if column == 0 else ""
            )
            ax.grid(alpha=0.3)
            if setting in OF_PATCHCORE:
                ax.legend()
    figure.suptitle("Fits beside PatchCore (coreset 1 %, stride 16), features cached; one setting changes at a time")
    return figure


def main() -> None:
    """Measure every point in its own process."""
    own = parser(__doc__)
    own.add_argument("--one", nargs=2, metavar=("MODEL", "SETTINGS"), help="measure and print one point")
    arguments = own.parse_args()
    begin(arguments)
    if arguments.one:
        sys.stdout.write(json.dumps(one(arguments.one[0], json.loads(arguments.one[1]))))
        return
    rows = []
    points, base = (TINY, BASE | {"images": 4}) if arguments.quick else (POINTS, BASE)
    for setting, values in points.items():
        for model in ("CSFlow", "Patchcore"):
            if model == "Patchcore" and setting not in OF_PATCHCORE:
                continue
            for value in values:
                settings = json.dumps(base | {setting: value})
                options = [f"--threads={arguments.threads}", "--one", model, settings]
                command = [sys.executable, "-W", "ignore", __file__, *options]
                output = subprocess.run(command, check=True, capture_output=True, text=True).stdout  # noqa: S603
                measured = json.loads(output[output.rindex("{") :])
                rows.append({"model": model, "setting": setting, "value": value} | measured)
                sys.stderr.write(f"{rows[-1]}\n")
    figure = plot(pd.DataFrame(rows), points)
    if not arguments.quick:
        RESULTS.mkdir(exist_ok=True)
        figure.savefig(RESULTS / "growth.png", dpi=110)
    written = [{k: f"{v:.1f}" if isinstance(v, float) else v for k, v in r.items()} for r in rows]
    write("growth", written, arguments)


if __name__ == "__main__":
    main()
