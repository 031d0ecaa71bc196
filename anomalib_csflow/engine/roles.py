"""Which images a detector has seen, and for what: their scores say nothing of how it judges new ones."""

import hashlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from .images import image_files

Roles = dict[str, list[str]]
"""Digests of image files, by what was done with them: ``TRAINED`` or ``VALIDATED``."""

TRAINED, VALIDATED = "trained on", "validated or calibrated on"
DIGEST_BYTES = 12


class SeenImages(Callback):
    """Notes in a fit which images the detector sees, and says in a test or prediction which of its images these are.

    The detector has them as ``roles``, and so do its checkpoints. A fit without checkpoints notes nothing.
    """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the images to train and to validate on, beside those of earlier fits."""
        if trainer.checkpoint_callback is None or not trainer.is_global_zero:
            return
        data: Any = getattr(trainer, "datamodule", None)
        noted: Any = pl_module
        for role, name in ((TRAINED, "train_data"), (VALIDATED, "val_data")):
            now = digests(_files(getattr(data, name, None)))
            noted.roles = noted.roles | {role: sorted({*noted.roles.get(role, ()), *now})}

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say which images to test the detector has seen."""
        _say(trainer, pl_module, trainer.test_dataloaders)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say which images to predict the detector has seen."""
        _say(trainer, pl_module, trainer.predict_dataloaders)


def digests(files: Iterable[str | Path]) -> list[str]:
    """Digest of the content of each file, in hexadecimal; of copies of a file the same."""
    with ThreadPoolExecutor(max_workers=4) as pool:  # hashing releases the interpreter
        return [*pool.map(_digest, files)]


def met(files: Iterable[str | Path], roles: Mapping[str, Iterable[str]]) -> str | None:
    """Say which images a detector has seen before.

    Args:
        files: to test or to predict.
        roles: of the detector's checkpoint.

    Returns:
        One sentence; None if it has seen none of them.
    """
    paths = [*files]
    if not any(roles.values()):
        return None
    found = digests(paths)
    seen = {
        role: [path for path, digest in zip(paths, found, strict=True) if digest in known]
        for role, known in ((role, {*known}) for role, known in roles.items())
    }
    parts = [
        f"{len(those)} {'was' if len(those) == 1 else 'were'} {role} (such as {those[0]})"
        for role, those in seen.items()
        if those
    ]
    if not parts:
        return None
    return (
        f"Of these {len(paths)} images, {' and '.join(parts)}: their scores say little about how the detector judges "
        "new images."
    )


def _say(trainer: Trainer, detector: Any, loaders: Any) -> None:
    if trainer.is_global_zero:
        loaders = loaders if isinstance(loaders, list) else [loaders]
        sentence = met(
            [file for loader in loaders for file in _files(getattr(loader, "dataset", None))], detector.roles
        )
        if sentence:
            rank_zero_info(sentence)


def _files(dataset: Any) -> list[str]:
    """Image files of an anomalib data set that exist: a missing one is named by the check of images."""
    return [file for file in image_files(dataset) if Path(file).is_file()]


def _digest(file: str | Path) -> str:
    return hashlib.blake2b(Path(file).read_bytes(), digest_size=DIGEST_BYTES).hexdigest()
