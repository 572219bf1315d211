"""Which rows train and which validate."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

TRAIN, VALID = 0, 1


@dataclass(frozen=True)
class RandomSplitter:
    """A share `valid_pct` of the rows, drawn by a hash of (seed, row id), validates.

    A row's part depends on nothing but its own id: not on the order, the number or the partitioning of the rows. So the
    share holds within sampling error only: about 1.96 * sqrt(p * (1 - p) / n).
    """

    valid_pct: float = 0.2
    seed: int = 42

    by_row_id: ClassVar[bool] = True  # is given row ids, where a function of the user's is given the items

    def __post_init__(self) -> None:
        if not 0 < self.valid_pct < 1:
            raise ValueError(f"valid_pct is a share between 0 and 1, not {self.valid_pct!r}")

    def __call__(self, ids: Sequence[str]) -> tuple[list[int], list[int]]:
        """The positions of the rows that train, and of those that validate."""
        key = self.seed.to_bytes(16, "little", signed=True)
        below = int(self.valid_pct * 2**64)
        train: list[int] = []
        valid: list[int] = []
        for position, row_id in enumerate(ids):
            (valid if _hash(row_id, key) < below else train).append(position)
        return train, valid


def _hash(row_id: str, key: bytes) -> int:
    encoded = row_id.encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(encoded, key=key, digest_size=8).digest(), "little")
