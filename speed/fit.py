"""A fit of CS-Flow's small recipe: processor seconds with the backbone in OpenVINO and in torch, beside PatchCore.

Without thresholds, which PatchCore does not take from good images. PatchCore has stride 16, at most 10,000 vectors, and
the benchmark's image size.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openvino
import torch
from anomalib.data import Folder
from anomalib.engine import Engine
from anomalib.models import get_model
from anomalib.models.components import AnomalibModule
from lightning.pytorch import seed_everything
from side_by_side import alternating, begin, parser, row, write
from training import CONFIGS, THEIR_SIZE, images

from anomalib_csflow import FeatureCache
from anomalib_csflow.benchmark.run import config
from anomalib_csflow.benchmark.run.baselines import patchcore
from anomalib_csflow.engine import compiled

TINY = {"backbone": "tf_efficientnet_lite0", "image_size": 128, "hidden_channels": 8, "max_steps": 2}
COUNT = 400  # images, where no data set is given
FEW = 16  # images in a batch for the backbone alone


@contextmanager
def openvino_from(least: int) -> Iterator[None]:
    """Let OpenVINO compute the features of so many images or more."""
    before = compiled.LEAST_IMAGES
    compiled.LEAST_IMAGES = least
    try:
        yield
    finally:
        compiled.LEAST_IMAGES = before


def fit_seconds(model: AnomalibModule, data: Folder) -> float:
    """Processor seconds of a fit, with nothing in the cache."""
    seed_everything(0, verbose=False)
    with tempfile.TemporaryDirectory() as folder:
        engine = Engine(
            default_root_dir=folder,
            accelerator="cpu",
            limit_val_batches=0,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[FeatureCache(Path(folder) / "cache")],
        )
        start = time.process_time()
        engine.fit(model, datamodule=data)
        return time.process_time() - start


def at_once(features: Any, batch: torch.Tensor) -> Callable[[], Any]:
    """The backbone in OpenVINO, for the whole batch at once."""
    model = openvino.convert_model(features, example_input=batch, input=list(batch.shape))
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    loaded = openvino.Core().compile_model(model, "CPU", settings)
    return lambda: loaded(batch.numpy(), share_inputs=True)


def main() -> None:
    """Measure the backbone alone, then whole fits."""
    options = parser(__doc__)
    options.add_argument("--data", type=Path, help="a data set in MVTec AD's layout; else images of noise")
    arguments = options.parse_args()
    begin(arguments)
    detector = config.read_detector({"config": "cs_flow_small.yaml"}, CONFIGS)
    batch_size = detector.train_batch_size
    recipe = detector.init_args
    recipe |= (TINY if arguments.quick else {}) | {"post_processor": False}
    size = recipe["image_size"]

    def ours() -> AnomalibModule:
        return get_model({"class_path": "anomalib_csflow.CSFlow", "init_args": recipe})

    features: Any = ours().model.features
    in_openvino, batch = compiled.CompiledFeatures(features), torch.rand(FEW, 3, size, size)
    with torch.inference_mode():
        ways = {
            "openvino": lambda: in_openvino(batch),
            "openvino at once": at_once(features, batch),
            "torch": lambda: features.few_at_once(batch),
            "all at once": lambda: features(batch),
        }
        ms = {name: 1e3 * seconds / FEW for name, seconds in alternating(ways, arguments.repeats).items()}
    rows: list[dict[str, Any]] = [row("backbone per image: OpenVINO, torch", ms["openvino"], ms["torch"], None)]
    rows.append(row(f"the same in OpenVINO: one by one, {FEW} at once", ms["openvino"], ms["openvino at once"], None))
    rows.append(row(f"the same in torch: few at once, {FEW} at once", ms["torch"], ms["all at once"], None))
    with tempfile.TemporaryDirectory() as folder:
        if arguments.data:
            (data_set,) = config.folders(arguments.data)
            data = Folder(**data_set.init_args, train_batch_size=batch_size, eval_batch_size=batch_size, num_workers=0)
        else:
            root = images(Path(folder), 4 if arguments.quick else COUNT, size)
            split: dict[str, Any] = {"val_split_mode": "none", "test_split_mode": "none"}
            data = Folder(
                name="noise", root=root, normal_dir="good", train_batch_size=batch_size, num_workers=0, **split
            )
        data.setup()
        what = f"fit on {len(data.train_data)} images"
        with openvino_from(1):
            fast = fit_seconds(ours(), data)
        with openvino_from(10**9):
            slow = fit_seconds(ours(), data)
        their_size = min(size, THEIR_SIZE)
        rival = patchcore(recipe["backbone"], recipe["weights"], their_size, layers=["blocks.4"], max_vectors=10_000)
        theirs = fit_seconds(rival, data)
    rows.append(row(f"{what}, processor: with OpenVINO, without", fast, slow, None, "s"))
    rows.append(row(f"{what}, processor: ours, PatchCore", fast, theirs, None, "s"))
    write("fit", rows, arguments)


if __name__ == "__main__":
    main()
