"""The callbacks every Learner has: the record, its plots and its table, the bar."""

import sys
from types import SimpleNamespace

import pytest
import torch

from training import Progress, Recorder
from training.callbacks import smoothed
from training.testing import same, tiny_learner


def test_losses_and_rates_step_by_step() -> None:
    learn = tiny_learner()
    learn.fit_one_cycle(2, 0.1)
    recorder = learn.recorder
    assert len(recorder.losses) == len(recorder.rates) == len(recorder.momenta) == 6
    assert recorder.epoch_ends == [3, 6]
    means = [sum(recorder.losses[i : i + 3]) / 3 for i in (0, 3)]
    assert means == pytest.approx([h["train/loss"] for h in recorder.history])
    assert recorder.rates[0] == pytest.approx(0.1 / 25)
    assert recorder.momenta[0] == pytest.approx(0.95)
    assert max(recorder.rates) <= 0.1
    again = Recorder()
    again.load_state_dict(recorder.state_dict())
    assert same(again.state_dict(), recorder.state_dict())


def test_smoothing_has_no_bias_to_the_start() -> None:
    assert smoothed([3.0, 3.0, 3.0], 0.9) == pytest.approx([3.0, 3.0, 3.0])
    assert smoothed([0.0, 1.0], 0.5) == pytest.approx([0.0, 2 / 3])


def test_plots_are_figures_of_the_record() -> None:
    learn = tiny_learner()
    learn.fit(3)
    (axes,) = learn.recorder.plot_loss(skip_start=2, smooth=0.0).axes
    train, valid = axes.lines
    assert list(train.get_xdata()) == [2, 3, 4, 5, 6, 7, 8]
    assert list(train.get_ydata()) == pytest.approx(learn.recorder.losses[2:])
    assert list(valid.get_xdata()) == [3, 6, 9]
    lr, momentum = learn.recorder.plot_sched().axes
    assert list(lr.lines[0].get_ydata()) == learn.recorder.rates
    assert list(momentum.lines[0].get_ydata()) == learn.recorder.momenta


def test_the_history_is_a_table_in_a_notebook() -> None:
    learn = tiny_learner()
    learn.fit(2)
    html = learn.recorder._repr_html_()
    assert html.count("<tr>") == 3
    assert "<th>valid/loss</th>" in html
    assert f"<td>{learn.recorder.history[1]['valid/loss']:.6g}</td>" in html


def test_a_bar_is_drawn_where_somebody_watches_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_learner().fit(1)
    quiet = capsys.readouterr()
    assert quiet.err == ""
    assert quiet.out.count("\n") == 1
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    learn = tiny_learner()
    learn.fit(1)
    watched = capsys.readouterr()
    assert "epoch 1/1" in watched.err
    assert "3/3" in watched.err or "0/3" in watched.err
    assert "validation" in watched.err
    assert next(c for c in learn.callbacks if isinstance(c, Progress))._bar is None
    assert watched.out.count("\n") == 1


def test_an_epoch_that_is_gone_on_with_on_a_gpu_is_recorded() -> None:
    """What it has so far was loaded to the CPU, what comes is on the device, for which "meta" stands."""
    begun = Recorder()
    begun.before_train(tiny_learner())
    batch = SimpleNamespace(yb=(1,), loss=torch.tensor(0.5), loss_count=4, rows=4, training=True)
    batch.opt = tiny_learner().opt
    begun.after_batch(batch)  # type: ignore[arg-type]
    state = begun.state_dict()
    assert (state["losses"], state["sums"]["loss"]) == ([0.5], 2.0)

    resumed = Recorder()
    resumed.load_state_dict(state)
    batch.loss = torch.tensor(0.5, device="meta")
    resumed.after_batch(batch)  # type: ignore[arg-type]
    assert [loss.device for loss, _ in resumed._unread] == [batch.loss.device]  # not read, which would make the host wait


def test_when_losses_are_read_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for at_once in (1, 2, 1000):
        monkeypatch.setattr("training.callbacks.READ_AT_ONCE", at_once)
        learn = tiny_learner()
        learn.fit(2)
        losses = [{k: v for k, v in values.items() if "loss" in k} for values in learn.recorder.history]
        found.append((losses, learn.recorder.losses))
    assert found[0] == found[1] == found[2]
    assert len(found[0][1]) == 6
