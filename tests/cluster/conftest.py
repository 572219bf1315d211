"""An MLflow store without its first two seconds, which go into making tables."""

import shutil
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sqlite file with MLflow's tables and no runs."""
    from cluster.store import open_client

    file = tmp_path_factory.mktemp("store") / "mlflow.db"
    open_client(f"sqlite:///{file}")
    return file


@pytest.fixture
def store(empty_store: Path, own_places: Path) -> str:
    """The address of an empty store in the working folder."""
    from cluster.places import places

    shutil.copy(empty_store, own_places / "mlflow.db")
    return places().tracking
