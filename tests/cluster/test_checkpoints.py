"""When a run's state is kept, and what of it: without Ray, in whose place a test takes what is reported."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from blocks import DataLoaders
from blocks.errors import UserError
from cluster import checkpoints
from cluster.checkpoints import SHARED, Checkpoints, SaveHere, file_of, mend_list, retried
from training import Callback, Learner

STORAGE = "memory://runs/a"  # Arrow alone does not know of it


def learner(*saves: Callback) -> Learner:
    torch.manual_seed(0)
    batches = [(torch.randn(4, 3), torch.randint(2, (4,))) for _ in range(3)]
    return Learner(DataLoaders(batches, batches), nn.Linear(3, 2), nn.CrossEntropyLoss(), callbacks=saves)


@pytest.fixture
def reported(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any], str | None]]:
    """Of each checkpoint: its name, its parts, and the folder that takes them as those of the best epoch so far."""
    import ray.train

    found: list[tuple[str, dict[str, Any], str | None]] = []

    def report(metrics: Any, *, checkpoint_dir_name: str, checkpoint_upload_fn: Any, **_: Any) -> None:
        parts, best, done = checkpoint_upload_fn.args
        found.append((checkpoint_dir_name, parts, best))
        done()

    monkeypatch.setattr(ray.train, "report", report)
    monkeypatch.setattr(checkpoints, "noticed", lambda: False)
    return found


def test_a_state_within_an_epoch_is_never_that_of_the_best_one(reported: Any) -> None:
    """Nor in a run that goes on there, which tells its earlier epochs again."""
    saves = Checkpoints(STORAGE, steps=1, minutes=None)
    learn = learner(saves)
    learn.fit(2)
    saves.save(learn, finished=True)
    at = {name: parts for name, parts, _ in reported}
    assert list(at) == [
        *(f"epoch-0000-batch-00000{batch}" for batch in (1, 2)),
        *(f"epoch-0001-batch-00000{batch}" for batch in (0, 1, 2)),
        "epoch-0002-batch-000000-end",
    ]
    assert reported[2][2] == STORAGE, "the first epoch is the best so far"
    assert all(name.endswith(("000000", "end")) for name, _, best in reported if best)

    parts = at["epoch-0001-batch-000001"]
    reported.clear()
    again = learner(Checkpoints(STORAGE, steps=1, minutes=None))
    again.load_state_dict(parts[SHARED] | parts[file_of(0)])
    again.resume()
    assert [(name, best) for name, _, best in reported] == [("epoch-0001-batch-000002", None)]


def test_what_one_of_the_ranks_wanted_is_wanted_by_those_that_go_on() -> None:
    saves = Checkpoints(STORAGE, None, None)
    nothing, wants = torch.zeros(3), torch.tensor([0.0, 1.0, 0.0])
    assert torch.equal(saves.merged([{"votes": nothing}, {"votes": wants}])["votes"], wants)
    assert saves.merged([{"votes": None}, {"votes": None}]) == {"votes": None}


class Keeps(Callback):
    """Has something for its state."""

    def __init__(self, kept: Any):
        self.kept = kept

    def state_dict(self) -> dict[str, Any]:
        return {"kept": self.kept}


def test_what_could_not_be_read_again_is_not_written(reported: Any, tmp_path: Path) -> None:
    saves, here = Checkpoints(STORAGE, None, None), SaveHere(str(tmp_path))
    learn = learner(saves, Keeps([np.float64(0.5), np.int64(3)]))
    saves.save(learn)
    torch.save(reported[0][1][file_of(0)], tmp_path / "own")
    assert torch.load(tmp_path / "own", weights_only=True)["callbacks"]["Keeps"] == {"kept": [0.5, 3]}
    here.save(learn)
    state = here.read()
    assert state is not None
    assert state["callbacks"]["Keeps"] == {"kept": [0.5, 3]}
    for kept in (np.zeros(2), Path("/a")):
        learn = learner(Keeps(kept))
        for one in (Checkpoints(STORAGE, None, None), here):
            with pytest.raises(UserError, match=f"the state of a callback .* has .*, a {type(kept).__name__}"):
                one.save(learn)


def test_a_list_of_checkpoints_that_was_cut_short_is_written_anew(tmp_path: Path) -> None:
    """Of those that are whole: the killed process may have left one of them in pieces as well."""
    from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import _CheckpointManagerState

    train = tmp_path / "train"
    for number in range(3):
        folder = train / f"epoch-{number:04d}-batch-000000"
        folder.mkdir(parents=True)
        torch.save({"world": 2}, folder / SHARED)
        for rank in range(2):
            torch.save({}, folder / file_of(rank))
    torn = folder / file_of(1)
    torn.write_bytes(torn.read_bytes()[:100])
    listed = train / "checkpoint_manager_snapshot.json"
    mend_list(str(tmp_path))
    assert not listed.exists()
    for content in (b"", b'{"ray_version": "2.6'):
        listed.write_bytes(content)
        mend_list(str(tmp_path))
        known = _CheckpointManagerState.model_validate_json(listed.read_bytes())
        assert [c.checkpoint_dir_name[:10] for c in known.checkpoint_results] == ["epoch-0000", "epoch-0001"]
        assert known.latest_checkpoint_result == known.checkpoint_results[-1]
    written = listed.read_bytes()
    mend_list(str(tmp_path))
    assert listed.read_bytes() == written


def test_storage_that_fails_for_a_moment_is_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "RETRY_SECONDS", (0.0, 0.0))
    left: list[OSError] = []

    def read() -> str:
        if left:
            raise left.pop()
        return "whole"

    left += [OSError("a"), OSError("b")]
    assert retried(read) == "whole"
    left += [OSError("a"), OSError("b"), OSError("c")]
    with pytest.raises(OSError, match="a"):
        retried(read)
    left += [FileNotFoundError("gone")]  # that does not pass
    with pytest.raises(FileNotFoundError):
        retried(read)
