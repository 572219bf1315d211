"""What a person gives a Learner wrongly is said with what to write instead, before anything trains where that is possible."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from blocks import DataLoaders
from blocks.errors import UserError
from training import (
    SGD,
    AvgMetric,
    EarlyStopping,
    F1Score,
    GradientAccumulation,
    GradientClip,
    Learner,
    Progress,
    ReduceLROnPlateau,
    SaveBest,
    body_and_head,
    get_hyper,
    set_hyper,
)

from .toy import batches, data, deep, learner

ROWS = batches((4, 4))


def frozen() -> Learner:
    learn = learner()
    learn.model.requires_grad_(False)
    return learn


def of(rows: Any, **settings: Any) -> Learner:
    return learner(DataLoaders(rows, rows, **settings))


@pytest.mark.parametrize(
    ("do", "error", "says"),
    [
        (lambda: learner(ROWS), TypeError, r"dls needs train and valid, .* DataLoaders\(train, valid\), not a list"),
        (lambda: learner(SimpleNamespace(train=ROWS)), TypeError, "dls needs valid"),
        (lambda: learner(model=lambda x: x), TypeError, "model is an nn.Module, not <function"),
        (lambda: learner(opt_func="adam"), TypeError, r"such as Adam, partial\(SGD, mom=0.9\) .* not 'adam'"),
        (lambda: learner(loss_func=nn.CrossEntropyLoss), TypeError, r"make one, CrossEntropyLoss\(\)"),
        (lambda: learner(loss_func="mse"), TypeError, r"loss_func is a function of \(pred, \*targets\), not 'mse'"),
        (lambda: learner(cbs=[EarlyStopping()]), TypeError, "cbs= is fastai's; here it is callbacks="),
        (lambda: learner().fit_one_cycle(n_epoch=2), TypeError, "here it is the first argument"),
        (lambda: learner().fine_tune(1, cbs=[]), TypeError, "here it is callbacks="),
        (lambda: learner(callbacks=[EarlyStopping]), TypeError, r"make one, EarlyStopping\(\)"),
        (lambda: learner(metrics=[AvgMetric]), TypeError, "a metric is a function"),
        (lambda: learner(loss_func=lambda p, y: p.mean()).get_preds(with_loss=True), TypeError, "has no `reduction`"),
        (lambda: learner().tta(n=0), ValueError, "at least 1, not 0"),
        (lambda: EarlyStopping(patience=0), ValueError, "patience is a number of epochs"),
        (lambda: ReduceLROnPlateau(patience=0), ValueError, "patience is a number of epochs"),
        (lambda: GradientAccumulation(0), ValueError, "n_acc is a number of rows"),
        (lambda: GradientClip(0.0), ValueError, "above 0, not 0.0"),
        (lambda: learner().fit(True), TypeError, "a schedule is a number of epochs"),
        (lambda: learner().fit(1, lr="1e-3"), ValueError, "lr, unless it is slice.*, is a number, 0 or more, not '1e-3'"),
        (lambda: learner().fit(1, lr=-1), ValueError, "0 or more, not -1"),
        (lambda: learner().fit(1, lr=float("nan")), ValueError, "0 or more, not nan"),
        (lambda: learner().fit(1, lr=[1e-5, 1e-3]), ValueError, r"slice\(first, last\), is a number"),
        (lambda: learner().fit(1, lr=slice(1e-3, 1e-5)), ValueError, "first <= last"),
        (lambda: learner().fit(1, lr=slice("a", "b")), ValueError, "a rate is a number"),
        (lambda: learner().fit(1, wd=-1), ValueError, "wd is a number, 0 or more, not -1"),
        (
            lambda: learner(moms=(0.9, 0.8)).fit_one_cycle(1),
            ValueError,
            "moms are the momentum at the start, the middle and the",
        ),
        (lambda: of([{"x": x, "y": y} for x, y in ROWS]).fit(1), TypeError, "a tuple of 1 input and the targets, not a dict"),
        (lambda: of([x for x, _ in ROWS]).fit(1), TypeError, "a tuple of 1 input and the targets, not a Tensor"),
        (lambda: of(ROWS, n_inp=3).fit(1), TypeError, "a tuple of 3 inputs and the targets, not 2 columns"),
        (lambda: learner().get_preds(ROWS[0]), TypeError, "a tuple of 1 input and the targets, not a Tensor"),
        (lambda: frozen().fit(1), ValueError, r"depends on no parameter that trains: unfreeze\(\)"),
        (lambda: learner(loss_func=lambda p, y: 0.5).fit(1), TypeError, "the mean over the rows, not 0.5"),
        (lambda: learner(loss_func=partial(cross_entropy, reduction="none")).fit(1), ValueError, r"has the shape \(4,\)"),
        (lambda: learner(splitter=lambda m: list(m.parameters())).fit(1), TypeError, "a splitter gives groups of parameters"),
        (
            lambda: learner(splitter=lambda m: [m[0].parameters()]).fit(1),
            ValueError,
            "leaves out 4 parameters, .*: 1.weight, 1.b",
        ),
        (lambda: learner(metrics=F1Score).fit(1), TypeError, r"Call it first: metrics=F1Score\(\)"),
        (lambda: of([(x * float("nan"), y) for x, y in ROWS]).lr_find(), ValueError, "the first loss is nan already"),
        (lambda: learner(SimpleNamespace(train=iter(ROWS), valid=[])).lr_find(), ValueError, "the data has no length"),
    ],
)
def test_what_is_given_wrongly_is_said(do: Callable[[], Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        do()


def test_parameters_that_never_train_may_be_left_out_of_the_groups() -> None:
    def head(model: nn.Module) -> Any:
        model[0].requires_grad_(False)
        return [model[1].parameters(), model[4].parameters()]

    learner(splitter=head).fit(1)


def test_one_callback_is_given_as_it_is_or_in_a_list() -> None:
    one = EarlyStopping()
    assert one in learner(callbacks=one).callbacks
    learn = learner()
    learn.fit(1, callbacks=one)
    for given in (one, [one], (c for c in [one])):
        with learn.added_cbs(given):
            assert one in learn.callbacks
            with learn.removed_cbs([one]):
                assert one not in learn.callbacks
    assert one not in learn.callbacks


def test_callbacks_are_removed_by_their_class() -> None:
    learn = Learner(data(), deep(), cross_entropy, callbacks=[SaveBest(), EarlyStopping()])
    learn.remove_cbs([Progress, SaveBest])
    assert {"Progress", "SaveBest"}.isdisjoint(c.name for c in learn.callbacks)
    learn.remove_cb(learn.early_stopping)  # type: ignore[attr-defined]
    learn.remove_cb(EarlyStopping)  # there is none


def test_a_checkpoint_holds_plain_numbers_whatever_was_given(tmp_path: Path) -> None:
    """NumPy's are not read back by torch.load(weights_only=True)."""
    learn = learner(splitter=body_and_head)
    learn.fit(1, lr=slice(np.float64(1e-3), np.float32(1e-2)), wd=np.float64(0.1))
    set_hyper(learn.opt, "eps", np.float64(1e-4))
    fresh = learner(splitter=body_and_head).load(learn.save(tmp_path / "learner.pt"))
    assert fresh.run_lr == slice(1e-3, pytest.approx(1e-2))
    assert get_hyper(fresh.opt, "eps") == [1e-4] * len(fresh.opt.param_groups)


def test_a_file_that_is_no_state_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("text")
    torch.save(deep(), tmp_path / "model")
    for name in ("text", "model"):
        with pytest.raises(UserError, match=r"is no file that learn\.save wrote, or it is damaged"):
            learner().load(tmp_path / name)
    whole = learner().save(tmp_path / "whole").read_bytes()
    (tmp_path / "cut").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="damaged"):
        learner().load(tmp_path / "cut")
    torch.save(deep().state_dict(), tmp_path / "weights")
    with pytest.raises(UserError, match=r"Weights alone are loaded by learn\.model\.load_state_dict"):
        learner().load(tmp_path / "weights")


def test_the_state_of_another_optimizer_is_refused(tmp_path: Path) -> None:
    learn = learner()
    learn.fit(1)
    with pytest.raises(UserError, match=r"the state is of another optimizer: its groups have .*sqr_mom"):
        learner(opt_func=SGD).load(learn.save(tmp_path / "learner.pt"))


def test_a_model_may_give_a_dict() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"out": self.layer(x)}

    learn = learner(model=Named(), loss_func=lambda pred, y: cross_entropy(pred["out"], y)).to_bf16()
    learn.fit(1)
    preds, _ = learn.get_preds()
    x = torch.cat([batch[0] for batch in learn.dls.valid])
    torch.testing.assert_close(preds["out"], learn.model(x)["out"].detach())


def test_a_failed_look_at_the_targets_is_said_as_itself() -> None:
    class Rows:
        def __iter__(self) -> Any:
            raise AttributeError("mine")

    dls = SimpleNamespace(train=Rows(), valid=[])
    with pytest.raises(AttributeError, match="mine"):
        Learner(dls, deep())
