"""A run's folder says what began there: written, found by folder or name, refused when ended or not there."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from blocks import DataLoaders
from blocks.errors import UserError
from cluster import Workers
from cluster.runs import (
    RUN_FILE,
    Run,
    RunError,
    driven,
    find_run,
    finish_run,
    new_run_folder,
    read_run,
    run_name,
    words_of,
    write_run,
)
from training import Learner, fine_tune, flat


def learner() -> Learner:
    """A Learner on two batches from a list."""
    batches = [(torch.randn(4, 3), torch.randint(2, (4,)))] * 2
    return Learner(DataLoaders(batches, batches), nn.Linear(3, 2), nn.CrossEntropyLoss(), lr=0.1)


BEGUN = Run("train", "pipelines.vision:digits", {"lr": "0.001", "schedule": "one_cycle(5)"}, {"workers": 2})


@pytest.fixture(params=["folder", "url"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A storage place: a folder, or a URL."""
    return str(tmp_path / "runs") if request.param == "folder" else f"memory://{tmp_path.name}/runs"


def test_what_is_written_is_read(storage: str) -> None:
    folder = new_run_folder(storage, "digits")
    write_run(folder, BEGUN)
    assert read_run(folder) == BEGUN
    assert run_name(folder).startswith("digits-")


def test_new_runs_have_names_of_their_own(storage: str) -> None:
    assert new_run_folder(storage, "digits") != new_run_folder(storage, "digits")


def test_a_run_lies_directly_in_the_storage_whatever_its_name(tmp_path: Path) -> None:
    """As MLflow's experiments are called: it is looked for there, by the next command too."""
    for name in ("team/pets", "/Users/me/pets", "it's", "../pets"):
        folder = Path(new_run_folder(str(tmp_path), name))
        assert folder.parent == tmp_path
        assert "'" not in folder.name


def test_a_run_is_found_by_its_folder_and_by_its_name(storage: str) -> None:
    folder = new_run_folder(storage, "digits")
    write_run(folder, BEGUN)
    assert find_run(run_name(folder), storage) == (folder, BEGUN)
    assert find_run(folder, "/nowhere") == (folder, BEGUN)


def test_a_run_folder_is_the_same_run_elsewhere(tmp_path: Path) -> None:
    folder = new_run_folder(str(tmp_path / "runs"), "digits")
    write_run(folder, BEGUN)
    shutil.move(folder, tmp_path / "moved")
    assert find_run("moved", str(tmp_path)) == (str(tmp_path / "moved"), BEGUN)
    assert str(tmp_path) not in Path(tmp_path, "moved", RUN_FILE).read_text()


def test_an_ended_run_is_not_gone_on_with(storage: str) -> None:
    folder = new_run_folder(storage, "digits")
    write_run(folder, BEGUN)
    finish_run(folder)
    with pytest.raises(RunError, match=rf"the run {run_name(folder)} has ended"):
        find_run(run_name(folder), storage)


def test_what_there_is_is_said_for_a_run_that_is_not_there(storage: str) -> None:
    with pytest.raises(RunError, match=r"there is no run 'digits-1' in .*, and none that is unfinished"):
        find_run("digits-1", storage)
    names = []
    for name in ("digits", "pets", "ended"):
        folder = new_run_folder(storage, name)
        write_run(folder, BEGUN)
        names.append(run_name(folder))
    finish_run(folder)
    with pytest.raises(RunError, match=f"unfinished there: {names[0]}, {names[1]}$"):
        find_run("birds", storage)
    with pytest.raises(RunError, match=f"did you mean '{names[1]}'"):
        find_run(names[1][:-1], storage)


def test_the_keys_of_a_url_are_not_told() -> None:
    with pytest.raises(RunError, match=r"there is no run 'memory://\*\*\*@runs/a' in memory://\*\*\*@runs,") as raised:
        find_run("memory://me:secret@runs/a", "memory://me:secret@runs")
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize(
    ("began", "goes_on", "there"), [(2, 0, "on workers"), ([1, 8], 0, "on workers"), (0, 2, "in this process")]
)
def test_a_run_does_not_begin_again_where_its_checkpoints_are_not(tmp_path: Path, began: Any, goes_on: int, there: str) -> None:
    schedule, learn = flat(2), learner()
    words = {"schedule": schedule, "lr": 0.1, "batch_size": None}
    write_run(tmp_path / "a", Run("train", None, words_of(words), {"workers": began}))
    with pytest.raises(UserError, match=f"'a' was begun {there}"):
        Workers(goes_on, storage=str(tmp_path)).run(learn, schedule, 0.1, "a")


def test_a_run_goes_on_with_the_batches_and_the_data_it_was_begun_with(tmp_path: Path) -> None:
    schedule, learn = flat(2), learner()
    words = words_of({"schedule": schedule, "lr": 0.1, "batch_size": 16})
    write_run(tmp_path / "a", Run("train", None, words, {"workers": 0}))
    write_run(tmp_path / "b", Run("train", None, words | {"batch_size": "None"}, {"workers": 0}, data="abc"))
    here = Workers(0, storage=str(tmp_path))
    with pytest.raises(UserError, match=r"was begun with .* batch_size=16: give it the same, not .* batch_size=None"):
        here.run(learn, schedule, 0.1, "a")
    with pytest.raises(RunError, match=r"the run b was begun with other data \(fingerprint abc, now None\)"):
        here.run(learn, schedule, 0.1, "b")


def test_a_run_is_driven_by_one_process(tmp_path: Path) -> None:
    write_run(
        tmp_path / "a", Run("train", None, words_of({"schedule": flat(1), "lr": 0.1, "batch_size": None}), {"workers": 0})
    )
    here = Workers(0, storage=str(tmp_path))
    with driven(str(tmp_path / "a")), pytest.raises(RunError, match="the run a is going on in another process"):
        here.run(learner(), flat(1), 0.1, "a")
    here.run(learner(), flat(1), 0.1, "a")
    assert read_run(tmp_path / "a").finished


def test_what_is_no_run_of_this_version_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"is not a run's folder: there is no run.json"):
        read_run(tmp_path)
    file = tmp_path / RUN_FILE
    file.write_text("{")
    with pytest.raises(RunError, match="is damaged"):
        read_run(tmp_path)
    for other in ([], {"version": 2, "kind": "train"}, {"version": 1, "kind": "play"}):
        file.write_text(json.dumps(other))
        with pytest.raises(RunError, match="is not one that this version of fastray reads"):
            find_run(str(tmp_path), "/nowhere")


def test_settings_become_words_of_the_command_line() -> None:
    assert words_of({"lr": 1e-3, "schedule": fine_tune(2), "arch": "resnet18"}) == {
        "lr": "0.001",
        "schedule": "fine_tune(2, freeze_epochs=1)",
        "arch": "resnet18",
    }
