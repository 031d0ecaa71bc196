"""The benchmark's configuration: entries for detectors and data sets, checked before any work starts."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import anomalib.data
import anomalib.models
import yaml

from anomalib_csflow.recipe_files import recipe_path

from .plan import DataSet, Detector, accepts, import_named

FOLDER = "anomalib.data.Folder"
LENGTHS = ("epochs", "steps")
"""Keys that set how long a detector trains."""


def _checked(values: Mapping[str, Any], kind: type, what: str) -> dict[str, Any]:
    """The entry of the configuration, if it only has known keys."""
    known = list(inspect.signature(kind).parameters)
    unknown = [key for key in values if key not in known]
    if unknown or "class_path" not in values:
        problem = f"has no key {unknown[0]!r}" if unknown else "needs a class_path"
        msg = f"benchmark: {what} {dict(values)} {problem}; keys are {', '.join(known)}"
        raise ValueError(msg)
    for name, value in values.items():
        word, is_one = FORMS[name]
        if not is_one(value):
            msg = f"benchmark: {name} of {what} must be {word}, got {value!r}"
            raise ValueError(msg)
    return dict(values)


def _is_mapping(value: object) -> bool:
    return isinstance(value, Mapping) and all(isinstance(key, str) for key in value)


def _is_count(value: object, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


FORMS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(("class_path", "name", "note", "error"), ("text", lambda value: isinstance(value, str))),
    **dict.fromkeys(LENGTHS, ("1 or more", lambda value: value is None or _is_count(value))),
    **dict.fromkeys(("train_batch_size", "eval_batch_size"), ("1 or more", _is_count)),
    "num_workers": ("0 or more", lambda value: _is_count(value, 0)),
    "init_args": ("a mapping of arguments", _is_mapping),
}
"""What the values of an entry must be, in words, by their keys."""


def _recipe(name: Path, base: Path) -> dict[str, Any]:
    """The entry that a recipe in anomalib's form stands for: a file, or a recipe of this package by its name."""
    path = next((path for path in (name, base / name) if path.is_file()), None)
    if path is None and (name.suffix or len(name.parts) > 1):
        msg = f"benchmark: no recipe {(base / name).absolute()}"
        raise FileNotFoundError(msg)
    path = path or recipe_path(str(name))
    try:
        recipe = yaml.safe_load(path.read_bytes())
    except yaml.YAMLError as error:
        msg = f"benchmark: {path} is not YAML ({' '.join(str(error).split())[:200]})"
        raise ValueError(msg) from error
    parts: list[Any] = (
        [recipe.get(name, {}) for name in ("model", "data", "trainer")] if _is_mapping(recipe) else [None]
    )
    if not all(map(_is_mapping, parts)) or not parts[0] or not _is_mapping(parts[1].get("init_args", {})):
        msg = f"benchmark: {path} is not a recipe with a model, as the files of this package's configs are"
        raise ValueError(msg)
    model, data, trainer = parts
    batches = data.get("init_args", {})
    sizes = {key: batches[key] for key in ("train_batch_size", "eval_batch_size", "num_workers") if key in batches}
    length = {name: trainer.get(f"max_{name}") for name in LENGTHS}
    return {**model, **{name: value for name, value in length.items() if value not in (None, -1)}, **sizes}


def read_detector(entry: Mapping[str, Any] | str, base: Path) -> Detector:
    """A detector of the configuration: a class path with arguments, or ``config``, a recipe, with changes to it.

    Args:
        entry: the entry of the configuration.
        base: the folder that relative paths of recipes refer to.

    Raises:
        ValueError: for an unknown class, key or argument.
        FileNotFoundError: if there is no such recipe.
    """
    values: dict[str, Any] = {"class_path": entry} if isinstance(entry, str) else dict(entry)
    if "config" in values:
        recipe = _recipe(Path(str(values.pop("config"))), base)
        if any(name in values for name in LENGTHS):  # one of them takes the place of whatever the recipe says
            recipe = {key: value for key, value in recipe.items() if key not in LENGTHS}
        wrong = [one for one in (recipe, values) if not _is_mapping(one.get("init_args", {}))]  # is refused below
        merged = {} if wrong else recipe.get("init_args", {}) | values.get("init_args", {})
        values = recipe | values | {"init_args": wrong[0]["init_args"] if wrong else merged}
    detector = Detector(**_checked(values, Detector, "a detector"))
    model = import_named(detector.class_path, anomalib.models, "detector")
    unknown = [key for key in detector.init_args if not accepts(model, key)]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(model).parameters.values())
    if unknown and not takes_any:
        known = ", ".join(inspect.signature(model).parameters)
        msg = f"{detector.class_path} has no argument {unknown[0]!r}; it has {known}"
        raise ValueError(msg)
    return Detector(**asdict(detector) | {"name": detector.name or detector.class_path.rpartition(".")[2]})


def folders(root: Path) -> list[DataSet]:
    """The data sets in MVTec AD's layout at a folder or in its subfolders; no test image is used in training.

    If there is none, the result is a single data set with an error that says so.
    """
    if (root / "train" / "good").is_dir():
        found = [root]
    else:
        found = sorted(path.parent.parent for path in root.glob("*/train/good"))
    if not found:
        msg = f"no data set in MVTec AD's layout (NAME/train/good, NAME/test/DEFECT) under {root.absolute()}"
        return [DataSet(FOLDER, name=root.absolute().name, error=msg)]
    return [_folder(path) for path in found]


def _folder(path: Path) -> DataSet:
    """The datamodule of one folder in MVTec AD's layout."""
    test = path / "test"
    kinds = sorted(folder.name for folder in test.iterdir() if folder.is_dir()) if test.is_dir() else []
    defects = [kind for kind in kinds if kind != "good"]
    if "good" not in kinds or not defects:
        msg = f"{test.absolute()} needs a folder good and one for each kind of defect: nothing can be measured without"
        return DataSet(FOLDER, name=path.name, error=msg)
    masks = [f"ground_truth/{kind}" for kind in defects]
    arguments: dict[str, Any] = {
        "name": path.name,
        "root": str(path.absolute()),
        "normal_dir": "train/good",
        "normal_test_dir": "test/good",
        "abnormal_dir": [f"test/{kind}" for kind in defects],
        "val_split_mode": "none",
    }
    if all((path / mask).is_dir() for mask in masks):
        arguments["mask_dir"] = masks
    return DataSet(FOLDER, arguments, path.name)


def read_data(entry: Mapping[str, Any] | str) -> list[DataSet]:
    """Data sets of a configuration entry: a folder, or the class path of a datamodule with arguments."""
    if isinstance(entry, str):
        return folders(Path(entry))
    data = DataSet(**_checked(entry, DataSet, "a data set"))
    import_named(data.class_path, anomalib.data, "datamodule")
    name = data.name or str(
        data.init_args.get("category") or data.init_args.get("name") or data.class_path.rpartition(".")[2]
    )
    return [DataSet(data.class_path, data.init_args, name)]
