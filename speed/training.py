"""Fitting in anomalib's engine: seconds per epoch from the second on, beside anomalib's Csflow.

The same images, backbone weights, size, blocks and width for both; no validation. Writing checkpoints is not timed on
either side: at the paper's width, one takes 3.3 GB, and more time than the steps on these few images.
"""

import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import yaml
from anomalib.data import Folder
from anomalib.engine import Engine
from anomalib.models import Csflow, get_model
from anomalib.models.components import AnomalibModule
from lightning.pytorch import Callback, seed_everything
from PIL import Image
from side_by_side import begin, parser, row, write

from anomalib_csflow import FeatureCache
from anomalib_csflow.benchmark.run.baselines import csflow

CONFIGS = Path(__file__).parents[1] / "configs"
THEIR_SIZE = 256  # pixels of the rivals' images, as in configs/benchmark.yaml
PAPER_WITHOUT_WEIGHTS = {
    "backbone": "torchvision/efficientnet_b5",
    "layer": "features.6.8",
    "weights": "random",
    "bfloat16": True,
}
"""The time does not depend on the weights, and random ones need no hub."""
ONE_LAYER = {
    "layer": "blocks.5",
    "layers": [],
    "num_scales": 3,
    "whiten": False,
    "noise": 0.0,
    "map_mode": "finest",
    "image_score": "energy",
    "max_steps": None,
}
"""Changes that leave only what Csflow also supports: one layer at three image sizes, trained by epochs."""


def their_csflow(recipe: dict[str, Any]) -> Csflow:
    """Anomalib's Csflow with a recipe's backbone, weights, size, blocks and width."""
    shared = ("backbone", "weights", "image_size", "layer", "kernel_sizes", "hidden_channels")
    return csflow(**{name: recipe[name] for name in shared})


class EpochTimes(Callback):
    """Seconds from the start of each epoch to the end of its last step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_epoch_start(self, *_: Any) -> None:
        """Start the clock of an epoch."""
        self.start = time.perf_counter()
        self.seconds.append(0.0)

    def on_train_batch_end(self, *_: Any) -> None:
        """Set the epoch's time up to this step."""
        self.seconds[-1] = time.perf_counter() - self.start

    def from_the_second(self) -> float:
        """Median of all epochs except the first."""
        return median(self.seconds[1:])


def images(root: Path, count: int, side: int) -> Path:
    """A folder of grey noise images, as large as real photographs."""
    generator = np.random.default_rng(0)
    (root / "good").mkdir(parents=True)
    for index in range(count):
        Image.fromarray(generator.integers(0, 255, (side, side), dtype=np.uint8)).save(root / "good" / f"{index}.png")
    return root


def epoch_seconds(model: AnomalibModule, root: Path, batch_size: int, epochs: int) -> float:
    """Seconds per epoch, from the second on."""
    seed_everything(0, verbose=False)
    data = Folder(
        name="noise",
        root=root,
        normal_dir="good",
        train_batch_size=batch_size,
        val_split_mode="none",
        test_split_mode="none",
        num_workers=0,
    )
    times = EpochTimes()
    with tempfile.TemporaryDirectory() as results:
        Engine(
            default_root_dir=results,
            max_epochs=epochs,
            accelerator="cpu",
            limit_val_batches=0,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[times, FeatureCache(Path(results) / "cache")],
        ).fit(model, datamodule=data)
    return times.from_the_second()


def main() -> None:
    """Measure both recipes."""
    options = parser(__doc__)
    options.add_argument("--only", choices=["small", "paper"])
    arguments = options.parse_args()
    begin(arguments)
    cases: dict[str, tuple[str, dict[str, Any], int, int, int, int, float]] = {
        # recipe, changes to it, number of images, their side, images per batch, epochs, target
        "small": ("cs_flow_small.yaml", ONE_LAYER, 96, 300, 16, 6, 1 / 8),
        "paper": ("cs_flow.yaml", PAPER_WITHOUT_WEIGHTS, 8, 900, 4, 3, 1 / 5),
    }
    if arguments.quick:
        tiny = {"image_size": 128, "hidden_channels": 8}
        cases = {name: (case[0], case[1] | tiny, 2, 150, 2, 2, case[6]) for name, case in cases.items()}
    rows = []
    for name, (config, changes, count, side, batch_size, epochs, target) in cases.items():
        if arguments.only not in {None, name}:
            continue
        recipe = yaml.safe_load((CONFIGS / config).read_text())["model"]["init_args"] | changes
        with tempfile.TemporaryDirectory() as folder:
            root = images(Path(folder), count, side)
            ours = get_model({"class_path": "anomalib_csflow.CSFlow", "init_args": recipe | {"post_processor": False}})
            ours_seconds = epoch_seconds(ours, root, batch_size, epochs)
            del ours
            theirs_seconds = epoch_seconds(their_csflow(recipe), root, batch_size, epochs)
        what = f"{name}: seconds per epoch of {count} images, batches of {batch_size}"
        rows.append(row(what, ours_seconds, theirs_seconds, target, "s"))
    write("training" if arguments.only is None else f"training_{arguments.only}", rows, arguments)


if __name__ == "__main__":
    main()
