"""From a text to the ids of its tokens, by whole Arrow columns, and back.

A text is a str, the path of a UTF-8 file, or a tuple of several fields. Ids are int32 in the store, int64 in a batch.
"""

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any, ClassVar, Self

import numpy as np
import pyarrow as pa
import torch

from blocks.category import is_missing
from blocks.errors import DataError, UnreadableRow
from blocks.files import named, read_bytes
from blocks.tensors import TensorText
from blocks.transform import ItemTransform, Summary, Transform
from blocks.words import PAD, SPECIAL_TOKENS, Text, count_tokens, detokenize, make_vocab, token_ids

MAX_WORDS = 60_000
AT_A_TIME = 1024  # texts


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


def texts_of_column(values: pa.Array) -> Iterator[str] | None:
    """The texts of a whole column; None for one with gaps, or of anything else, which has to be read item by item."""
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    if values.null_count or not (pa.types.is_string(values.type) or pa.types.is_large_string(values.type)):
        return None
    # A few at a time: as Python's strings they take memory once more.
    return (text for start in range(0, len(values), AT_A_TIME) for text in values.slice(start, AT_A_TIME).to_pylist())


def readable_texts(values: pa.Array) -> Iterator[Text]:
    """The texts of a column that can be read; the others are named when they are encoded."""
    whole = texts_of_column(values)
    if whole is not None:
        yield from whole
        return
    for value in values.to_pylist():
        with contextlib.suppress(UnreadableRow):
            yield text_of(value)


# --- what the training part tells --------------------------------------------------------------------------------------


@dataclass
class TokenCounts:
    """How often each token occurs. Mergeable, exact; a row without a text does not count."""

    counts: Counter[str] = field(default_factory=Counter)

    def observe(self, value: Any, row_id: Any) -> None:
        self.counts.update(count_tokens([text_of(value)]))

    def observe_column(self, values: pa.Array, row_ids: pa.Array) -> None:
        self.counts.update(count_tokens(readable_texts(values)))

    def merge(self, other: Self) -> None:
        self.counts.update(other.counts)

    def to_plain(self) -> dict[str, Any]:
        return {"counts": dict(self.counts)}

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> Self:
        return cls(Counter(plain["counts"]))


# --- encoding ----------------------------------------------------------------------------------------------------------


@dataclass
class EncodeText(ItemTransform, registered=False):
    """A text becomes the ids of its tokens; decoded, it is a text again. The base of words and subwords.

    backwards: the last token first.
    """

    backwards: bool = field(default=False, kw_only=True)

    @property
    def vocab(self) -> tuple[str, ...]:
        """The tokens in the order of their ids."""
        raise NotImplementedError

    @property
    def pad_id(self) -> int:
        """The id of padding."""
        return SPECIAL_TOKENS.index(PAD)

    def ids_of(self, texts: Iterable[Text]) -> tuple[np.ndarray, np.ndarray]:
        """int32 ids (tokens,) of all texts and int64 offsets (texts + 1,): of text i `ids[offsets[i]:offsets[i + 1]]`."""
        raise NotImplementedError

    def text_of_ids(self, ids: Sequence[int]) -> str:
        """A text that has these tokens."""
        raise NotImplementedError

    def encodes(self, x: object) -> TensorText:
        ids, _ = self.ids_of([text_of(x)])
        return torch.from_numpy(ids[::-1].copy() if self.backwards else ids).as_subclass(TensorText)

    def encodes_column(self, values: pa.Array) -> pa.LargeListArray | None:
        texts = texts_of_column(values)
        if texts is None:
            return None
        ids, offsets = self.ids_of(texts)
        if self.backwards:
            ends = offsets[:-1] + offsets[1:] - 1
            ids = ids[np.repeat(ends, np.diff(offsets)) - np.arange(len(ids))]
        return pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), pa.array(ids))

    def decodes(self, x: TensorText) -> str:
        ids = x.flatten().tolist()
        return self.text_of_ids(ids[::-1] if self.backwards else ids)


@dataclass
class EncodeWords(EncodeText):
    """The tokens are words, by fastai's rules (`blocks.words`), and the marks before them.

    vocab: given, or that of the training part: the tokens seen `min_freq` times and more, at most `max_vocab` with the special
    ones.
    """

    vocab: tuple[str, ...] = field(default=(), repr=False)
    min_freq: int = 3
    max_vocab: int = MAX_WORDS

    summary: ClassVar[type[Summary] | None] = TokenCounts

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

    def ids_of(self, texts: Iterable[Text]) -> tuple[np.ndarray, np.ndarray]:
        return token_ids(texts, self._index)

    def text_of_ids(self, ids: Sequence[int]) -> str:
        return detokenize([self.vocab[i] for i in ids])


@dataclass
class WidenTokens(Transform):
    """Token ids become int64, as losses and look-ups want them; stored they take half as much."""

    def encodes(self, x: TensorText) -> TensorText:
        return x.long()  # type: ignore[return-value]  # keeps its class
