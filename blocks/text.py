"""Texts as inputs: token ids of any length in the store, padded batches for a classifier, streams for a language model.

    DataBlock(blocks=(TextBlock(), CategoryBlock()), get_x=ColReader("review"), get_y=ColReader("label"))
    DataBlock(blocks=(TextBlock(is_lm=True),), get_x=ColReader("review"))

Tokenised once, when the data is prepared; what there is to learn is learned from the training part. Id 1 is padding, unless a
tokenizer.json says otherwise; a batch has it behind its shorter texts.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from blocks.datablock import TransformBlock
from blocks.dataloaders import DataLoaders
from blocks.errors import UserError
from blocks.streams import Streams
from blocks.subwords import MAX_SUBWORDS, EncodeSubwords
from blocks.tokens import MAX_WORDS, EncodeText, EncodeWords, WidenTokens


def TextBlock(  # noqa: N802  named as fastai's blocks are
    is_lm: bool = False,
    *,
    tokenizer: str | Path | EncodeText = "words",
    vocab: Sequence[str] = (),
    min_freq: int = 3,
    max_vocab: int | None = None,
    seq_len: int = 72,
    backwards: bool = False,
) -> TransformBlock:
    """A block of texts for a classifier, or for a language model (`is_lm`), whose target is each next token.

    tokenizer: "words"; "bpe" or "unigram", subwords learned from a sample of the training part; the path of a tokenizer.json;
    or that of other data, `text_tfm(dls)`, as a classifier needs that uses their language model. The last three kinds need
    fastray[text].
    vocab: the words, `text_vocab(dls)` of other data; else those that the training part has `min_freq` times. max_vocab: how
    many tokens at most, by default 60,000 words, 8,000 subwords. seq_len: tokens a batch of a language model goes on by.
    backwards: texts are read from their end.
    """
    encode = _encoder(tokenizer, tuple(vocab), min_freq, max_vocab, backwards)
    feed: dict[str, Any] = {"samples": Streams(seq_len)} if is_lm else {"sort_by_length": True, "pad": encode.pad_id}
    return TransformBlock(type_tfms=(encode,), batch_tfms=(WidenTokens(),), dls_kwargs=feed)


def _encoder(
    tokenizer: str | Path | EncodeText, vocab: tuple[str, ...], min_freq: int, max_vocab: int | None, backwards: bool
) -> EncodeText:
    if tokenizer == "words":
        return EncodeWords(vocab, min_freq, max_vocab or MAX_WORDS, backwards=backwards)
    if vocab:
        raise ValueError("a vocabulary is one of words: subwords have theirs in their tokenizer")
    if isinstance(tokenizer, EncodeText):
        return replace(tokenizer, backwards=backwards)
    if tokenizer in ("bpe", "unigram"):
        return EncodeSubwords(str(tokenizer), max_vocab or MAX_SUBWORDS, backwards=backwards)
    if Path(tokenizer).suffix == ".json":
        return EncodeSubwords.from_file(tokenizer, backwards=backwards)
    raise UserError(f"tokenizer is words, bpe, unigram, the path of a tokenizer.json or text_tfm(dls), not {tokenizer!r}")


def text_tfm(dls: DataLoaders) -> EncodeText:
    """The fitted transform of the data's texts: `vocab`, `pad_id`, `decode`. TypeError when the data has none."""
    found = dls.fitted_tfm(EncodeText)
    if found is None:
        raise TypeError("the data has no text among its inputs: make it by text_dataloaders, or with a TextBlock")
    return found


def text_vocab(dls: DataLoaders) -> tuple[str, ...]:
    """The tokens of the data's texts, in the order of their ids. (`dls.vocab` is that of the target: classes, or these.)"""
    return text_tfm(dls).vocab
