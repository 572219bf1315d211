"""Finding a model again: by its MLflow address or its folder."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from blocks.errors import UserError
from cluster.places import places, shown
from cluster.store import open_client

if TYPE_CHECKING:
    from training.export import Predictor


def load_model(model: str) -> "Predictor":
    """The predictor of `models:/m-...` in the store of `places()`, or of the folder of an export.

    UserError when there is no such model.
    """
    from training.export import load_predictor

    return load_predictor(_downloaded(model) if model.startswith("models:/") else Path(model))


def _downloaded(uri: str) -> Path:
    # The store's own folder where it is local, else a copy of it.
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException
    from mlflow.models import Model

    tracking = places().tracking
    try:
        logged = open_client(tracking).get_logged_model(uri.removeprefix("models:/"))
        folder = download_artifacts(artifact_uri=logged.artifact_location, tracking_uri=tracking)
        data = Model.load(folder).flavors["python_function"]["data"]
    except (MlflowException, OSError, KeyError) as error:
        raise UserError(
            f"there is no model {uri!r} in MLflow's store {shown(tracking)}: {str(error).rstrip('.')}. Its address is printed "
            "when training ends; the store is that of the working folder, or MLFLOW_TRACKING_URI"
        ) from error
    inside = Path(folder, data).resolve()
    if not inside.is_relative_to(Path(folder).resolve()):
        raise UserError(f"the model {uri!r} points at {os.fspath(inside)!r}, outside its own folder")
    return inside
