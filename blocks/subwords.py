"""Subwords as tokens, by the library `tokenizers`: byte pairs and Unigram learned from the data, or any tokenizer.json.

What a tokenizer is, its JSON says; that is the fitted state, so an export carries it and needs no file of its own.
"""

import contextlib
import functools
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, cast

import numpy as np
import pyarrow as pa

from blocks.errors import DataError, UnreadableRow, UserError
from blocks.tokens import EncodeText, text_of
from blocks.transform import Summary
from blocks.words import BOS, SPECIAL_TOKENS, UNK, Text, in_chunks

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MAX_SUBWORDS = 8_000
SAMPLE_CHARACTERS = 5_000_000  # of the training part, that subwords are learned from
OF_ONE_TEXT = 10_000  # characters of a text that may be among them
DIGITS = 6  # of a piece's score: the library sums them in any order, so the last ones differ from run to run


@dataclass
class TextSample:
    """Some texts, the same ones however the rows are divided: those with the smallest hashes of their row's id.

    Mergeable: a text among the first of all is among the first of its part.
    """

    hashed: list[tuple[str, str]] = field(default_factory=list)  # hash, text
    in_order: int = field(default=0, compare=False, repr=False)  # how many there were when they were last sorted and cut

    def observe(self, value: Any, row_id: Any) -> None:
        text = joined(text_of(value))[:OF_ONE_TEXT]
        self.hashed.append((blake2b(str(row_id).encode(), digest_size=8).hexdigest(), text))
        if len(self.hashed) > 1000 + 2 * self.in_order:
            self._prune()

    def observe_column(self, values: pa.Array, row_ids: pa.Array) -> None:
        for value, row_id in zip(values.to_pylist(), row_ids.to_pylist(), strict=True):
            with contextlib.suppress(UnreadableRow):
                self.observe(value, row_id)

    @property
    def texts(self) -> list[str]:
        """The texts of the sample, in the order of their hashes."""
        self._prune()
        return [text for _, text in self.hashed]

    def _prune(self) -> None:
        self.hashed.sort()
        until = np.cumsum([len(text) for _, text in self.hashed])
        del self.hashed[int(np.searchsorted(until, SAMPLE_CHARACTERS)) + 1 :]
        self.in_order = len(self.hashed)

    def merge(self, other: Self) -> None:
        self.hashed += other.hashed
        self._prune()

    def to_plain(self) -> dict[str, Any]:
        self._prune()
        return {"hashed": self.hashed}

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> Self:
        return cls([(key, text) for key, text in plain["hashed"]])


def joined(text: Text) -> str:
    """The fields of a text a line each."""
    return text if isinstance(text, str) else "\n".join(text)


@dataclass
class EncodeSubwords(EncodeText):
    """The tokens are subwords.

    model: "bpe" or "unigram", learned with `max_vocab` tokens, the special ones first; "file": of a tokenizer.json. tokenizer:
    the JSON, as the library writes it. pad: the id of padding.
    """

    model: str = "bpe"
    max_vocab: int = MAX_SUBWORDS
    tokenizer: str = field(default="", repr=False)
    pad: int = 1

    summary: ClassVar[type[Summary] | None] = TextSample

    @classmethod
    def from_file(cls, path: str | Path, backwards: bool = False) -> Self:
        """Those of a tokenizer.json. UserError when it is none. Texts are not padded to its length, and cut as it says."""
        tokenizers = _library()
        try:
            found = tokenizers.Tokenizer.from_str(Path(path).read_text(encoding="utf-8"))
        except Exception as error:
            raise UserError(f"{str(path)!r} is no tokenizer.json: {error}") from error
        padding = (found.padding or {}).get("pad_token")
        found.no_padding()
        pad = next((p for p in (padding, "[PAD]", "<pad>", "xxpad") if p and found.token_to_id(p) is not None), None)
        if pad is None:
            pad = "xxpad"
            found.add_special_tokens([pad])
        return cls("file", found.get_vocab_size(), found.to_str(), found.token_to_id(pad), backwards=backwards)

    @property
    def fitted(self) -> bool:
        return bool(self.tokenizer)

    def setups(self, train: TextSample, valid: TextSample) -> set[Any]:
        if not any(train.texts):
            raise DataError("the training part has no text to learn subwords from: all are empty")
        self.tokenizer = _learned(self.model, self.max_vocab, train.texts)
        return set()

    @property
    def vocab(self) -> tuple[str, ...]:
        return _vocab_of(self.tokenizer) if self.fitted else ()

    @property
    def pad_id(self) -> int:
        return self.pad

    def ids_of(self, texts: Iterable[Text]) -> tuple[np.ndarray, np.ndarray]:
        tokenizer = _tokenizer(self.tokenizer)
        ids: list[np.ndarray] = [np.zeros(0, np.int32)]
        lengths: list[int] = []
        for chunk in in_chunks(texts):
            for found in tokenizer.encode_batch_fast([joined(text) for text in chunk]):
                ids.append(np.array(found.ids, np.int32))
                lengths.append(len(found.ids))
        return np.concatenate(ids), np.cumsum([0, *lengths])

    def text_of_ids(self, ids: Sequence[int]) -> str:
        return _tokenizer(self.tokenizer).decode(list(ids))


def _library() -> Any:
    # The tasks share the machine's cores among them; and a process that is forked later would be warned of its threads.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        import tokenizers
    except ImportError as error:
        raise UserError("subwords need the library tokenizers: pip install 'fastray[text]'") from error
    return tokenizers


@functools.lru_cache(maxsize=4)
def _tokenizer(content: str) -> "Tokenizer":
    return cast("Tokenizer", _library().Tokenizer.from_str(content))


@functools.lru_cache(maxsize=4)
def _vocab_of(content: str) -> tuple[str, ...]:
    ids = {i: token for token, i in _tokenizer(content).get_vocab().items()}
    return tuple(ids.get(i, "") for i in range(max(ids) + 1))


def _learned(model: str, size: int, texts: Iterable[str]) -> str:
    library = _library()
    special = {"special_tokens": list(SPECIAL_TOKENS), "show_progress": False, "vocab_size": size}
    if model == "bpe":
        made = library.Tokenizer(library.models.BPE())
        made.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = library.decoders.ByteLevel()
        trainer = library.trainers.BpeTrainer(initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(), **special)
    else:
        made = library.Tokenizer(library.models.Unigram())
        made.normalizer = library.normalizers.NFKC()
        made.pre_tokenizer = library.pre_tokenizers.Metaspace()
        made.decoder = library.decoders.Metaspace()
        trainer = library.trainers.UnigramTrainer(unk_token=UNK, **special)
    made.train_from_iterator(texts, trainer)
    made.post_processor = library.processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, SPECIAL_TOKENS.index(BOS))]
    )
    content: str = made.to_str()
    return content if model == "bpe" else _in_order(content)


def _in_order(unigram: str) -> str:
    # Pieces by their score, of equal ones by value, so that one sample has one tokenizer.
    plain = json.loads(unigram)
    first, rest = plain["model"]["vocab"][: len(SPECIAL_TOKENS)], plain["model"]["vocab"][len(SPECIAL_TOKENS) :]
    ordered = sorted((-round(score, DIGITS), piece) for piece, score in rest)
    plain["model"]["vocab"] = [*first, *([piece, -score] for score, piece in ordered)]
    return json.dumps(plain, ensure_ascii=False)
