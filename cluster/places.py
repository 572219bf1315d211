"""Where things lie: prepared data, run folders, MLflow's store. Absolute addresses, so that they mean the same anywhere."""

import os
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from blocks.prepare import cache_folder


@dataclass(frozen=True)
class Places:
    """cache: prepared and example data. storage: a folder a run. tracking: MLflow's store or server."""

    cache: str
    storage: str
    tracking: str

    def environment(self) -> dict[str, str]:
        """The environment variables by which another process finds the same places."""
        return {"FASTRAY_CACHE": self.cache, "FASTRAY_STORAGE": self.storage, "MLFLOW_TRACKING_URI": self.tracking}


def places() -> Places:
    """From $FASTRAY_CACHE, $FASTRAY_STORAGE and $MLFLOW_TRACKING_URI; else ~/.cache/fastray, and ./runs and ./mlflow.db."""
    here = Path.cwd()
    return Places(
        cache=str(cache_folder()),
        storage=str(Path(os.environ.get("FASTRAY_STORAGE") or here / "runs").expanduser().absolute()),
        tracking=os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{here / 'mlflow.db'}",
    )


def is_local(address: str) -> bool:
    """Whether `address` (a path or a URL) lies on this machine's own disk."""
    return urlsplit(address).scheme in ("", "file", "sqlite")


def has_password(address: str) -> bool:
    """Whether a URL carries a password."""
    return urlsplit(address).password is not None


def sqlite_file(tracking: str) -> Path | None:
    """The file of MLflow's sqlite store, or None for another kind of store."""
    return Path(tracking.removeprefix("sqlite:///")).absolute() if tracking.startswith("sqlite:///") else None
