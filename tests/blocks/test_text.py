"""Texts as token ids: fastai's rules for words, the vocabulary, batches and streams of them, and what is no good text."""

from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blocks import (
    CategoryBlock,
    ColReader,
    ColSplitter,
    DataBlock,
    DataError,
    DataLoaders,
    TensorText,
    TextBlock,
    TransformBlock,
    UserError,
    get_text_files,
    parent_label,
    read_text,
    text_tfm,
    text_vocab,
)
from blocks.words import CHARACTERS, SPECIAL_TOKENS, count_tokens, detokenize, make_vocab, token_ids, tokenize

# --- words -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("", ""),
        ("Sooo GREAT, it's", "xxmaj s xxrep 3 o xxup great , it 's"),
        ("I can\u2019t DON'T", "xxmaj i ca n't xxup do xxup n't"),
        ("no no no NO", "xxwrep 3 no xxup no"),
        ("no no no no", "xxwrep 4 no"),
        ("wait!!!! ... ?!", "wait xxrep 4 ! xxrep 3 . ? !"),
        ("3.99 or 1,000,000 in 2000", "3.99 or 1,000,000 in 2000"),
        ("a<br />b &amp; c", "a b & c"),
        ("snake_case iPhone", "snake_case iphone"),
        ("שלום عَرَبِي हिन्दी", "שלום عَرَبِي हिन्दी"),
        ("👍🏽 👩‍👩‍👧❤️❤️❤️", "👍🏽 👩‍👩‍👧 xxrep 3 ❤️"),
        (("The title", "a body"), "xxfld 1 xxmaj the title xxfld 2 a body"),
    ],
)
def test_words_are_tokens_by_fastais_rules(text: Any, tokens: str) -> None:
    assert tokenize(text) == ["xxbos", *tokens.split()]


WORDS = st.sampled_from(
    ["the", "The", "GOOD", "don't", "IT'S", "sooo", "no", "3.5", "x", ".", "!!!", "?", "(", ")", "😀", "שלום"]
)


@settings(deadline=None, max_examples=200)
@given(words=st.lists(WORDS, max_size=12))
def test_a_decoded_text_has_the_tokens_it_was_decoded_from(words: list[str]) -> None:
    tokens = tokenize(" ".join(words))
    assert tokenize(detokenize(tokens)) == tokens


@settings(deadline=None, max_examples=100)
@given(text=st.text(max_size=40))
def test_any_text_has_tokens_and_any_tokens_are_a_text(text: str) -> None:
    tokens = tokenize(text)
    assert tokens[0] == "xxbos"
    assert all(tokens)
    assert isinstance(detokenize(tokens[::-1]), str)  # marks without what they speak of


def test_many_texts_have_the_ids_of_each_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["The food was good good good good.", "", "It WAS bad", "unknown words"] * 3
    index = {token: i for i, token in enumerate(make_vocab(count_tokens(texts[:3]), 1, 100))}
    assert CHARACTERS > 50
    monkeypatch.setattr("blocks.words.CHARACTERS", 50)  # so that they are read in several chunks
    ids, offsets = token_ids(texts, index)
    each = [[index.get(token, 0) for token in tokenize(text)] for text in texts]
    assert [part.tolist() for part in np.split(ids, offsets[1:-1])] == each
    assert ids.dtype == np.int32
    assert 0 in each[3]
    assert count_tokens(texts) == sum((count_tokens([text]) for text in texts[1:]), count_tokens(texts[:1]))


def test_a_vocabulary_has_the_most_frequent_tokens_and_of_equally_frequent_ones_the_first_by_value() -> None:
    counts = {"b": 3, "a": 3, "c": 5, "rare": 1, "xxbos": 9}
    assert make_vocab(counts, 2, 100) == (*SPECIAL_TOKENS, "c", "a", "b")
    assert make_vocab(counts, 1, len(SPECIAL_TOKENS) + 2) == (*SPECIAL_TOKENS, "c", "a")


# --- blocks ------------------------------------------------------------------------------------------------------------

PHRASES = ("the food was good", "bad service here", "it was great , really great", "never again")


def reviews(n: int = 60) -> pd.DataFrame:
    words = [" ".join(PHRASES[(i + j) % 4] for j in range(1 + i % 5)) for i in range(n)]
    return pd.DataFrame({"review": words, "label": ["good", "bad"] * (n // 2), "valid": [i % 4 == 3 for i in range(n)]})


def classified(frame: Any, text: TransformBlock | None = None, **settings: Any) -> DataLoaders:
    block = DataBlock(
        blocks=(text or TextBlock(min_freq=1), CategoryBlock()),
        get_x=ColReader("review"),
        get_y=ColReader("label"),
        splitter=ColSplitter("valid"),
    )
    return block.dataloaders(frame, **({"cache": "off", "batch_size": 8} | settings))


def language(frame: Any, text: TransformBlock | None = None, **settings: Any) -> DataLoaders:
    block = DataBlock(
        blocks=(text or TextBlock(is_lm=True, min_freq=1, seq_len=7),), get_x=ColReader("review"), splitter=ColSplitter("valid")
    )
    return block.dataloaders(frame, **({"cache": "off", "batch_size": 4} | settings))


def test_a_classifiers_batches_are_padded_texts_of_about_one_length() -> None:
    frame = reviews()
    dls = classified(frame)
    vocab = text_vocab(dls)
    assert dls.vocab == ("bad", "good")
    found: dict[str, str] = {}
    padding = 0.0
    for batch in dls.train:
        assert type(batch[0]) is TensorText
        for row_id, text in zip(batch.ids, batch[0].tolist(), strict=True):
            words = [vocab[i] for i in text if i != 1]
            assert vocab[1] == "xxpad"
            assert text == [vocab.index(w) for w in words] + [1] * (len(text) - len(words))  # behind the text
            found[row_id] = " ".join(words[1:])
        padding += float((batch[0] == 1).float().mean()) / len(dls.train)
    assert found == {str(i): text for i, text in enumerate(frame.review) if i % 4 != 3}
    assert padding < 0.15
    x, y = dls.one_batch()
    assert x.dtype == y.dtype == torch.int64
    (sample, *_) = dls.decode_batch(dls.one_batch())
    assert sample[0] in [text.replace(" ,", ",") for text in frame.review]


def test_each_row_comes_once_an_epoch_and_global_batches_do_not_depend_on_the_ranks() -> None:
    whole = classified(reviews())
    for epoch in (0, 1):
        of_ranks = []
        for rank in range(3):
            feed = whole.train.shard(rank, 3)  # type: ignore[attr-defined]
            feed.set_epoch(epoch)
            of_ranks.append([batch.ids for batch in feed])
        whole.train.set_epoch(epoch)  # type: ignore[attr-defined]
        alone = [batch.ids for batch in whole.train]
        assert [sorted(chain.from_iterable(parts)) for parts in zip(*of_ranks, strict=True)] == [sorted(ids) for ids in alone]
        assert sorted(chain.from_iterable(alone), key=int) == [str(i) for i in range(60) if i % 4 != 3]


def test_a_language_models_batches_are_streams_of_the_texts() -> None:
    dls = language(reviews())
    assert dls.vocab == text_vocab(dls)
    batches = list(dls.valid)
    x, y = (np.concatenate([batch[i].numpy() for batch in batches], axis=1) for i in (0, 1))
    assert (x[:, 1:] == y[:, :-1]).all()
    tokens = [t for text in reviews().review[3::4] for t in tokenize(text)]
    read = [dls.vocab[i] for i in np.concatenate([x, y[:, -1:]], axis=1)[0].tolist()]
    assert read == tokens[: len(read)]
    assert type(dls.one_batch()[1]) is TensorText
    assert "food was" in dls.decode_batch(dls.one_batch())[0][0]


def test_backwards_texts_are_read_from_their_end() -> None:
    forwards, backwards = (classified(reviews(), TextBlock(min_freq=1, backwards=b)) for b in (False, True))
    one, other = forwards.one_batch()[0], backwards.one_batch()[0]
    lengths = (one != 1).sum(1)
    for row, reversed_row, n in zip(one, other, lengths.tolist(), strict=True):
        assert row[:n].tolist() == reversed_row[:n].tolist()[::-1]
    assert forwards.decode_batch(forwards.one_batch()) == backwards.decode_batch(backwards.one_batch())


def test_a_classifier_reads_by_the_vocabulary_of_a_language_model() -> None:
    vocab = text_vocab(language(reviews()))
    assert text_vocab(classified(reviews(12), TextBlock(vocab=vocab))) == vocab


def test_files_and_lists_are_read_as_a_table_is(tmp_path: Path) -> None:
    frame = reviews()
    for i, row in frame.iterrows():
        folder = tmp_path / str(row.label)
        folder.mkdir(exist_ok=True)
        (folder / f"{i:03d}.txt").write_text(row.review, encoding="utf-8")
    for get_x in (lambda path: path, read_text):
        block = DataBlock((TextBlock(min_freq=1), CategoryBlock()), get_items=get_text_files, get_x=get_x, get_y=parent_label)
        dls = block.dataloaders(tmp_path, batch_size=8, cache="off")
        assert dls.vocab == ("bad", "good")
        assert len(text_vocab(dls)) > len(SPECIAL_TOKENS)
    listed = DataBlock((TextBlock(is_lm=True, min_freq=1, seq_len=7),)).dataloaders(
        list(frame.review), batch_size=4, cache="off"
    )
    assert {*text_vocab(listed)} <= {*text_vocab(language(frame))}


# --- subwords ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_subwords_are_learned_alike_from_the_same_rows_in_any_pieces(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tokenizers")
    monkeypatch.setattr("blocks.subwords.SAMPLE_CHARACTERS", 800)  # of about 2,000
    learned = []
    for pieces in (1, 3):
        monkeypatch.setattr("blocks.fit.PIECES_AT_LEAST", pieces)
        monkeypatch.setattr("blocks.fit.FEWEST_ROWS", 1)
        learned.append(text_tfm(classified(reviews(), TextBlock(tokenizer=kind, max_vocab=300))))
    assert learned[0] == learned[1]
    tfm = learned[0]
    assert tfm.vocab[: len(SPECIAL_TOKENS)] == SPECIAL_TOKENS
    assert len(tfm.vocab) <= 300
    assert tfm.pad_id == 1
    ids = tfm("the food was good")
    assert ids[0] == 2
    assert tfm.decode(ids) == "the food was good"
    assert tfm.encodes_column(pa.array(["bad", ""]))[0].as_py() == tfm("bad").tolist()


def test_a_tokenizers_file_serves_with_its_own_padding(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.models.WordLevel({"[PAD]": 0, "[UNK]": 1, "the": 2, "food": 3}, unk_token="[UNK]")
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.enable_padding(length=50)
    made.save(str(tmp_path / "tokenizer.json"))
    dls = classified(reviews(), TextBlock(tokenizer=tmp_path / "tokenizer.json"))
    assert text_vocab(dls) == ("[PAD]", "[UNK]", "the", "food")
    assert text_tfm(dls).pad_id == 0
    shapes = {batch[0].shape[1] for batch in dls.train}
    assert max(shapes) < 50
    assert any(int(batch[0][:, -1].min()) == 0 for batch in dls.train)
    again = text_tfm(classified(reviews(), TextBlock(tokenizer=text_tfm(dls))))
    assert again == text_tfm(dls)
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        TextBlock(tokenizer=tmp_path / "other.json")
    with pytest.raises(ValueError, match="words, bpe, unigram"):
        TextBlock(tokenizer="sentencepiece")


# --- what is no good text ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "length"),
    [
        ("", 1),
        ("word " * 3 + "other " * 200_000, 1 + 3 + 3),
        ("שלום, مرحبا!", 5),
        ("😀😀 👩‍👩‍👧", 4),
        ("\x00 \ufeff \u202e", 4),
        (None, "5: it has no text"),
        (b"caf\xe9", "5: not UTF-8 .byte 3 is 0xe9"),
    ],
    ids=["empty", "1 MB", "right to left", "emoji", "control", "None", "not UTF-8"],
)
def test_odd_texts_are_read_or_named(text: Any, length: Any) -> None:
    frame = reviews(20)
    items = [{"review": r, "label": y, "valid": v} for r, y, v in frame.itertuples(index=False)]
    items[5]["review"] = text
    if isinstance(length, str):
        with pytest.raises(DataError, match=f"(?s){length}.*max_bad_rows"):
            classified(items)
        assert "5" not in [row for batch in classified(items, max_bad_rows=1).train for row in batch.ids]
        return
    dls = classified(items)
    rows = {row: x for batch in dls.train for row, x in zip(batch.ids, batch[0], strict=True)}
    assert int((rows["5"] != 1).sum()) == length


def test_a_table_in_another_encoding_names_the_line(tmp_path: Path) -> None:
    lines = [f"{r},{y},{str(v).lower()}" for r, y, v in reviews(20).replace(",", "", regex=True).itertuples(index=False)]
    lines[4] = "caf\xe9,good,false"
    (tmp_path / "latin.csv").write_bytes("\n".join(["review,label,valid", *lines]).encode("latin-1"))
    with pytest.raises(DataError, match=r"latin\.csv' cannot be read: the line b'caf.xe9,good,false' is not UTF-8"):
        classified(tmp_path / "latin.csv")


def test_numbers_are_no_texts() -> None:
    with pytest.raises(DataError, match=r"0 .int. is no text"):
        classified(reviews(20).assign(review=range(20)))
