"""Texts as inputs: token ids of any length in the store, padded batches for a classifier, streams for a language model.

    DataBlock(blocks=(TextBlock(), CategoryBlock()), get_x=ColReader("review"), get_y=ColReader("label"))
    DataBlock(blocks=(TextBlock(is_lm=True),), get_x=ColReader("review"))

A text is a str, the path of a UTF-8 file, or a tuple of several fields. Tokenised once, when the data is prepared; the
vocabulary is that of the training part. Id 1 is padding, which a batch has behind its shorter texts.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any, ClassVar, Self

import numpy as np
import pyarrow as pa
import torch

from blocks.category import is_missing
from blocks.datablock import TransformBlock
from blocks.dataloaders import DataLoaders
from blocks.errors import DataError, UnreadableRow
from blocks.files import named, read_bytes
from blocks.streams import Streams
from blocks.tensors import TensorText
from blocks.transform import ItemTransform, Summary, Transform
from blocks.words import PAD, SPECIAL_TOKENS, Text, count_tokens, detokenize, make_vocab, token_ids

MAX_WORDS = 60_000


# --- what is a text ----------------------------------------------------------------------------------------------------


def read_text(file: str | PurePath) -> str:
    """The content of a UTF-8 file by path or URL: the `get_x` of files at a URL. UnreadableRow when it cannot be read."""
    try:
        return _decoded(read_bytes(str(file)))
    except OSError as error:
        raise UnreadableRow(f"not a readable file: {error}") from error
    except UnreadableRow as error:
        raise UnreadableRow(f"{named(str(file))} is {error}") from None


def _decoded(content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UnreadableRow(
            f"not UTF-8 (byte {error.start} is {content[error.start]:#04x}): convert it, as in iconv -f latin1 -t utf-8"
        ) from error


def text_of(item: Any) -> Text:
    """The text an item is, or the texts of its fields. UnreadableRow where there is none, DataError for what is no text."""
    if isinstance(item, str):
        return item
    if is_missing(item):
        raise UnreadableRow("it has no text: the cell is empty")
    if isinstance(item, PurePath):
        return read_text(item)
    if isinstance(item, bytes):
        return _decoded(item)
    if isinstance(item, tuple | list) and item and all(is_missing(f) or isinstance(f, str) for f in item):
        return tuple("" if is_missing(f) else f for f in item)
    raise DataError(f"{item!r:.80} ({type(item).__name__}) is no text: a str, the path of a file, or a tuple of several texts")


def _texts(values: pa.Array) -> list[str]:
    # Of a whole column. DataError for one that has to be read item by item: that names the row.
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    if values.null_count or not (pa.types.is_string(values.type) or pa.types.is_large_string(values.type)):
        raise DataError(f"{values.null_count} gaps in a column of {values.type}: a column of texts is wanted")
    return values.to_pylist()


# --- what the training part tells --------------------------------------------------------------------------------------


@dataclass
class TokenCounts:
    """How often each token occurs. Mergeable, exact; a row without a text does not count."""

    counts: Counter[str] = field(default_factory=Counter)

    def observe(self, value: Any, row_id: Any) -> None:
        self.counts.update(count_tokens([text_of(value)]))

    def observe_column(self, values: pa.Array, row_ids: pa.Array) -> None:
        self.counts.update(count_tokens(_texts(values.drop_null())))

    def merge(self, other: Self) -> None:
        self.counts.update(other.counts)

    def to_plain(self) -> dict[str, Any]:
        return {"counts": dict(self.counts)}

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> Self:
        return cls(Counter(plain["counts"]))


# --- encoding ----------------------------------------------------------------------------------------------------------


@dataclass
class EncodeWords(ItemTransform):
    """A text becomes its words' places in the vocabulary, by fastai's rules (`blocks.words`); decoded, it is a text again.

    vocab: given, or that of the training part: the tokens seen `min_freq` times and more, at most `max_vocab` with the special
    ones. backwards: the last token first.
    """

    vocab: tuple[str, ...] = ()
    min_freq: int = 3
    max_vocab: int = MAX_WORDS
    backwards: bool = False

    summary: ClassVar[type[Summary] | None] = TokenCounts
    pad_id: ClassVar[int] = SPECIAL_TOKENS.index(PAD)

    def __post_init__(self) -> None:
        if self.vocab and self.vocab[: len(SPECIAL_TOKENS)] != SPECIAL_TOKENS:
            raise ValueError(
                f"a vocabulary begins with {', '.join(SPECIAL_TOKENS)}: give the one of other data, text_vocab(dls)"
            )
        if self.min_freq < 1 or self.max_vocab <= len(SPECIAL_TOKENS):
            raise ValueError(
                f"min_freq is at least 1 and max_vocab more than the {len(SPECIAL_TOKENS)} special tokens, not "
                f"{self.min_freq} and {self.max_vocab}"
            )
        self._index = {token: i for i, token in enumerate(self.vocab)}

    @property
    def fitted(self) -> bool:
        return bool(self.vocab)

    def setups(self, train: TokenCounts, valid: TokenCounts) -> set[Any]:
        self.vocab = make_vocab(train.counts, self.min_freq, self.max_vocab)
        if len(self.vocab) == len(SPECIAL_TOKENS):
            raise DataError(
                f"no word occurs {self.min_freq} times in the training part, which has {len(train.counts)} different tokens: "
                "lower min_freq"
            )
        self.__post_init__()
        return set()

    def encodes(self, x: object) -> TensorText:
        ids, _ = token_ids([text_of(x)], self._index)
        return torch.from_numpy(ids[::-1].copy() if self.backwards else ids).as_subclass(TensorText)

    def encodes_column(self, values: pa.Array) -> pa.LargeListArray:
        return ragged(*token_ids(_texts(values), self._index), self.backwards)

    def decodes(self, x: TensorText) -> str:
        ids = x.flatten().tolist()
        return detokenize([self.vocab[i] for i in (reversed(ids) if self.backwards else ids)])


def ragged(ids: np.ndarray, offsets: np.ndarray, backwards: bool) -> pa.LargeListArray:
    """Token ids of several texts as a column with a list a text, each the other way round where asked for."""
    if backwards:
        lengths = np.diff(offsets)
        ids = ids[np.repeat(offsets[:-1] + offsets[1:] - 1, lengths) - np.arange(len(ids))]
    return pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), pa.array(ids))


@dataclass
class WidenTokens(Transform):
    """Token ids become int64, as losses and look-ups want them; stored they take half as much."""

    def encodes(self, x: TensorText) -> TensorText:
        return x.long()  # type: ignore[return-value]  # keeps its class


# --- blocks ------------------------------------------------------------------------------------------------------------


def TextBlock(  # noqa: N802  named as fastai's blocks are
    is_lm: bool = False,
    *,
    vocab: Sequence[str] = (),
    min_freq: int = 3,
    max_vocab: int | None = None,
    seq_len: int = 72,
    backwards: bool = False,
) -> TransformBlock:
    """A block of texts for a classifier, or for a language model (`is_lm`), whose target is each next token.

    vocab: the tokens, such as those of a language model's data, `text_vocab(dls)`; else those that the training part has
    `min_freq` times, `max_vocab` at most. seq_len: tokens a batch of a language model goes on by. backwards: texts are read
    from their end.
    """
    encode = EncodeWords(tuple(vocab), min_freq, max_vocab or MAX_WORDS, backwards)
    feed: dict[str, Any] = {"samples": Streams(seq_len)} if is_lm else {"sort_by_length": True, "pad": encode.pad_id}
    return TransformBlock(type_tfms=(encode,), batch_tfms=(WidenTokens(),), dls_kwargs=feed)


def text_tfm(dls: DataLoaders) -> EncodeWords:
    """The fitted transform of the data's texts: `vocab`, `pad_id`, `decode`. TypeError when the data has none."""
    tfms: Iterable[Any] = () if dls.encode is None else (t for c in dls.encode.columns for t in c.type_tfms.transforms)
    found = next((t for t in tfms if isinstance(t, EncodeWords)), None)
    if found is None:
        raise TypeError("the data has no text among its inputs: make it by text_dataloaders, or with a TextBlock")
    return found


def text_vocab(dls: DataLoaders) -> tuple[str, ...]:
    """The tokens of the data's texts, in the order of their ids. (`dls.vocab` is that of the target: classes, or these.)"""
    return text_tfm(dls).vocab
