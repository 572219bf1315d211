"""Adam, parameter groups, freezing, rates."""

from collections.abc import Iterable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from training import SGD, Adam, Callback, Learner, body_and_head, one_cycle
from training.hypers import get_hyper, set_hyper
from training.optimizer import (
    OptimizerFunction,
    OptimWrapper,
    freeze_to,
    one_group,
    parameter_groups,
    set_rates,
)

from .toy import learner


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), nn.Linear(4, 2)
    )


def by_child(m: nn.Module) -> list[list[nn.Parameter]]:
    return [list(child.parameters()) for child in m.children()]


def names(m: nn.Module, parameters: Iterable[Tensor]) -> list[str]:
    found = {id(p): name for name, p in m.named_parameters()}
    return [found[id(p)] for p in parameters]


def test_adam_is_torchs_adamw() -> None:
    """Ten steps against torch's plain, unfused implementation, in double precision."""
    ours, theirs = model().double(), model().double()
    adam = Adam(ours.parameters(), lr=0.02, mom=0.8, sqr_mom=0.97, eps=1e-4, wd=0.3)
    adamw = torch.optim.AdamW(theirs.parameters(), 0.02, (0.8, 0.97), 1e-4, 0.3, foreach=False, fused=False)
    start = [p.detach().clone() for p in ours.parameters()]
    for _ in range(10):
        x = torch.randn(6, 3, dtype=torch.float64)
        for net, optimizer in ((ours, adam), (theirs, adamw)):
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()
    for p, q, s in zip(ours.parameters(), theirs.parameters(), start, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)
        assert not torch.equal(p, s)


def test_adam_has_fastais_defaults() -> None:
    defaults = Adam(model().parameters()).defaults
    assert defaults == {"lr": 1e-3, "mom": 0.9, "sqr_mom": 0.99, "eps": 1e-5, "wd": 0.01, "dampening": True}


def test_biases_and_normalisation_are_kept_from_decay() -> None:
    m = model()
    groups = parameter_groups(by_child(m), m)
    assert [(g["layer_group"], g.get("weight_decay"), names(m, g["params"])) for g in groups] == [
        (0, None, ["0.0.weight"]),
        (0, 0.0, ["0.0.bias", "0.1.weight", "0.1.bias"]),
        (1, None, ["1.0.weight"]),
        (1, 0.0, ["1.0.bias", "1.1.weight", "1.1.bias"]),
        (2, None, ["2.weight"]),
        (2, 0.0, ["2.bias"]),
    ]


@pytest.mark.parametrize("layer", [nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.LayerNorm(4), nn.InstanceNorm1d(4, affine=True)])
def test_every_norm_layer_is_kept_from_decay(layer: nn.Module) -> None:
    groups = parameter_groups(one_group(layer), layer)
    assert [(g["weight_decay"], names(layer, g["params"])) for g in groups] == [(0.0, ["weight", "bias"])]


@pytest.mark.parametrize("layer", [nn.MultiheadAttention(4, 2), nn.LSTM(3, 4), nn.GRU(3, 4)], ids=["attention", "lstm", "gru"])
def test_every_bias_is_kept_from_decay(layer: nn.Module) -> None:
    """Also those that torch calls in_proj_bias or bias_ih_l0."""
    groups = parameter_groups(one_group(layer), layer)
    decayed = [name for g in groups if "weight_decay" not in g for name in names(layer, g["params"])]
    assert decayed == [name for name, _ in layer.named_parameters() if "bias" not in name]


def test_decay_takes_effect_on_weights_only() -> None:
    """Without gradients of size, decay alone moves: weights shrink by 1 - lr * wd, the rest stays."""
    m = model()
    optimizer = Adam(parameter_groups(by_child(m), m), lr=0.1, wd=0.5)
    start = {name: p.detach().clone() for name, p in m.named_parameters()}
    for p in m.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in m.named_parameters():
        decayed = name in ("0.0.weight", "1.0.weight", "2.weight")
        torch.testing.assert_close(p, start[name] * (0.95 if decayed else 1))


def test_each_parameter_is_in_exactly_one_group() -> None:
    m = model()
    grouped = names(m, [p for g in parameter_groups(by_child(m), m) for p in g["params"]])
    assert sorted(grouped) == sorted(name for name, _ in m.named_parameters())


def test_one_group_and_body_and_head() -> None:
    m = model()
    assert [names(m, g) for g in one_group(m)] == [[name for name, _ in m.named_parameters()]]
    body, head = body_and_head(m)
    assert names(m, head) == ["2.weight", "2.bias"]
    assert names(m, body) == [name for name, _ in m.named_parameters()][:-2]


def test_body_and_head_leaves_no_parameter_out() -> None:
    """A parameter of the model itself, such as a ViT's class token, belongs to the body; left out, it would never train."""
    m = model()
    m.token = nn.Parameter(torch.zeros(3))
    body, head = body_and_head(m)
    assert sorted(names(m, [*body, *head])) == sorted(name for name, _ in m.named_parameters())


@pytest.mark.parametrize(
    ("n", "train_bn", "training"),
    [
        (0, True, {"0.0", "0.1", "1.0", "1.1", "2"}),
        (0, False, {"0.0", "0.1", "1.0", "1.1", "2"}),
        (1, True, {"0.1", "1.0", "1.1", "2"}),
        (1, False, {"1.0", "1.1", "2"}),
        (-1, True, {"0.1", "1.1", "2"}),
        (-1, False, {"2"}),
        (-3, False, {"0.0", "0.1", "1.0", "1.1", "2"}),
    ],
)
def test_freeze_to(n: int, train_bn: bool, training: set[str]) -> None:
    m = model()
    freeze_to(by_child(m), m, -1, False)
    freeze_to(by_child(m), m, n, train_bn)
    assert {name.rpartition(".")[0] for name, p in m.named_parameters() if p.requires_grad} == training


@pytest.mark.parametrize("n", [3, -4, 99])
def test_freeze_to_beyond_the_groups_is_refused_and_changes_nothing(n: int) -> None:
    m = model()
    with pytest.raises(ValueError, match=f"freeze_to={n}, but the model has 3 parameter groups: from -3 to 2 is possible"):
        freeze_to(by_child(m), m, n)
    assert all(p.requires_grad for p in m.parameters())


@pytest.mark.parametrize(("spread", "expected"), [(1, [0.5, 0.5, 0.5]), (100, [0.005, 0.05, 0.5])])
def test_rates_spread_in_equal_ratios(spread: float, expected: list[float]) -> None:
    m = model()
    optimizer = Adam(parameter_groups(by_child(m), m))
    set_rates(optimizer, 0.5, spread, None)
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([rate for rate in expected for _ in range(2)])
    assert {g["mom"] for g in optimizer.param_groups} == {0.9}


def test_momentum_is_set_where_the_optimizer_has_one() -> None:
    m = model()
    adam = Adam(m.parameters())
    set_rates(adam, 1, 1, 0.7)
    assert (adam.param_groups[0]["mom"], adam.param_groups[0]["sqr_mom"]) == (0.7, 0.99)
    adamw = torch.optim.AdamW(m.parameters(), betas=(0.9, 0.98))
    set_rates(adamw, 1, 1, 0.7)
    assert adamw.param_groups[0]["betas"] == (0.7, 0.98)
    set_rates(adamw, 1, 1, None)
    assert adamw.param_groups[0]["betas"] == (0.9, 0.98)
    for optimizer, expected in (
        (torch.optim.SGD(m.parameters(), lr=1, momentum=0.9), 0.7),
        (torch.optim.SGD(m.parameters(), lr=1), 0),
    ):
        set_rates(optimizer, 1, 1, 0.7)
        assert optimizer.param_groups[0]["momentum"] == expected


def test_torchs_optimizers_by_fastais_names() -> None:
    m = model()
    adam = OptimWrapper(m.parameters(), torch.optim.AdamW, lr=0.1, mom=0.8, wd=0.3, eps=1e-3)
    assert type(adam) is torch.optim.AdamW
    assert (adam.defaults["betas"], adam.defaults["weight_decay"], adam.defaults["eps"]) == ((0.8, 0.999), 0.3, 1e-3)
    assert [get_hyper(adam, name) for name in ("lr", "mom", "sqr_mom", "wd")] == [[0.1], [0.8], [0.999], [0.3]]
    rms = OptimWrapper(m.parameters(), torch.optim.RMSprop, mom=0.5, sqr_mom=0.7)
    assert (rms.defaults["momentum"], rms.defaults["alpha"]) == (0.5, 0.7)
    set_hyper(rms, "sqr_mom", 0.6)
    assert rms.param_groups[0]["alpha"] == 0.6
    with pytest.raises(ValueError, match="has no hyper-parameter 'nu_1'; it has lr, momentum"):
        set_hyper(rms, "nu_1", 1.0)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.1, [0.1, 0.1, 0.1]),
        (slice(1e-4, 1e-2), [1e-4, 1e-3, 1e-2]),
        (slice(1e-2), [1e-3, 1e-3, 1e-2]),
        ([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]),
        (np.float32(0.5), [0.5, 0.5, 0.5]),
        (torch.tensor(0.5), [0.5, 0.5, 0.5]),
        (np.array([1.0, 2.0, 3.0]), [1.0, 2.0, 3.0]),
    ],
)
def test_a_hyper_parameter_is_set_for_each_group_of_layers(value: Any, expected: list[float]) -> None:
    """The two parameter groups of a group of layers, with and without decay, get the same."""
    m = model()
    for optimizer in (Adam(parameter_groups(by_child(m), m)), torch.optim.AdamW(parameter_groups(by_child(m), m))):
        for name in ("lr", "mom"):
            set_hyper(optimizer, name, value)
            assert get_hyper(optimizer, name) == pytest.approx([v for v in expected for _ in range(2)])
            assert {type(v) for v in get_hyper(optimizer, name)} == {float}  # what a checkpoint may hold
    with pytest.raises(ValueError, match="2 values were given for 3 groups of layers"):
        set_hyper(optimizer, "lr", [1.0, 2.0])


def test_a_composed_optimizer_has_fastais_method() -> None:
    m = model()
    opt = Adam(parameter_groups(by_child(m), m))
    opt.set_hyper("wd", slice(1e-4, 1e-2))
    assert opt.get_hyper("wd") == pytest.approx([1e-4, 1e-4, 1e-3, 1e-3, 1e-2, 1e-2][: len(opt.param_groups)])


def test_adam_takes_part_of_its_numbers_ahead() -> None:
    assert partial(Adam, wd=0.2)(model().parameters()).defaults["wd"] == 0.2


@pytest.mark.parametrize("opt_func", [Adam, SGD, torch.optim.SGD])
def test_a_learner_sets_the_decay_of_any_optimizer(opt_func: OptimizerFunction) -> None:
    """Also of one whose own decay is 0, and again after a fit without any; not that of biases."""
    learn = learner(opt_func=opt_func, wd=0.5)
    assert set(get_hyper(learn.opt, "wd")) == {0.5, 0.0}
    for wd in (0.0, 0.25):
        learn.fit(1, wd=wd)
        assert get_hyper(learn.opt, "wd") == [wd if group.get("decays", True) else 0.0 for group in learn.opt.param_groups]
    assert set(get_hyper(learn.opt, "wd")) == {0.25, 0.0}


@pytest.mark.parametrize("opt_func", [Adam, partial(SGD, mom=0.5), torch.optim.Adam, partial(torch.optim.SGD, momentum=0.5)])
def test_a_momentum_that_was_set_is_kept_through_a_run_whose_phases_set_their_own(opt_func: Any) -> None:
    learn = learner(opt_func=opt_func)
    own = get_hyper(learn.opt, "mom")
    learn.fit(one_cycle(1))
    assert get_hyper(learn.opt, "mom") == own
    set_hyper(learn.opt, "mom", 0.25)
    learn.fit(one_cycle(1))
    learn.fit(1)
    assert set(learn.recorder.momenta[-3:]) == {0.25}
    assert get_hyper(learn.opt, "mom") == [0.25] * len(own)


def test_a_momentum_that_a_callback_sets_in_a_run_is_kept_where_the_phase_sets_none() -> None:
    class Sets(Callback):
        def after_epoch(self, learn: Learner) -> None:
            set_hyper(learn.opt, "mom", 0.3)

    learn = learner(callbacks=[Sets()])
    learn.fit(2)
    assert learn.recorder.momenta == [0.9] * 3 + [0.3] * 3


def test_nesterov_needs_a_momentum() -> None:
    with pytest.raises(ValueError, match=r"above 0, not mom=0\.0"):
        SGD(model().parameters(), nesterov=True)
