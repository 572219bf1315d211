"""Models in MLflow: an export logged as the model of its run, and registered under a name on request."""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster.example import read_items
from cluster.sent import SentRun


def log_model(client: Any, experiment: str, run: SentRun, record: Mapping[str, Any], folder: Path) -> None:
    """Log the export of a spool's model record, and register it where the record says so. What was done before is not repeated.

    The pyfunc's folder holds data only; `cluster.scoring` is its loader.
    """
    # Step by step, because `mlflow.pyfunc.log_model` acts on the process's one tracking address and active run.
    if not run.model:
        run.model = str(client.create_logged_model(experiment, name="learner", source_run_id=run.id).model_id)
    logged = client.get_logged_model(run.model)
    if str(logged.status) != "READY":
        with tempfile.TemporaryDirectory() as scratch:
            _save(Path(scratch, "model"), logged, run, record, folder)
            client.log_model_artifacts(logged.model_id, str(Path(scratch, "model")))
        _log_output(client, run)
        client.finalize_logged_model(logged.model_id, "READY")
    if record.get("register"):
        _register(client, run, logged.artifact_location, record["register"], record.get("alias", ""))


def _save(to: Path, logged: Any, run: SentRun, record: Mapping[str, Any], folder: Path) -> None:
    import mlflow.pyfunc
    from mlflow.models import Model, ModelSignature
    from mlflow.types import Schema

    schemas = {part: Schema.from_json(json.dumps(record[part])) for part in ("inputs", "outputs")}
    mlflow.pyfunc.save_model(
        path=str(to),
        mlflow_model=Model(
            artifact_path=logged.artifact_location, run_id=run.id, model_id=logged.model_id, model_uuid=logged.model_id
        ),
        loader_module="cluster.scoring",
        data_path=str(folder / record["path"]),
        signature=ModelSignature(**schemas),
        input_example=read_items(folder / record["example"], {c["name"]: c["type"] == "binary" for c in record["inputs"]}),
        pip_requirements=["fastray"],
    )


def _log_output(client: Any, run: SentRun) -> None:
    from mlflow.entities import LoggedModelOutput

    client.log_outputs(run.id, [LoggedModelOutput(run.model, step=max(run.mark, 0))])


def _register(client: Any, run: SentRun, where: str, name: str, alias: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    there = [v for v in client.search_model_versions(f"name = '{name}'") if v.run_id == run.id and v.source == where]
    # By its place: an address such as models:/m-... is looked up in the process's one tracking store, whatever the client's is.
    version = there[0] if there else client.create_model_version(name, where, run.id, model_id=run.model)
    run.version = f"{name}/{version.version}"
    if alias:
        client.set_registered_model_alias(name, alias, version.version)
