"""Where things lie: prepared data, run folders, MLflow's store. Absolute addresses, so that they mean the same anywhere."""

import os
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from blocks.cache import cache_folder, cache_url


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
        cache=cache_url() or str(cache_folder()),
        storage=str(Path(os.environ.get("FASTRAY_STORAGE") or here / "runs").expanduser().absolute()),
        tracking=_absolute(os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"),
    )


def is_local(address: str) -> bool:
    """Whether `address` (a path or a URL) lies on this machine's own disk."""
    return urlsplit(address).scheme in ("", "file", "sqlite")


def has_secret(address: str) -> bool:
    """Whether a URL carries a user name, a password or a token."""
    return "@" in urlsplit(address).netloc


def shown(text: str, of: str | None = None) -> str:
    """An address, or a text that repeats the address `of`, without what it carries before the @."""
    userinfo = urlsplit(of or text).netloc.rpartition("@")[0]
    return text.replace(f"{userinfo}@", "***@") if userinfo else text


def _absolute(tracking: str) -> str:
    # Relative addresses mean another place in another process's folder.
    if tracking.startswith("sqlite:///"):
        return f"sqlite:///{Path(tracking.removeprefix('sqlite:///')).absolute()}"
    return tracking if urlsplit(tracking).scheme else str(Path(tracking).absolute())


def sqlite_file(tracking: str) -> Path | None:
    """The file of MLflow's sqlite store, or None for another kind of store."""
    return Path(tracking.removeprefix("sqlite:///")).absolute() if tracking.startswith("sqlite:///") else None
