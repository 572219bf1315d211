"""Two and three ranks against one process: gradients, losses of any denominator, borrowed rows, agreement, going on.

The ranks run the scenarios together (`several_ranks`); the tests read what they found.
"""

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from blocks import DataLoaders
from blocks.draws import sample_keys
from training import (
    AdaptiveGANSwitcher,
    Callback,
    CancelBatchException,
    CancelEpochException,
    CancelFitException,
    CancelTrainException,
    CancelValidException,
    CrossEntropyLossFlat,
    EarlyStopping,
    GANLearner,
    GradientAccumulation,
    GradientClip,
    Learner,
    accuracy,
    body_and_head,
    distributed,
    gan,
)

from .several_ranks import WORLDS, on_ranks

SGD = torch.optim.SGD
Results = dict[str, Any]

GENERATOR = torch.Generator().manual_seed(5)
X, Y = torch.randn(97, 4, generator=GENERATOR), torch.randint(3, (97,), generator=GENERATOR)


class Share(tuple[Any, ...]):
    """This rank's rows of a global batch; one that does not count where it has none."""

    own_rows: int
    global_rows: int
    keys: Tensor


def shares(rank: int, world: int, rows: int = 97, batch_size: int = 32) -> list[Share]:
    made = []
    for start in range(0, rows, batch_size):
        whole = torch.arange(start, min(start + batch_size, rows))
        mine = whole.tensor_split(world)[rank]
        taken = mine if len(mine) else whole[:1]
        share = Share((X[taken], Y[taken]))
        share.own_rows, share.global_rows = len(mine), len(whole)
        made.append(share)
    return made


def plain() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Sequential(nn.Linear(4, 16), nn.Tanh()), nn.Linear(16, 3))


def normalised() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 3))


def learner(rank: int, world: int, model: nn.Module | None = None, **changes: Any) -> Learner:
    dls = DataLoaders(shares(rank, world), shares(rank, world, rows=41))
    settings: Results = {"loss_func": CrossEntropyLossFlat(), "opt_func": SGD, "lr": 0.1} | changes
    learn = Learner(dls, model or plain(), **settings)
    learn.remove_callback(learn.progress)  # type: ignore[attr-defined]
    return learn


def found(learn: Learner, **more: Any) -> Results:
    history = [{k: v for k, v in values.items() if not k.startswith("time/")} for values in learn.recorder.history]
    return {"weights": {k: v.clone() for k, v in learn.model.state_dict().items()}, "history": history} | more


# --- jobs that end as in one process -------------------------------------------------------------------------------------


@on_ranks(*WORLDS)
def forty_steps(rank: int, world: int) -> Results:
    """A prime number of rows in batches of 32: the last batch has one row, which all ranks but one must do without."""
    learn = learner(rank, world, metrics=accuracy)
    learn.fit(10)
    return found(learn)


@on_ranks(*WORLDS)
def freezing(rank: int, world: int) -> Results:
    learn = learner(rank, world, splitter=body_and_head)
    learn.fine_tune(2, 0.2)
    return found(learn)


@on_ranks(*WORLDS)
def batch_statistics_without_the_borrowed_row(rank: int, world: int) -> Results:
    learn = learner(rank, world, normalised())
    learn.dls.train.pop(-2)
    for _ in range(2):  # the batch of one row would leave no variance: it joins the one before
        last = learn.dls.train.pop()
    share = Share((X[:5] + 1, Y[:5])) if rank == 0 else Share((X[:1], Y[:1]))
    share.own_rows, share.global_rows = 5 * (rank == 0), 5
    learn.dls.train.append(share)
    assert last.global_rows == 32
    learn.fit(2)
    return found(learn)


@on_ranks(*WORLDS)
def half_precision(rank: int, world: int) -> Results:
    learn = learner(rank, world, normalised()).to_bf16()
    learn.dls.train.pop()  # one row has no variance
    learn.fit(2)
    return found(learn)


@on_ranks(*WORLDS)
def weighted_classes(rank: int, world: int) -> Results:
    """The mean of this loss is over the weights of the targets, not over rows."""
    learn = learner(rank, world, loss_func=CrossEntropyLossFlat(weight=[1.0, 5.0, 0.5], ignore_index=2))
    learn.fit(2)
    return found(learn)


class Branching(nn.Module):
    """Has parameters that only rows with a positive first number use, and some that none uses."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.common, self.seldom, self.never = nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.common(x)
        chosen = x[:, 0] > 1.5
        if chosen.any():
            y = y.index_add(0, chosen.nonzero().flatten(), self.seldom(x[chosen]))
        return y


@on_ranks(*WORLDS)
def parameters_that_not_every_rank_uses(rank: int, world: int) -> Results:
    learn = learner(rank, world, Branching())
    learn.fit(2)
    return found(learn, never=learn.model.never.weight.grad is None)


@on_ranks(*WORLDS)
def accumulating(rank: int, world: int) -> Results:
    class EverySecond(Callback):
        def before_step(self, learn: Learner) -> None:
            if learn.iter % 2 == 0:
                raise CancelBatchException

    learn = learner(rank, world, callbacks=[EverySecond()])
    learn.fit(2)
    return found(learn)


@on_ranks(*WORLDS)
def accumulating_and_clipping(rank: int, world: int) -> Results:
    learn = learner(
        rank, world, callbacks=[GradientAccumulation(64), GradientClip(0.05), EarlyStopping("train/loss", patience=3)]
    )
    learn.fit(4)
    return found(learn)


@on_ranks(*WORLDS)
def two_nets_that_take_turns(rank: int, world: int) -> Results:
    """A GAN, whose noise follows from the samples' keys."""
    torch.manual_seed(3)
    models = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 4)), nn.Linear(4, 1)
    batches = []
    for share in shares(rank, world):
        real = Share((share[0],))
        real.own_rows, real.global_rows = share.own_rows, share.global_rows
        real.keys = sample_keys(0, 0, (share[0][:, 0] * 1e6).long())
        batches.append(real)
    losses, switcher = (gan.bce_gen_loss, gan.bce_crit_loss), AdaptiveGANSwitcher(None, 0.6)
    learn = GANLearner(DataLoaders(batches), *models, *losses, switcher, noise=2, opt_func=SGD, lr=0.1)
    learn.remove_callback(learn.progress)  # type: ignore[attr-defined]
    learn.fit(4)
    return found(learn)


SAME = (
    forty_steps,
    freezing,
    batch_statistics_without_the_borrowed_row,
    weighted_classes,
    parameters_that_not_every_rank_uses,
    accumulating,
    accumulating_and_clipping,
    two_nets_that_take_turns,
)


# --- agreement -----------------------------------------------------------------------------------------------------------


class OneRank(Callback):
    """On one rank only, raises `error` at an event of the second batch, or of the epoch, of the second epoch."""

    order = 100

    def __init__(self, error: type[Exception], event: str, mine: bool, in_validation: bool = False):
        self.error, self.event, self.mine, self.in_validation, self.raised = error, event, mine, in_validation, False
        self.cancelled: list[str] = []

    def at(self, event: str, learn: Learner) -> None:
        if event.startswith("after_cancel"):
            self.cancelled.append(f"{event} {learn.epoch} {learn.iter if learn.training else 'validation'}")
        here = learn.epoch == 1 and (event not in ranks_in_batch or learn.iter == 1) and self.in_validation != learn.training
        if self.mine and event == self.event and here and not self.raised:
            self.raised = True
            raise self.error


ranks_in_batch = (
    "before_batch", "after_pred", "after_loss", "before_backward", "after_backward", "before_step", "after_step", "after_batch",
)  # fmt: skip
AT_EVENTS = (*ranks_in_batch, "before_epoch", "before_train", "after_train", "before_validate", "after_validate", "after_epoch")
for _event in (*AT_EVENTS, *(f"after_cancel_{part}" for part in ("batch", "train", "validate", "epoch", "fit"))):
    setattr(OneRank, _event, lambda self, learn, event=_event: self.at(event, learn))

CANCELS: list[tuple[type[Exception], str, bool]] = [
    *((CancelFitException, event, False) for event in (*ranks_in_batch, "before_train", "after_train")),
    *((CancelFitException, event, True) for event in ("before_validate", "after_loss", "after_validate", "after_epoch")),
    *((CancelTrainException, event, False) for event in ("before_batch", "after_loss", "after_batch")),
    *((CancelEpochException, event, False) for event in ("after_loss", "after_train")),
    *((CancelBatchException, event, False) for event in ("before_batch", "after_loss")),
    (CancelValidException, "after_loss", True),
]


def cancelled(rank: int, world: int, error: type[Exception], event: str, in_validation: bool) -> Results:
    one = OneRank(error, event, mine=rank == world - 1, in_validation=in_validation)
    learn = learner(rank, world, callbacks=[one])
    learn.fit(3)
    return found(learn, cancelled=one.cancelled)


@on_ranks(*WORLDS)
def all_cancelled(rank: int, world: int) -> list[Results]:
    return [cancelled(rank, world, *case) for case in CANCELS]


@on_ranks(*WORLDS)
def stops_at_nan(rank: int, world: int) -> Results:
    """A loss that is NaN on one rank only stops all before it reaches a weight."""

    def stop(self: Any, learn: Learner) -> None:
        if not torch.isfinite(learn.loss):
            raise CancelFitException

    learn = learner(rank, world, callbacks=[type("Stop", (Callback,), {"after_loss": stop})()])
    if rank == world - 1:
        learn.dls.train[2][0].fill_(torch.nan)
    learn.fit(1)
    return found(learn)


# --- going on ------------------------------------------------------------------------------------------------------------


@on_ranks(*WORLDS)
def finds_rates(rank: int, world: int) -> Results:
    learn = learner(rank, world)
    before = found(learn)["weights"]
    rates = learn.lr_find(num_it=30)
    return found(learn, before=before, suggested=dict(rates.suggestions), losses=rates.losses.tolist())


class KeepState(Callback):
    """Keeps the state after some batches of a training."""

    order = 1000

    def __init__(self) -> None:
        self.kept: dict[int, io.BytesIO] = {}
        self.steps = 0

    def after_batch(self, learn: Learner) -> None:
        if learn.training:
            self.steps += 1
            if self.steps in (1, 5, 11):
                torch.save(learn.state_dict(), self.kept.setdefault(self.steps, io.BytesIO()))


@on_ranks(*WORLDS)
def goes_on(rank: int, world: int) -> Results:
    """With buckets so small that there are several."""
    size, distributed.BUCKET_BYTES = distributed.BUCKET_BYTES, 200
    unbroken = learner(rank, world, normalised(), splitter=body_and_head, callbacks=[KeepState()])
    unbroken.dls.train.pop()  # one row has no variance
    unbroken.fine_tune(3, 0.2)
    ends = []
    for file in unbroken.keep_state.kept.values():  # type: ignore[attr-defined]
        file.seek(0)
        fresh = learner(rank, world, normalised(), splitter=body_and_head)
        fresh.dls.train.pop()
        fresh.load_state_dict(torch.load(file, weights_only=True))
        fresh.resume()
        ends.append(found(fresh))
    distributed.BUCKET_BYTES = size
    return {"unbroken": found(unbroken), "ends": ends}


# --- the tests -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return {job.__name__: job(0, 1) for job in SAME} | {"cancels": all_cancelled(0, 1)}


def assert_near(one: Any, other: Any, atol: float) -> None:
    assert one.keys() == other.keys()
    for name in other:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=atol, msg=name)


each_world = pytest.mark.parametrize("world", WORLDS)


@each_world
@pytest.mark.parametrize("job", SAME)
def test_ranks_end_as_one_process(job: Any, world: int, ranks_found: Any, alone: Any) -> None:
    expected = alone[job.__name__]
    for rank in ranks_found(job, world):
        assert_near(rank["weights"], expected["weights"], atol=1e-5)
        assert len(rank["history"]) == len(expected["history"])
        for mine, one in zip(rank["history"], expected["history"], strict=True):
            assert mine == pytest.approx(one, rel=1e-4, abs=1e-6)


@each_world
def test_ranks_end_with_the_same_bits(world: int, ranks_found: Any) -> None:
    for job in SAME:
        first, *others = ranks_found(job, world)
        for other in others:
            assert_near(other["weights"], first["weights"], atol=0)


@each_world
def test_half_precision_is_as_close_as_half_precision_can_be(world: int, ranks_found: Any) -> None:
    alone = half_precision(0, 1)
    first, *others = ranks_found(half_precision, world)
    assert_near(first["weights"], alone["weights"], atol=5e-3)
    for other in others:
        assert_near(other["weights"], first["weights"], atol=0)


@each_world
def test_a_parameter_that_no_rank_uses_has_no_gradient(world: int, ranks_found: Any) -> None:
    assert all(rank["never"] for rank in ranks_found(parameters_that_not_every_rank_uses, world))


# Within a batch, after the gradients are summed, the others are told with the next ones: they have stepped by then.
LATER = ("after_backward", "before_step")


@each_world
@pytest.mark.parametrize("case", range(len(CANCELS)), ids=[f"{e.__name__}-{event}" for e, event, _ in CANCELS])
def test_what_one_rank_cancels_all_do(case: int, world: int, ranks_found: Any, alone: Any) -> None:
    error, event, _ = CANCELS[case]
    ends = [rank[case] for rank in ranks_found(all_cancelled, world)]
    first, *others = ends
    part = error.__name__.removeprefix("Cancel").removesuffix("Exception").lower().replace("valid", "validate")
    assert [name.split()[0] for name in first["cancelled"]] == [f"after_cancel_{part}"]
    for other in others:
        assert_near(other["weights"], first["weights"], atol=0)
        assert other["history"] == first["history"]
        assert [c.split()[:2] for c in other["cancelled"]] == [c.split()[:2] for c in first["cancelled"]]
    if event not in LATER:
        assert_near(first["weights"], alone["cancels"][case]["weights"], atol=1e-5)
        assert len(first["history"]) == len(alone["cancels"][case]["history"])


@each_world
def test_ranks_find_the_rates_of_one_process(world: int, ranks_found: Any) -> None:
    alone = finds_rates(0, 1)
    for rank in ranks_found(finds_rates, world):
        assert rank["losses"] == pytest.approx(alone["losses"], rel=1e-4)
        assert rank["suggested"] == pytest.approx(alone["suggested"])
        assert_near(rank["weights"], rank["before"], atol=0)


@each_world
def test_nan_on_one_rank_stops_all_before_the_step(world: int, ranks_found: Any) -> None:
    for rank in ranks_found(stops_at_nan, world):
        assert all(torch.isfinite(w).all() for w in rank["weights"].values())
        assert rank["history"] == []


@each_world
def test_ranks_go_on_with_the_bits_of_the_unbroken_run(world: int, ranks_found: Any) -> None:
    for rank in ranks_found(goes_on, world):
        unbroken = rank["unbroken"]
        assert len(rank["ends"]) == 3
        for end in rank["ends"]:
            assert_near(end["weights"], unbroken["weights"], atol=0)
            assert end["history"] == unbroken["history"]
