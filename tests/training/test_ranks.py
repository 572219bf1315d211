"""Two and three ranks against one process: gradients, losses of any denominator, borrowed rows, agreement, going on.

The ranks run the scenarios together (`several_ranks`); the tests read what they found.
"""

import copy
import io
import itertools
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
    ranks,
)
from training.state import OF_RANK

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
    class Keep(Callback):
        """The weights before the first epoch and after each."""

        def __init__(self) -> None:
            self.kept: list[dict[str, Tensor]] = []

        def before_fit(self, learn: Learner) -> None:
            self.after_epoch(learn)

        def after_epoch(self, learn: Learner) -> None:
            self.kept.append({name: w.clone() for name, w in learn.model.state_dict().items()})

    keep = Keep()
    learn = learner(rank, world, splitter=body_and_head, callbacks=[keep])
    learn.fine_tune(2, 0.2)
    return found(learn, kept=keep.kept)


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
def forty_steps_normalised(rank: int, world: int) -> Results:
    learn = learner(rank, world, normalised())
    for part in (learn.dls.train, learn.dls.valid):
        part.pop()  # one row has no variance
    learn.fit(13)
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


# --- what passes between ranks -------------------------------------------------------------------------------------------


@on_ranks(*WORLDS)
def collectives_per_step(rank: int, world: int) -> list[int]:
    """Of a model without and with a BatchNorm, between one batch's beginning and the next one's."""
    numbers = []
    for model in (plain(), normalised()):
        begun = 0

        def counted(x: Tensor, begin: Any = distributed.begin_sum) -> Any:
            nonlocal begun
            begun += 1
            return begin(x)

        class Counts(Callback):
            def __init__(self) -> None:
                self.at: list[int] = []

            def before_batch(self, learn: Learner) -> None:
                self.at.append(begun)  # noqa: B023

        counts = Counts()
        learn = learner(rank, world, model, callbacks=[counts, GradientClip(1.0)])
        learn.dls.train.pop()  # one row has no variance
        with pytest.MonkeyPatch.context() as patch:
            for module in (distributed, ranks):
                patch.setattr(module, "begin_sum", counted)
            patch.setattr(torch.distributed, "all_gather_object", None)
            patch.setattr(learn, "_validate", lambda dl: None)
            learn.fit(1)
        numbers.append([b - a for a, b in itertools.pairwise(counts.at)])
    assert all(len(set(steps)) == 1 for steps in numbers)
    return [steps[0] for steps in numbers]


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
        in_time = learn.epoch == (event != "before_fit") and (event not in IN_BATCH or learn.iter == 1)
        here = in_time and self.in_validation != learn.training
        if self.mine and event == self.event and here and not self.raised:
            self.raised = True
            raise self.error


IN_BATCH = (
    "before_batch", "after_pred", "after_loss", "before_backward", "after_backward", "before_step", "after_step", "after_batch",
)  # fmt: skip
OF_VALIDATION = ("before_batch", "after_pred", "after_loss", "after_batch", "before_validate", "after_validate", "after_epoch")
AT_EVENTS = {*IN_BATCH, *OF_VALIDATION, "before_fit", "before_epoch", "before_train", "after_train"}
for _event in (*AT_EVENTS, *(f"after_cancel_{part}" for part in ("batch", "train", "validate", "epoch", "fit"))):
    setattr(OneRank, _event, lambda self, learn, event=_event: self.at(event, learn))

CANCELS: list[tuple[type[Exception], str, bool]] = [
    *((CancelFitException, event, False) for event in (*IN_BATCH, "before_train", "after_train")),
    *((CancelFitException, event, True) for event in ("before_fit", "before_epoch", *OF_VALIDATION)),
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
    """Keeps the state after every batch of a training: the first rank's part that all share, and this rank's own."""

    order = 1000

    def __init__(self) -> None:
        self.kept: list[io.BytesIO] = []

    def after_batch(self, learn: Learner) -> None:
        if learn.training:
            state = learn.state_dict()
            shared = distributed.gather({key: value for key, value in state.items() if key not in OF_RANK})[0]
            self.kept.append(io.BytesIO())
            torch.save(shared | {key: state[key] for key in OF_RANK}, self.kept[-1])


class OwnRows(Callback):
    """Has a state that differs from rank to rank."""

    def __init__(self) -> None:
        self.seen = 0

    def after_batch(self, learn: Learner) -> None:
        self.seen += learn.rows if learn.training else 0

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen = state["seen"]


@on_ranks(*WORLDS)
def goes_on(rank: int, world: int) -> Results:
    """With buckets so small that there are several, and numbers drawn by each rank's own generator."""
    size, distributed.BUCKET_BYTES = distributed.BUCKET_BYTES, 200

    def one(*callbacks: Callback) -> Learner:
        model = normalised()
        model.insert(3, nn.Dropout(0.2))  # type: ignore[attr-defined]
        learn = learner(rank, world, model, splitter=body_and_head, callbacks=[OwnRows(), *callbacks])
        learn.dls.train.pop()  # one row has no variance
        return learn

    unbroken = one(KeepState())
    torch.manual_seed(rank)
    unbroken.fine_tune(2, 0.2)
    ends = []
    for file in unbroken.keep_state.kept:  # type: ignore[attr-defined]
        file.seek(0)
        fresh = one()
        fresh.load_state_dict(torch.load(file, weights_only=True))
        fresh.resume()
        ends.append(found(fresh, seen=fresh.own_rows.seen))  # type: ignore[attr-defined]
    distributed.BUCKET_BYTES = size
    return {"unbroken": found(unbroken, seen=unbroken.own_rows.seen), "ends": ends}  # type: ignore[attr-defined]


@on_ranks(*WORLDS)
def stops_in_an_epoch(rank: int, world: int) -> Results:
    """What a checkpoint has, shared and of each rank, and how the run ends without a break."""

    class KeepAll(Callback):
        order = 1000

        def after_batch(self, learn: Learner) -> None:
            if learn.training and (learn.epoch, learn.iter) == (1, 1):
                state = copy.deepcopy(learn.state_dict())
                parts = distributed.gather({key: state.pop(key) for key in OF_RANK})
                self.kept = state | {"parts": parts}

    learn = learner(rank, world, callbacks=[KeepAll()])
    learn.fit(3)
    return {"kept": learn.keep_all.kept, "end": found(learn)}  # type: ignore[attr-defined]


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
def test_with_batchnorm_ranks_end_as_one_process_too(world: int, ranks_found: Any) -> None:
    alone = forty_steps_normalised(0, 1)
    first, *others = ranks_found(forty_steps_normalised, world)
    assert_near(first["weights"], alone["weights"], atol=1e-4)
    for other in others:
        assert_near(other["weights"], first["weights"], atol=0)


@each_world
def test_what_is_frozen_stays_and_what_is_not_moves_alike_on_all_ranks(world: int, ranks_found: Any) -> None:
    first, *others = (found["kept"] for found in ranks_found(freezing, world))
    assert len(first) == 4
    for number, weights in enumerate(first):
        for other in others:
            assert_near(other[number], weights, atol=0)
    for number, (before, after) in enumerate(itertools.pairwise(first)):
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        assert moved == ({"1.weight", "1.bias"} if number == 0 else before.keys())


@each_world
def test_a_step_sums_gradients_once_and_batchnorm_in_each_pass(world: int, ranks_found: Any) -> None:
    assert ranks_found(collectives_per_step, world) == [[1, 3]] * world


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
        assert len(rank["ends"]) == 9
        for end in rank["ends"]:
            assert_near(end["weights"], unbroken["weights"], atol=0)
            assert (end["history"], end["seen"]) == (unbroken["history"], unbroken["seen"])


@each_world
def test_another_number_of_ranks_goes_on_to_the_same_end(world: int, ranks_found: Any) -> None:
    first, second, *_ = ranks_found(stops_in_an_epoch, world)
    drawn = []
    for state in (first["kept"], second["kept"]):  # alike on all ranks
        one = learner(0, 1)
        one.load_state_dict(state)
        drawn.append(torch.rand(3))
        one.load_state_dict(state)
        one.resume()
        assert_near(found(one)["weights"], first["end"]["weights"], atol=1e-5)
        for mine, expected in zip(found(one)["history"], first["end"]["history"], strict=True):
            assert mine == pytest.approx(expected, rel=1e-4)
    assert torch.equal(*drawn)
