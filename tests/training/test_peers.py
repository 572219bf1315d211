"""A rank that dies or leaves at an error, and ranks that do not do the same: nobody waits, through shared memory or sockets."""

import os
from typing import Any

import pytest
import torch
from torch import nn

from blocks import DataLoaders
from training import Callback, CrossEntropyLossFlat, Learner, distributed, same_host
from training.same_host import PeerLost

from .several_ranks import DIED, on_ranks


class OwnError(Exception):
    """A person's."""


def learner(*callbacks: Callback) -> Learner:
    torch.manual_seed(0)
    batches = [(torch.randn(4, 3), torch.randint(2, (4,))) for _ in range(3)]
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    learn = Learner(DataLoaders(batches, batches), model, CrossEntropyLossFlat(), callbacks=callbacks)
    learn.remove_callback(learn.progress)  # type: ignore[attr-defined]
    return learn


def at(event: str, epoch: int, action: Any) -> Callback:
    def act(self: Any, learn: Learner) -> None:
        if learn.epoch == epoch:
            action()

    return type("At", (Callback,), {event: act})()


def through_sockets() -> None:
    same_host.ORDERED = False


def fail() -> None:
    raise OwnError("a picture is broken")


LOST = ("PeerLost", "PeerLeft")


def die() -> None:
    os._exit(DIED)


def outcome(event: str, action: Any, guilty: bool) -> list[str]:
    """What a training ends with on this rank, then a second one, and a sum."""
    learn, found = learner(*([at(event, 1, action)] if guilty else [])), []
    for what in (lambda: learn.fit(3), lambda: learn.fit(1), lambda: distributed.sum_over_ranks(torch.ones(1))):
        try:
            what()
            found.append("")
        except (OwnError, PeerLost) as error:
            found.append(f"{type(error).__name__}: {error}")
    return found


@on_ranks(3, alone=True)
def fails_in_a_batch(rank: int, world: int) -> list[str]:
    return outcome("after_loss", fail, rank == world - 1)


@on_ranks(3, alone=True)
def fails_in_a_batch_through_sockets(rank: int, world: int) -> list[str]:
    through_sockets()
    return outcome("after_loss", fail, rank == world - 1)


@on_ranks(2, alone=True)
def fails_after_the_training(rank: int, world: int) -> list[str]:
    """The other rank, which has trained to the end, is told when it needs this one."""

    class Fails(Callback):
        def after_fit(self, learn: Learner) -> None:
            fail()

    learn = learner(*([Fails()] if rank == 0 else []))
    try:
        learn.fit(1)
        learn.validate()
    except (OwnError, PeerLost) as error:
        return [f"{type(error).__name__}: {error}"]
    return []


@on_ranks(3, alone=True)
def first_dies(rank: int, world: int) -> list[str]:
    """With it goes the store in which ranks look for news."""
    return outcome("after_loss", die, rank == 0)


@on_ranks(3, alone=True)
def last_dies_through_sockets(rank: int, world: int) -> list[str]:
    through_sockets()
    return outcome("before_validate", die, rank == world - 1)


@on_ranks(2, alone=True)
def more_batches_than_the_other(rank: int, world: int) -> list[str]:
    """One is in a batch while the other is done with the epoch: they come to sums of different sizes."""
    learn = learner()
    learn.dls.train.extend(learn.dls.train[:1] * (rank == 0))
    try:
        learn.fit(1)
    except RuntimeError as error:
        return [str(error)]
    return []


@pytest.mark.parametrize("scenario", [fails_in_a_batch, fails_in_a_batch_through_sockets])
def test_an_error_on_one_rank_ends_all_and_says_why(scenario: Any, ranks_found: Any) -> None:
    *others, guilty = ranks_found(scenario, 3)
    why = "rank 2 has left the training at OwnError: a picture is broken"
    assert guilty[0] == "OwnError: a picture is broken"
    for other in others:
        assert other[0].startswith(LOST)
    assert any(why in other[0] for other in others)
    for rank in (*others, guilty):  # what had begun is never finished, so there is no going on
        assert all(later.startswith(LOST) and "start all ranks again" in later for later in rank[1:])


def test_an_error_after_the_training_is_told_to_who_goes_on(ranks_found: Any) -> None:
    guilty, other = ranks_found(fails_after_the_training, 2)
    assert guilty == ["OwnError: a picture is broken"]
    assert other == ["PeerLeft: rank 0 has left the training at OwnError: a picture is broken"]


def test_the_others_notice_that_the_first_died(ranks_found: Any) -> None:
    dead, *others = ranks_found(first_dies, 3)
    assert dead is None
    assert all(end.startswith(LOST) for other in others for end in other)
    assert any("the process of rank 0 has ended" in other[0] for other in others)


def test_the_others_notice_that_the_last_died(ranks_found: Any) -> None:
    *others, dead = ranks_found(last_dies_through_sockets, 3)
    assert dead is None
    assert all(end.startswith(LOST) for other in others for end in other)


@pytest.mark.skipif(not same_host.ORDERED, reason="gloo ends the process where sizes differ")
def test_ranks_that_do_not_do_the_same_are_told(ranks_found: Any) -> None:
    for (end,) in ranks_found(more_batches_than_the_other, 2):
        assert "the ranks came to sums of different sizes" in end or "has left the training" in end
