"""The demo: CS-Flow in anomalib's engine on a small data set made from photographs, with pictures and a table.

``python -m anomalib_csflow.demo [FOLDER]`` needs no network: the photographs come with scikit-image, the
backbone's weights with a package.
"""

import argparse
import io
import logging
import warnings
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import skimage.data
import torch
from matplotlib import pyplot as plt
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.table import Table
from skimage import draw, filters

with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)  # anomalib imports deprecated modules
    from anomalib.data import Folder
    from anomalib.data.utils import read_image
    from anomalib.engine import Engine

    from anomalib_csflow import ConformalPostProcessor, from_recipe
    from anomalib_csflow.benchmark import overview
    from anomalib_csflow.benchmark.run import accuracy, measure
    from anomalib_csflow.engine.detector import FlowDetector

TEXTURES = ("brick", "grass", "gravel")
CROP = 128  # pixels of the 512 x 512 photographs
SIZE = 256  # pixels to which they are resized: twice as many show all that is in them
TRAIN_WIDTH = 336  # training crops come from the columns left of this, test crops from the rest
NUM_TRAIN, NUM_GOOD, NUM_DEFECTIVE = 64, 15, 15
STEPS = 150
METRICS = ("image_AUROC", "pixel_AUROC", "AUPRO")

Grey = NDArray[np.float64]  # (H, W) in [0, 255]
Mask = NDArray[np.bool_]


# -- the data set -------------------------------------------------------------------------------


def scratch(image: Grey, generator: np.random.Generator) -> Mask:
    """A crooked line, about three pixels wide."""
    mask = np.zeros(image.shape)
    y, x = generator.integers(30, CROP - 30, 2)
    angle = generator.uniform(0, 2 * np.pi)
    for _ in range(4):
        angle += generator.normal(0, 0.4)
        y_next, x_next = (np.clip(v + 18 * f(angle), 4, CROP - 5) for v, f in ((y, np.sin), (x, np.cos)))
        mask[draw.line(int(y), int(x), int(y_next), int(x_next))] = 1
        y, x = y_next, x_next
    return filters.gaussian(mask, 1.5) > 0.06


def spot(image: Grey, generator: np.random.Generator) -> Mask:
    """An ellipse."""
    mask = np.zeros(image.shape)
    center, radii = generator.integers(30, CROP - 30, 2), generator.integers(8, 18, 2)
    mask[draw.ellipse(*center, *radii, shape=image.shape)] = 1
    return mask > 0


def patch(image: Grey, generator: np.random.Generator) -> Mask:
    """A rectangle."""
    mask = np.zeros(image.shape)
    top, left = generator.integers(10, CROP - 60, 2)
    height, width = generator.integers(24, 50, 2)
    mask[top : top + height, left : left + width] = 1
    return mask > 0


def damage(image: Grey, other: Grey, kind: int, generator: np.random.Generator) -> tuple[Grey, Mask]:
    """Put one defect into an image; returns the damaged image and the exact mask."""
    shape = (scratch, spot, patch)[kind]
    mask = shape(image, generator)
    if shape is patch:  # pasted from another texture
        return np.where(mask, other, image), mask
    level = generator.choice([25.0, 230.0])
    blend = filters.gaussian(mask.astype(float), 0.7) * 0.85 * mask  # soft edges inside the mask, nothing outside it
    return image * (1 - blend) + level * blend, mask


def make_data(root: Path, seed: int = 0) -> None:
    """Write good and defective crops of the photographs, with masks, in MVTec AD's layout."""
    generator = np.random.default_rng(seed)
    photographs = {name: getattr(skimage.data, name)().astype(float) for name in TEXTURES}

    def crop(name: str, left: int, right: int) -> Grey:
        y = generator.integers(0, 512 - CROP + 1)
        x = generator.integers(left, right - CROP + 1)
        view = photographs[name][y : y + CROP, x : x + CROP]
        return view[:, ::-1] if generator.random() < 0.5 else view

    def save(image: NDArray[np.generic], *parts: str) -> None:
        path = root.joinpath(*parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.clip(image, 0, 255).astype(np.uint8)).save(path)

    for index, name in enumerate(TEXTURES):
        other = TEXTURES[index - 1]  # the source of the patches: gravel on brick, brick on grass, grass on gravel
        for number in range(NUM_TRAIN):
            save(crop(name, 0, TRAIN_WIDTH), name, "train", "good", f"{number:03d}.png")
        for number in range(NUM_GOOD):
            save(crop(name, TRAIN_WIDTH, 512), name, "test", "good", f"{number:03d}.png")
        for number in range(NUM_DEFECTIVE):
            image, mask = damage(crop(name, TRAIN_WIDTH, 512), crop(other, TRAIN_WIDTH, 512), number % 3, generator)
            save(image, name, "test", "defective", f"{number:03d}.png")
            save(mask * 255, name, "ground_truth", "defective", f"{number:03d}.png")


def folder(root: Path, name: str) -> Folder:
    """Anomalib's datamodule of one texture."""
    return Folder(
        name=name,
        root=root / name,
        normal_dir="train/good",
        normal_test_dir="test/good",
        abnormal_dir="test/defective",
        mask_dir="ground_truth/defective",
        train_batch_size=8,
        eval_batch_size=16,
        num_workers=0,  # for so few small images, starting a worker costs more than it saves
        val_split_mode="from_train",  # thresholds from good images that are neither trained nor tested on
        val_split_ratio=0.25,
    )


# -- pictures and table -------------------------------------------------------------------------


@torch.inference_mode()
def predict(detector: FlowDetector, image: Path) -> Any:
    """What the detector says of one file: score, verdict and heat map on the scale of its thresholds."""
    return detector(read_image(image, as_tensor=True)[None])


def draw_pictures(name: str, root: Path, detector: FlowDetector, path: Path) -> None:
    """One column per kind of defect, and one for a good image: the image, the true mask, the heat map."""
    test = root / name / "test"
    images = [*sorted((test / "defective").iterdir())[:3], sorted((test / "good").iterdir())[0]]
    predictions = [predict(detector, image) for image in images]
    heat = np.stack([np.asarray(prediction.anomaly_map).squeeze() for prediction in predictions])
    figure, axes = plt.subplots(3, len(images), figsize=(10, 8.2), layout="constrained")
    for column, (image_path, kind) in enumerate(zip(images, ("scratch", "spot", "patch", "good"), strict=True)):
        image = np.asarray(Image.open(image_path))
        mask_path = root / name / "ground_truth" / "defective" / image_path.name
        mask = np.asarray(Image.open(mask_path)) if kind != "good" else np.zeros_like(image)
        extent = (0, image.shape[1], image.shape[0], 0)
        axes[0, column].imshow(image, cmap="gray", extent=extent)
        axes[1, column].imshow(mask, cmap="gray", extent=extent, vmin=0, vmax=255)
        axes[2, column].imshow(image, cmap="gray", extent=extent)
        axes[2, column].imshow(heat[column], cmap="jet", alpha=0.6, extent=extent, vmin=0.2, vmax=0.8)  # calibrated
        if heat[column].max() > 0.5:  # the threshold
            axes[2, column].contour(heat[column], [0.5], colors="white", linewidths=1.5, extent=extent, origin="upper")
        axes[0, column].set_title(kind)
        is_defective, score = (
            np.asarray(value).squeeze() for value in (predictions[column].pred_label, predictions[column].pred_score)
        )
        axes[2, column].set_xlabel(f"predicted {'defective' if is_defective else 'good'}, score {score:.2f}")
    for axis, title in zip(axes[:, 0], ("image", "true mask", "heat map"), strict=True):
        axis.set_ylabel(title, fontsize=12)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    figure.suptitle(f"CS-Flow on {name}, trained on {NUM_TRAIN} good images", fontsize=14)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def try_export(detector: FlowDetector, images: Sequence[Path], root: Path) -> str:
    """Export to OpenVINO and predict with it; says how long an image takes, and how many verdicts are the same."""
    with redirect_stdout(io.StringIO()):  # the exporter lists its steps
        latency, inferencer = measure.openvino_latency(detector, images, root)
    verdicts = [(inferencer.predict(image).pred_label, predict(detector, image).pred_label) for image in images]
    same = sum(bool(exported) == bool(ours) for exported, ours in verdicts)
    return f"{latency:.0f} ms per image, with reading its file; {same} of {len(images)} verdicts as before the export"


def run(root: Path, steps: int = STEPS) -> None:
    """Make the data, fit, test, export, predict, and print the table."""
    console = Console()
    console.print(f"[bold]Making the data set[/bold] in {root / 'data'}")
    make_data(root / "data")
    table = Table(
        "texture",
        *(overview.BY_KEY[name].title for name in METRICS),
        "fit, s",
        title=f"CS-Flow on EfficientNet-Lite2, {SIZE} pixels",
    )
    pictures = []
    for name in TEXTURES:
        console.rule(f"[bold]{name}[/bold]: fit, test, draw")
        torch.manual_seed(0)
        processor = ConformalPostProcessor(0.05, num_folds=0)
        changes = {"image_size": SIZE, "crop_size": CROP, "max_steps": steps}
        detector = from_recipe("cs_flow_small", **changes, post_processor=processor)
        datamodule = folder(root / "data", name)
        seconds = measure.fit(
            detector,
            datamodule,
            root,
            thresholds=True,
            log_every_n_steps=1,
            enable_model_summary=False,
        )
        Engine(default_root_dir=root).test(detector, datamodule=datamodule, verbose=False)  # draws the test images
        found = accuracy.evaluate(measure.predict(detector, datamodule, root, enable_progress_bar=False))
        pictures.append(root / f"{name}.png")
        draw_pictures(name, root / "data", detector.eval(), pictures[-1])
        table.add_row(name, *(f"{found[name]:.3f}" for name in METRICS), f"{seconds:.0f}")
    console.rule(f"[bold]{name}[/bold]: export to OpenVINO, predict with it")  # one is enough to see: it takes seconds
    images = sorted((root / "data" / name / "test").rglob("*.png"))
    console.print(try_export(detector, images, root / "exported" / name))
    console.print(table)
    console.print("AUROC and AUPRO are at most 1.")
    console.print("Pictures:", *(str(path) for path in pictures), sep="\n  ")
    console.print(f"All test images: {root / 'CSFlow'}/*/latest/images")


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("demo"), help="where to write; default ./demo")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"steps of training; default {STEPS}")
    arguments = parser.parse_args()
    mpl.use("agg")
    warnings.simplefilter("ignore")  # from the libraries used; a first user cannot act on them
    logging.disable(logging.WARNING)
    run(arguments.folder, arguments.steps)


if __name__ == "__main__":
    main()
