"""Summaries of numbers that merge: of parts seen by different tasks, the summary of the whole.

None and NaN are missing values: counted, and otherwise left out.
"""

import base64
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import numpy as np
import pyarrow as pa


@dataclass
class Moments:
    """How many numbers there are, their mean and the sum of their squared distances from it.

    Merged by the formula of Chan, Golub and LeVeque ("Updating formulae and a pairwise algorithm for computing sample
    variances", 1979): what order parts are merged in shows in the last bits only.
    """

    n: int = 0
    mean: float = 0.0
    squares: float = 0.0
    missing: int = 0

    @property
    def variance(self) -> float:
        """Of the numbers themselves (divided by n); 0 without any."""
        return self.squares / self.n if self.n else 0.0

    @property
    def std(self) -> float:
        return math.sqrt(self.variance)

    def observe(self, value: Any, row_id: Any) -> None:
        self._merge_array(_numbers([value]), 1)

    def observe_column(self, values: pa.Array, row_ids: pa.Array) -> None:
        self._merge_array(_numbers(values), len(values))

    def _merge_array(self, found: np.ndarray, rows: int) -> None:
        mean = float(found.mean()) if len(found) else 0.0
        self.merge(type(self)(len(found), mean, float(((found - mean) ** 2).sum()), rows - len(found)))

    def merge(self, other: Self) -> None:
        self.missing += other.missing
        n = self.n + other.n
        if not other.n:
            return
        apart = other.mean - self.mean
        self.squares += other.squares + apart * apart * self.n * other.n / n
        self.mean += apart * other.n / n
        self.n = n

    def to_plain(self) -> dict[str, Any]:
        return {"n": self.n, "mean": self.mean, "squares": self.squares, "missing": self.missing}

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> Self:
        return cls(**plain)


@dataclass
class Quantiles:
    """Quantiles of numbers: exact up to a million of them, then with a rank error that is known (`rank_error`).

    Beyond `CAPACITY` the sorted values are halved, every second one standing for two, and so on: the buffers of Manku,
    Rajagopalan and Lindsay ("Approximate medians and other quantiles in one pass and with limited memory", 1998). One
    halving moves a rank by at most the weight of a value, so a billion numbers are off by about a hundred thousandth.
    """

    levels: list[np.ndarray] = field(default_factory=lambda: [np.empty(0)])  # of level i each value stands for 2**i
    slack: int = 0  # by how much a rank may be wrong
    missing: int = 0

    CAPACITY: ClassVar[int] = 1_000_000

    @property
    def n(self) -> int:
        return sum(len(values) << level for level, values in enumerate(self.levels))

    @property
    def rank_error(self) -> float:
        """How far off the share of numbers below a quantile can be; 0 while it is exact."""
        return self.slack / self.n if self.n else 0.0

    def observe(self, value: Any, row_id: Any) -> None:
        self._add(_numbers([value]), 1)

    def observe_column(self, values: pa.Array, row_ids: pa.Array) -> None:
        self._add(_numbers(values), len(values))

    def _add(self, found: np.ndarray, rows: int) -> None:
        self.merge(type(self)([found], 0, rows - len(found)))

    def merge(self, other: Self) -> None:
        self.missing += other.missing
        self.slack += other.slack
        for level, values in enumerate(other.levels):
            self._put(level, values)
        level = 0
        while level < len(self.levels):
            if len(self.levels[level]) > self.CAPACITY:
                self._halve(level)
            level += 1

    def _put(self, level: int, values: np.ndarray) -> None:
        if level == len(self.levels):
            self.levels.append(np.empty(0))
        self.levels[level] = np.concatenate([self.levels[level], values])

    def _halve(self, level: int) -> None:
        values = np.sort(self.levels[level])
        odd = len(values) % 2
        self.levels[level] = values[:odd]  # an odd one out stays as it is
        first = (self.slack >> level) % 2  # by turns the lower and the upper of two, so that errors cancel
        self._put(level + 1, values[odd + first :: 2])
        self.slack += 1 << level

    def quantile(self, q: float) -> float:
        """The value below which the share `q` of the numbers lies, between two of them by their distance; NaN without any."""
        values = np.concatenate(self.levels)
        if not len(values):
            return math.nan
        if not self.slack:
            return float(np.quantile(values, q))
        weights = np.concatenate([np.full(len(v), 1 << level) for level, v in enumerate(self.levels)])
        order = np.argsort(values, kind="stable")
        below = np.cumsum(weights[order])
        return float(values[order][np.searchsorted(below, q * (self.n - 1), side="right")])

    @property
    def median(self) -> float:
        return self.quantile(0.5)

    def to_plain(self) -> dict[str, Any]:
        # As bytes, because as text a million numbers are three times as long.
        levels = [base64.b64encode(v.astype("<f8").tobytes()).decode() for v in self.levels]
        return {"levels": levels, "slack": self.slack, "missing": self.missing}

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> Self:
        levels = [np.frombuffer(base64.b64decode(text), "<f8") for text in plain["levels"]]
        return cls(levels, plain["slack"], plain["missing"])


def _numbers(values: Any) -> np.ndarray:
    # As float64, without what is missing.
    if isinstance(values, pa.Array | pa.ChunkedArray):
        values = values.drop_null().to_numpy(zero_copy_only=False)
    else:
        values = [v for v in values if v is not None]
    found = np.asarray(values, np.float64)
    return found[~np.isnan(found)]
