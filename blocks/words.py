"""Words as tokens, by fastai's rules: what a capital, a repetition or a new field says stands before the word as a token.

    Sooo GREAT, it's  ->  xxbos xxmaj s xxrep 3 o xxup great , it 's

A regular expression finds the words; the rules act on each different one once, as most are met again and again, so a token
costs a look-up (about 0.4 us in all). The library `tokenizers` is for subwords (`blocks.subwords`): its normalisers cannot
count a repetition, and to be told a word's place in the text costs more than to find it here. Languages that put no spaces
between words need subwords.
"""

import functools
import html
import itertools
import re
import sys
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

# In fastai's order: unknown, padding, begin and end of a text, field, repeated character, repeated word, all capitals, one.
SPECIAL_TOKENS = ("xxunk", "xxpad", "xxbos", "xxeos", "xxfld", "xxrep", "xxwrep", "xxup", "xxmaj")
UNK, PAD, BOS, _, FLD, REP, WREP, UP, MAJ = SPECIAL_TOKENS

Text = str | tuple[str, ...]  # a text, or its fields
Raw = str | tuple[Any, ...]  # a word as it stands in a text, or a mark of ours: (BOS,), (FLD, number), (WREP, times, word)

MANY = 3  # times, from which on a repetition becomes a token
CHARACTERS = 1_000_000  # of texts that are held as words at a time
ENDS_A_WORD = frozenset(".,!?;:)]}%")  # what is written without a space before it

_BREAK = re.compile(r"<br\s*/?>", re.IGNORECASE)
_CONTRACTED = re.compile(r"(.+?)(n't|'(?:s|m|d|ll|re|ve))", re.IGNORECASE)
_REPEATED = re.compile(r"(\S)(\1{2,})")


@functools.cache
def _marks() -> str:
    # What belongs to the character before it: accents, vowel signs of Indian and Arabic writing; Python's \w has none of them.
    marks = [chr(c) for c in range(0x20000) if unicodedata.category(chr(c)).startswith("M")]
    return "".join(map(re.escape, marks)) + "\U0001f3fb-\U0001f3ff"  # skin tones


@functools.cache
def _words() -> re.Pattern[str]:
    # Numbers; words with apostrophes and marks in them; symbols. To look at ASCII first makes it four times as fast.
    inner = rf"'\w+|(?![\0-\x7f])[{_marks()}\u200c\u200d]+\w*"
    return re.compile(rf"\d+(?:[.,]\d+)+(?!\w)|\w+(?:{inner})*|[^\w\s]+")


@functools.cache
def _symbols() -> re.Pattern[str]:
    return re.compile(rf".(?:[{_marks()}]|\u200d.)*")


# --- from text to tokens -----------------------------------------------------------------------------------------------


def _raw_words(text: Text) -> list[Raw]:
    if isinstance(text, tuple):
        fields: Iterator[list[Raw]] = ([(FLD, n), *_found(field)] for n, field in enumerate(text, 1))
        return [(BOS,), *itertools.chain.from_iterable(fields)]
    return [(BOS,), *_found(text)]


def _found(text: str) -> list[str]:
    if "&" in text:
        text = html.unescape(text)
    if "<" in text:
        text = _BREAK.sub("\n", text)
    return _words().findall(text.replace("\u2019", "'"))


@functools.lru_cache(maxsize=200_000)
def expanded(raw: Raw) -> tuple[str, ...]:
    """The tokens of a word as it stands in a text."""
    if isinstance(raw, tuple):
        return (WREP, str(raw[1]), *expanded(raw[2])) if raw[0] == WREP else tuple(map(str, raw))
    if not (raw[0].isalnum() or raw[0] == "_"):
        groups = ((symbol, len(list(same))) for symbol, same in itertools.groupby(_symbols().findall(raw)))
        return tuple(itertools.chain.from_iterable((REP, str(n), s) if n >= MANY else (s,) * n for s, n in groups))
    contracted = _CONTRACTED.fullmatch(raw)
    if contracted:
        return (*expanded(contracted[1]), *_cased(contracted[2]))
    repeated = None if raw[0].isdecimal() else _REPEATED.search(raw)  # 1,000 is a number
    if repeated:
        before, after = raw[: repeated.start()], raw[repeated.end() :]
        times = str(len(repeated[0]))
        rest = expanded(after) if after else ()
        return (*(_cased(before) if before else ()), REP, times, *_cased(repeated[1]), *rest)
    return _cased(raw)


def _cased(word: str) -> tuple[str, ...]:
    low = word.lower()
    if low == word:
        return (word,)
    if len(word) > 1 and word.isupper() and low.upper() == word:
        return (UP, low)
    return (MAJ, low) if low.capitalize() == word else (low,)


def _is_one_word(raw: Raw) -> bool:
    return isinstance(raw, str) and raw[0].isalnum() and len([t for t in expanded(raw) if t not in (UP, MAJ)]) == 1


class _Coded:
    """Texts as codes of their different words: `words[code]`, int64 `codes`, of text i `codes[offsets[i]:offsets[i + 1]]`."""

    def __init__(self, known: defaultdict[Raw, int], texts: Sequence[Text]):
        found = [_raw_words(text) for text in texts]
        lengths = np.fromiter(map(len, found), np.int64, len(found))
        every = itertools.chain.from_iterable(found)
        codes = np.fromiter(map(known.__getitem__, every), np.int64, int(lengths.sum()))
        self.codes, self.offsets = _without_repetitions(known, codes, np.append(0, np.cumsum(lengths)))


def _without_repetitions(known: defaultdict[Raw, int], codes: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    # A word three times and more becomes one code, of the word with its mark. A text begins with its mark, so no run crosses.
    starts = np.flatnonzero(np.append(True, codes[1:] != codes[:-1])) if len(codes) else np.zeros(0, np.int64)
    lengths = np.diff(np.append(starts, len(codes)))
    runs = np.flatnonzero(lengths >= MANY)
    if not len(runs):
        return codes, offsets
    words = list(known)
    keep = np.ones(len(codes), bool)
    for start, length in zip(starts[runs].tolist(), lengths[runs].tolist(), strict=True):
        word = words[codes[start]]
        if _is_one_word(word):
            codes[start] = known[WREP, length, word]
            keep[start + 1 : start + length] = False
    return codes[keep], np.append(0, np.cumsum(keep))[offsets]


def in_chunks(texts: Iterable[Text]) -> Iterator[list[Text]]:
    """The texts in lists of about a million characters."""
    held: list[Text] = []
    characters = 0
    for text in texts:
        held.append(text)
        characters += len(text) if isinstance(text, str) else sum(map(len, text))
        if characters >= CHARACTERS:
            yield held
            held, characters = [], 0
    if held:
        yield held


def _vocabulary() -> defaultdict[Raw, int]:
    known: defaultdict[Raw, int] = defaultdict()
    known.default_factory = known.__len__
    return known


def count_tokens(texts: Iterable[Text]) -> Counter[str]:
    """How often each token occurs in some texts."""
    counts: Counter[str] = Counter()
    known = _vocabulary()
    seen = np.zeros(0, np.int64)
    for chunk in in_chunks(texts):
        codes = _Coded(known, chunk).codes
        seen = np.append(seen, np.zeros(len(known) - len(seen), np.int64)) + np.bincount(codes, minlength=len(known))
    for word, times in zip(known, seen.tolist(), strict=True):
        for token in expanded(word) if times else ():
            counts[token] += times
    return counts


def token_ids(texts: Iterable[Text], index: Mapping[str, int]) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of some texts by their places in a vocabulary, 0 where it lacks one.

    Returns int32 ids (tokens,) of all texts and int64 offsets (texts + 1,): text i is `ids[offsets[i]:offsets[i + 1]]`.
    """
    known = _vocabulary()
    own: list[int] = []  # the ids of each word's tokens, word by word
    ends = [0]
    ids: list[np.ndarray] = []
    lengths: list[np.ndarray] = []
    for chunk in in_chunks(texts):
        coded = _Coded(known, chunk)
        for word in itertools.islice(known, len(ends) - 1, None):
            own += [index.get(token, 0) for token in expanded(word)]
            ends.append(len(own))
        bounds = np.array(ends)
        per_word = np.diff(bounds)[coded.codes]
        until = np.append(0, np.cumsum(per_word))
        # Of word w the tokens are own[bounds[w]:bounds[w + 1]], and they begin at until[i] where it is the i-th one.
        ids.append(np.array(own, np.int32)[np.arange(until[-1]) + np.repeat(bounds[coded.codes] - until[:-1], per_word)])
        lengths.append(np.diff(until[coded.offsets]))
    if not ids:
        return np.zeros(0, np.int32), np.zeros(1, np.int64)
    return np.concatenate(ids), np.append(0, np.cumsum(np.concatenate(lengths)))


def tokenize(text: Text) -> list[str]:
    """The tokens of one text."""
    known = _vocabulary()
    codes = _Coded(known, [text]).codes
    words = list(known)
    return [token for code in codes.tolist() for token in expanded(words[code])]


def make_vocab(counts: Mapping[str, int], min_freq: int, max_vocab: int) -> tuple[str, ...]:
    """The special tokens and those seen `min_freq` times and more, the most frequent first, of equally frequent ones by value.

    max_vocab: the number of all of them at most.
    """
    often = [(-n, token) for token, n in counts.items() if n >= min_freq and token not in SPECIAL_TOKENS]
    return (*SPECIAL_TOKENS, *(sys.intern(token) for _, token in sorted(often)))[:max_vocab]


# --- and back ----------------------------------------------------------------------------------------------------------


def detokenize(tokens: Sequence[str]) -> str:
    """A text that has these tokens: capitals and repetitions are written out, each further text or field begins a line."""
    written: list[str] = []
    waiting = list(tokens[::-1])
    symbol_before = True
    while waiting:
        token = waiting.pop()
        if token in (BOS, FLD):
            if token == FLD and waiting:
                waiting.pop()
            if written:
                written.append("\n")
            symbol_before = True
        elif token not in (PAD, "xxeos"):
            word, symbol = _written(token, waiting)
            joined = token in ENDS_A_WORD or (_CONTRACTED.fullmatch(f"x{word}") is not None and not word[0].isalnum())
            joined = (joined or word.lower() == "n't") and not symbol_before
            written.append(word if joined or not written or written[-1] == "\n" else f" {word}")
            symbol_before = symbol
    return "".join(written)


def _written(token: str, waiting: list[str]) -> tuple[str, bool]:
    # A word and whether it is a symbol; what a mark speaks of is taken off the end of `waiting`.
    if token in (REP, WREP) and len(waiting) > 1 and waiting[-1].isdecimal():
        times = min(int(waiting.pop()), 100)  # a model may write any number
        word, symbol = _written(waiting.pop(), waiting)
        return (word * times if token == REP else " ".join([word] * times)), symbol
    if token in (UP, MAJ) and waiting:
        word, symbol = _written(waiting.pop(), waiting)
        return (word.upper() if token == UP else word.capitalize()), symbol
    return token, not token[:1].isalnum()
