"""False alarms of real fits: the rate that a threshold promises, beside the one measured on good images.

Each repetition divides all good images of a data set anew, before anything is fitted: some to fit, some to calibrate,
the rest to test. It fits CS-Flow's small recipe in anomalib's engine, loads the checkpoint, and scores the test images
as ``predict`` does. A promise is about false alarms only, so few steps show as much as many.
"""

import math
import shutil
import tempfile
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from anomalib.data import Folder, InferenceBatch
from anomalib.engine import Engine
from lightning.pytorch import seed_everything
from rich.console import Console
from side_by_side import begin, parser, write
from torch import Tensor
from training import images

from anomalib_csflow import ConformalPostProcessor, CSFlow, FeatureCache, from_recipe
from anomalib_csflow.benchmark.run import config
from anomalib_csflow.calibration import Promise
from anomalib_csflow.engine.recalibration import raw_scores

RATES = (0.01, 0.02, 0.05, 0.1)
TEST, CALIBRATION = 0.2, 0.5
"""Share of the good images to test on, and share of the rest to calibrate on."""
TINY = {"backbone": "tf_efficientnet_lite0", "image_size": 128, "hidden_channels": 8, "max_steps": 2}
PROMISES = ("held-out", "certified", "out-of-fold")


def divided(good: list[Path], folder: Path, seed: int) -> Path:
    """A folder with the images to fit and calibrate on in ``good``, and those to test on in ``held_out``."""
    order = np.random.default_rng(seed).permutation(len(good))
    tested = max(round(TEST * len(good)), 1)
    for position, index in enumerate(order):
        target = folder / ("held_out" if position < tested else "good") / f"{index:04d}{good[index].suffix}"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(good[index], target)
    return folder


def fitted(root: Path, changes: dict[str, Any], seed: int, promise: str, cache: Path) -> CSFlow:
    """A detector with thresholds, loaded from the checkpoint that a fit left."""
    seed_everything(seed, verbose=False)
    held_out = promise != "out-of-fold"
    processor = ConformalPostProcessor(
        promise="certified" if promise == "certified" else "marginal", num_folds=0 if held_out else 3
    )
    model = from_recipe("cs_flow_small", **changes, post_processor=processor, visualizer=False)
    data = Folder(
        name="good",
        root=root,
        normal_dir="good",
        normal_test_dir="held_out",
        val_split_mode="from_train",
        val_split_ratio=CALIBRATION if held_out else 0.1,
        train_batch_size=16,
        eval_batch_size=16,
        num_workers=0,
        seed=seed,
    )
    engine = Engine(
        default_root_dir=root / "results",
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        max_epochs=1,
        callbacks=[FeatureCache(cache)],
    )
    engine.fit(model, datamodule=data)
    assert engine.best_model_path is not None  # noqa: S101 (a fit always saves)
    return CSFlow.load_from_checkpoint(engine.best_model_path)


def false_alarms(detector: CSFlow, scores: Tensor, maxima: Tensor | None, rate: float) -> tuple[Promise, float]:
    """What a threshold for a rate promises, and the share of good images with a label "anomalous" or any contour."""
    processor: Any = detector.post_processor
    processor.false_alarm_rate = rate
    made = processor.calibrate(processor.score_scale.good, processor.map_scale.good, processor.made.kind)
    maps = None if maxima is None else maxima[:, None, None, None]
    called = processor(InferenceBatch(pred_score=scores, anomaly_map=maps)).pred_label
    return made, float(called.float().mean())


def repetitions(name: str, good: list[Path], changes: dict[str, Any], count: int, promise: str) -> pd.DataFrame:
    """A row for each repetition and rate."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as cache:
        for seed in range(count):
            with tempfile.TemporaryDirectory() as folder:
                root = divided(good, Path(folder), seed)
                detector = fitted(root, changes, seed, promise, Path(cache))
                scores, maxima = raw_scores(detector, root / "held_out")
                for rate in RATES:
                    made, alarms = false_alarms(detector, scores, maxima, rate)
                    rows.append(asdict(made) | {"alarms": alarms, "tested": len(scores)})
            Console(stderr=True).print(f"{name}: {seed + 1} of {count} fits")
    return pd.DataFrame(rows)


def lines(name: str, found: pd.DataFrame) -> list[dict[str, Any]]:
    """A line of the table for each rate; rates that promise the same are one line."""
    table = []
    for promised, group in found.groupby(found["rate"].round(6)):
        one = group[group["asked_rate"] == group["asked_rate"].max()]
        error = one["alarms"].std() / math.sqrt(len(one)) if len(one) > 1 else 0.0
        table.append(
            {
                "good images": name,
                "calibrated on": int(one["num_images"].iloc[0]),
                "tested on": int(one["tested"].iloc[0]),
                "promise": one["kind"].iloc[0],
                "promised": f"{100 * promised:.2f} %",
                "measured": f"{100 * one['alarms'].mean():.2f} % ± {100 * error:.2f}",
                "kept": "yes" if one["alarms"].mean() <= promised + 2 * error else "NO",
            }
        )
    return table


def main() -> None:
    """Repeat fits on each data set."""
    options = parser(__doc__)
    options.add_argument("--data", type=Path, help="a data set in MVTec AD's layout, or a folder of such; else noise")
    options.add_argument("--promise", choices=PROMISES, default="held-out", help="how thresholds are calibrated")
    options.add_argument("--max_steps", type=int, default=60, help="of each fit")
    options.add_argument("--fits", type=int, default=20, help="of each data set")
    arguments = options.parse_args()
    begin(arguments)
    warnings.simplefilter("ignore")
    changes = TINY if arguments.quick else {"max_steps": arguments.max_steps}
    count = 2 if arguments.quick else arguments.fits
    table: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        noise = {"noise": Path(folder)}
        if arguments.data is None:
            images(Path(folder) / "train", 20, 128)
        sets = {s.name: Path(s.init_args["root"]) for s in config.folders(arguments.data)} if arguments.data else noise
        for name, root in sets.items():
            good = sorted(path for part in ("train", "test") for path in (root / part / "good").glob("*.*"))
            table += lines(name, repetitions(name, good, changes, count, arguments.promise))
    write(f"false_alarms_{arguments.promise}", table, arguments)


if __name__ == "__main__":
    main()
