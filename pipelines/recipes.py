"""The recipes by name: ours, and `module:function` for a user's own."""

import importlib
import sys
from pathlib import Path

from training.recipe import RecipeFunction, SettingError, did_you_mean

RECIPES = {
    **dict.fromkeys(("digits", "fashion", "folder", "textures"), "pipelines.vision"),
    **dict.fromkeys(("segments", "points", "boxes"), "pipelines.shapes"),
    "digits_gan": "pipelines.gan",
    **dict.fromkeys(("penguins", "titanic", "credit", "ames", "diamonds", "table"), "pipelines.tabular"),
    **dict.fromkeys(("movies", "ratings"), "pipelines.collab"),
    **dict.fromkeys(("reviews", "ulmfit", "docs_lm", "texts"), "pipelines.text"),
    **dict.fromkeys(("temperature", "cities"), "pipelines.series"),
    "series": "pipelines.own_series",
}


def recipe_names() -> list[str]:
    """The names of the recipes that come with fastray."""
    return sorted(RECIPES)


def find_recipe(name: str) -> RecipeFunction:
    """The recipe function `name`; `module:function` finds one in the working folder. SettingError when there is none."""
    module_name, colon, function_name = name.rpartition(":")
    if not colon:
        if name not in RECIPES:
            raise SettingError(
                f"there is no recipe {name!r}{did_you_mean(name, RECIPES)} (a recipe of your own: module:function)"
            )
        module_name = RECIPES[name]
    elif str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as missing:
        if missing.name is None or not f"{module_name}.".startswith(f"{missing.name}."):
            raise  # the module is there, and itself needs one that is not
        raise SettingError(f"there is no module {module_name!r} in {Path.cwd()} or installed") from None
    found = getattr(module, function_name, None)
    if found is None or not hasattr(found, "__wrapped__"):
        raise SettingError(f"{module_name} has no recipe {function_name!r}: a function decorated with @training.recipe")
    return found
