"""Labels as blocks: a vocabulary fitted on the training part, indices in the store, names when shown."""

import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch

from blocks.datablock import TransformBlock
from blocks.errors import DataError
from blocks.tensors import TensorCategory
from blocks.transform import Summary, Transform


class Category(str):
    """The name of a class, as decoded."""


@dataclass
class CategoryCounts:
    """How often each label occurs, and the row of one that occurs once. Mergeable, exact."""

    counts: Counter[str] = field(default_factory=Counter)
    only_row: dict[str, str] = field(default_factory=dict)

    def observe(self, value: Any, row_id: str) -> None:
        label = str(value)
        self.counts[label] += 1
        if self.counts[label] == 1:
            self.only_row[label] = row_id
        else:
            self.only_row.pop(label, None)

    def merge(self, other: Self) -> None:
        self.counts += other.counts
        both = self.only_row | other.only_row
        self.only_row = {label: row for label, row in both.items() if self.counts[label] == 1}

    def to_plain(self) -> dict[str, Any]:
        return {"counts": dict(self.counts), "only_row": self.only_row}

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> Self:
        return cls(Counter(plain["counts"]), dict(plain["only_row"]))


@dataclass
class Categorize(Transform):
    """A label becomes its index in the vocabulary; the vocabulary is that of the training part, sorted, unless given."""

    vocab: tuple[str, ...] = ()

    summary: ClassVar[type[Summary] | None] = CategoryCounts

    def __post_init__(self) -> None:
        self.vocab = tuple(str(v) for v in self.vocab)
        self._index = {label: i for i, label in enumerate(self.vocab)}
        if len(self._index) != len(self.vocab):
            twice = [label for label, n in Counter(self.vocab).items() if n > 1]
            raise ValueError(f"the vocabulary names {', '.join(map(repr, twice))} more than once")

    @property
    def fitted(self) -> bool:
        return bool(self.vocab)

    def setups(self, train: CategoryCounts, valid: CategoryCounts) -> set[str]:
        # A class with one item, drawn into validation, could never be learned: it trains instead, and that is said.
        lone = {label: row for label, row in valid.only_row.items() if label not in train.counts}
        if lone:
            warnings.warn(
                f"{len(lone)} classes have one item each, which is moved to the training part: {_listed(sorted(lone))}",
                stacklevel=2,
            )
        known = set(train.counts) | set(lone)
        if len(known) < 2:
            raise DataError(
                f"a classifier needs at least two classes in the training part, found {_listed(sorted(known)) or 'none'}: "
                "check that get_y names the class (parent_label: the folder an item lies in)"
            )
        unseen = sorted(set(valid.counts) - known)
        if unseen:
            raise DataError(
                f"{_listed(unseen)}: only in the validation part ({sum(valid.counts[c] for c in unseen)} rows), so the "
                "model could never learn it. Change the splitter's seed or fraction, add items of that class, or "
                "name the classes in CategoryBlock(vocab=...)"
            )
        self.vocab = tuple(sorted(known))
        self.__post_init__()
        return set(lone.values())

    def encodes(self, x: object) -> TensorCategory:
        index = self._index.get(str(x))
        if index is None:
            raise DataError(f"the label {str(x)!r} is not in the vocabulary {_listed(self.vocab)}")
        return torch.tensor(index).as_subclass(TensorCategory)

    def decodes(self, x: TensorCategory) -> Any:
        return Category(self.vocab[int(x)]) if x.ndim == 0 else [Category(self.vocab[int(i)]) for i in x]


def _listed(names: Sequence[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(repr, names[:most])) + more


def CategoryBlock(vocab: Sequence[str] = ()) -> TransformBlock:  # noqa: N802  fastai's name
    """A block of single labels; `vocab` fixes the classes and their order, else the training part does."""
    return TransformBlock(type_tfms=(Categorize(tuple(vocab)),))
