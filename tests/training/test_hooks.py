"""Hooks and what they record."""

import pytest
import torch
from torch import nn

from training import ActivationStats, Callback, HookCallback, Learner, hook_output, hook_outputs, output_sizes
from training.testing import tiny_learner


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


def test_outputs_are_stored_until_the_hooks_are_removed() -> None:
    net, x = model(), torch.randn(5, 3)
    with hook_outputs(net) as hooks:
        y = net(x)
        assert len(hooks) == 3
        assert torch.equal(hooks[1].stored, net[1](net[0](x)))
        assert torch.equal(hooks.stored[2], y)
        assert not hooks.stored[2].requires_grad
    net(torch.randn(7, 3))
    assert hooks.stored[2].shape == (5, 2)
    assert [len(m._forward_hooks) for m in net] == [0, 0, 0]


def test_gradients_of_outputs() -> None:
    net, x = model(), torch.randn(5, 3)
    with hook_output(net[1], grad=True) as hook:
        net(x).sum().backward()
    torch.testing.assert_close(hook.stored, net[2].weight.detach().sum(dim=0).expand(5, 4))


def test_sizes_of_outputs() -> None:
    net = model()
    assert output_sizes(net, torch.randn(5, 3)) == [(5, 4), (5, 4), (5, 2)]
    assert net.training


def test_statistics_of_activations() -> None:
    stats = ActivationStats(with_hist=True)
    learn = tiny_learner(stats)
    given: list[torch.Tensor] = []
    with hook_output(learn.model[1][2]) as hook:

        class Keep(Callback):
            def after_pred(self, learn: Learner) -> None:
                if learn.training:
                    given.append(hook.stored)

        learn.add_callback(Keep())
        learn.fit(1)
    assert [len(batch) for batch in stats.stats] == [3, 3, 3]  # convolution, BatchNorm, linear
    assert stats.layer_stats(2)["mean"] == pytest.approx([float(g.mean()) for g in given], abs=1e-6)
    assert stats.layer_stats(2)["std"] == pytest.approx([float(g.std(correction=0)) for g in given])
    near = [float((g.abs() <= 0.05).float().mean()) for g in given]
    assert stats.layer_stats(2)["near_zero"] == pytest.approx(near)
    assert sum(stats.stats[0][2]["hist"]) == 8
    assert [a.get_title() for a in stats.plot_layer_stats(0).axes] == ["mean", "std", "near_zero"]


def test_only_every_nth_training_batch_is_looked_at_in_the_given_modules() -> None:
    learn = tiny_learner()
    stats = ActivationStats(modules=[learn.model[1]], every=2)
    learn.add_callback(stats)
    learn.fit(2)
    assert [len(batch) for batch in stats.stats] == [1] * 4


def test_a_hook_callback_says_what_it_lacks() -> None:
    with pytest.raises(NotImplementedError, match="def hook"):
        tiny_learner(HookCallback()).fit(1)
    with pytest.raises(ValueError, match="at least 1, not 0"):
        HookCallback(every=0)
