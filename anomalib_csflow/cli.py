"""``anomalib-csflow``: anomalib's own command line with this package's detectors in it.

Short names (``--model CSFlow``) and ``benchmark`` work here, because the detectors have been imported. ``test``,
``predict`` and ``export`` need no ``--model`` beside ``--ckpt_path``. ``COMMANDS`` are this package's own.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from .host_cli import anomalib, silence_logs, silence_warnings
from .recipe_files import find_recipes, recipe_path
from .user_errors import DEBUG, sentence


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; without arguments, those of the process.

    An error that the user can do something about ends it with that sentence, others with their traceback.
    """
    try:
        run(list(sys.argv[1:] if arguments is None else arguments))
    except Exception as error:
        said = None if os.environ.get(DEBUG) else sentence(error)
        if said is None:
            raise
        if isinstance(error, argparse.ArgumentError):
            print(said, file=sys.stderr)
            sys.exit(2)
        sys.exit(said)


def run(arguments: list[str]) -> None:
    """Run a command."""
    command, rest = (arguments[0], arguments[1:]) if arguments else ("", [])
    if command == "validate" and (not rest or rest[0].startswith("-")):
        command = ""  # anomalib's own, which takes no bundle
    if command in COMMANDS:
        COMMANDS[command][0](rest)
        return
    if command in {"-h", "--help"}:
        print("Commands of anomalib-csflow:")
        for name, (_, what) in COMMANDS.items():
            print(f"  {name:17}{what}")
        print("All others are anomalib's:")
    with from_checkpoint(arguments) as complete:
        anomalib(complete)


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
        print(recipe_path(names[0]))


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
    from anomalib_csflow.engine.checkpoints import model_of

    silence_logs()
    cls = getattr(anomalib_csflow, model_of(old)["class_path"].rpartition(".")[2])
    made = recalibration.recalibrate(cls, old, given.good, new, given.rate, given.promise)
    print(f"{made}\nThe new thresholds are in {new}; {old} is as it was.")


def bundle(arguments: Sequence[str]) -> None:
    """Make a bundle of a checkpoint."""
    from anomalib_csflow.runtime.bundle import FORMATS

    parser = argparse.ArgumentParser(prog="anomalib-csflow bundle", description="Make a bundle for the line.")
    parser.add_argument("--ckpt_path", type=Path, required=True, help="the .ckpt file of a fit")
    parser.add_argument("--out", type=Path, required=True, help="a new folder, or a .zip file")
    parser.add_argument("--reference", type=Path, help="good images: a few go into the bundle; for int8, all")
    parser.add_argument("--formats", nargs="+", default=["openvino"], choices=FORMATS)
    parsed = parser.parse_args(arguments)
    silence_warnings()
    from anomalib_csflow import bundling
    from anomalib_csflow.runtime import Bundle

    silence_logs()
    made = bundling.bundle(parsed.ckpt_path, parsed.out, parsed.reference, parsed.formats)
    for note in Bundle(made).manifest["notes"]:
        print(note)
    print(f"{made}: check it with anomalib-csflow validate {made}")


def fit_all(arguments: Sequence[str]) -> None:
    """Fit a recipe to each part."""
    from anomalib_csflow.fit_all import main

    main(arguments)


def runtime(command: str, arguments: Sequence[str]) -> None:
    """Run a command of what runs on the line."""
    from anomalib_csflow.runtime.__main__ import main

    main([command, *arguments], "anomalib-csflow")


COMMANDS: dict[str, tuple[Callable[[Sequence[str]], None], str]] = {
    "recipe": (recipe, "lists the recipes, or prints the path of one"),
    "install-weights": (install_weights, "puts weights of installed packages where timm looks for them"),
    "fit-all": (fit_all, "fits a recipe to each part in a folder"),
    "calibrate": (calibrate, "sets a checkpoint's thresholds from new good images"),
    "bundle": (bundle, "makes of a checkpoint what a production line needs"),
    "validate": (partial(runtime, "validate"), "compares the runtimes of a BUNDLE with the detector"),
    "watch": (partial(runtime, "watch"), "judges the images that arrive in a folder with a BUNDLE"),
}
"""This package's own: what runs each, and what it does."""


@contextmanager
def from_checkpoint(arguments: list[str]) -> Iterator[list[str]]:
    """The arguments, with the model of the checkpoint if they name a checkpoint and no model."""
    options = [argument.partition("=") for argument in arguments]
    names = [name for name, _, _ in options]
    is_complete = "--ckpt_path" not in names or {"-c", "--config", "--model", "-h", "--help"} & {*names}
    if is_complete or arguments[0] not in {"test", "validate", "predict", "export"}:
        yield arguments
        return
    position = names.index("--ckpt_path")
    path = options[position][2] or next(iter(arguments[position + 1 :]), "")
    silence_warnings()
    from anomalib_csflow.engine.checkpoints import model_of

    model = model_of(path)
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "model.yaml"
        config.write_text(json.dumps({"model": model}))  # which is YAML too
        yield [arguments[0], "--config", str(config), *arguments[1:]]


if __name__ == "__main__":
    main()
