"""Every shipped callback keeps the promises of `training.testing`: one table of settings feeds all checks."""

import ast
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import training
from blocks import DataLoaders
from training import Callback, Learner, SchedCos, testing
from training.testing import MakeCallback, MakeLearner, tiny_learner


class Recurrent(nn.Module):
    """A language model of 10 words: (rows, steps) -> prediction (rows, steps, 10), raw and dropped outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.rnn, self.out = nn.Embedding(10, 4), nn.LSTM(4, 6, batch_first=True), nn.Linear(6, 10)
        self.reset()

    def reset(self) -> None:
        self.hidden: Any = None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        raw, hidden = self.rnn(self.words(x), self.hidden)
        self.hidden = tuple(h.detach() for h in hidden)
        dropped = nn.functional.dropout(raw, 0.1, self.training)
        return self.out(dropped), raw, dropped


def recurrent_learner(*callbacks: Callback) -> Learner:
    torch.manual_seed(2)
    batches = [(torch.randint(10, (4, 7)), torch.randint(10, (4, 7))) for _ in range(6)]
    both = training.RNNRegularizer(), training.ModelResetter()
    missing = [c for c in both if c.name not in {given.name for given in callbacks}]
    dls = DataLoaders(batches[:4], batches[4:])
    return Learner(dls, Recurrent(), training.CrossEntropyLossFlat(), lr=0.01, callbacks=[*callbacks, *missing])


class Rates(nn.Module):
    """The score of a user's code and an item's, (rows, 2) -> (rows,)."""

    def __init__(self) -> None:
        super().__init__()
        self.users, self.items = nn.Embedding(4, 3), nn.Embedding(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return (self.users(x[:, 0]) * self.items(x[:, 1])).sum(1)


def choosing_learner(*callbacks: Callback) -> Learner:
    torch.manual_seed(2)
    batches = [(torch.stack([torch.randint(4, (6,)), torch.randint(1, 5, (6,))], 1),) for _ in range(5)]
    dls = DataLoaders(batches[:3], batches[3:])
    return Learner(dls, Rates(), training.BCEWithLogitsLossFlat(), lr=0.01, callbacks=callbacks)


def forecasting_learner(*callbacks: Callback) -> Learner:
    torch.manual_seed(2)
    batches = [(torch.randn(4, 6, 2), torch.randn(4, 3, 2)) for _ in range(5)]
    dls = DataLoaders(batches[:3], batches[3:])
    return Learner(dls, training.NLinear(6, 3), training.L1LossFlat(), lr=0.01, callbacks=callbacks)


class SeesTargets(nn.Module):
    """A model that is given the targets beside the inputs, and does not need them to predict."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(3, 1)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        assert y is None or y.shape == (len(x), 1)
        return self.out(x)


def target_giving_learner(*callbacks: Callback) -> Learner:
    torch.manual_seed(2)
    batches = [(torch.randn(4, 3), torch.randn(4, 1)) for _ in range(5)]
    dls = DataLoaders(batches[:3], batches[3:])
    return Learner(dls, SeesTargets(), training.MSELossFlat(), lr=0.01, callbacks=callbacks)


def gan_learner(*callbacks: Callback) -> Learner:
    torch.manual_seed(4)
    real = [(torch.randn(8, 2),) for _ in range(5)]
    losses = training.gan.bce_gen_loss, training.gan.bce_crit_loss
    switcher = next((c for c in callbacks if "Switcher" in c.name), None)
    models = nn.Linear(3, 2), nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1))
    learn = training.GANLearner(DataLoaders(real[:4], real[4:]), *models, *losses, switcher, noise=3, lr=0.01)
    for callback in callbacks:
        if isinstance(callback, training.GANTrainer):
            learn.remove_callback(next(c for c in learn.callbacks if isinstance(c, training.GANTrainer)))
        if callback is not switcher:
            learn.add_callback(callback)
    return learn


SETTINGS: dict[str, tuple[MakeCallback, MakeLearner]] = {
    name: setting if isinstance(setting, tuple) else (setting, tiny_learner)
    for name, setting in {
        "AdaptiveGANSwitcher": (lambda: training.AdaptiveGANSwitcher(None, 0.8), gan_learner),
        "FixedGANSwitcher": (lambda: training.FixedGANSwitcher(2, 1), gan_learner),
        "GANTrainer": (lambda: training.GANTrainer(clip=0.5, noise=3), gan_learner),
        "AgainstLinear": (lambda: training.AgainstLinear(torch.ones(7, 3) / 7), forecasting_learner),
        "AgainstNaive": (training.AgainstNaive, forecasting_learner),
        "AgainstOthers": (lambda: training.AgainstOthers(5), choosing_learner),
        "ActivationStats": lambda: training.ActivationStats(every=2, with_hist=True),
        "BatchTransforms": training.BatchTransforms,
        "BnFreeze": training.BnFreeze,
        "CSVLogger": training.CSVLogger,
        "ChannelsLast": training.ChannelsLast,
        "CollectData": training.CollectData,
        "CutMix": training.CutMix,
        "EarlyStopping": lambda: training.EarlyStopping(patience=5),
        "FetchPredictions": training.FetchPredictions,
        "GatherPredictions": lambda: training.GatherPredictions(with_input=True, with_loss=True),
        "GiveTargets": (training.GiveTargets, target_giving_learner),
        "GradientAccumulation": lambda: training.GradientAccumulation(8),
        "GradientClip": lambda: training.GradientClip(0.1),
        "LRFinder": lambda: training.LRFinder(1e-3, 0.1, 20),
        "MCDropout": training.MCDropout,
        "MixUp": training.MixUp,
        "MixedPrecision": training.MixedPrecision,
        "MixedPrecision float16": lambda: training.MixedPrecision(torch.float16),
        "ModelResetter": (training.ModelResetter, recurrent_learner),
        "ParamScheduler": lambda: training.ParamScheduler({"wd": training.SchedLin(0.1, 0.0), "lr": SchedCos(0.02, 0.0)}),
        "Progress": training.Progress,
        "RNNRegularizer": (lambda: training.RNNRegularizer(2.0, 1.0), recurrent_learner),
        "Recorder": training.Recorder,
        "ReduceLROnPlateau": training.ReduceLROnPlateau,
        "SaveBest": lambda: training.SaveBest(with_opt=True),
        "ScheduledRates": training.ScheduledRates,
        "ShowGraph": training.ShowGraph,
        "ShortEpoch": lambda: training.ShortEpoch(0.5),
        "TerminateOnNaN": training.TerminateOnNaN,
    }.items()
}
TO_DERIVE_FROM = {"Callback", "HookCallback", "ValueWatcher"}


@pytest.mark.parametrize(("make", "make_learner"), SETTINGS.values(), ids=SETTINGS.keys())
@pytest.mark.parametrize(
    "check",
    [
        testing.check_training_goes_on_after_cancel,
        testing.check_state_round_trip,
        testing.check_picklable,
        testing.check_restores_what_it_changed,
        testing.check_same_result_again,
        testing.check_goes_on_where_it_stopped,
    ],
)
@pytest.mark.filterwarnings("ignore:.* watches valid/loss, which epoch 0 did not record:UserWarning")
def test_promises(check: Callable[[MakeCallback, MakeLearner], None], make: MakeCallback, make_learner: MakeLearner) -> None:
    check(make, make_learner)


def test_every_shipped_callback_is_in_the_table() -> None:
    """Read from the sources, so that one without a public name is found too."""
    shipped = set()
    for file in Path(inspect.getfile(training)).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                found = getattr(__import__(f"training.{file.stem}", fromlist=["_"]), node.name)
                shipped |= {node.name} if issubclass(found, Callback) else set()
    assert shipped - TO_DERIVE_FROM == {name.split()[0] for name in SETTINGS}


def test_all_promises_are_checked_by_check_callback() -> None:
    class Broken(Callback):
        def before_fit(self, learn: Learner) -> None:
            learn.loss_func = nn.CrossEntropyLoss()

    with pytest.raises(AssertionError, match="the fit left changed: loss_func"):
        testing.check_restores_what_it_changed(Broken, tiny_learner)
    with pytest.raises((AssertionError, AttributeError)):
        testing.check_callback(Broken)


def test_a_state_that_is_no_plain_data_is_found() -> None:
    class Code(Callback):
        def state_dict(self) -> dict[str, Any]:
            return {"function": print}

    with pytest.raises(Exception, match="Weights only load failed"):
        testing.check_state_round_trip(Code, tiny_learner)


def test_a_callback_that_trains_otherwise_each_time_is_found() -> None:
    class Random(Callback):
        def before_step(self, learn: Learner) -> None:
            generator = torch.Generator()
            generator.seed()
            for p in learn.model.parameters():
                p.grad += torch.randn(p.shape, generator=generator)

    with pytest.raises(AssertionError, match="the weights are others"):
        testing.check_same_result_again(Random, tiny_learner)
