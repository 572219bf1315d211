"""Two ranks, by gloo in processes of their own and without Ray, against one process over the same rows.

Run as a program, this file is one of the ranks: it does all `JOBS` and saves what came of them.
"""

import importlib
import os
import subprocess
import sys
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
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
    Learner,
    Phase,
    accuracy,
    body_and_head,
    distributed,
    error_rate,
    fine_tune,
)

WORLD = 2
SGD = torch.optim.SGD
Results = dict[str, Any]


def digits(root: Path, rank: int, world: int) -> DataLoaders:
    """Few digits as one of `world` ranks sees them: an odd batch size, so that the shares differ in every batch."""
    block = DataBlock(
        blocks=(ImageBlock(), CategoryBlock()),
        get_items=get_image_files,
        get_y=parent_label,
        splitter=RandomSplitter(0.25, seed=1),
        item_tfms=Resize(8),
        batch_tfms=Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    )
    return block.dataloaders(root, batch_size=25).shard(rank, world)


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


def trains_on_digits(root: Path, rank: int, world: int) -> Results:
    learn = Learner(digits(root, rank, world), layered(), opt_func=SGD, lr=0.1, metrics=[accuracy, error_rate])
    learn.fit(2)
    shares = [len(x) for x, _ in learn.dls.train]
    return numbers(learn) | {"shares": shares, "validated": learn.validate()}


def fine_tunes_digits(root: Path, rank: int, world: int) -> Results:
    """A frozen phase, then all groups, and once more."""
    learn = Learner(digits(root, rank, world), layered(), opt_func=partial(SGD, lr=1), lr=0.1, splitter=body_and_head)
    learn.fit((*fine_tune(2), Phase(1, freeze_to=-1, train_bn=False), Phase(1)))
    return numbers(learn)


def starts_with_weights_of_its_own(root: Path, rank: int, world: int) -> Results:
    """Before the first step all ranks get those of rank 0."""
    model = layered()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(rank)
    learn = Learner(digits(root, rank, world), model, opt_func=SGD, lr=0.1)
    learn.fit(1)
    return numbers(learn)


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


def one_step_on_uneven_shares(root: Path, rank: int, world: int) -> Results:
    return one_step(slice(None) if world == 1 else (slice(0, 5), slice(5, 7))[rank], 7)


def one_step_on_plain_batches(root: Path, rank: int, world: int) -> Results:
    """Tuples that know nothing of other ranks, as a torch DataLoader with a DistributedSampler gives them."""
    return one_step(slice(0, 6) if world == 1 else (slice(0, 3), slice(3, 6))[rank], None)


def a_rank_without_validation_rows(root: Path, rank: int, world: int) -> Results:
    valid = [Batch((X, Y), lambda: [], 7)] if rank == 0 else []
    torch.manual_seed(2)
    learn = Learner(DataLoaders([(X, Y)], valid), nn.Linear(4, 3), CrossEntropyLossFlat(), metrics=accuracy)
    return {"validated": learn.validate()}


def stops_on_all_ranks(root: Path, rank: int, world: int) -> Results:
    class Stop(Callback):
        def after_batch(self, learn: Learner) -> None:
            if learn.training and learn.iter == 1:
                raise CancelFitException

    learn = Learner(digits(root, rank, world), layered(), opt_func=SGD, lr=0.1, callbacks=[Stop()])
    learn.fit(1)
    return numbers(learn)


def knows_the_others(root: Path, rank: int, world: int) -> Results:
    mine = torch.tensor([1.0, 10.0]) * (rank + 1)
    total = distributed.sum_over_ranks(mine)
    return {"rank": distributed.rank(), "world": distributed.world(), "total": total, "mine": mine}


JOBS = (
    trains_on_digits,
    fine_tunes_digits,
    starts_with_weights_of_its_own,
    one_step_on_uneven_shares,
    one_step_on_plain_batches,
    a_rank_without_validation_rows,
    stops_on_all_ranks,
    knows_the_others,
)


def be_a_rank(rank: int, root: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=WORLD)
    results = {job.__name__: job(root, rank, WORLD) for job in JOBS}
    torch.save(results, folder / f"rank{rank}.pt")
    distributed.leave()


# --- the tests ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ranks(few_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Results]]:
    """What each rank found; both run at the same time, with every warning an error."""
    folder = tmp_path_factory.mktemp("ranks")
    running = []
    for rank in range(WORLD):
        environment = {**os.environ, "FASTRAY_CACHE": str(folder / f"cache{rank}"), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-W", "error", __file__, str(rank), str(few_digits), str(folder)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        running.append(subprocess.Popen(command, env=environment, cwd=folder, text=True, **pipes))  # type: ignore[call-overload]
    try:
        said = [process.communicate(timeout=120)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0], "\n".join(said)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(WORLD)]


def assert_weights(found: dict[str, Tensor], expected: dict[str, Tensor], atol: float) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=atol)


@pytest.mark.parametrize(
    "job", [trains_on_digits, fine_tunes_digits, one_step_on_uneven_shares, one_step_on_plain_batches, stops_on_all_ranks]
)
def test_two_ranks_end_with_the_weights_of_one_process(job: Any, ranks: list[dict[str, Results]], few_digits: Path) -> None:
    alone = job(few_digits, 0, 1)
    for found in ranks:
        assert_weights(found[job.__name__]["weights"], alone["weights"], atol=1e-6)


@pytest.mark.parametrize(
    "job", [fine_tunes_digits, trains_on_digits, starts_with_weights_of_its_own, one_step_on_uneven_shares]
)
def test_both_ranks_end_with_the_same_weights_and_without_hooks(job: Any, ranks: list[dict[str, Results]]) -> None:
    one, other = (found[job.__name__] for found in ranks)
    assert_weights(one["weights"], other["weights"], atol=0)
    assert not one["hooked_after"]
    assert not other["hooked_after"]


@pytest.mark.parametrize("job", [trains_on_digits, fine_tunes_digits])
def test_each_rank_records_the_losses_and_metrics_of_all_rows(
    job: Any, ranks: list[dict[str, Results]], few_digits: Path
) -> None:
    alone = job(few_digits, 0, 1)["history"]
    for found in ranks:
        history = found[job.__name__]["history"]
        assert [set(values) for values in history] == [set(values) for values in alone]
        assert history == [pytest.approx(values, rel=1e-5, abs=1e-7) for values in alone]


def test_the_shares_were_uneven_and_all_the_rows(ranks: list[dict[str, Results]], few_digits: Path) -> None:
    """Else the tests above would prove little."""
    one, other = (found["trains_on_digits"]["shares"] for found in ranks)
    assert one != other
    assert [a + b for a, b in zip(one, other, strict=True)] == trains_on_digits(few_digits, 0, 1)["shares"]


def test_validate_is_over_all_rows(ranks: list[dict[str, Results]], few_digits: Path) -> None:
    alone = trains_on_digits(few_digits, 0, 1)["validated"]
    assert set(alone) == {"valid/loss", "valid/accuracy", "valid/error_rate"}
    for found in ranks:
        assert found["trains_on_digits"]["validated"] == pytest.approx(alone, rel=1e-5)


def test_a_rank_may_have_no_validation_rows(ranks: list[dict[str, Results]], few_digits: Path) -> None:
    alone = a_rank_without_validation_rows(few_digits, 0, 1)["validated"]
    assert [found["a_rank_without_validation_rows"]["validated"] for found in ranks] == [pytest.approx(alone)] * 2


def test_the_ranks_start_with_the_weights_of_the_first(ranks: list[dict[str, Results]], few_digits: Path) -> None:
    alone = starts_with_weights_of_its_own(few_digits, 0, 1)
    assert_weights(ranks[1]["starts_with_weights_of_its_own"]["weights"], alone["weights"], atol=1e-6)


def test_ranks_know_their_number_and_sum_without_changing_their_own(ranks: list[dict[str, Results]]) -> None:
    for rank, results in enumerate(ranks):
        found = results["knows_the_others"]
        assert (found["rank"], found["world"]) == (rank, WORLD)
        assert found["total"].tolist() == [3, 30]
        assert found["mine"].tolist() == [rank + 1, 10 * (rank + 1)]


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


if __name__ == "__main__":
    be_a_rank(int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
