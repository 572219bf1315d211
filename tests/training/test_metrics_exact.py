"""Every metric against scikit-learn (or a formula) over all rows, for any split into batches and over two ranks."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics as skm
from torch import Tensor

from training import metrics as ours
from training.metrics import Metric, MetricFunction, as_metric, values_over_ranks

from .several_ranks import on_ranks

ROWS = 23
RNG = np.random.default_rng(0)
TWO, BINARY = RNG.normal(size=(ROWS, 2)), RNG.integers(2, size=ROWS)
FOUR, CLASSES = RNG.normal(size=(ROWS, 4)), RNG.integers(3, size=ROWS)  # the fourth class never occurs
LABELS, HOT = RNG.normal(size=(ROWS, 3)), RNG.integers(2, size=(ROWS, 3))
VALUES = RNG.normal(size=ROWS)
NOISY = (VALUES + RNG.normal(size=ROWS) / 3)[:, None] + 0.2
MAPS, MASKS = RNG.normal(size=(ROWS, 2, 3, 4)), RNG.integers(2, size=(ROWS, 3, 4))
MANY, MULTI = RNG.normal(size=(ROWS, 3, 3, 4)), RNG.integers(3, size=(ROWS, 3, 4))
TEXTS, WORDS = RNG.normal(size=(ROWS, 9, 5)), RNG.integers(1, 5, size=(ROWS, 9))
POINTS, POINTS_THERE = RNG.normal(size=(2, ROWS, 3, 2))
TEXTS[:, :6] += 9 * np.eye(5)[WORDS[:, :6]]  # else no four words in a row are ever right


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def softmax(x: np.ndarray) -> np.ndarray:
    return np.exp(x) / np.exp(x).sum(-1, keepdims=True)


def best(x: np.ndarray, axis: int = -1) -> np.ndarray:
    return x.argmax(axis)


def rise(x: np.ndarray) -> np.ndarray:
    return np.exp(x / 9)


def of_two(f: Callable[..., Any], **kw: Any) -> Callable[..., Any]:
    return lambda p, t: f(t, best(p), **kw)


def of_labels(f: Callable[..., Any], **kw: Any) -> Callable[..., Any]:
    return lambda p, t: f(t, LABELS > 0, **kw)


def pixels(f: Callable[..., Any], **kw: Any) -> Callable[..., Any]:
    return lambda p, t: f(t.ravel(), best(p, 1).ravel(), **kw)


def log_loss(p: np.ndarray, t: np.ndarray) -> float:
    return float(skm.log_loss(t.ravel(), softmax(p).reshape(-1, p.shape[-1]), labels=range(p.shape[-1])))


class Parts:
    """A loss that keeps a part of itself."""

    def __call__(self, pred: Tensor, targ: Tensor) -> Tensor:
        self.part = (pred.squeeze(1) - targ).abs().mean()
        return self.part


PARTS = Parts()


def part_of_the_loss(pred: Tensor, targ: Tensor) -> Tensor:
    PARTS(pred, targ)
    return PARTS.part


MACRO: dict[str, Any] = {"average": "macro"}
# name: (metric, predictions, targets, the truth)
CASES: dict[str, tuple[Callable[[], Metric | MetricFunction], np.ndarray, np.ndarray, Callable[..., Any]]] = {
    "accuracy": (lambda: ours.accuracy, FOUR, CLASSES, of_two(skm.accuracy_score)),
    "accuracy of words": (lambda: ours.accuracy, TEXTS, WORDS, lambda p, t: np.mean(best(p) == t)),
    "error_rate": (lambda: ours.error_rate, FOUR, CLASSES, lambda p, t: 1 - skm.accuracy_score(t, best(p))),
    "top_k": (
        lambda: ours.AvgMetric(lambda p, t: ours.top_k_accuracy(p, t, k=2)),
        FOUR,
        CLASSES,
        lambda p, t: skm.top_k_accuracy_score(t, p, k=2, labels=range(4)),
    ),
    "accuracy_multi": (lambda: ours.accuracy_multi, LABELS, HOT, lambda p, t: np.mean((p > 0) == t)),
    "foreground_acc": (lambda: ours.foreground_acc, MANY, MULTI, lambda p, t: np.mean((best(p, 1) == t)[t != 0])),
    "points_error": (lambda: ours.points_error, POINTS, POINTS_THERE, lambda p, t: np.hypot(*(p - t).T).mean() / 2),
    "mse": (lambda: ours.mse, NOISY, VALUES, lambda p, t: skm.mean_squared_error(t, p)),
    "mae": (lambda: ours.mae, NOISY, VALUES, lambda p, t: skm.mean_absolute_error(t, p)),
    "msle": (lambda: ours.msle, rise(NOISY), rise(VALUES), lambda p, t: skm.mean_squared_log_error(t, p)),
    "rmse": (lambda: ours.rmse, NOISY, VALUES, lambda p, t: skm.root_mean_squared_error(t, p)),
    "exp_rmspe": (
        lambda: ours.exp_rmspe,
        NOISY,
        VALUES,
        lambda p, t: np.sqrt(np.mean(((np.exp(t) - np.exp(p[:, 0])) / np.exp(t)) ** 2)),
    ),
    "Perplexity": (ours.Perplexity, TEXTS, WORDS, lambda p, t: np.exp(log_loss(p, t))),
    "LossMetric": (lambda: ours.AvgMetric(part_of_the_loss), NOISY, VALUES, lambda p, t: skm.mean_absolute_error(t, p)),
    "BrierScore": (ours.BrierScore, TWO, BINARY, lambda p, t: skm.brier_score_loss(t, softmax(p)[:, 1])),
    "BrierScoreMulti": (ours.BrierScoreMulti, LABELS, HOT, lambda p, t: np.mean((sigmoid(p) - t) ** 2)),
    "F1Score": (ours.F1Score, TWO, BINARY, of_two(skm.f1_score)),
    "F1Score macro": (lambda: ours.F1Score(average="macro"), FOUR, CLASSES, of_two(skm.f1_score, **MACRO)),
    "FBeta": (lambda: ours.FBeta(0.5), TWO, BINARY, of_two(skm.fbeta_score, beta=0.5)),
    "FBeta weighted": (
        lambda: ours.FBeta(2.0, average="weighted"),
        FOUR,
        CLASSES,
        of_two(skm.fbeta_score, beta=2, average="weighted"),
    ),
    "Precision": (ours.Precision, TWO, BINARY, of_two(skm.precision_score)),
    "Precision micro": (lambda: ours.Precision(average="micro"), FOUR, CLASSES, of_two(skm.precision_score, average="micro")),
    "Recall": (ours.Recall, TWO, BINARY, of_two(skm.recall_score)),
    "Recall macro": (
        lambda: ours.Recall(average="macro"),
        FOUR,
        CLASSES,
        of_two(skm.recall_score, **MACRO, zero_division=0.0),
    ),
    "Jaccard": (ours.Jaccard, TWO, BINARY, of_two(skm.jaccard_score)),
    "Jaccard macro": (lambda: ours.Jaccard(average="macro"), FOUR, CLASSES, of_two(skm.jaccard_score, **MACRO)),
    "BalancedAccuracy": (ours.BalancedAccuracy, FOUR[:, :3], CLASSES, of_two(skm.balanced_accuracy_score)),
    "BalancedAccuracy, an absent class": (
        ours.BalancedAccuracy,
        FOUR,
        CLASSES,
        lambda p, t: np.mean([np.mean(best(p)[t == c] == c) for c in range(3)]),
    ),
    "CohenKappa": (ours.CohenKappa, FOUR, CLASSES, of_two(skm.cohen_kappa_score)),
    "CohenKappa quadratic": (
        lambda: ours.CohenKappa(weights="quadratic"),
        FOUR,
        CLASSES,
        of_two(skm.cohen_kappa_score, weights="quadratic"),
    ),
    "MatthewsCorrCoef": (ours.MatthewsCorrCoef, FOUR, CLASSES, of_two(skm.matthews_corrcoef)),
    "HammingLoss": (ours.HammingLoss, FOUR, CLASSES, of_two(skm.hamming_loss)),
    "F1ScoreMulti": (ours.F1ScoreMulti, LABELS, HOT, of_labels(skm.f1_score, **MACRO)),
    "FBetaMulti": (lambda: ours.FBetaMulti(0.5), LABELS, HOT, of_labels(skm.fbeta_score, beta=0.5, **MACRO)),
    "PrecisionMulti": (ours.PrecisionMulti, LABELS, HOT, of_labels(skm.precision_score, **MACRO)),
    "RecallMulti": (ours.RecallMulti, LABELS, HOT, of_labels(skm.recall_score, **MACRO)),
    "JaccardMulti": (ours.JaccardMulti, LABELS, HOT, of_labels(skm.jaccard_score, **MACRO)),
    "HammingLossMulti": (ours.HammingLossMulti, LABELS, HOT, of_labels(skm.hamming_loss)),
    "MatthewsCorrCoefMulti": (
        ours.MatthewsCorrCoefMulti,
        LABELS,
        HOT,
        lambda p, t: skm.matthews_corrcoef(t.ravel(), p.ravel() > 0),
    ),
    "Dice": (ours.Dice, MAPS, MASKS, pixels(skm.f1_score)),
    "DiceMulti": (ours.DiceMulti, MANY, MULTI, pixels(skm.f1_score, **MACRO)),
    "JaccardCoeff": (ours.JaccardCoeff, MAPS, MASKS, pixels(skm.jaccard_score)),
    "JaccardCoeffMulti": (ours.JaccardCoeffMulti, MANY, MULTI, pixels(skm.jaccard_score, **MACRO)),
    "R2Score": (ours.R2Score, NOISY, VALUES, lambda p, t: skm.r2_score(t, p)),
    "ExplainedVariance": (ours.ExplainedVariance, NOISY, VALUES, lambda p, t: skm.explained_variance_score(t, p)),
    "CorpusBLEUMetric": (ours.CorpusBLEUMetric, TEXTS, WORDS, lambda p, t: bleu(best(p), t)),
    "RocAuc": (
        ours.RocAuc,
        FOUR[:, :3],
        CLASSES,
        lambda p, t: skm.roc_auc_score(t, softmax(p), multi_class="ovr"),
    ),
    "RocAucBinary": (ours.RocAucBinary, TWO, BINARY, lambda p, t: skm.roc_auc_score(t, softmax(p)[:, 1])),
    "RocAucMulti": (ours.RocAucMulti, LABELS, HOT, lambda p, t: skm.roc_auc_score(t, p)),
    "APScoreBinary": (ours.APScoreBinary, TWO, BINARY, lambda p, t: skm.average_precision_score(t, softmax(p)[:, 1])),
    "APScoreMulti": (ours.APScoreMulti, LABELS, HOT, lambda p, t: skm.average_precision_score(t, p)),
    "PearsonCorrCoef": (ours.PearsonCorrCoef, NOISY, VALUES, lambda p, t: stats.pearsonr(p[:, 0], t)[0]),
    "SpearmanCorrCoef": (ours.SpearmanCorrCoef, NOISY, VALUES, lambda p, t: stats.spearmanr(p[:, 0], t)[0]),
    "skm_to_fastai": (lambda: ours.skm_to_fastai(skm.zero_one_loss), FOUR, CLASSES, of_two(skm.zero_one_loss)),
    "skm_to_fastai, labels": (
        lambda: ours.skm_to_fastai(skm.f1_score, thresh=0.5, average="samples", zero_division=0.0),
        LABELS,
        HOT,
        of_labels(skm.f1_score, average="samples", zero_division=0.0),
    ),
    "skm_to_fastai, values": (
        lambda: ours.skm_to_fastai(skm.max_error, is_class=False),
        NOISY,
        VALUES,
        lambda p, t: skm.max_error(t, p),
    ),
}


def bleu(found: np.ndarray, wanted: np.ndarray) -> float:
    """BLEU-4 of one reference each, written out; 1 is padding."""
    right, all_, lengths = np.zeros(4), np.zeros(4), np.zeros(2)
    for f, w in zip(found, wanted, strict=True):
        f, w = [t for t in f if t != 1], [t for t in w if t != 1]
        lengths += len(f), len(w)
        for n in range(1, 5):
            grams = [[tuple(x[i : i + n]) for i in range(len(x) - n + 1)] for x in (f, w)]
            right[n - 1] += sum(min(grams[0].count(g), grams[1].count(g)) for g in set(grams[0]))
            all_[n - 1] += len(grams[0])
    shortness = 1.0 if lengths[0] > lengths[1] else np.exp(1 - lengths[1] / lengths[0])
    return float(shortness * np.exp(np.mean(np.log(right / all_))))


def accumulated(name: str, shares: list[slice]) -> Metric:
    make, pred, targ, _ = CASES[name]
    metric = as_metric(make())
    metric.reset()
    for rows in shares:
        p, t = torch.from_numpy(pred[rows]), torch.from_numpy(targ[rows])
        if len(p):
            metric.accumulate(p, t, len(p))
    return metric


def truth(name: str) -> float:
    _, pred, targ, expected = CASES[name]
    return float(expected(pred, targ))


@pytest.mark.parametrize("name", CASES)
@settings(deadline=None, max_examples=3, derandomize=True)
@given(cuts=st.lists(st.integers(0, ROWS), min_size=1, max_size=3))
def test_any_split_into_batches_gives_what_scikit_learn_gives(name: str, cuts: list[int]) -> None:
    bounds = sorted({0, *cuts, ROWS})
    metric = accumulated(name, [slice(a, b) for a, b in itertools.pairwise(bounds)])
    assert list(values_over_ranks([metric]).values()) == [pytest.approx(truth(name), rel=1e-6, abs=1e-9)]


def test_no_metric_is_left_out() -> None:
    """Each public function and factory of the module is tried above."""
    import ast

    tree = ast.parse(Path(ours.__file__).read_text(encoding="utf-8"))
    public = {n.name for n in tree.body if isinstance(n, ast.FunctionDef) and not n.name.startswith("_")}
    tried = {name.partition(" ")[0].rstrip(",") for name in CASES} | {"top_k_accuracy"}
    assert public - tried == {"as_metric", "values_over_ranks", "LossMetrics", "optim_metric"}


def test_parts_of_a_loss_are_metrics_by_the_names_of_its_attributes() -> None:
    metrics = ours.LossMetrics("part, whole", PARTS)
    PARTS.part, PARTS.whole = torch.tensor(2.0), torch.tensor(3.0)  # type: ignore[attr-defined]
    for metric in metrics:
        metric.accumulate(torch.zeros(4, 1), torch.zeros(4), 4)
    assert values_over_ranks(metrics) == {"part": 2.0, "whole": 3.0}


@pytest.mark.parametrize("name", ["accuracy", "F1Score", "RocAucBinary"])
def test_a_metric_forgets_when_reset_and_has_no_value_without_rows(name: str) -> None:
    metric = accumulated(name, [slice(0, 9)])
    metric.reset()
    assert values_over_ranks([metric]) == {}
    again = accumulated(name, [slice(0, ROWS)])
    for _ in range(2):
        assert list(values_over_ranks([again]).values()) == [pytest.approx(truth(name))]


def test_what_does_not_fit_is_said() -> None:
    metric = ours.F1Score()
    with pytest.raises(ValueError, match="average='binary' is for two classes, not 4: pass average='macro'"):
        metric.accumulate(torch.from_numpy(FOUR), torch.from_numpy(CLASSES), ROWS)
    import torchmetrics

    other = ours.TorchMetric(lambda n: torchmetrics.CatMetric(), lambda p, t: (p,), "rows")
    with pytest.raises(TypeError, match="CatMetric keeps value, which are no sums: use an AccumMetric"):
        other.accumulate(torch.zeros(2, 1), torch.zeros(2), 2)


# --- two ranks ---------------------------------------------------------------------------------------------------------

# The rows of each rank: shares of different sizes, and a rank without any.
SHARES = ([[slice(0, 5), slice(5, 6)], [slice(6, ROWS)]], [[], [slice(0, ROWS)]])


@on_ranks(2)
def all_metrics(rank: int, world: int) -> list[list[Any]]:
    return [[name, *values_over_ranks([accumulated(name, shares[rank])]).values()] for shares in SHARES for name in CASES]


def test_two_ranks_give_what_one_gives(ranks_found: Any) -> None:
    for found in ranks_found(all_metrics, 2):
        assert found == [[name, pytest.approx(truth(name), rel=1e-6, abs=1e-9)] for _ in SHARES for name in CASES]
