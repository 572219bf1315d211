"""Every transform and block of ours keeps the public contract of `blocks.testing`: one table of cases feeds all checks."""

import importlib
import pkgutil
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import blocks
from blocks import (
    Brightness,
    Categorize,
    CategoryBlock,
    Contrast,
    CropPad,
    Dihedral,
    DihedralItem,
    EncodedMultiCategorize,
    EncodeWords,
    Flip,
    FlipItem,
    Hue,
    ImageBlock,
    IntToFloatTensor,
    LogNumber,
    MakeKnown,
    MakeSeries,
    MaskBlock,
    MultiCategorize,
    MultiCategoryBlock,
    Normalize,
    NormalizeSeries,
    OneHotEncode,
    OpenImage,
    PILImage,
    PILImageBW,
    PILMask,
    QuantileNumber,
    RandomCrop,
    RandomErasing,
    RandomResizedCrop,
    RandomResizedCropGPU,
    RatioResize,
    RegressionBlock,
    RegressionSetup,
    Resize,
    Rotate,
    Saturation,
    StandardizeSeries,
    TensorBBox,
    TensorCategory,
    TensorImage,
    TensorMask,
    TensorNumber,
    TensorPoint,
    TensorSeries,
    TensorText,
    TextBlock,
    ToTensor,
    Transform,
    TransformBlock,
    Warp,
    WidenTokens,
    Zoom,
    series_tfms,
)
from blocks.affine import AffineCoordTfm
from blocks.category import CategoryCounts, MultiCategoryCounts
from blocks.images import OpenMask
from blocks.lighting import LightingTfm
from blocks.pieces import InPieces
from blocks.pixels import PixelMoments
from blocks.points import BBoxCategorize, ClipBoxes, MakeBoxes, MakePoints, PointScaler
from blocks.prepare import map_here
from blocks.series import SeriesMoments
from blocks.subwords import EncodeSubwords, TextSample
from blocks.summaries import Quantiles
from blocks.tabular import GAP_VOCAB, EncodeTable, TableSummary
from blocks.testing import (
    Case,
    check_block,
    check_carried,
    check_fingerprints,
    check_summary,
    check_transform,
)
from blocks.tokens import TokenCounts
from blocks.transform import _REGISTRY, transform_from_plain
from blocks.words import SPECIAL_TOKENS

TABLE = EncodeTable(
    ("c",),
    ("n",),
    fills=(0.5,),
    learned=True,
    gap_names=("n",),
    vocabs=(("#na#", "a", "b"), GAP_VOCAB),
    means=(1.0,),
    stds=(2.0,),
)
SERIES = [torch.randn(5, 2, generator=torch.Generator().manual_seed(i)).as_subclass(TensorSeries) for i in range(2)]
NUMBERS = [torch.tensor(number).as_subclass(TensorNumber) for number in (0.5, 3.0)]
ROWS = [{"c": "a", "n": 1.0}, {"c": None, "n": None}, {"c": "unknown", "n": -3.5}]
NOISE = np.random.default_rng(0).integers(0, 256, (4, 12, 10, 3)).astype(np.uint8)
PICTURES = [PILImage.create(n) for n in NOISE]
GREY = [PILImageBW.create(n) for n in NOISE]
SKY = [PILMask.create(n[..., 0] % 3) for n in NOISE]
POINTS = [torch.tensor([[1.5, 2.5], [9.0, 0.5]]) + i for i in range(4)]
ITEMS = [
    (p, m, TensorPoint.create(q), TensorBBox.create(torch.cat([q[:1], q[:1] + 3], 1)))
    for p, m, q in zip(PICTURES, SKY, POINTS, strict=True)
]
BYTES = [torch.from_numpy(n.transpose(2, 0, 1).copy()).as_subclass(TensorImage) for n in NOISE]
FLOATS = [b / 255 for b in BYTES]
BATCH = [
    (f, torch.from_numpy(n[..., 0] % 3).long().as_subclass(TensorMask), (q / 6 - 1).as_subclass(TensorPoint))
    for f, n, q in zip(FLOATS, NOISE, POINTS, strict=True)
]
CODES = [torch.tensor([0, 2]).as_subclass(TensorCategory), torch.tensor([1]).as_subclass(TensorCategory)]
VOCAB = (*SPECIAL_TOKENS, "the", "food", "was", "great", ".", "3")
TEXTS = ["The food was GREAT.", "food food food", "", "great... the the"]
ROUNDED = 1e-5  # sums of float32 in another order

CASES = [
    Case(Categorize(("a", "b")), ["a", "b", "b"], inverse=0, column=True),
    Case(Categorize(("a", "b"), add_na=True), ["a", None, "c"], column=True),
    Case(Categorize()),
    Case(MultiCategorize(("a", "b")), [["a"], [], ["a", "b"]], inverse=0, column=True),
    Case(EncodedMultiCategorize(("a", "b")), [[0, 1], [1, 1]]),
    Case(OneHotEncode(3), CODES, inverse=0),
    Case(RegressionSetup(), [1.5, 2.0, -3.25], inverse=0, column=True),
    Case(RegressionSetup(2), [[1.5, 2.0], [0.0, 1.0]], inverse=0, column=True),
    Case(TABLE, ROWS, column=True),
    *(Case(t, [np.arange(6.0), np.ones((3, 2))]) for t in (MakeSeries(), MakeKnown())),
    Case(NormalizeSeries((1.0, 0.0), (2.0, 0.5)), SERIES, inverse=1e-6),
    Case(StandardizeSeries(), SERIES),
    Case(LogNumber(), NUMBERS, inverse=1e-6),
    Case(QuantileNumber(2, (0.0, 1.0, 4.0)), NUMBERS, inverse=1e-6),
    Case(EncodeWords(VOCAB), TEXTS, column=True),
    Case(EncodeWords(VOCAB, backwards=True), TEXTS[:3], inverse=0, column=True),
    Case(EncodeSubwords(max_vocab=300)),
    Case(WidenTokens(), [torch.arange(3, dtype=torch.int32).as_subclass(TensorText)]),
    Case(OpenImage(), list(NOISE)),
    Case(OpenImage(mode="L"), list(NOISE)),
    Case(OpenMask(("sky", "tree", "car")), [n[..., 0] % 3 for n in NOISE]),
    Case(ToTensor(), [*PICTURES, *GREY, *SKY]),
    *(
        Case(t, ITEMS)
        for t in (Resize(8), Resize((8, 9), method="pad"), Resize(9, method="squish"), CropPad(11), RatioResize(9))
    ),
    *(Case(t, ITEMS) for t in (RandomCrop(8), RandomResizedCrop((8, 9)), FlipItem(p=0.5), DihedralItem())),
    Case(MakePoints(), [[[1, 2], [3, 4]]]),
    Case(MakeBoxes(), [[[1, 2, 3, 4]]]),
    Case(BBoxCategorize(("cat",), add_na=True), [["cat", "cow"], []]),
    Case(PointScaler(), ITEMS),
    Case(ClipBoxes(), [torch.tensor([[-2.0, -1, 0, 3], [2, 2, 3, 3]]).as_subclass(TensorBBox)]),
    Case(IntToFloatTensor(), BYTES, inverse=0, batch=True),
    Case(Normalize((0.5, 0.4, 0.3), (0.25, 0.2, 0.1)), FLOATS, inverse=1e-6, batch=True),
    *(Case(t, BATCH, batch=True, tolerance=ROUNDED) for t in (Flip(), Dihedral(), Rotate(20), Zoom(), Warp())),
    *(Case(t, BATCH, batch=True, tolerance=ROUNDED) for t in (RandomResizedCropGPU(8), AffineCoordTfm((Flip(), Rotate(20))))),
    *(
        Case(t, BATCH, batch=True, tolerance=ROUNDED)
        for t in (Brightness(), Contrast(), Saturation(), Hue(), RandomErasing(p=1))
    ),
    *(Case(t, SERIES, batch=True, tolerance=ROUNDED) for t in series_tfms()),
    Case(LightingTfm((Brightness(), Contrast(0.1))), BATCH, batch=True, tolerance=ROUNDED),
    Case(InPieces((IntToFloatTensor(), Flip())), BYTES, batch=True, tolerance=ROUNDED),
]

BLOCKS: dict[str, tuple[TransformBlock, list[Any], Any]] = {
    "image": (ImageBlock(), list(NOISE), Resize(8)),
    "grey": (ImageBlock(PILImageBW), list(NOISE), ()),
    "mask": (MaskBlock(("sky", "tree", "car")), [n[..., 0] % 3 for n in NOISE], Resize(8)),
    "category": (CategoryBlock(("a", "b")), ["a", "b"], ()),
    "multi": (MultiCategoryBlock(vocab=("a", "b")), [["a"], []], ()),
    "encoded": (MultiCategoryBlock(encoded=True, vocab=("a", "b")), [[0, 1]], ()),
    "number": (RegressionBlock(), [1, 2.5], ()),
    "text": (TextBlock(vocab=VOCAB), TEXTS, ()),
    "numbers": (RegressionBlock(2), [[1, 2.5], [3, 4]], ()),
}


LABELS = st.sampled_from(["a", "b", "c", None])
SUMMARIES: dict[type[Any], st.SearchStrategy[Any]] = {
    CategoryCounts: LABELS,
    MultiCategoryCounts: st.lists(LABELS, max_size=3),
    SeriesMoments: st.lists(st.integers(1, 9), min_size=2, max_size=2).map(lambda v: torch.tensor([v, v[::-1]])),
    Quantiles: st.just(1.0),  # tests/blocks/test_summaries.py has it merge: its values come in any order
    TokenCounts: st.sampled_from(TEXTS),
    TextSample: st.sampled_from(TEXTS),
    PixelMoments: st.binary(min_size=8, max_size=8).map(lambda b: torch.tensor(list(b), dtype=torch.uint8).view(2, 2, 2)),
}


def imported() -> set[type[Transform]]:
    for module in pkgutil.iter_modules(blocks.__path__):
        importlib.import_module(f"blocks.{module.name}")
    return {cls for cls in _REGISTRY.values() if cls.__module__.startswith("blocks.")}


def test_every_transform_is_found_by_its_name_alone() -> None:
    """An export names it, and a fresh process has imported none of our files."""
    assert {name for name, kind in _REGISTRY.items() if kind in imported() and getattr(blocks, name, None) is not kind} == set()


def test_every_transform_has_a_case() -> None:
    assert {type(case.transform) for case in CASES} == imported()


@pytest.mark.parametrize("case", CASES, ids=lambda case: repr(case.transform)[:60])
def test_every_transform_keeps_the_contract(case: Case) -> None:
    check_transform(case)


@pytest.mark.parametrize(("block", "items", "item_tfms"), BLOCKS.values(), ids=BLOCKS)
def test_every_block_keeps_the_contract(block: TransformBlock, items: list[Any], item_tfms: Any) -> None:
    check_block(block, items, item_tfms)


@pytest.mark.parametrize("kind", SUMMARIES)
@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_summaries_of_parts_merge_to_that_of_the_whole(kind: type[Any], data: Any) -> None:
    values = data.draw(st.lists(SUMMARIES[kind], min_size=1, max_size=20))
    check_summary(kind, values, seed=data.draw(st.integers(0, 99)))


def test_every_summary_has_its_values() -> None:
    assert {t.summary for t in imported()} - {None, EncodeTable.summary} == set(SUMMARIES)


@settings(deadline=None, max_examples=30)
@given(strategy=st.sampled_from(["mode", "constant"]), data=st.data())
def test_summaries_of_tables_merge_to_that_of_the_whole(strategy: str, data: Any) -> None:
    rows = st.fixed_dictionaries(
        {"c": st.sampled_from(["a", "b", None]), "n": st.sampled_from([None, 1.0, 2.0, 4.0]), "m": st.integers(1, 9)}
    )
    values = data.draw(st.lists(rows, min_size=1, max_size=20))
    check_summary(partial(TableSummary.of, ("c",), ("n", "m"), strategy), values, seed=data.draw(st.integers(0, 99)))


def test_fingerprints_are_those_of_another_process() -> None:
    check_fingerprints([case.transform for case in CASES])


def test_all_of_them_are_carried() -> None:
    """By this process; tests/cluster/test_contracts.py has them carried by Ray Data."""
    check_carried(CASES, map_here)


@pytest.mark.parametrize("case", CASES, ids=lambda case: repr(case.transform)[:60])
def test_wrong_fields(case: Case) -> None:
    with pytest.raises(ValueError, match="has the fields"):
        transform_from_plain(case.transform.to_plain() | {"surprise": 1})
