"""What a language model reads: the texts of an epoch one after the other, as contiguous streams."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from blocks import order
from blocks.errors import DataError
from blocks.gather import Epoch, Share, Span, piece, shards_of, share_of

if TYPE_CHECKING:
    from blocks.feed import Feed


@dataclass(frozen=True)
class Streams:
    """The texts of a column in an order of (seed, epoch), one after the other, cut into `batch_size` equal streams.

    A batch is (tokens, the tokens one further on), typed int (rows, up to seq_len) each. Row i goes on where row i of the batch
    before ended, so a model may keep its state; workers read some of the streams each, and together what one would read.
    At most `batch_size` tokens at the end of the order are left over; shuffled texts make it others each epoch.
    """

    seq_len: int = 72
    column: str = "x"

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that are read."""
        return (self.column,)

    def __post_init__(self) -> None:
        if self.seq_len < 1:
            raise ValueError(f"seq_len is at least 1, not {self.seq_len}")


class StreamSamples:
    """The samples of a `Feed` over `Streams`: row i of batch k is a stretch of stream i."""

    def __init__(self, feed: "Feed"):
        assert isinstance(feed.samples, Streams)
        self.feed, self.settings = feed, feed.samples
        self.shards = shards_of(feed.prepared)
        self.rows = self.shards.rows_of(feed.part)
        self._lengths = self.shards.lengths(self.settings.column, self.rows)
        tokens = int(self._lengths.sum())
        if tokens <= feed.batch_size:
            raise DataError(f"{tokens} tokens do not fill {feed.batch_size} streams: lower batch_size")
        self.length = (tokens - 1) // feed.batch_size  # of a stream, in tokens to predict
        steps = -(-self.length // self.settings.seq_len)
        self.n = steps * feed.batch_size
        self.bounds = np.arange(steps + 1) * feed.batch_size

    def epoch(self, epoch: int) -> Epoch:
        """The batches of this epoch."""
        feed, seq_len = self.feed, self.settings.seq_len
        texts = order.shuffled(len(self.rows), feed.seed, epoch) if feed.shuffle else np.arange(len(self.rows))
        rows, ends = self.rows[texts], np.cumsum(self._lengths[texts])
        own, _ = share_of(np.arange(feed.batch_size), feed.rank, feed.world, lend=False)

        def share(k: int) -> Share:
            starts = own * self.length + k * seq_len
            length = min(seq_len, self.length - k * seq_len)
            first = np.searchsorted(ends, starts, side="right")
            return Share(rows[first], starts, feed.batch_size, span=Span(starts, length, (self.settings.column,)))

        def columns(share: Share) -> list[torch.Tensor]:
            assert share.span is not None
            tokens = self._read(rows, ends, share.span.starts, share.span.length + 1)
            return [tokens[:, :-1], tokens[:, 1:]]

        return Epoch(share, columns)

    def _read(self, rows: np.ndarray, ends: np.ndarray, starts: np.ndarray, length: int) -> torch.Tensor:
        # `length` tokens from each of `starts` on, of the texts in `rows` that end at `ends`: typed (starts, length).
        column = self.settings.column
        lines = []
        for start in starts.tolist():
            text = int(np.searchsorted(ends, start, side="right"))
            begin = start - (int(ends[text - 1]) if text else 0)
            found: list[np.ndarray] = []
            missing = length
            while missing:
                ((shard, row),) = self.shards.located(rows[text : text + 1])
                found.append(piece(shard.columns[column], row)[begin : begin + missing])
                text, begin, missing = text + 1, 0, missing - len(found[-1])
            lines.append(np.concatenate(found))
        return torch.from_numpy(np.stack(lines)).as_subclass(self.shards.kinds[column])
