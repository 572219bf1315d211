"""What cannot be had, and what goes wrong on a worker, is said soon, once, and as itself."""

import os
import pickle
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import ray.cloudpickle
import torch
from torch import Tensor, nn

from blocks import DataBlock
from cluster import Workers, dataloaders, runtime
from cluster.failures import ERRORS, WorkersLost, as_bytes
from cluster.runtime import ResourceError
from pipelines import cli
from training import Callback, Learner, accuracy
from training.failure import failure_of

pytestmark = pytest.mark.usefixtures("ray_running")

# As with a script of the user's: what this file defines travels by value, because workers cannot import it.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


@pytest.fixture
def learner(digits_block: DataBlock, few_digits: Path) -> Callable[..., Learner]:
    dls = dataloaders(digits_block, few_digits, batch_size=16)

    def make(*callbacks: Callback, **changes: Any) -> Learner:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 3))
        sgd = {"opt_func": lambda groups: torch.optim.SGD(groups, lr=0.1), "lr": 0.1, "metrics": accuracy}
        return Learner(dls, model, callbacks=callbacks, **sgd | changes)

    return make


# --- too few resources -------------------------------------------------------------------------------------------------


def test_more_than_the_cluster_has_is_refused_at_once() -> None:
    cpus = int(ray.cluster_resources()["CPU"])
    began = time.monotonic()
    with pytest.raises(ResourceError) as caught:
        Workers(640).check(batch_size=640)
    assert str(caught.value) == (
        f"no room for 640 workers: it takes 640 CPUs, the cluster has {cpus} CPUs. Give {cpus} or fewer, or start more nodes"
    )
    with pytest.raises(ResourceError) as caught:
        Workers(2, gpu=True).check(batch_size=2)
    assert str(caught.value) == (
        f"no room for 2 workers: it takes 2 CPUs and 2 GPUs, the cluster has {cpus} CPUs and 0 GPUs. "
        "Leave gpu=True out, or start nodes with GPUs"
    )
    with pytest.raises(ResourceError, match="no room for at least 64 workers: it takes 64 CPUs"):
        Workers((64, 80)).check(batch_size=640)
    assert time.monotonic() - began < 10  # far below it: nothing is waited for


@pytest.fixture
def all_but_one_cpu() -> Iterator[int]:
    """Somebody holds all CPUs but one; gives how many there are."""
    cpus = int(ray.cluster_resources()["CPU"])
    held = ray.util.placement_group([{"CPU": 1}] * (cpus - 1))
    ray.get(held.ready())
    while ray.available_resources().get("CPU", 0) != 1:  # what there is, is known a moment later
        time.sleep(0.05)
    yield cpus
    ray.util.remove_placement_group(held)


def test_what_others_hold_is_waited_for_but_not_for_ever(
    all_but_one_cpu: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runtime, "BUSY_SECONDS", 1.0)
    monkeypatch.setattr(runtime, "RELEASE_SECONDS", 0.1)
    Workers(1).check(batch_size=2)
    assert capsys.readouterr().out == ""
    told = f"it takes 2 CPUs, others hold all but 1 CPU of the cluster's {all_but_one_cpu} CPUs"
    with pytest.raises(ResourceError) as caught:
        Workers(2).check(batch_size=2)
    instead = "Give 1 or fewer, or start more nodes, or wait until they are done"
    assert re.fullmatch(rf"no room for 2 workers within \d+ s: {re.escape(told)}\. {instead}", str(caught.value))
    assert capsys.readouterr().out == f"wait: {told}; at most 1 s for 2 workers\n"


@pytest.fixture
def torn(few_digits: Path, tmp_path: Path) -> Path:
    """Digits of which one file is no picture."""
    shutil.copytree(few_digits, tmp_path / "torn")
    (tmp_path / "torn" / "2" / "torn.png").write_bytes(b"\x89PNG")
    return tmp_path / "torn"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["path=/nowhere"], "there is no folder '/nowhere'"),
        (["path=%s", "batch_size=2", "workers=3"], "batch_size=2 is the global one, of all 3 workers: at least 3"),
        (["path=%s", "workers=640", "batch_size=640"], "no room for 640 workers: it takes 640 CPUs, the cluster has "),
        (["path=%s"], "1 rows cannot be read, 0 are allowed:"),
    ],
)
def test_mistakes_on_the_command_line(
    words: list[str], said: str, torn: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line (and one for each bad row), exit code 2, with workers as without."""
    command = ["fastray", "train", "folder", *(["workers=2"] if "workers" not in " ".join(words) else []), *words]
    monkeypatch.setattr(sys, "argv", [word.replace("%s", str(torn)) for word in command])
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(runtime, "stop_ray", lambda: None)  # the tests after this one need it
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    first, *rest = capsys.readouterr().err.splitlines()
    assert first.startswith(f"fastray: {said}")
    assert rest == [] or (rest[0].startswith("  2/torn.png: ") and len(rest) <= 2)


# --- a person's own exception ------------------------------------------------------------------------------------------


class OutOfIdeas(Exception):
    """An exception of the person's own, which is slower to pickle than the other rank is to notice that this one has left."""

    def __reduce__(self) -> Any:
        time.sleep(2.5)
        return super().__reduce__()


class OfTwo(Exception):
    """An exception that cannot be made again from its message alone, as pickle would."""

    def __init__(self, one: str, two: str):
        super().__init__(f"{one} and {two}")


class Begins(Callback):
    """Notes in a file that a rank has begun to train."""

    def __init__(self, file: Path):
        self.file = file

    def before_fit(self, learn: Learner) -> None:
        with self.file.open("a") as file:
            file.write(f"{torch.distributed.get_rank()}\n")


class FailsOnRankOne(Callback):
    """What a person's callback does wrong, on rank 1 in the third epoch."""

    def before_batch(self, learn: Learner) -> None:
        if learn.training and (torch.distributed.get_rank(), learn.epoch, learn.iter) == (1, 2, 3):
            raise OutOfIdeas("nothing comes to mind")


def test_a_persons_exception_is_final_and_arrives_as_itself(learner: Callable[..., Learner], tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    learn = learner(Begins(begun), FailsOnRankOne())
    before = [p.clone() for p in learn.model.parameters()]
    with pytest.raises(OutOfIdeas, match="nothing comes to mind") as caught:
        learn.fit(4, on=Workers(2, storage=str(tmp_path / "runs"), max_failures=3))
    assert sorted(begun.read_text().split()) == ["0", "1"]  # never again, whatever the budget
    where, lines, everything = caught.value.__notes__
    line = FailsOnRankOne.before_batch.__code__.co_firstlineno + 2
    rows = r"rows \d/\d{4}\.png, \d/\d{4}\.png, \d/\d{4}\.png and 5 more"
    own = rf"{re.escape(__file__)}:{line} in before_batch"
    assert re.fullmatch(rf"in FailsOnRankOne\.before_batch, epoch 2, batch 3, rank 1 of 2, {rows}; {own}", where)
    found = failure_of(caught.value)
    assert found is not None
    assert (found.source, found.event, found.rank, len(found.rows)) == ("callback", "before_batch", 1, 8)
    assert lines.splitlines()[0] == "on rank 1:"
    assert f'File "{__file__}", line {line}, in before_batch' in lines
    assert 'raise OutOfIdeas("nothing comes to mind")' in lines
    assert "ray" not in lines
    (run,) = (tmp_path / "runs").iterdir()
    assert everything == f"everything that was said: {run / ERRORS}"
    assert "learner.py" in (run / ERRORS).read_text()
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__
    assert all(torch.equal(a, b) for a, b in zip(before, learn.model.parameters(), strict=True))


def loss_of_two(pred: Tensor, targ: Tensor) -> Tensor:
    raise OfTwo("this", "that")


def test_an_exception_that_cannot_travel_becomes_its_words() -> None:
    error = OfTwo("this", "that")
    error.add_note("in the loss")
    told = pickle.loads(as_bytes(error))  # noqa: S301  our own
    assert (type(told), str(told), told.__notes__) == (RuntimeError, "OfTwo: this and that", ["in the loss"])


@pytest.mark.slow
def test_an_exception_that_cannot_travel_arrives_with_its_words(learner: Callable[..., Learner]) -> None:
    with pytest.raises(RuntimeError) as caught:
        learner(loss_func=loss_of_two).fit(1, on=Workers(2))
    assert str(caught.value) == "OfTwo: this and that"
    where, _, everything = caught.value.__notes__
    assert re.match(r"in the loss, epoch 0, batch 0, rank [01] of 2, rows \d/", where)
    file = Path(everything.removeprefix("everything that was said: "))
    assert "in loss_of_two" in file.read_text()
    file.unlink()


class HoldsALock(Callback):
    """What cannot be pickled."""

    def __init__(self) -> None:
        self.lock = threading.Lock()


def test_what_cannot_be_sent_to_workers_is_named(learner: Callable[..., Learner]) -> None:
    learn = learner(HoldsALock())
    with pytest.raises(ValueError, match=r"^the callback HoldsALock cannot be sent to the workers: .*_thread\.lock"):
        learn.fit(1, on=Workers(2))
    lock = threading.Lock()
    with pytest.raises(ValueError, match=r"^the loss cannot be sent to the workers: .*_thread\.lock"):
        learner(loss_func=lambda pred, targ: pred.mean() + lock.locked()).fit(1, on=Workers(2))
    assert {c.name for c in learn.callbacks} >= {"Progress", "HoldsALock"}


class KilledOnRankOne(Callback):
    """The process of rank 1 ends, as one does that takes more memory than there is."""

    def before_batch(self, learn: Learner) -> None:
        if torch.distributed.get_rank() == 1 and learn.iter == 1:
            os.kill(os.getpid(), signal.SIGKILL)


def test_processes_lost_beyond_the_budget(learner: Callable[..., Learner], tmp_path: Path) -> None:
    """A lost peer is never the reason that is shown; each process begins once and once more."""
    begun = tmp_path / "begun"
    with pytest.raises(WorkersLost) as caught:
        learner(Begins(begun), KilledOnRankOne()).fit(1, on=Workers(2, storage=str(tmp_path / "runs"), max_failures=1))
    killed = "rank 1: its process has ended: killed, perhaps for the memory it took, or crashed"
    assert re.search(rf"{killed}$|rank 0: the process of rank 1 has ended", str(caught.value))
    assert "PeerLost" not in str(caught.value)
    assert sorted(begun.read_text().split()) == ["0", "0", "1", "1"]
    (run,) = (tmp_path / "runs").iterdir()
    assert caught.value.__notes__ == [f"everything that was said: {run / ERRORS}"]


def test_a_run_that_has_lost_its_nodes_waits_for_others_but_not_for_ever(
    learner: Callable[..., Learner], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from cluster import controller

    begun = tmp_path / "begun"
    monkeypatch.setattr(controller, "room", lambda gpu: 1 if begun.exists() else 2)
    monkeypatch.setattr(controller, "LOOK_SECONDS", 0.3)
    monkeypatch.setattr(controller, "NODES_SECONDS", 1.0)
    with pytest.raises(ResourceError, match=r"of at least 2 workers the cluster has room for 1, for \d+ s\. Start more nodes"):
        learner(Begins(begun)).fit(100_000, on=Workers((2, 3)))
    said = "wait: of at least 2 workers the cluster has room for 1; for nodes to come, at most 1 s"
    assert capsys.readouterr().out.splitlines().count(said) == 1
    Workers(int(ray.cluster_resources()["CPU"])).check(batch_size=64)  # what it held is free again
