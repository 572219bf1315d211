"""A run's folder, and `run.json` in it: what began there, in words that any process can begin it from again.

The folder holds no address outside of itself, so that a copy of it elsewhere is the same run. Plain JSON: a recipe by its
name, its settings as the command line takes them.
"""

import contextlib
import difflib
import fcntl
import json
import os
import re
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from blocks.errors import UserError
from blocks.storage import folders, get, is_url, joined, put, shown
from cluster.spool import read
from training.schedule import as_words

RUN_FILE = "run.json"
VERSION = 1
KINDS = ("train", "sweep")
UNUSUAL = re.compile(r"[^\w.-]")  # in a name: a run's folder lies directly in the storage
RESTARTS = "fastray.restarts"  # the tag of how often a run went on after a break


class RunError(UserError):
    """A run that is not there, or cannot be gone on with."""


@dataclass(frozen=True)
class Run:
    """What began in a run's folder.

    kind: "train" or "sweep". recipe: the name by which `pipelines.recipes.find_recipe` finds it; None for a script's own fit.
    words: each setting as text, as on the command line. runner: the runner's own settings, such as {"workers": 2}.
    data: its data's fingerprint, where that has one. finished: it ended, and nothing is left to go on with.
    """

    kind: str
    recipe: str | None
    words: Mapping[str, str] = field(default_factory=dict)
    runner: Mapping[str, Any] = field(default_factory=dict)
    data: str | None = None
    finished: bool = False
    version: int = VERSION


def words_of(settings: Mapping[str, Any]) -> dict[str, str]:
    """Settings as the command line takes them."""
    return {name: as_words(value) for name, value in settings.items()}


def new_run_folder(storage: str, name: str) -> str:
    """The folder, or the URL, of a new run in `storage`: by name and time, never used before; made when the run begins."""
    name = f"{UNUSUAL.sub('_', name)}-{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:4]}"
    return _inside(storage, name)


def run_name(folder: str | Path) -> str:
    """The name of the run in a folder or at a URL."""
    return str(folder).partition("?")[0].rstrip("/").rpartition("/")[2]


def write_run(folder: str | Path, run: Run) -> None:
    """Write `run.json` in a folder, which is made, or at a URL."""
    if not is_url(str(folder)):
        Path(folder).mkdir(parents=True, exist_ok=True)
    put(folder, RUN_FILE, json.dumps(asdict(run), indent=1).encode())


def read_run(folder: str | Path) -> Run:
    """What began in a folder or at a URL. RunError when that is no run's folder, or another version's."""
    found = _run_in(folder)
    if found is None:
        raise RunError(f"{shown(str(folder))} is not a run's folder: there is no {RUN_FILE} in it")
    return found


def _run_in(folder: str | Path) -> Run | None:
    where = f"{RUN_FILE} in {shown(str(folder))}"
    try:
        said = json.loads(get(folder, RUN_FILE))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise RunError(f"{where} is damaged: {error}") from error
    if not isinstance(said, dict) or said.get("version") != VERSION or said.get("kind") not in KINDS:
        raise RunError(f"{where} is not one that this version of fastray reads: it has to be of version {VERSION}")
    return Run(**{f.name: said[f.name] for f in fields(Run) if f.name in said})


def restarts_of(spool: Path) -> int:
    """How often the run of a spool went on after a break."""
    told = [record["value"] for record, _ in read(spool) if record["kind"] == "tag" and record["key"] == RESTARTS]
    return int(told[-1]) if told else 0


def check_data(folder: str | Path, begun: Run, found: str | None) -> None:
    """RunError when the run in a folder was begun with data of another fingerprint than `found`."""
    if found != begun.data:
        raise RunError(
            f"the run {run_name(folder)} was begun with other data (fingerprint {begun.data}, now {found}): go on with "
            "the files, the transforms and the versions of then, or begin a new run"
        )


@contextlib.contextmanager
def driven(folder: str) -> Iterator[None]:
    """This process drives the run in a folder. RunError when another one does; at a URL, nobody can know."""
    if is_url(folder):
        yield
        return
    opened = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)  # dies with the process
        except BlockingIOError:
            raise RunError(f"the run {run_name(folder)} is going on in another process: wait for its end, or end it") from None
        except OSError:  # a disk without locks
            pass
        yield
    finally:
        os.close(opened)


def finish_run(folder: str | Path) -> None:
    """Note that the run in a folder, or at a URL, has ended."""
    write_run(folder, replace(read_run(folder), finished=True))


def find_run(name: str, storage: str) -> tuple[str, Run]:
    """The folder and the words of an unfinished run: by its folder, its URL, or its name in `storage`.

    RunError when there is none, with those there are, or when it has ended.
    """
    for folder in (name, _inside(storage, name)):
        run = _run_in(folder)
        if run is None:
            continue
        if run.finished:
            raise RunError(f"the run {run_name(folder)} has ended, there is nothing left to go on with: begin a new one")
        return (folder if is_url(folder) else str(Path(folder).absolute())), run
    raise RunError(f"there is no run {shown(name)!r} in {shown(storage)}{_those_in(storage, name)}")


def _those_in(storage: str, name: str) -> str:
    names = folders(storage) if is_url(storage) else [p.name for p in Path(storage).glob("*")]
    runs = {name: run for name in sorted(names) if (run := _run_in(_inside(storage, name))) is not None}
    unfinished = [name for name, run in runs.items() if not run.finished]
    near = difflib.get_close_matches(name, unfinished, n=1, cutoff=0.8)
    if near:
        return f": did you mean {near[0]!r}?"
    return f"; unfinished there: {', '.join(unfinished[-10:])}" if unfinished else ", and none that is unfinished"


def _inside(storage: str, name: str) -> str:
    return joined(storage, name) if is_url(storage) else str(Path(storage, name).expanduser().absolute())
