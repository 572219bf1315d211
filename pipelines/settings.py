"""What the settings of several recipes have in common."""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from training.recipe import SettingError

BatchSize = Annotated[int, Field(ge=2)]  # BatchNorm, which most of the models have, needs two rows


def given_path(recipe: str, path: str, what: str) -> Path:
    """The path that a recipe on the person's own data was given. SettingError without one. what: it has to be."""
    if not path:
        raise SettingError(f"{recipe} needs path=..., {what}")
    return Path(path).expanduser()
