"""Where the recipes are: the YAML files of ``configs/``, which are installed as ``anomalib_csflow.recipes``."""

import difflib
from importlib import resources
from pathlib import Path


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
