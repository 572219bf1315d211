"""Predictions and what else a Learner says of what it learned."""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from blocks import (
    CategoryBlock,
    DataBlock,
    DataLoaders,
    ImageBlock,
    ItemGetter,
    MaskBlock,
    Pipeline,
    RandomSplitter,
    RandTransform,
    RegressionBlock,
    TensorBase,
    get_image_files,
)
from blocks.draws import uniform
from training import (
    CrossEntropyLossFlat,
    Learner,
    MixedPrecision,
    MSELossFlat,
    ShortEpoch,
    accuracy,
    body_and_head,
    precision_callbacks,
)
from training.optimizer import group_hyper

from .toy import batches, data, deep, doing, learner


def expected(learn: Learner) -> tuple[Tensor, Tensor, Tensor]:
    x, y = (torch.cat(parts) for parts in zip(*learn.dls.valid, strict=True))
    with torch.no_grad():
        return x, learn.model.eval()(x), y


def test_get_preds_gives_all_that_is_asked_for_in_fastais_order() -> None:
    learn = learner()
    x, pred, y = expected(learn)
    inputs, preds, targets, decoded, losses = learn.get_preds(with_input=True, with_decoded=True, with_loss=True)
    torch.testing.assert_close(inputs, x)
    torch.testing.assert_close(preds, pred.softmax(1))
    assert torch.equal(targets, y)
    assert torch.equal(decoded, pred.argmax(1))
    torch.testing.assert_close(losses, cross_entropy(pred, y, reduction="none"))
    assert learn.loss_func.reduction == "mean"  # type: ignore[union-attr]


def test_get_preds_of_the_training_part_and_by_another_activation() -> None:
    learn = learner()
    preds, targets = learn.get_preds(ds_idx=0, act=lambda p: p * 0)
    assert torch.equal(targets, torch.cat([y for _, y in learn.dls.train]))
    assert not preds.any()


def test_several_inputs_and_targets_are_tuples() -> None:
    class Sum(nn.Linear):
        def forward(self, one: Tensor, other: Tensor) -> Tensor:
            return super().forward(one + other)

    rows = [(x, 2 * x, y, y) for x, y in batches((4, 3))]
    learn = learner(DataLoaders(rows, rows, n_inp=2), Sum(3, 2), loss_func=lambda p, y, z: cross_entropy(p, y))
    (one, other), _, (y, z) = learn.get_preds(with_input=True)
    assert torch.equal(other, 2 * one)
    assert torch.equal(y, z)


def test_rows_come_as_in_the_store(digits_block: DataBlock, few_digits: Path) -> None:
    """Also those of the training part, which is drawn in another order."""
    dls = digits_block.dataloaders(few_digits, batch_size=32)
    torch.manual_seed(1)
    learn = Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(768, 3)))
    assert not torch.equal(learn.get_preds(ds_idx=0, reorder=False)[1], learn.get_preds(ds_idx=0)[1])
    assert torch.equal(learn.get_preds(ds_idx=0)[1], learn.get_preds(ds_idx=0)[1].sort().values)  # files lie by class


def test_predictions_are_recorded_nowhere(capsys: pytest.CaptureFixture[str]) -> None:
    learn = learner(metrics=accuracy)
    learn.fit(1)
    values = dict(learn.recorder.values)
    capsys.readouterr()
    learn.get_preds()
    assert learn.recorder.values == values
    assert capsys.readouterr().out == ""


def test_predictions_are_float32_where_training_is_not() -> None:
    learn = learner().to_bf16()
    seen = []
    learn.model.register_forward_hook(lambda m, i, o: seen.append(o.dtype))
    learn.validate()
    learn.get_preds()
    assert seen == [torch.bfloat16] * 2 + [torch.float32] * 2
    assert any(isinstance(c, MixedPrecision) for c in learn.callbacks)


def test_without_batches_there_is_nothing_to_predict() -> None:
    with pytest.raises(ValueError, match="no batches to predict"):
        learner().get_preds([])


def test_predict_reads_one_item(digits_block: DataBlock, few_digits: Path) -> None:
    dls = digits_block.dataloaders(few_digits, batch_size=32)
    torch.manual_seed(1)
    learn = Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(768, 3)), lr=3e-3, metrics=accuracy)
    learn.fit(6)
    item = next((few_digits / "2").iterdir())
    label, index, probabilities = learn.predict(item)
    assert (label, int(index)) == ("2", 2)
    assert probabilities.shape == (3,)
    assert probabilities.sum() == pytest.approx(1)
    with pytest.raises(ValueError, match="not made from a DataBlock"):
        learner().predict(item)


class TensorNoisy(TensorBase):
    """What `Noise` is for."""


@dataclass
class Noise(RandTransform):
    """Adds a number drawn for each row, to training data."""

    def draw(self, x: Any, keys: Tensor) -> Tensor:
        return uniform(keys, 1)

    def encodes(self, x: TensorNoisy, drawn: Tensor) -> Tensor:
        return x + drawn[:, None]


def noisy() -> Learner:
    rows = [(torch.zeros(5, 1).as_subclass(TensorNoisy), torch.zeros(5, 1))]
    learn = Learner(DataLoaders(rows, rows, batch_tfms=Pipeline.of(Noise())), nn.Identity(), MSELossFlat(), lr=0.1)
    return learn


def test_tta_averages_rounds_of_other_draws() -> None:
    learn = noisy()
    (augmented, plain), targets = learn.tta(n=3, beta=None)
    assert not plain.any()
    assert augmented.unique().numel() == 5
    assert torch.equal(targets, torch.zeros(5, 1))
    torch.testing.assert_close(learn.tta(n=3, beta=0.25)[0], 0.75 * augmented)
    largest = learn.tta(n=3, use_max=True)[0]
    assert (largest > augmented).all()
    assert torch.equal(learn.tta(n=3)[0], learn.tta(n=3)[0])
    assert not learn.get_preds()[0].any()


def test_tta_of_several_outputs() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            return x, {"double": 2 * x}

    learn = noisy()
    one, _ = learn.tta(n=2)
    learn.model, learn.loss_func = Two(), lambda pred, y: pred[0].sum() * 0
    (plain, named), _ = learn.tta(n=2)
    torch.testing.assert_close((plain, named["double"]), (one, 2 * one))
    (largest, _), _ = learn.tta(n=2, use_max=True)
    assert (largest > plain).all()


def test_tta_of_rows_in_another_order_each_round_is_refused() -> None:
    """Once the mean was over other rows."""
    learn, (x, y) = learner(), (torch.cat(parts) for parts in zip(*batches((4, 4, 3)), strict=True))
    rows = TensorDataset(x, y)
    with pytest.raises(ValueError, match="in another order each time"):
        learn.tta(DataLoader(rows, batch_size=4, shuffle=True))

    class Shuffles:
        def __iter__(self) -> Any:
            order = torch.randperm(len(x))
            return iter([(x[order], y[order])])

        def __len__(self) -> int:
            return 1

    with pytest.raises(ValueError, match="in another order each time"):
        learn.tta(Shuffles())
    preds, targets = learn.tta(DataLoader(rows, batch_size=4))
    assert torch.equal(targets, y)
    torch.testing.assert_close(preds, learn.get_preds(DataLoader(rows, batch_size=4))[0])


def test_predictions_that_memory_does_not_hold_go_to_files(tmp_path: Path) -> None:
    learn = learner()
    preds, targets = learn.get_preds()
    inputs, none, nothing, losses = learn.get_preds(
        with_input=True, with_loss=True, save_preds=tmp_path / "preds", save_targs=tmp_path / "targs"
    )
    assert none.numel() == nothing.numel() == 0
    assert len(inputs) == len(losses) == 5
    for name, expected in (("preds", preds), ("targs", targets)):
        files = [np.load(tmp_path / name / f"{i}.npy") for i in range(len(list((tmp_path / name).iterdir())))]
        assert len(files) == 2
        assert np.array_equal(np.concatenate(files), expected.numpy())
    with pytest.raises(ValueError, match="with_decoded needs the predictions in memory"):
        learn.get_preds(save_preds=tmp_path, with_decoded=True)


def test_show_results_is_a_figure(digits_block: DataBlock, few_digits: Path) -> None:
    dls = digits_block.dataloaders(few_digits, batch_size=32)
    figure = Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(768, 3))).show_results(n=4)
    assert isinstance(figure, Figure)
    titles = [axis.get_title() for axis in figure.axes]
    assert len(titles) == 4
    assert all(set(title.split("\n")) <= {"0", "1", "2"} and len(title.split("\n")) == 2 for title in titles)


def test_show_results_of_numbers_is_a_table() -> None:
    rows = [(x, x[:, :1].clone()) for x, _ in batches((4, 3))]
    figure = learner(DataLoaders(rows, rows), nn.Linear(3, 1), loss_func=MSELossFlat()).show_results(n=3)
    assert isinstance(figure, Figure)


def test_summary_names_layers_shapes_and_parameters() -> None:
    learn = learner(splitter=body_and_head)
    learn.freeze()
    before = {name: w.clone() for name, w in learn.model.state_dict().items()}
    lines = learn.summary().splitlines()
    assert lines[0] == "Sequential on batches of 4 rows"
    assert lines[2].split() == ["0", "Linear", "(4,", "5)", "20", "no"]
    assert lines[3].split() == ["1", "BatchNorm1d", "(4,", "5)", "10", "yes"]
    assert "42 parameters, 22 train" in lines
    assert any("CrossEntropyLossFlat" in line for line in lines)
    assert all(torch.equal(w, before[name]) for name, w in learn.model.state_dict().items())


def test_show_training_loop_prints_events_and_who_listens(capsys: pytest.CaptureFixture[str]) -> None:
    learn = learner(callbacks=[doing("after_pred", lambda learn: None)])
    learn.show_training_loop()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "before_fit"
    assert lines[-1].split()[0] == "after_fit"
    assert any(line.startswith("      after_pred") and line.endswith("Doing") for line in lines)
    assert {line.split()[0] for line in lines if line.startswith("  ")} >= {"before_epoch", "after_cancel_batch"}
    assert [line for line in lines if line.startswith("    after_train")]


# --- contexts ------------------------------------------------------------------------------------------------------------


def test_callbacks_may_be_there_or_not_for_a_while() -> None:
    learn, seen = learner(), []
    note = doing("before_fit", lambda learn: seen.append(1))
    with learn.added_callbacks(note):
        learn.fit(1)
        with learn.removed_callbacks(note):
            learn.fit(1)
        learn.fit(1)
    learn.fit(1)
    learn.fit(1, callbacks=[note])
    assert len(seen) == 3
    assert note not in learn.callbacks


def test_added_callbacks_go_after_an_error() -> None:
    learn = learner()
    note = doing("before_fit", lambda learn: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        learn.fit(1, callbacks=[note])
    assert note not in learn.callbacks


def test_no_logging_prints_nothing_and_no_bar_only_the_lines(capsys: pytest.CaptureFixture[str]) -> None:
    learn = Learner(data(), deep(), CrossEntropyLossFlat(), lr=0.1)
    with learn.no_logging():
        learn.fit(1)
    assert capsys.readouterr().out == ""
    with learn.no_bar():
        assert not learn.progress.bar  # type: ignore[attr-defined]
        learn.fit(1)
    assert capsys.readouterr().out.startswith("epoch 1/1")
    assert learn.progress.bar  # type: ignore[attr-defined]


def test_a_loss_function_of_torch_is_not_reduced_either() -> None:
    learn = learner(loss_func=cross_entropy)
    _, pred, y = expected(learn)
    torch.testing.assert_close(learn.get_preds(with_loss=True)[-1], cross_entropy(pred, y, reduction="none"))
    assert learn.loss_func is cross_entropy


def test_callbacks_are_found_by_name() -> None:
    learn = learner(callbacks=[MixedPrecision()])
    assert learn.mixed_precision is learn.callbacks[-2] or isinstance(learn.mixed_precision, MixedPrecision)  # type: ignore[attr-defined]
    assert not hasattr(learn, "save_best")
    with pytest.raises(AttributeError, match="neither an attribute nor a callback 'mixed_precisoin'"):
        _ = learn.mixed_precisoin  # type: ignore[attr-defined]


# --- precision -----------------------------------------------------------------------------------------------------------


def test_precision_is_chosen_and_taken_back() -> None:
    learn = learner()
    plain = list(learn.callbacks)
    assert learn.to_bf16().to_fp16().to_channels_last().to_channels_last() is learn
    assert [c.dtype for c in learn.callbacks if isinstance(c, MixedPrecision)] == [torch.float16]
    assert [c.name for c in learn.callbacks].count("ChannelsLast") == 1
    learn.to_fp32().remove_callback(learn.channels_last)  # type: ignore[attr-defined]
    assert learn.callbacks == plain


@pytest.mark.parametrize("pays", [True, False])
def test_auto_is_bfloat16_where_that_pays_and_says_so(
    pays: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("training.precision.bf16_pays", lambda device: pays)
    assert not any(isinstance(c, MixedPrecision) for c in learner().callbacks)  # a Learner itself is float32
    found = precision_callbacks("auto", torch.device("cpu"))
    assert [c.name for c in found] == ["MixedPrecision", "ChannelsLast"] * pays
    assert ("bfloat16" in capsys.readouterr().out) == pays


def test_other_precisions() -> None:
    assert precision_callbacks("fp32", torch.device("cpu")) == []
    (half, _) = precision_callbacks("fp16", torch.device("cpu"))
    assert isinstance(half, MixedPrecision)
    assert half.dtype == torch.float16
    with pytest.raises(ValueError, match="auto, fp32, bf16 or fp16"):
        precision_callbacks("int8", torch.device("cpu"))  # type: ignore[arg-type]


def test_compile_keeps_the_names_of_the_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    learn = learner()
    compiled: list[nn.Module] = []
    monkeypatch.setattr(type(learn.model), "compile", lambda self: compiled.append(self))
    assert learn.compile() is learn
    assert compiled == [learn.model]


def test_weight_decay_is_the_learners_but_for_biases_and_normalisation() -> None:
    def decays(**settings: Any) -> dict[str, float]:
        learn = learner(**settings)
        of = {id(p): group_hyper(g, "wd") for g in learn.opt.param_groups for p in g["params"]}
        return {name: of[id(p)] for name, p in learn.model.named_parameters()}

    assert decays(wd=0.3) == {name: 0.3 * (name in ("0.weight", "4.weight")) for name in decays()}
    assert set(decays(wd=0.3, wd_bn_bias=True).values()) == {0.3}
    assert decays()["0.weight"] == 0.01
    learn = learner()
    learn.fit(1, wd=0.5)
    assert {group_hyper(g, "wd") for g in learn.opt.param_groups} == {0.5, 0.0}


def test_moms_and_train_bn_are_the_learners() -> None:
    learn = learner(splitter=body_and_head, train_bn=False, moms=(0.9, 0.7, 0.8))
    learn.fit_one_cycle(1)
    assert learn.schedule[0].momentum is not None
    assert [v for _, v in learn.schedule[0].momentum.points] == [0.9, 0.7, 0.8]
    learn.freeze()
    assert {name for name, p in learn.model.named_parameters() if p.requires_grad} == {"4.weight", "4.bias"}
    learn.fine_tune(1)
    assert learn.schedule[0].train_bn is None


@pytest.mark.parametrize(
    ("fit", "epochs"),
    [
        (lambda learn: learn.fit_flat_cos(2, 0.1, pct_start=0.5), 2),
        (lambda learn: learn.fit_sgdr(2, 1, 0.1), 3),
        (lambda learn: learn.fine_tune(1, slice(1e-3, 1e-1), freeze_epochs=2), 3),
        (lambda learn: learn.fit_one_cycle(2, slice(1e-3, 1e-1), pct_start=0.5, div=10), 2),
    ],
)
def test_the_ways_to_fit(fit: Any, epochs: int) -> None:
    learn = learner(splitter=body_and_head)
    fit(learn)
    assert len(learn.recorder.history) == epochs


def test_rates_by_slice_are_those_of_the_first_and_the_last_group() -> None:
    learn = learner(splitter=body_and_head)
    learn.fit(1, lr=slice(0.001, 0.1))
    assert {g["layer_group"]: g["lr"] for g in learn.opt.param_groups} == {0: pytest.approx(0.001), 1: 0.1}


def test_what_has_no_dataloaders_can_be_predicted() -> None:
    rows = batches((4, 3))
    learn = learner(SimpleNamespace(train=rows, valid=rows))
    assert len(learn.get_preds()[0]) == 7


def test_predict_of_a_mask_gives_its_pixels(few_digits: Path) -> None:
    """Its classes have names, too, but it is not a list of them."""
    block = DataBlock(
        blocks=(ImageBlock(), MaskBlock(("paper", "ink"))),
        get_items=get_image_files,
        get_y=lambda path: (np.asarray(Image.open(path).convert("L")) > 100).astype(np.uint8),
        splitter=RandomSplitter(0.25, seed=1),
    )
    learn = Learner(block.dataloaders(few_digits, batch_size=16), nn.Conv2d(3, 2, 1))
    decoded, prediction, activations = learn.predict(get_image_files(few_digits)[0])
    assert torch.equal(decoded, prediction)
    assert torch.equal(prediction, activations.argmax(dim=0))


def test_predict_of_several_inputs() -> None:
    class Added(nn.Linear):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(a + 2 * b)

    items = [((float(i), 1.0), (float(-i), 2.0), i % 2) for i in range(20)]
    block = DataBlock(
        blocks=(RegressionBlock(2), RegressionBlock(2), CategoryBlock()),
        n_inp=2,
        getters=[ItemGetter(0), ItemGetter(1), ItemGetter(2)],
        splitter=RandomSplitter(0.25, seed=1),
    )
    learn = Learner(block.dataloaders(items, batch_size=4), Added(2, 2))
    logits = learn.model(*(torch.tensor([values]) for values in items[3][:2]))
    torch.testing.assert_close(learn.predict(items[3][:2]).activations, logits.detach().softmax(dim=1)[0])
    with pytest.raises(ValueError, match="a tuple of 2 inputs"):
        learn.predict(items[3][0][:1])


def test_predictions_are_of_all_rows_where_epochs_are_short() -> None:
    learn = learner(callbacks=[ShortEpoch(0.1)])
    assert len(learn.get_preds()[0]) == sum(len(y) for _, y in learn.dls.valid)
