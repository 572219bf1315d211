"""MixUp and CutMix: what is mixed, with which shares, and what is learned from it."""

from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import beta, kstest
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from blocks import DataLoaders
from blocks.draws import sample_keys, uniform
from training import Callback, CrossEntropyLossFlat, CutMix, Learner, MixUp
from training.mixing import beta_quantile


class Seen(Callback):
    """Keeps what the model is given, and the losses."""

    order = 100

    def __init__(self) -> None:
        self.x: list[Tensor] = []
        self.losses: list[float] = []

    def before_batch(self, learn: Learner) -> None:
        self.x.append(learn.xb[0])

    def after_loss(self, learn: Learner) -> None:
        self.losses.append(float(learn.loss_grad.detach()))


def one_hot_learner(*callbacks: Callback, rows: int = 16) -> Learner:
    """The pictures (rows, 8, 8) of row i are 1 in channel i and 0 elsewhere, so that what was mixed can be read off."""
    x = torch.eye(rows)[:, :, None, None].expand(rows, rows, 8, 8).clone()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64 * rows, rows))
    dls = DataLoaders([(x, torch.arange(rows))] * 2, [(x, torch.arange(rows))])
    return Learner(dls, model, CrossEntropyLossFlat(), torch.optim.SGD, lr=0.0, callbacks=callbacks)


@pytest.mark.parametrize("make", [MixUp, CutMix])
def test_the_losses_are_mixed_as_the_pictures_are(make: Any) -> None:
    seen = Seen()
    learn = one_hot_learner(make(), seen)
    learn.fit(1)
    for mixed, loss in zip(seen.x[:2], seen.losses[:2], strict=True):
        shares = mixed.mean(dim=(2, 3))  # of each row's picture: whose it is
        torch.testing.assert_close(shares.sum(dim=1), torch.ones(16))
        assert loss == pytest.approx(float(cross_entropy(learn.model(mixed), shares).detach()), rel=1e-5)
        others = shares * (1 - torch.eye(16))
        assert int((others > 0).sum(dim=1).max()) == 1
        assert int((others > 0).sum(dim=0).max()) == 1
        assert bool(others.sum() > 0.5)
    assert not torch.equal(seen.x[0], seen.x[1])
    assert torch.equal(seen.x[2], learn.dls.valid[0][0])


def test_mixup_keeps_at_least_half_of_each_row() -> None:
    seen = Seen()
    one_hot_learner(MixUp(1.0), seen).fit(1)
    kept = seen.x[0].mean(dim=(2, 3)).diagonal()
    assert 0.5 <= float(kept.min()) < 0.7


def test_cutmix_puts_in_one_box_of_whole_pixels() -> None:
    seen = Seen()
    one_hot_learner(CutMix(), seen).fit(1)
    own = seen.x[0][torch.arange(16), torch.arange(16)]  # 1 where a row's picture is its own
    assert set(own.unique().tolist()) == {0.0, 1.0}
    for picture in own:
        ys, xs = (picture == 0).nonzero(as_tuple=True)
        if len(ys):
            assert len(ys) == (ys.max() - ys.min() + 1) * (xs.max() - xs.min() + 1)


def test_a_rows_draws_are_those_of_its_key() -> None:
    """The same share in company or alone, whatever the batch: so on any number of workers."""
    keys = sample_keys(0, 1, np.arange(10))
    drawn = beta_quantile(0.4, uniform(keys, 3))
    assert torch.equal(drawn[4:7], beta_quantile(0.4, uniform(keys[4:7], 3)))


@pytest.mark.parametrize("alpha", [0.4, 1.0, 5.0])
def test_the_shares_have_the_beta_distribution(alpha: float) -> None:
    drawn = beta_quantile(alpha, uniform(sample_keys(0, 0, np.arange(20_000)), 7))
    assert kstest(drawn.numpy(), beta(alpha, alpha).cdf).pvalue > 0.01
    assert 0 <= float(drawn.min()) < float(drawn.max()) <= 1


def test_what_cannot_be_mixed_is_told() -> None:
    x, y = torch.randint(5, (4, 3)), torch.randint(2, (4,))
    learn = Learner(DataLoaders([(x, y)]), nn.Embedding(5, 2), CrossEntropyLossFlat(), callbacks=[MixUp()])
    with pytest.raises(TypeError, match=r"MixUp mixes inputs of floating point numbers, not torch\.int64"):
        learn.fit(1)
    with pytest.raises(ValueError, match=r"alpha .* above 0, not 0"):
        MixUp(0)


def test_it_learns_from_mixed_rows() -> None:
    learn = one_hot_learner(MixUp())
    learn.opt_func = torch.optim.Adam
    before = learn.validate()["valid/loss"]
    learn.fit(20, lr=0.01)
    assert learn.validate()["valid/loss"] < before / 10
