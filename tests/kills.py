"""Kill processes at random instants, and look at what they leave; ``test_kills.py`` runs it.

``python kills.py SEED IMAGES FOLDER KIND=COUNT ...``. It forks before anything is computed, and all work is done in
forks: so a kill costs the time until it comes, and not that of an import. How late kills come follows from how long the
work takes where nothing is killed.
"""

import json
import os
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from anomalib.data import Folder
from anomalib.engine import Engine
from conftest import SMALL, folder_arguments, randomize
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from traced_once import trace_once

from anomalib_csflow import CSFlow, FeatureCache
from anomalib_csflow.engine.checkpoints import read_checkpoint
from anomalib_csflow.features.store import FeatureStore

warnings.simplefilter("ignore")
torch.set_num_threads(1)
seed, images, root = int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
folder = root  # of the kind at hand
instants = np.random.default_rng(seed)
OPTIONS: dict[str, Any] = {**SMALL, "image_size": 64, "post_processor": False, "visualizer": False}


def forked(work: Callable[[], Any], seconds: float | None = None) -> bool:
    """Do a work in a process of its own, and kill it after some seconds; return whether it was killed.

    Raises:
        SystemExit: if the work fails.
    """
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    if status not in {0, signal.SIGKILL}:
        sys.exit(f"{work.__name__} failed")
    return status == signal.SIGKILL


def timed(work: Callable[[], Any]) -> float:
    """Seconds of a work that is not killed."""
    start = time.perf_counter()
    forked(work)
    return time.perf_counter() - start


# -- fitting, with the cache and checkpoints -----------------------------------------------------------


def fit(cache: Path, *, epochs: int = 10**6, resumes: bool = True) -> None:
    """Go on from the last checkpoint, if there is one; a checkpoint after every step."""
    seed_everything(0, verbose=False)
    saving = ModelCheckpoint(folder / "saved", "model", every_n_train_steps=1, enable_version_counter=False)
    engine = Engine(
        accelerator="cpu",
        max_epochs=epochs,
        default_root_dir=folder,
        enable_progress_bar=False,
        logger=False,
        callbacks=[saving, FeatureCache(cache)],
    )
    path = folder / "saved/model.ckpt"
    data = Folder(**folder_arguments(images))
    engine.fit(CSFlow(**OPTIONS), datamodule=data, ckpt_path=path if resumes and path.is_file() else None)


def look_at_fit() -> None:
    """The checkpoint loads and is not older than the last; the features are those of a fit that was not killed."""
    for path in (folder / "saved").glob("*.ckpt"):
        CSFlow.load_from_checkpoint(path)
        step, last = read_checkpoint(path)["global_step"], folder / "saved/step"
        before = int(last.read_text()) if last.is_file() else 0
        if step < before:
            msg = f"the checkpoint of step {before} was replaced by one of step {step}"
            raise AssertionError(msg)
        last.write_text(str(step))
    for path in (folder / "cache").rglob("*.safetensors"):
        true = folder / "true" / path.relative_to(folder / "cache")
        pyramid, right = (features(file) for file in (path, true))
        for level, expected in zip(pyramid, right, strict=True):
            torch.testing.assert_close(level, expected, rtol=1e-4, atol=1e-4)
        with (folder / "seen").open("a") as file:
            file.write(f"{path.name}\n")


def features(path: Path) -> tuple[torch.Tensor, ...]:
    """What the store reads from one of its files."""
    store = FeatureStore(path.parents[2], {})
    store.folder = path.parents[1]
    found = store.get(path.stem)
    assert found is not None, path
    return found


def finish() -> None:
    """Go on for an epoch from what the kills have left, to the end."""
    path = folder / "saved/model.ckpt"
    fit(folder / "cache", epochs=read_checkpoint(path)["epoch"] + 2 if path.is_file() else 1)


def fits(count: int) -> None:
    """Kill fits, of which every third starts without the cache, and every fifth without a checkpoint."""
    whole = timed(lambda: fit(folder / "true", epochs=1, resumes=False))
    for turn in range(count):
        for name in [*(["cache"] if turn % 3 == 0 else []), *(["saved"] if turn % 5 == 0 else [])]:
            shutil.rmtree(folder / name, ignore_errors=True)
        forked(lambda: fit(folder / "cache"), instants.uniform(0.2, 1.2) * whole)
        forked(look_at_fit)
    forked(finish)
    forked(look_at_fit)


# -- checkpoints and exports over earlier ones ---------------------------------------------------------


def detector(number: int) -> CSFlow:
    """One of two detectors, which give other scores."""
    made = CSFlow(**OPTIONS)
    randomize(made.model.flow, seed=number, scale=0.05)
    return made.eval()


IMAGE = torch.linspace(0, 1, 3 * 64 * 64).reshape(1, 3, 64, 64)


def check_scores(score: float) -> None:
    """A score is that of one of the two detectors."""
    known = json.loads((folder / "known").read_text())
    if min(abs(score / one - 1) for one in known) > 1e-3:
        msg = f"an export gives {score}, which is neither of {known}"
        raise AssertionError(msg)
    with (folder / "seen").open("a") as file:
        file.write(f"{score}\n")


def write_scores() -> None:
    """Write what the two detectors score."""
    known = [float(detector(number)(IMAGE).pred_score) for number in (0, 1)]
    (folder / "known").write_text(json.dumps(known))


def save_checkpoints(turns: int = 10**9) -> None:
    """Write checkpoints of both, over and over."""
    engine = Engine(accelerator="cpu", default_root_dir=folder, logger=False)
    pair = [detector(number) for number in (0, 1)]
    engine._setup_trainer(pair[0])
    engine.trainer.strategy.connect(pair[0])
    pair[0].trainer = engine.trainer
    pair[0].check_read_checkpoints()
    states = [{name: value.clone() for name, value in one.model.flow.state_dict().items()} for one in pair]
    for turn in range(turns):
        pair[0].model.flow.load_state_dict(states[turn % 2])
        engine.trainer.save_checkpoint(folder / "model.ckpt")


def look_at_checkpoints() -> None:
    """There is one, whole."""
    for path in folder.glob("*.ckpt"):
        check_scores(float(CSFlow.load_from_checkpoint(path).eval()(IMAGE).pred_score))


def export_modules(turns: int = 10**9) -> None:
    """Write torch modules of both, over and over."""
    pair = [detector(number) for number in (0, 1)]
    for turn in range(turns):
        pair[turn % 2].to_torch(folder / "exported")


def export(turns: int = 10**9) -> None:
    """Write exports of both in all formats, over and over."""
    trace_once(folder / "traced", lambda model: str(model.number))
    pair = [detector(number) for number in (0, 1)]
    for turn in range(turns):
        made = pair[turn % 2]
        made.number = turn % 2
        for write in (made.to_torch, made.to_onnx, made.to_openvino):
            write(folder / "exported")


def look_at_exports() -> None:
    """Each is whole: the graph of a detector with its own weights."""
    import onnxruntime
    import openvino

    root = folder / "exported/weights"
    for path in root.glob("torch/*.pt"):
        check_scores(float(torch.load(path, weights_only=False)["model"](IMAGE).pred_score))
    for path in root.glob("openvino/*.xml"):
        model = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        check_scores(float(model(IMAGE.numpy())["pred_score"].squeeze()))
    for path in root.glob("onnx/*.onnx"):
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        check_scores(float(session.run(["pred_score"], {"input": IMAGE.numpy()})[0].squeeze()))


def overwrites(work: Callable[..., None], look: Callable[[], None], count: int, turns: int) -> None:
    """Kill what writes over what is there."""
    forked(write_scores)
    forked(lambda: work(2))  # which traces both
    setup, whole = timed(lambda: work(0)), timed(lambda: work(turns))
    for _ in range(count):
        forked(work, instants.uniform(setup, max(whole, 1.1 * setup)))
        forked(look)


KINDS: dict[str, Callable[[int], None]] = {
    "fit": fits,
    "checkpoint": lambda count: overwrites(save_checkpoints, look_at_checkpoints, count, 20),
    "torch": lambda count: overwrites(export_modules, look_at_exports, count, 20),
    "export": lambda count: overwrites(export, look_at_exports, count, 6),
}
for kind, _, number in (argument.partition("=") for argument in sys.argv[4:]):
    folder = root / kind
    folder.mkdir()
    KINDS[kind](int(number))
    seen = folder / "seen"
    found = len(seen.read_text().splitlines()) if seen.is_file() else 0
    sys.stdout.write(f"{kind}: {number} kills, {found} files looked at\n")
    sys.stdout.flush()
