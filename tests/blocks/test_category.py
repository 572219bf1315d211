"""Labels: counting them in parts and by columns, the vocabulary, and what cannot be learned."""

from collections import Counter
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blocks import (
    Categorize,
    Category,
    CategoryBlock,
    DataError,
    EncodedMultiCategorize,
    MultiCategorize,
    MultiCategoryBlock,
    OneHotEncode,
    TensorCategory,
    TensorMultiCategory,
)
from blocks.category import CategoryCounts, MultiCategoryCounts
from blocks.transform import Pipeline, transform_from_plain


def counted(rows: list[tuple[str, str]]) -> CategoryCounts:
    counts = CategoryCounts()
    for label, row_id in rows:
        counts.observe(label, row_id)
    return counts


def labels(*names: str, of: str = "t") -> CategoryCounts:
    return counted([(name, f"{of}{i}") for i, name in enumerate(names)])


def test_counts_by_text_ids() -> None:
    counts = CategoryCounts()
    counts.observe_column(pa.array(["a", "b", "a"]), pa.array(["z/2", "z/3", "z/1"]))
    assert counts == CategoryCounts(Counter(a=2, b=1), {"a": "z/1", "b": "z/3"})


def test_counts_are_plain_data_and_back() -> None:
    counts = labels("a", "b", "b")
    assert CategoryCounts.from_plain(counts.to_plain()) == counts


def test_vocab_is_that_of_the_training_part_sorted() -> None:
    categorize = Categorize()
    assert not categorize.fitted
    assert categorize.setups(labels("dog", "cat", "dog", "ant", "cat"), labels("cat", of="v")) == set()
    assert categorize.fitted
    assert categorize.vocab == ("ant", "cat", "dog")


def test_decode_undoes_encode() -> None:
    categorize = Categorize(("z", "a", "m"))
    for i, name in enumerate(categorize.vocab):
        code = categorize(name)
        assert type(code) is TensorCategory
        assert code.dtype == torch.int64
        assert code.ndim == 0
        assert int(code) == i
        assert categorize.decode(code) == name
        assert type(categorize.decode(code)) is Category


def test_a_batch_of_codes_is_decoded() -> None:
    categorize = Categorize(("a", "b"))
    assert categorize.decode(torch.tensor([1, 0, 1]).as_subclass(TensorCategory)) == ["b", "a", "b"]


def test_labels_that_are_no_text_are_named_by_it() -> None:
    categorize = Categorize()
    categorize.setups(labels("1", "2"), CategoryCounts())
    assert int(categorize(2)) == 1
    assert Categorize((1, 2)).vocab == ("1", "2")  # type: ignore[arg-type]


def test_unknown_label() -> None:
    with pytest.raises(DataError, match="'bird' is not in the vocabulary 'cat', 'dog'"):
        Categorize(("cat", "dog"))("bird")


def test_a_class_only_in_validation() -> None:
    with pytest.raises(DataError, match=r"'bird': only in the validation part \(2 rows\)"):
        Categorize().setups(labels("cat", "dog"), labels("cat", "bird", "bird", of="v"))


def test_a_class_with_one_item_trains() -> None:
    categorize = Categorize()
    with pytest.warns(UserWarning, match="1 classes have one item each, .*: 'bird'"):
        moved = categorize.setups(labels("cat", "dog"), labels("cat", "bird", "dog", of="v"))
    assert moved == {"v1"}
    assert categorize.vocab == ("bird", "cat", "dog")


def test_one_validation_item_of_a_class_that_trains_stays() -> None:
    assert Categorize().setups(labels("cat", "dog"), labels("dog", of="v")) == set()


@pytest.mark.parametrize("train", [("cat", "cat"), ()])
def test_fewer_than_two_classes(train: tuple[str, ...]) -> None:
    with pytest.raises(DataError, match="at least two classes"):
        Categorize().setups(labels(*train), CategoryCounts())


def test_a_vocabulary_names_each_class_once() -> None:
    with pytest.raises(ValueError, match="names 'a' more than once"):
        Categorize(("a", "b", "a"))


def test_a_given_vocabulary_leaves_nothing_to_fit() -> None:
    (given,) = CategoryBlock(vocab=["b", "a"]).type_tfms
    assert given == Categorize(("b", "a"))
    assert given.fitted  # type: ignore[union-attr]
    (open_one,) = CategoryBlock().type_tfms
    assert not open_one.fitted  # type: ignore[union-attr]


def test_order_of_appearance() -> None:
    categorize = Categorize(sort=False)
    categorize.setups(counted([("dog", "r3"), ("cat", "r2"), ("dog", "r1"), ("ant", "r4")]), CategoryCounts())
    assert categorize.vocab == ("dog", "cat", "ant")


def test_a_class_for_what_is_not_known() -> None:
    categorize = Categorize(add_na=True)
    assert not categorize.fitted
    assert categorize.setups(labels("dog", "cat"), labels("bird", of="v")) == set()
    assert categorize.vocab == ("#na#", "cat", "dog")
    assert [int(categorize(label)) for label in ("cat", "bird", None, float("nan"), pd.NA, "#na#")] == [1, 0, 0, 0, 0, 0]
    assert categorize.encodes_column(pa.array(["cat", "bird", None, "dog"])).tolist() == [1, 0, 0, 2]
    assert transform_from_plain(categorize.to_plain()) == categorize


@pytest.mark.parametrize("label", [None, float("nan"), pd.NA])
def test_a_missing_label(label: Any) -> None:
    with pytest.raises(DataError, match="a row has no label"):
        Categorize(("a", "b"))(label)
    with pytest.raises(DataError, match="a row has no label"):
        Categorize(("a", "b")).encodes_column(pa.array(["a", None]))


def test_the_nearest_name_is_suggested() -> None:
    with pytest.raises(DataError, match="'catt' is not in the vocabulary 'cat', 'dog'; did you mean 'cat'"):
        Categorize(("cat", "dog"))("catt")
    with pytest.raises(DataError, match="'catt' is not in the vocabulary 'cat', 'dog'; did you mean 'cat'"):
        Categorize(("cat", "dog")).encodes_column(pa.array(["cat", "catt"]))


@pytest.mark.parametrize(
    "values",
    [
        pa.array(["b", "a", "b"]),
        pa.array([True, False, True]),
        pa.array([2, 1, 2]),
        pa.array([2.0, 0.5, 2.0]),
        pa.array(["b", "a", "b"]).dictionary_encode(),
        pa.array(["x", "b", "a", "b"]).dictionary_encode()[1:],
        pa.array([], pa.string()),
    ],
    ids=lambda v: str(v.type),
)
def test_a_column_is_encoded_as_its_rows(values: pa.Array) -> None:
    categorize = Categorize(tuple(sorted({str(v) for v in values.to_pylist()} | {"other"})))
    column = categorize.encodes_column(values)
    assert column.dtype == np.int64
    assert column.tolist() == [int(categorize(v)) for v in values.to_pylist()]


# --- any number of labels ----------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(rows=st.lists(st.lists(st.sampled_from("abcd"), max_size=4), max_size=8))
def test_multi_categorize_by_row_and_by_column(rows: list[list[str]]) -> None:
    categorize = MultiCategorize(("a", "b", "c", "d"))
    encoded = [categorize(row) for row in rows]
    assert all(type(e) is TensorMultiCategory and e.dtype == torch.float32 for e in encoded)
    assert [categorize.decode(e) for e in encoded] == [sorted(set(row)) for row in rows]
    values = pa.array([["a"], *rows], pa.list_(pa.string()))[1:]
    column = categorize.encodes_column(values)
    assert column.shape == (len(rows), 4)
    assert column.tolist() == [e.tolist() for e in encoded]


def test_multi_categorize_fits_and_decodes() -> None:
    train, valid = MultiCategoryCounts(), MultiCategoryCounts()
    for i, row in enumerate([["b", "a"], ("b",), [], None, {"c"}]):
        train.observe(row, i)
    valid.observe(["d", "a"], 9)
    categorize = MultiCategoryBlock().type_tfms[0]
    assert isinstance(categorize, MultiCategorize)
    with pytest.warns(UserWarning, match="one item each, .*: 'd'"):
        assert categorize.setups(train, valid) == {9}
    assert categorize.vocab == ("a", "b", "c", "d")
    assert categorize(("d", "a")).tolist() == [1, 0, 0, 1]  # a tuple is a list of labels, not a sample
    assert str(categorize.decode(categorize(["d", "a"]))) == "a;d"


def test_what_is_no_list_of_labels() -> None:
    categorize = MultiCategorize(("a", "b"))
    for value, message in (("a b", "label_delim"), (3, "not a list"), (None, "no list of labels"), (["c"], "'c' is not in")):
        with pytest.raises(DataError, match=message):
            categorize(value)
    with pytest.raises(DataError, match="1 rows have no list"):
        categorize.encodes_column(pa.array([["a"], None]))
    with pytest.raises(DataError, match="no row of the training part has a label"):
        MultiCategorize().setups(MultiCategoryCounts(), MultiCategoryCounts())


def test_labels_that_are_encoded_already() -> None:
    (encoded,) = MultiCategoryBlock(encoded=True, vocab=["a", "b", "c"]).type_tfms
    assert isinstance(encoded, EncodedMultiCategorize)
    for value in ([0, 1, 1], (0, 1, 1), np.array([False, True, True])):
        code = encoded(value)
        assert type(code) is TensorMultiCategory
        assert code.tolist() == [0, 1, 1]
        assert encoded.decode(code) == ["b", "c"]
    with pytest.raises(DataError, match="one number for each of the 3 classes"):
        encoded([0, 1])
    with pytest.raises(ValueError, match="name their classes"):
        MultiCategoryBlock(encoded=True)


def test_one_hot_encode_follows_categorize() -> None:
    pipeline = Pipeline.of([Categorize(("a", "b", "c")), OneHotEncode(3)])
    code = pipeline("b")
    assert type(code) is TensorMultiCategory
    assert code.tolist() == [0, 1, 0]
    assert pipeline.decode(code) == ["b"]


@pytest.mark.parametrize("values", [["a b", "c"], [1.5, 2.0], [None, True]], ids=repr)
def test_a_column_of_no_lists_is_refused_as_a_value_is(values: list[Any]) -> None:
    first = next(v for v in values if v is not None)
    with pytest.raises(DataError) as of_value:
        MultiCategorize(("a", "b")).encodes(first)
    for act in (
        lambda column: MultiCategoryCounts().observe_column(column, pa.array(range(len(values)))),
        lambda column: MultiCategorize(("a", "b")).encodes_column(column.drop_null()),
    ):
        with pytest.raises(DataError, match="is not a list of labels") as of_column:
            act(pa.array(values))
        assert str(of_column.value) == str(of_value.value)
    nothing = MultiCategoryCounts()
    nothing.observe_column(pa.nulls(2), pa.array([0, 1]))
    assert nothing == MultiCategoryCounts()
