"""Features of a frozen phase: computed once, the same losses, and a reason wherever they would not be the same."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from blocks import DataBlock, DataLoaders, RandomResizedCrop, aug_transforms
from blocks.errors import UserError
from training import (
    Callback,
    CancelFitException,
    CollectData,
    FetchPredictions,
    Learner,
    MixedPrecision,
    MixUp,
    Phase,
    SaveBest,
    Schedule,
    accuracy,
    body_and_head,
    create_head,
    fine_tune,
    gradual_unfreeze,
)
from training.features import Cut, compute_ahead, find_cut
from training.hooks import Hook
from training.optimizer import freeze_to

from .toy import assert_same, doing, without_times

FROZEN = Phase(2, freeze_to=-1)
CACHED = Phase(2, freeze_to=-1, cache_features=True)


class Counted(nn.Sequential):
    """A body that counts the rows it is given."""

    rows = 0

    def forward(self, x: Tensor) -> Tensor:
        Counted.rows += len(x)
        return super().forward(x)


class Noisy(nn.Module):
    """Dropout that no layer shows."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5, self.training)


class Scaled(nn.Sequential):
    """More than its children, one after the other."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 3


class Acts(nn.Module):
    """What it does is no weight, and no number that a layer shows."""

    def __init__(self, act: Callable[[Tensor], Tensor], scale: float = 1.0) -> None:
        super().__init__()
        self.act, self._scale = act, scale

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x) * self._scale


class Centred(nn.Module):
    """The others of the batch count."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


def body(*more: nn.Module) -> nn.Module:
    norm = nn.BatchNorm2d(4)
    norm.running_mean = torch.full((4,), 0.1)  # unlike that of a batch
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), norm, nn.ReLU(), *more, nn.Conv2d(4, 6, 3, stride=2), nn.ReLU())


@pytest.fixture
def dls(digits_block: DataBlock, few_digits: Path) -> DataLoaders:
    return digits_block.dataloaders(few_digits, batch_size=32)


def learner(dls: Any, model: nn.Module | None = None, **changes: Any) -> Learner:
    torch.manual_seed(1)
    settings: dict[str, Any] = {"splitter": body_and_head, "metrics": accuracy, "train_bn": False, "lr": 1e-2} | changes
    learn = Learner(dls, model or nn.Sequential(body(), create_head(6, 3, [8])), **settings)
    learn.remove_callback(learn.progress)  # type: ignore[attr-defined]
    return learn


def trained(dls: Any, schedule: Schedule, **changes: Any) -> Learner:
    learn = learner(dls, **changes)
    torch.manual_seed(2)
    learn.fit(schedule)
    return learn


@pytest.mark.parametrize("make", [fine_tune, gradual_unfreeze])
def test_losses_weights_and_optimizer_are_those_without(dls: DataLoaders, make: Callable[..., Schedule]) -> None:
    settings: dict[str, Any] = {"freeze_epochs": 2} if make is fine_tune else {"stages": 2}
    plain, cached = (trained(dls, make(1, **settings, cache_features=on)) for on in (False, True))
    for epoch, other in zip(*(without_times(learn.recorder.history) for learn in (plain, cached)), strict=True):
        assert other == pytest.approx(epoch, rel=1e-5)
    one, other = plain.state_dict(), cached.state_dict()
    torch.testing.assert_close(other["model"], one["model"])
    torch.testing.assert_close(other["optimizer"]["state"], one["optimizer"]["state"])


def test_the_body_sees_each_row_once_over_epochs_and_learners(dls: DataLoaders, capsys: pytest.CaptureFixture[str]) -> None:
    def rows_seen(**changes: Any) -> int:
        Counted.rows = 0
        torch.manual_seed(3)
        trained(dls, (CACHED,), model=nn.Sequential(Counted(*body()), create_head(6, 3)), **changes)  # type: ignore[misc]
        return Counted.rows

    assert 120 <= rows_seen() < 130  # and a few, to try whether it is exact
    assert "features: computed once for 120 rows" in capsys.readouterr().out
    assert rows_seen(lr=0.5) < 10
    assert "features" not in capsys.readouterr().out


def test_other_weights_or_batch_transforms_have_features_of_their_own(dls: DataLoaders, digits_block: DataBlock) -> None:
    learn = learner(dls)
    stores = [compute_ahead(learn, (CACHED,), map)]
    with torch.no_grad():
        learn.model[0][0].bias += 1
    stores.append(compute_ahead(learn, (CACHED,), map))
    learn.dls = dls.add_tfms([lambda x: x * 2])
    stores.append(compute_ahead(learn, (CACHED,), map))
    assert len({store.fingerprint for store in stores if store is not None}) == 3
    with torch.no_grad():
        learn.model[1][-1][-1].weight += 1
    again = compute_ahead(learn, (CACHED,), map)
    assert again is not None
    assert again.reused
    assert all(p.requires_grad for p in learn.model.parameters())  # as it was
    assert compute_ahead(learn, (FROZEN, CACHED), map) is None


@pytest.mark.parametrize("other", [Acts(F.tanh), Acts(F.relu, 2.0)])
def test_another_function_has_features_of_its_own(other: Acts, dls: DataLoaders) -> None:
    stores = []
    for acts in (Acts(F.relu), other, Acts(F.relu)):
        torch.manual_seed(3)
        stores.append(compute_ahead(learner(dls, nn.Sequential(body(acts), create_head(6, 3))), (CACHED,), map))
    first, second, again = (store.fingerprint for store in stores if store is not None)
    assert first == again != second


def test_a_head_that_does_more_than_its_children(dls: DataLoaders) -> None:
    def made() -> nn.Module:
        torch.manual_seed(3)
        return nn.Sequential(body(), Scaled(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)))

    plain, cached = (trained(dls, (phase,), model=made()) for phase in (FROZEN, CACHED))
    for epoch, other in zip(*(without_times(learn.recorder.history) for learn in (plain, cached)), strict=True):
        assert other == pytest.approx(epoch, rel=1e-5)


def test_pooled_features_are_small(dls: DataLoaders) -> None:
    store = compute_ahead(learner(dls), (CACHED,), map)
    assert store is not None
    assert store.table(0)["features"].type.shape == [12]  # 6 channels, their largest and their mean


def test_it_goes_on_in_the_middle_of_a_phase(dls: DataLoaders, tmp_path: Path) -> None:
    def interrupt(learn: Learner) -> None:
        if learn.training and (learn.epoch, learn.iter) == (1, 1):
            raise CancelFitException

    whole = trained(dls, fine_tune(1, freeze_epochs=2, cache_features=True))
    broken = learner(dls, callbacks=[doing("after_batch", interrupt)])
    torch.manual_seed(2)
    broken.fit(fine_tune(1, freeze_epochs=2, cache_features=True))
    broken.save(tmp_path / "state")
    fresh = learner(dls)
    fresh.load(tmp_path / "state").resume()
    assert without_times(fresh.recorder.history) == without_times(whole.recorder.history)
    assert_same(fresh.state_dict()["model"], whole.state_dict()["model"])


def test_callbacks_see_the_whole_model_and_its_data(dls: DataLoaders) -> None:
    """What a callback predicts or keeps in such a phase is the whole model's."""
    fetched = FetchPredictions()
    learn = trained(dls, (CACHED,), callbacks=[fetched])
    torch.testing.assert_close(learn.get_preds(), fetched.preds)
    learn = trained(dls, (CACHED,), callbacks=[SaveBest("valid/loss")])
    assert learn.validate()["valid/loss"] == pytest.approx(min(v["valid/loss"] for v in learn.recorder.history))
    assert learn.dls is dls


def test_half_precision_is_that_of_the_training(dls: DataLoaders) -> None:
    plain, cached = (trained(dls, (phase,), callbacks=[MixedPrecision()]) for phase in (FROZEN, CACHED))
    for one, other in zip(plain.recorder.history, cached.recorder.history, strict=True):
        assert other["train/loss"] == pytest.approx(one["train/loss"], rel=1e-2)


def test_damaged_features_are_made_again(dls: DataLoaders) -> None:
    store = compute_ahead(learner(dls), (CACHED,), map)
    assert store is not None
    shard = store.folder / store.index["shards"][0]["file"]
    shard.write_bytes(shard.read_bytes()[:-100])
    again = compute_ahead(learner(dls), (CACHED,), map)
    assert again is not None
    assert not again.reused
    assert again.damaged() == []


# --- where the head begins ---------------------------------------------------------------------------------------------


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


@pytest.mark.parametrize(
    ("model", "cut"),
    [
        (nn.Sequential(nn.Sequential(nn.Linear(4, 4)), create_head(4, 2)), Cut("1", 2)),
        (nn.Sequential(nn.Sequential(nn.Linear(4, 4)), nn.Sequential(nn.Dropout(), nn.Linear(4, 2))), Cut("1", 0)),
        (nn.Sequential(nn.Linear(4, 4), nn.Flatten(), nn.Dropout(), nn.Linear(4, 2)), Cut("", 2)),
        (Branches(), Cut("head")),
        (nn.Sequential(nn.Linear(4, 4), Scaled(nn.Flatten(), nn.Linear(4, 2))), Cut("1")),
        (Scaled(nn.Linear(4, 4), nn.Linear(4, 2)), Cut("1")),
    ],
)
def test_where_the_head_begins(model: nn.Module, cut: Cut) -> None:
    freeze_to(body_and_head(model), model, -1, train_bn=False)
    assert find_cut(model) == cut


# --- refusals ----------------------------------------------------------------------------------------------------------


class Touches(Callback):
    def before_batch(self, learn: Learner) -> None:
        learn.xb = tuple(x * 2 for x in learn.xb)


class Skips(nn.Module):
    """What trains is not the last to be run."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = body(nn.Identity()), create_head(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)) * 2


def with_hook(model: nn.Module) -> nn.Module:
    Hook(model[0], lambda *_: None)  # type: ignore[index]
    return model


def head() -> nn.Module:
    return create_head(6, 3)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (lambda: {"train_bn": True}, "normalisation layers of frozen groups train, unless .* train_bn=False"),
        (lambda: {"callbacks": [MixUp(0.4)]}, "MixUp may look at the inputs"),
        (lambda: {"callbacks": [CollectData()]}, "CollectData may look at the inputs"),
        (lambda: {"callbacks": [Touches()]}, "Touches may look at the inputs .* needs_inputs = False"),
        (lambda: {"model": nn.Sequential(body(nn.Dropout2d(0.1)), head())}, "random in training"),
        (lambda: {"model": nn.Sequential(body(Noisy()), head())}, "gives something else in training"),
        (lambda: {"model": nn.Sequential(body(Centred()), head())}, "the frozen part .* depends on the others of its batch"),
        (lambda: {"model": nn.Sequential(nn.BatchNorm2d(3, affine=False), body(), head())}, "statistics of each batch in 0:"),
        (lambda: {"model": with_hook(nn.Sequential(body(), head()))}, "'0' of the frozen part has a hook"),
        (lambda: {"model": Skips()}, "'head' trains, but its output is not the model's"),
    ],
)
def test_what_would_not_be_exact_is_refused(dls: DataLoaders, changes: Callable[[], dict[str, Any]], reason: str) -> None:
    with pytest.raises(UserError, match=f"(?s)would not give the losses it gives without: .*{reason}"):
        trained(dls, (CACHED,), **changes())


def test_a_phase_that_trains_more_than_the_head_is_refused(dls: DataLoaders) -> None:
    with pytest.raises(UserError, match="the phase trains all of the model: freeze_to=-1"):
        trained(dls, (Phase(1, freeze_to=0, cache_features=True),))

    def three(model: nn.Module) -> list[list[nn.Parameter]]:
        return [list(part.parameters()) for part in (model[0][:3], model[0][3:], model[1])]  # type: ignore[index]

    with pytest.raises(UserError, match=r"more than the model's last part: 0\.3\.weight"):
        trained(dls, (Phase(1, freeze_to=-2, cache_features=True),), splitter=three)


def test_data_that_is_another_each_epoch_is_refused(dls: DataLoaders, digits_block: DataBlock, few_digits: Path) -> None:
    with pytest.raises(UserError, match=r"a batch transform is random on training data: .*Flip"):
        trained(dls.add_tfms(aug_transforms(max_rotate=0, max_zoom=1, max_warp=0, max_lighting=0)), (CACHED,))
    with pytest.raises(UserError, match="the batch transforms give something else each time"):
        trained(dls.add_tfms([lambda x: x + torch.rand(1) if x.ndim == 4 else x]), (CACHED,))
    with pytest.raises(UserError, match="the batch transforms make of a row depends on the others"):
        trained(dls.add_tfms([lambda x: x.float() - x.float().mean(0) if x.ndim == 4 else x]), (CACHED,))
    with pytest.raises(UserError, match="item transforms are random"):
        trained(digits_block.new(item_tfms=RandomResizedCrop(16)).dataloaders(few_digits), (CACHED,))
    with pytest.raises(UserError, match="only rows that a DataBlock has prepared"):
        trained(DataLoaders([dls.one_batch()], [dls.one_batch()]), (CACHED,))


def test_features_are_kept_where_the_data_is(
    digits_block: DataBlock, few_digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a storage's URL, from where another node fetches them; with cache="off", until this process ends."""
    monkeypatch.setenv("HOME", str(tmp_path / "node"))
    monkeypatch.setenv("FASTRAY_CACHE", f"file://{tmp_path}/storage")
    dls = digits_block.dataloaders(few_digits, batch_size=32)
    first = compute_ahead(learner(dls), (CACHED,), map)
    assert first is not None
    assert (tmp_path / "storage" / "prepared" / first.fingerprint / "index.json").exists()
    monkeypatch.setenv("HOME", str(tmp_path / "other"))
    again = compute_ahead(learner(digits_block.dataloaders(few_digits, batch_size=32)), (CACHED,), map)
    assert again is not None
    assert again.reused
    assert again.table(0).equals(first.table(0))
    once = compute_ahead(learner(digits_block.dataloaders(few_digits, batch_size=32, cache="off")), (CACHED,), map)
    assert once is not None
    assert not once.reused
    assert once.folder.name.startswith(".")
