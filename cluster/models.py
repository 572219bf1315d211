"""Finding a model again: by its MLflow address or its folder."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blocks.errors import UserError
from cluster.places import places, shown
from cluster.store import open_client

if TYPE_CHECKING:
    from training.export import Predictor


def load_model(model: str, trust: Sequence[str] = ()) -> "Predictor":
    """The predictor of a model in the store of `places()`, or of the folder of an export.

    model: `models:/m-...`, `models:/NAME@ALIAS`, `models:/NAME/VERSION` or a folder. trust: as `load_predictor` takes it.
    UserError when there is no such model.
    """
    from training.export import load_predictor

    return load_predictor(_downloaded(model) if model.startswith("models:/") else Path(model), trust)


def _downloaded(uri: str) -> Path:
    # The store's own folder where it is local, else a copy of it.
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException
    from mlflow.models import Model

    tracking = places().tracking
    try:
        place = _place(open_client(tracking), uri.removeprefix("models:/"))
        folder = download_artifacts(artifact_uri=place, tracking_uri=tracking)
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


def _place(client: Any, address: str) -> str:
    # Of m-..., NAME@ALIAS or NAME/VERSION.
    name, at, alias = address.partition("@")
    if at:
        found = client.get_model_version_by_alias(name, alias)
        return str(client.get_model_version_download_uri(name, found.version))
    name, slash, version = address.rpartition("/")
    if slash:
        return str(client.get_model_version_download_uri(name, version))
    return str(client.get_logged_model(address).artifact_location)
