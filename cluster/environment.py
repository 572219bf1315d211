"""Where and with what a run was made: the tags by which its result can be traced to a commit and versions."""

import json
import os
import platform
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from blocks.storage import shown

GIT_SECONDS = 3.0  # a working folder on a slow disk must not keep the training waiting
VERSIONS = ("fastray", "torch", "torchvision", "ray", "mlflow", "pyarrow", "numpy")


def environment() -> dict[str, str]:
    """Tags: the git commit of the working folder and whether files differ from it, the command, versions, Ray's job."""
    found = {
        "mlflow.source.name": " ".join(shlex.quote(shown(word)) for word in [Path(sys.argv[0]).name, *sys.argv[1:]]),
        "mlflow.source.type": "JOB" if _submission() else "LOCAL",
        "fastray.versions": ", ".join(
            [f"python {platform.python_version()}", *(f"{name} {version(name)}" for name in VERSIONS)]
        ),
        "fastray.host": platform.node(),
        "fastray.ray_job": _ray_job(),
        "fastray.submission": _submission(),
    }
    commit = _git("rev-parse", "HEAD")
    if commit:
        changed = _git("status", "--porcelain", "--untracked-files=no")
        found |= {
            "mlflow.source.git.commit": commit,
            "mlflow.source.git.branch": _git("rev-parse", "--abbrev-ref", "HEAD") or "",
        }
        found["fastray.git.dirty"] = "unknown" if changed is None else str(bool(changed)).lower()
    return {name: value for name, value in found.items() if value}


def _git(*words: str) -> str | None:
    try:
        done = subprocess.run(["git", *words], capture_output=True, text=True, check=True, timeout=GIT_SECONDS)
    except (OSError, subprocess.SubprocessError):  # no git, or no repository
        return None
    return done.stdout.strip()


def _ray_job() -> str:
    if "ray" not in sys.modules:
        return ""
    import ray

    return str(ray.get_runtime_context().get_job_id()) if ray.is_initialized() else ""


def _submission() -> str:
    # Ray tells it to the process of a submitted job.
    config = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}")
    return str(config.get("metadata", {}).get("job_submission_id", ""))
