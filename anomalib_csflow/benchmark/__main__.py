"""The table of the README: CS-Flow's small recipe beside anomalib's PatchCore, on real images.

``python -m anomalib_csflow.benchmark ROOT`` measures each data set under ROOT that is in MVTec AD's layout
(``train/good``, ``test/<kind>``, ``ground_truth/<kind>``): same weights, image size and images for both.
"""

import argparse
import os
import platform
import subprocess
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import yaml
from anomalib.data import Folder
from anomalib.models import Patchcore, get_model
from anomalib.models.components import AnomalibModule
from anomalib.pre_processing import PreProcessor
from rich.console import Console
from torchvision.transforms.v2 import Compose, Normalize, Resize

from anomalib_csflow import weights
from anomalib_csflow.benchmark import measure

CONFIG = Path("configs/cs_flow_small.yaml")
PATCHCORE_LAYER = "blocks.4"  # stride 16: with stride 8 too, the memory's selection takes hours on 761 images
PATCHCORE_RATIO = 0.01


def data_sets(root: Path) -> list[Path]:
    """Folders under root that hold a data set in MVTec AD's layout.

    Raises:
        FileNotFoundError: if there is none.
    """
    found = sorted(path.parent.parent for path in root.glob("*/train/good"))
    if not found:
        msg = f"no data set in MVTec AD's layout (NAME/train/good) under {root.absolute()}"
        raise FileNotFoundError(msg)
    return found


def datamodule(path: Path, **arguments: Any) -> Folder:
    """Anomalib's datamodule of one data set; nothing of the test set is used in training."""
    kinds = sorted(folder.name for folder in (path / "test").iterdir() if folder.name != "good")
    return Folder(
        name=path.name,
        root=path,
        normal_dir="train/good",
        normal_test_dir="test/good",
        abnormal_dir=[f"test/{kind}" for kind in kinds],
        mask_dir=[f"ground_truth/{kind}" for kind in kinds],
        val_split_mode="none",
        **arguments,
    )


def patchcore(model: dict[str, Any]) -> AnomalibModule:
    """Anomalib's PatchCore on the same backbone, weights and image size as the recipe's."""
    backbone, size = model["backbone"], model["image_size"]
    if model["weights"] == "package":
        weights.install(backbone)
    elif model["weights"] != "hub":
        msg = f"PatchCore cannot be given the recipe's weights {model['weights']!r}: only 'package' and 'hub' reach it"
        raise ValueError(msg)
    mean, std = weights.normalization(backbone)
    transform = Compose([Resize([size, size] if isinstance(size, int) else size, antialias=True), Normalize(mean, std)])
    return Patchcore(
        backbone, [PATCHCORE_LAYER], coreset_sampling_ratio=PATCHCORE_RATIO, pre_processor=PreProcessor(transform)
    )


def measure_one(name: str, path: Path, seed: int, recipe: dict[str, Any], root: Path) -> dict[str, Any]:
    """One row: a model on a data set with a seed."""
    torch.manual_seed(seed)
    arguments = {
        key: recipe["data"]["init_args"][key] for key in ("train_batch_size", "eval_batch_size", "num_workers")
    }
    data = datamodule(path, **arguments)
    trainer = {"accelerator": "cpu", "limit_val_batches": 0, "enable_model_summary": False}
    if name == "CSFlow":
        model = get_model(recipe["model"])
        trainer["max_epochs"] = recipe["trainer"]["max_epochs"]
    else:
        model = patchcore(recipe["model"]["init_args"])
    seconds = measure.fit(model, data, root, **trainer)
    return {"data": path.name, "model": name, "seed": seed, "fit, s": seconds} | measure.evaluate(model, data, root)


def summary(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Mean and standard deviation over the seeds."""
    frame = pd.DataFrame(rows).groupby(["data", "model"], sort=False)

    def cell(values: pd.Series) -> str:
        digits = 0 if values.name == "fit, s" else 3
        spread = f" +- {values.std():.{digits}f}" if len(values) > 1 else ""
        return f"{values.mean():.{digits}f}{spread}"

    columns = [*measure.METRICS.values(), "fit, s"]
    table = frame[columns].agg(cell)
    table.insert(0, "seeds", frame.size())
    return table.reset_index()


def machine() -> str:
    """What the figures were measured on."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("anomalib-csflow", "anomalib", "torch", "timm"))
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)  # noqa: S607
    where = f"{platform.machine()}, {os.cpu_count()} CPUs, {torch.get_num_threads()} threads"
    return f"{where}; {packages}; commit {commit.stdout.strip() or 'none'}"


def main() -> None:
    """Parse the command line, measure, write the rows as they come, print the table."""
    parser = argparse.ArgumentParser(prog="python -m anomalib_csflow.benchmark", description=__doc__)
    parser.add_argument("root", type=Path, help="folder of data sets")
    parser.add_argument("--only", nargs="+", help="names of data sets; default all")
    parser.add_argument("--models", nargs="+", default=["CSFlow", "Patchcore"], choices=["CSFlow", "Patchcore"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--config", type=Path, default=CONFIG, help=f"CS-Flow's recipe; default {CONFIG}")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/real_data"), help="where to write; default runs/real_data"
    )
    arguments = parser.parse_args()
    recipe = yaml.safe_load(arguments.config.read_text())
    paths = [path for path in data_sets(arguments.root) if not arguments.only or path.name in arguments.only]
    warnings.simplefilter("ignore")  # the libraries' own, which would bury the progress
    arguments.out.mkdir(parents=True, exist_ok=True)
    console = Console()
    rows: list[dict[str, Any]] = []
    for path in paths:
        for name in arguments.models:
            for seed in arguments.seeds:
                console.rule(f"{name} on {path.name}, seed {seed}")
                rows.append(measure_one(name, path, seed, recipe, arguments.out))
                console.print(rows[-1])
                pd.DataFrame(rows).to_csv(arguments.out / "rows.csv", index=False)
    table = summary(rows).to_markdown(index=False)
    (arguments.out / "table.md").write_text(f"{table}\n\n{machine()}\n")
    console.print(table, machine(), sep="\n\n", soft_wrap=True)


if __name__ == "__main__":
    main()
