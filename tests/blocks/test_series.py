"""Series: gaps, scales, lengths that differ, and windows with what follows them."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from blocks import CategoryBlock, ColReader, ColSplitter, DataBlock, DataError, SeriesBlock, TensorSeries, Windows
from blocks.draws import sample_keys
from blocks.series import MakeSeries, NormalizeSeries, StandardizeSeries
from blocks.series_augment import Scale, series_tfms
from blocks.tensors import TensorForecast, TensorKnown, as_plain
from blocks.transform import RandTransform


def test_gaps_lie_on_the_line_between_their_neighbours() -> None:
    x = MakeSeries()([[0.0, np.nan], [np.nan, 5.0], [4.0, np.nan]])
    assert type(x) is TensorSeries
    assert as_plain(x).tolist() == [[0, 5], [2, 5], [4, 5]]
    assert MakeSeries()(np.arange(3)).shape == (3, 1)


@pytest.mark.parametrize(
    ("value", "match"),
    [
        ("abc", "is not a series"),
        (np.zeros((2, 2, 2)), "not an array of"),
        ([], "not an array of"),
        ([1.0, np.inf], "1 infinite"),
        ([[1.0, np.nan], [2.0, np.nan]], "gaps only"),
    ],
)
def test_what_is_no_series(value: Any, match: str) -> None:
    with pytest.raises(DataError, match=match):
        MakeSeries()(value)


def test_a_number_of_channels() -> None:
    with pytest.raises(DataError, match="has 2 channels, not 3"):
        MakeSeries(3)(np.zeros((4, 2)))


def rows(n: int = 40, same: bool = True) -> list[dict[str, Any]]:
    draw = np.random.default_rng(0)
    return [
        {
            "values": draw.normal([10 * (i % 2), 5.0], [2.0, 1.0], (8 if same else 4 + i % 5, 2)),
            "label": "ab"[i % 2],
            "is_valid": i % 4 > 1,
        }
        for i in range(n)
    ]


def block(scale: Any = "training") -> DataBlock:
    return DataBlock(
        blocks=(SeriesBlock(scale), CategoryBlock()),
        get_x=ColReader("values"),
        get_y=ColReader("label"),
        splitter=ColSplitter("is_valid"),
    )


def test_channels_are_scaled_by_the_training_part() -> None:
    dls = block().dataloaders(rows(), cache="off")
    steps = np.concatenate([r["values"] for r in rows() if not r["is_valid"]])
    scale = dls.encode.columns[0].type_tfms.transforms[1]  # type: ignore[union-attr]
    assert isinstance(scale, NormalizeSeries)
    assert scale.means == pytest.approx(tuple(steps.mean(0)))
    assert scale.stds == pytest.approx(tuple(steps.std(0)))
    (x, label), *_ = dls.decode_batch(dls.one_batch())
    torch.testing.assert_close(as_plain(x), torch.tensor(rows()[2]["values"], dtype=torch.float32), rtol=1e-4, atol=1e-4)
    assert label == "a"


def test_a_series_by_its_own_scale() -> None:
    x = as_plain(StandardizeSeries()(MakeSeries()([[1.0, 7.0], [2.0, 7.0], [3.0, 7.0]])))
    assert x[:, 0].mean() == pytest.approx(0, abs=1e-6)
    assert x[:, 0].std(correction=0) == pytest.approx(1)
    assert x[:, 1].tolist() == [0, 0, 0]


def test_series_of_several_lengths_share_a_batch() -> None:
    dls = block(None).dataloaders(rows(same=False), cache="off", batch_size=8)
    batch = next(iter(dls.valid))
    wanted = [r["values"] for r in rows(same=False) if r["is_valid"]][:8]
    assert batch[0].shape == (8, max(map(len, wanted)), 2)
    for x, values in zip(as_plain(batch[0]), wanted, strict=True):
        torch.testing.assert_close(x[: len(values)], torch.tensor(values, dtype=torch.float32))
        assert x[len(values) :].isnan().all()


def test_a_scale_is_named() -> None:
    with pytest.raises(ValueError, match="'training', 'sample' or None, not 'batch'"):
        SeriesBlock("batch")  # type: ignore[arg-type]


def test_windows_and_what_follows_them() -> None:
    series = [{"values": 100.0 * i + np.arange(20), "is_valid": i > 1} for i in range(4)]
    data = DataBlock(blocks=(SeriesBlock(None),), get_x=ColReader("values"), splitter=ColSplitter("is_valid"), get_y=())
    dls = data.dataloaders(series, cache="off", batch_size=7).new(samples=Windows(5, 2, horizon=3))
    found = []
    for x, y in dls.train:
        assert (type(x), type(y)) == (TensorSeries, TensorForecast)
        assert (x.shape[1:], y.shape[1:]) == ((5, 1), (3, 1))
        assert torch.equal(as_plain(y)[:, :, 0], as_plain(x)[:, -1] + torch.tensor([1.0, 2.0, 3.0]))
        found += as_plain(x)[:, 0, 0].tolist()
    assert sorted(found) == [100 * i + start for i in range(2) for start in range(0, 13, 2)]
    assert dls.target is not None
    seen, came = dls.decode_batch(dls.one_batch())[0]
    assert (len(seen), len(came)) == (5, 3)
    with pytest.raises(ValueError, match="horizon is how many steps"):
        Windows(5, horizon=-1)


@pytest.mark.parametrize("tfm", series_tfms(), ids=lambda t: type(t).__name__)
def test_random_changes_follow_the_sample(tfm: RandTransform) -> None:
    """The same in any company, padding left alone, and what follows a window changed by Scale alone."""
    tfm = replace(tfm, p=1.0)  # type: ignore[type-var]
    x = torch.randn(4, 30, 2).cumsum(1).as_subclass(TensorSeries)
    x[1, 20:] = torch.nan
    keys = sample_keys(0, 3, np.arange(4))
    changed = tfm(x, keys=keys)
    assert type(changed) is TensorSeries
    torch.testing.assert_close(as_plain(changed)[1:2, :20], as_plain(tfm(x[1:2, :20], keys=keys[1:2])))
    assert torch.equal(as_plain(changed).isnan(), as_plain(x).isnan())
    assert (as_plain(changed)[~as_plain(x).isnan()] != as_plain(x)[~as_plain(x).isnan()]).any()
    assert torch.equal(as_plain(replace(tfm, p=0.0)(x, keys=keys)).nan_to_num(), as_plain(x).nan_to_num())  # type: ignore[type-var]
    ahead, known = (torch.ones(4, 3, 2).as_subclass(kind) for kind in (TensorForecast, TensorKnown))
    of_window = as_plain(tfm(torch.ones(4, 3, 2).as_subclass(TensorSeries), keys=keys))
    assert torch.equal(as_plain(tfm(ahead, keys=keys)), of_window if isinstance(tfm, Scale) else torch.ones(4, 3, 2))
    assert torch.equal(as_plain(tfm(known, keys=keys)), torch.ones(4, 3, 2))
