"""Two ranks, by gloo in processes of their own and without Ray, against one process over the same rows."""

import importlib
import os
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from sklearn import metrics as skm
from torch import Tensor, nn

from blocks import (
    Batch,
    CategoryBlock,
    DataBlock,
    DataLoaders,
    ImageBlock,
    Normalize,
    RandomSplitter,
    Resize,
    get_image_files,
    parent_label,
)
from training import (
    Callback,
    CancelFitException,
    CrossEntropyLossFlat,
    F1Score,
    Learner,
    MSELossFlat,
    Phase,
    RocAuc,
    accuracy,
    body_and_head,
    distributed,
    error_rate,
    fine_tune,
    rmse,
)

from .several_ranks import WORLDS, on_ranks

WORLD = 2
SGD = torch.optim.SGD
Results = dict[str, Any]


def digits(rank: int, world: int) -> DataLoaders:
    """Few digits as one of `world` ranks sees them: an odd batch size, so that the shares differ in every batch."""
    block = DataBlock(
        blocks=(ImageBlock(), CategoryBlock()),
        get_items=get_image_files,
        get_y=parent_label,
        splitter=RandomSplitter(0.25, seed=1),
        item_tfms=Resize(8),
        batch_tfms=Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    )
    return block.dataloaders(Path(os.environ["FEW_DIGITS"]), batch_size=25).shard(rank, world)


def layered() -> nn.Module:
    """A small classifier of digits with a normalisation that looks at one row at a time; the same on every call."""
    torch.manual_seed(3)
    body = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.LayerNorm(16), nn.ReLU())
    return nn.Sequential(body, nn.Linear(16, 3))


def numbers(learn: Learner) -> Results:
    """The weights and the record without its times."""
    history = [{k: v for k, v in values.items() if not k.startswith("time/")} for values in learn.recorder.history]
    state = {name: w.detach().clone() for name, w in learn.model.state_dict().items()}
    hooked = any(p._post_accumulate_grad_hooks for p in learn.model.parameters())
    return {"history": history, "weights": state, "hooked_after": hooked}


@on_ranks(WORLD)
def trains_on_digits(rank: int, world: int) -> Results:
    learn = Learner(digits(rank, world), layered(), opt_func=SGD, lr=0.1, metrics=[accuracy, error_rate])
    learn.fit(2)
    shares = [len(x) for x, _ in learn.dls.train]
    return numbers(learn) | {"shares": shares, "validated": learn.validate()}


@on_ranks(WORLD)
def fine_tunes_digits(rank: int, world: int) -> Results:
    """A frozen phase, then all groups, and once more."""
    learn = Learner(digits(rank, world), layered(), opt_func=partial(SGD, lr=1), lr=0.1, splitter=body_and_head)
    learn.fit((*fine_tune(2), Phase(1, freeze_to=-1, train_bn=False), Phase(1)))
    return numbers(learn)


@on_ranks(WORLD)
def starts_with_weights_of_its_own(rank: int, world: int) -> Results:
    """Before the first step all ranks get those of rank 0."""
    model = layered()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(rank)
    learn = Learner(digits(rank, world), model, opt_func=SGD, lr=0.1)
    learn.fit(1)
    return numbers(learn)


@on_ranks(*WORLDS)
def rows_of_each_batch(rank: int, world: int) -> list[list[list[str]]]:
    """Of two epochs: the ids of this rank's rows."""
    train, found = digits(rank, world).train, []
    for epoch in range(2):
        train.set_epoch(epoch)
        found.append([[] if batch.borrowed else [str(i) for i in batch.ids] for batch in train])
    return found


class Keep(Callback):
    """The scores and targets of the rows that are validated here."""

    def __init__(self) -> None:
        self.scores: list[Tensor] = []
        self.targets: list[Tensor] = []

    def after_loss(self, learn: Learner) -> None:
        if not learn.training:
            self.scores.append(learn.pred[: learn.rows])
            self.targets.append(learn.yb[0].as_subclass(Tensor)[: learn.rows])


def measured(learn: Learner) -> Results:
    keep = Keep()
    learn.fit(1, callbacks=[keep])
    return {"record": learn.recorder.history[-1], "scores": torch.cat(keep.scores), "targets": torch.cat(keep.targets)}


@on_ranks(*WORLDS)
def measures_of_classes(rank: int, world: int) -> Results:
    metrics = [accuracy, F1Score(average="macro"), RocAuc()]
    return measured(Learner(digits(rank, world), layered(), opt_func=SGD, lr=0.1, metrics=metrics))


@on_ranks(*WORLDS)
def measures_of_numbers(rank: int, world: int) -> Results:
    """The last batch has one row, which the ranks after the first do without."""
    generator = torch.Generator().manual_seed(7)
    x, y = torch.randn(25, 4, generator=generator), torch.randn(25, 1, generator=generator)
    torch.manual_seed(2)
    batches = []
    for whole in torch.arange(25).split(8):
        rows = whole.tensor_split(world)[rank]
        batches += [Batch((x[rows], y[rows]), lambda: [], len(whole))] if len(rows) else []
    learn = Learner(DataLoaders([(x, y)], batches), nn.Linear(4, 1), MSELossFlat(), SGD, lr=0.1, metrics=rmse)
    return measured(learn)


ROWS = torch.Generator().manual_seed(5)
X, Y = torch.randn(7, 4, generator=ROWS), torch.randint(3, (7,), generator=ROWS)


def one_step(mine: slice, global_rows: int | None) -> Results:
    batch: Any = (X[mine], Y[mine])
    if global_rows is not None:
        batch = Batch(batch, lambda: [], global_rows)
    torch.manual_seed(2)
    learn = Learner(DataLoaders([batch]), nn.Linear(4, 3), CrossEntropyLossFlat(), SGD, lr=0.5)
    learn.fit(1)
    return numbers(learn)


@on_ranks(WORLD)
def one_step_on_uneven_shares(rank: int, world: int) -> Results:
    return one_step(slice(None) if world == 1 else (slice(0, 5), slice(5, 7))[rank], 7)


@on_ranks(WORLD)
def one_step_on_plain_batches(rank: int, world: int) -> Results:
    """Tuples that know nothing of other ranks, as a torch DataLoader with a DistributedSampler gives them."""
    return one_step(slice(0, 6) if world == 1 else (slice(0, 3), slice(3, 6))[rank], None)


@on_ranks(WORLD)
def a_rank_without_validation_rows(rank: int, world: int) -> Results:
    valid = [Batch((X, Y), lambda: [], 7)] if rank == 0 else []
    torch.manual_seed(2)
    learn = Learner(DataLoaders([(X, Y)], valid), nn.Linear(4, 3), CrossEntropyLossFlat(), metrics=accuracy)
    return {"validated": learn.validate()}


@on_ranks(WORLD)
def stops_on_all_ranks(rank: int, world: int) -> Results:
    class Stop(Callback):
        def after_batch(self, learn: Learner) -> None:
            if learn.training and learn.iter == 1:
                raise CancelFitException

    learn = Learner(digits(rank, world), layered(), opt_func=SGD, lr=0.1, callbacks=[Stop()])
    learn.fit(1)
    return numbers(learn)


@on_ranks(WORLD)
def knows_the_others(rank: int, world: int) -> Results:
    mine = torch.tensor([1.0, 10.0]) * (rank + 1)
    total = distributed.sum_over_ranks(mine)
    return {"rank": distributed.rank(), "world": distributed.world(), "total": total, "mine": mine}


# --- the tests ---------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def digits_here(few_digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEW_DIGITS", str(few_digits))  # as on the ranks


def assert_weights(found: dict[str, Tensor], expected: dict[str, Tensor], atol: float) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=atol)


@pytest.mark.parametrize(
    "job", [trains_on_digits, fine_tunes_digits, one_step_on_uneven_shares, one_step_on_plain_batches, stops_on_all_ranks]
)
def test_two_ranks_end_with_the_weights_of_one_process(job: Any, ranks_found: Any) -> None:
    alone = job(0, 1)
    for found in ranks_found(job, WORLD):
        assert_weights(found["weights"], alone["weights"], atol=1e-6)


@pytest.mark.parametrize(
    "job", [fine_tunes_digits, trains_on_digits, starts_with_weights_of_its_own, one_step_on_uneven_shares]
)
def test_both_ranks_end_with_the_same_weights_and_without_hooks(job: Any, ranks_found: Any) -> None:
    one, other = ranks_found(job, WORLD)
    assert_weights(one["weights"], other["weights"], atol=0)
    assert not one["hooked_after"]
    assert not other["hooked_after"]


@pytest.mark.parametrize("job", [trains_on_digits, fine_tunes_digits])
def test_each_rank_records_the_losses_and_metrics_of_all_rows(job: Any, ranks_found: Any) -> None:
    alone = job(0, 1)["history"]
    for found in ranks_found(job, WORLD):
        history = found["history"]
        assert [set(values) for values in history] == [set(values) for values in alone]
        assert history == [pytest.approx(values, rel=1e-5, abs=1e-7) for values in alone]


def test_the_shares_were_uneven_and_all_the_rows(ranks_found: Any) -> None:
    """Else the tests above would prove little."""
    one, other = (found["shares"] for found in ranks_found(trains_on_digits, WORLD))
    assert one != other
    assert [a + b for a, b in zip(one, other, strict=True)] == trains_on_digits(0, 1)["shares"]


def test_validate_is_over_all_rows(ranks_found: Any) -> None:
    alone = trains_on_digits(0, 1)["validated"]
    assert set(alone) == {"valid/loss", "valid/accuracy", "valid/error_rate"}
    for found in ranks_found(trains_on_digits, WORLD):
        assert found["validated"] == pytest.approx(alone, rel=1e-5)


def test_a_rank_may_have_no_validation_rows(ranks_found: Any) -> None:
    alone = a_rank_without_validation_rows(0, 1)["validated"]
    found = ranks_found(a_rank_without_validation_rows, WORLD)
    assert [rank["validated"] for rank in found] == [pytest.approx(alone)] * 2


def test_the_ranks_start_with_the_weights_of_the_first(ranks_found: Any) -> None:
    alone = starts_with_weights_of_its_own(0, 1)
    assert_weights(ranks_found(starts_with_weights_of_its_own, WORLD)[1]["weights"], alone["weights"], atol=1e-6)


def test_ranks_know_their_number_and_sum_without_changing_their_own(ranks_found: Any) -> None:
    for rank, found in enumerate(ranks_found(knows_the_others, WORLD)):
        assert (found["rank"], found["world"]) == (rank, WORLD)
        assert found["total"].tolist() == [3, 30]
        assert found["mine"].tolist() == [rank + 1, 10 * (rank + 1)]


@pytest.mark.parametrize("world", WORLDS)
def test_each_row_is_seen_once_an_epoch_in_the_batch_of_one_process(world: int, ranks_found: Any) -> None:
    alone, ranks = rows_of_each_batch(0, 1), ranks_found(rows_of_each_batch, world)
    for epoch in range(2):
        seen = [row for rank in ranks for batch in rank[epoch] for row in batch]
        assert len(seen) == len(set(seen)) == 91
        for of_ranks, whole in zip(zip(*(rank[epoch] for rank in ranks), strict=True), alone[epoch], strict=True):
            assert sorted(row for batch in of_ranks for row in batch) == sorted(whole)
    assert alone[0] != alone[1]


@pytest.mark.parametrize("world", WORLDS)
def test_metrics_are_scikit_learns_over_the_rows_of_all_ranks(world: int, ranks_found: Any) -> None:
    scores, targets = gathered(ranks_found(measures_of_classes, world))
    expected = {
        "valid/accuracy": skm.accuracy_score(targets, scores.argmax(1)),
        "valid/f1_score": skm.f1_score(targets, scores.argmax(1), average="macro"),
        "valid/roc_auc_score": skm.roc_auc_score(targets, scores.softmax(1), multi_class="ovr"),
    }
    assert len(targets) == 29
    for rank in ranks_found(measures_of_classes, world):
        assert {name: rank["record"][name] for name in expected} == pytest.approx(expected, abs=1e-6)
    scores, targets = gathered(ranks_found(measures_of_numbers, world))
    assert len(targets) == 25
    for rank in ranks_found(measures_of_numbers, world):
        assert rank["record"]["valid/rmse"] == pytest.approx(skm.root_mean_squared_error(targets, scores), abs=1e-6)


def gathered(found: list[Results]) -> list[Tensor]:
    return [torch.cat([rank[part] for rank in found]) for part in ("scores", "targets")]


def test_alone_nothing_is_reduced() -> None:
    x = torch.tensor([1.0])
    assert (distributed.rank(), distributed.world()) == (0, 1)
    assert distributed.sum_over_ranks(x) is x


def test_who_leaves_holds_the_group_no_more() -> None:
    """Else gloo aborts one process in some tens at its end. Torch's functions take the group as a default on import."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    importlib.reload(importlib.import_module("torch.distributed.nn.functional"))
    group = weakref.ref(dist.group.WORLD)
    assert distributed.gather("a") == ["a"]
    distributed.leave()
    assert group() is None
    names = [thread.read_text() for thread in Path("/proc/self/task").glob("*/comm")]
    assert not [name for name in names if "gloo" in name]
