"""The recipes: the YAML files of ``configs/``, which are installed as ``anomalib_csflow.recipes``."""

import difflib
from importlib import import_module, resources
from pathlib import Path
from typing import Any


def find_recipes() -> dict[str, Path]:
    """The recipes by name: those of a checkout, else those installed with the package."""
    folder = Path(__file__).parents[1] / "configs"
    if not (folder / "cs_flow.yaml").is_file():
        folder = Path(str(resources.files("anomalib_csflow.recipes")))
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


def recipe_path(name: str) -> Path:
    """The file of a recipe.

    Raises:
        FileNotFoundError: if there is no recipe of that name; lists similar names.
    """
    recipes = find_recipes()
    if name not in recipes:
        near = difflib.get_close_matches(name, recipes, n=3, cutoff=0.4) or list(recipes)
        msg = f"there is no recipe {name!r}; near names are {', '.join(near)}"
        raise FileNotFoundError(msg)
    return recipes[name]


def from_recipe(name: str, **changes: Any) -> Any:
    """A detector with the arguments of a recipe.

    Args:
        name: of the recipe, such as ``cs_flow_small``.
        **changes: arguments that replace those of the recipe, or that it does not have.

    Returns:
        The detector. Its ``max_steps``, if the recipe has them, say how long it trains.

    Raises:
        FileNotFoundError: if there is no recipe of that name; lists similar names.
        ValueError: if it is the benchmark's, which is of no detector.

    Example:
        >>> from_recipe("cs_flow_small", max_steps=100).hparams["max_steps"]
        100
    """
    import yaml  # noqa: PLC0415 (the paths of recipes are found without what takes seconds to import)

    model = yaml.safe_load(recipe_path(name).read_text()).get("model")
    if model is None:
        msg = f"the recipe {name!r} is of no detector"
        raise ValueError(msg)
    package, _, detector = model["class_path"].rpartition(".")
    return getattr(import_module(package), detector)(**model["init_args"] | changes)
