"""Labels: counting them in parts, the vocabulary, and what cannot be learned."""

import random
from functools import reduce

import pytest
import torch

from blocks import Categorize, Category, CategoryBlock, DataError, TensorCategory
from blocks.category import CategoryCounts


def counted(rows: list[tuple[str, str]]) -> CategoryCounts:
    counts = CategoryCounts()
    for label, row_id in rows:
        counts.observe(label, row_id)
    return counts


def labels(*names: str, of: str = "t") -> CategoryCounts:
    return counted([(name, f"{of}{i}") for i, name in enumerate(names)])


@pytest.mark.parametrize("seed", range(20))
def test_merging_parts_in_any_order_equals_one_pass(seed: int) -> None:
    draw = random.Random(seed)
    rows = [(draw.choice("abcdefghij"), f"row{i}") for i in range(draw.randint(1, 15))]
    parts: list[list[tuple[str, str]]] = [[] for _ in range(draw.randint(1, 6))]
    for row in rows:
        draw.choice(parts).append(row)
    draw.shuffle(parts)

    def merged(a: CategoryCounts, b: CategoryCounts) -> CategoryCounts:
        a.merge(b)
        return a

    whole = counted(rows)
    assert reduce(merged, map(counted, parts)) == whole
    assert set(whole.only_row) == {label for label, n in whole.counts.items() if n == 1}


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
