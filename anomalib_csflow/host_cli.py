"""anomalib's own command line, with this package's detectors in it."""

import contextlib
import logging
import re
import shutil
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def anomalib(arguments: Sequence[str]) -> Any:
    """Run anomalib's command line, with this package's detectors and the seed that is asked for.

    Raises:
        ArgumentError: if the parser refuses an argument.
    """
    silence_warnings()
    import anomalib_csflow

    for name in anomalib_csflow.__all__:  # anomalib finds a short name among the classes that exist
        getattr(anomalib_csflow, name)
    from anomalib.cli.cli import AnomalibCLI
    from anomalib.loggers import configure_logger
    from lightning.pytorch import seed_everything
    from lightning.pytorch.utilities import rank_zero_only

    class CLI(AnomalibCLI):
        """anomalib's own, mended in four ways.

        Its parser raises an error for what it refuses. It sets the seed of ``seed_everything``, which anomalib reads
        but does not use. And only the first process of a fit makes a version folder: ``latest`` would otherwise lead
        to the empty folder of another process. After a fit without a checkpoint, ``latest`` is what it was.
        """

        @staticmethod
        def init_parser(**kwargs: Any) -> Any:
            parser = AnomalibCLI.init_parser(**kwargs)
            parser.exit_on_error = False
            return parser

        def before_instantiate_classes(self) -> None:
            super().before_instantiate_classes()
            options = self.config[self.subcommand]
            if self.subcommand == "fit" and getattr(rank_zero_only, "rank", 0):
                self.unused = tempfile.TemporaryDirectory()
                options["trainer"]["default_root_dir"] = self.unused.name
            seed = options.get("seed_everything")
            if isinstance(seed, int) and not isinstance(seed, bool):  # True asks for a random seed
                seed_everything(seed, workers=True)

        def _run_subcommand(self) -> None:
            try:
                super()._run_subcommand()
            except BaseException:
                if self.subcommand in {"fit", "train"}:
                    with contextlib.suppress(OSError):
                        forget(Path(self.engine._cache.args["default_root_dir"]))
                raise

    configure_logger()
    silence_logs()
    return CLI(arguments)


def forget(version: Path) -> None:
    """Lead ``latest`` away from a version folder without a checkpoint, to the last with one; remove it if it is empty.

    Where the system has no symbolic links, nothing changes.
    """
    latest = version.with_name("latest")
    is_ours = latest.is_symlink() and latest.resolve() == version.resolve()
    if not is_ours or not re.fullmatch(r"v\d+", version.name) or any(version.rglob("*.ckpt")):
        return
    others = [path for path in version.parent.glob("v*") if re.fullmatch(r"v\d+", path.name)]
    fitted = [path for path in others if any(path.rglob("*.ckpt"))]
    latest.unlink()
    if fitted:
        latest.symlink_to(max(fitted, key=lambda path: int(path.name[1:])), target_is_directory=True)
    if not any(path.is_file() for path in version.rglob("*")):
        shutil.rmtree(version, ignore_errors=True)


def silence_warnings() -> None:
    """Ignore warnings that a user cannot act on: deprecations inside libraries, and what is as it should be."""
    for category in (DeprecationWarning, FutureWarning):
        warnings.filterwarnings("ignore", category=category)
    for message in (
        ".*Found .* module.s. in eval mode at the start of training",  # the frozen backbone
        ".*No positive samples in targets",  # a folder of good images has no defects
        ".*The ``compute`` method of metric .* was called before the ``update`` method",  # and no masks
    ):
        warnings.filterwarnings("ignore", message=message)


def silence_logs() -> None:
    """Leave out Lightning's tips, the exporters' steps, and anomalib's second copy of every message."""
    from lightning_utilities.core import rank_zero

    rank_zero.log.addFilter(_is_no_tip)  # the logger of whichever of Lightning's packages was imported last
    for library in ("nncf", "onnx_ir", "onnxscript"):
        logging.getLogger(library).setLevel(logging.WARNING)
    root = logging.getLogger()
    root.handlers = [handler for handler in root.handlers if type(handler) is not logging.StreamHandler]


def _is_no_tip(record: logging.LogRecord) -> bool:
    return "Tip:" not in record.getMessage()
