"""`DataLoaders`: a training and a validation iterable of batches, and what is needed to show and to predict."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from blocks.encode import encode_sample
from blocks.feed import Batch, Feed
from blocks.plan import Encode, Plan, the_item
from blocks.prepared import Prepared
from blocks.splits import TRAIN, VALID
from blocks.transform import Pipeline


@dataclass(frozen=True)
class DataLoaders:
    """What a `Learner` trains on: `train` and `valid` are iterables of batches, a list or a torch DataLoader as well.

    batch_tfms run on each batch on the model's device. n_inp: how many of a batch's columns are inputs.
    encode, prepared: the item side and the store, where the data came from a DataBlock.
    """

    train: Iterable[Any]
    valid: Iterable[Any] = ()
    batch_tfms: Pipeline = field(default_factory=Pipeline)
    n_inp: int = 1
    encode: Encode | None = None
    prepared: Prepared | None = None
    plan_text: str = ""  # Plan.explain()

    def shard(self, rank: int, world: int) -> "DataLoaders":
        """The same data as one of `world` ranks sees it. TypeError when it cannot be divided."""
        if not isinstance(self.train, Feed) or not isinstance(self.valid, Feed):
            undivided = self.valid if isinstance(self.train, Feed) else self.train
            raise TypeError(
                "several workers need data that can be divided among them: make it with block.dataloaders(source) or "
                f"cluster.dataloaders(block, source), not from {type(undivided).__name__}"
            )
        return replace(self, train=self.train.shard(rank, world), valid=self.valid.shard(rank, world))

    @property
    def vocab(self) -> tuple[str, ...]:
        """The class names of the target, in the order of their indices; empty for other targets."""
        if self.encode is None:
            return ()
        tfms = self.encode.columns[-1].type_tfms.transforms
        return next((t.vocab for t in tfms if hasattr(t, "vocab")), ())

    def one_batch(self, part: int = VALID) -> Any:
        """The first batch of a part after the batch transforms."""
        loader = self.valid if part == VALID else self.train
        batch = next(iter(loader))
        return transformed(batch, self.batch_tfms, part)

    def decode_batch(self, batch: Sequence[Any]) -> list[tuple[Any, ...]]:
        """Each sample of a transformed batch as what it was before: pixels as uint8, a category by its name."""
        columns = [self.batch_tfms.decode(column) for column in batch]
        samples = list(zip(*columns, strict=True))
        if self.encode is None:
            return samples
        tfms = [c.type_tfms for c in self.encode.columns]
        return [tuple(t.decode(v) for t, v in zip(tfms, sample, strict=True)) for sample in samples]

    def show_batch(self, n: int = 16, part: int = TRAIN) -> Any:
        """A matplotlib figure of the first `n` samples of a batch as the model sees them (`blocks.show.show_batch`)."""
        from blocks.show import show_batch

        batch = self.one_batch(part)
        target = batch[self.n_inp] if len(batch) > self.n_inp else None
        return show_batch(batch[0], target, samples=self.decode_batch(batch)[:n])

    def __repr__(self) -> str:
        return f"DataLoaders(train={_size(self.train)}, valid={_size(self.valid)}, batch_tfms={self.batch_tfms})"


def transformed(batch: Any, tfms: Pipeline, part: int) -> Any:
    """`tfms` applied to each column of a batch; the ids stay with it."""
    if not tfms.transforms:
        return batch
    mapped = tfms(tuple(batch), split_idx=part)
    return Batch(mapped, batch._ids, batch.global_rows) if isinstance(batch, Batch) else mapped


def dataloaders_of(plan: Plan, prepared: Prepared, *, batch_size: int, seed: int) -> DataLoaders:
    """The loaders of a plan that was carried out."""
    return DataLoaders(
        train=Feed(prepared, TRAIN, batch_size, shuffle=True, seed=seed),
        valid=Feed(prepared, VALID, batch_size, shuffle=False),
        batch_tfms=plan.batch_tfms,
        n_inp=prepared.encode.n_input_columns,
        encode=prepared.encode,
        prepared=prepared,
        plan_text=plan.explain(prepared),
    )


def input_tensor(encode: Encode, item: Any) -> torch.Tensor:
    """The input column of one item, encoded as validation data are: `item` is what `get_x` gives."""
    x = replace(encode.columns[0], getter=the_item, keeps_file=False)
    at_once = replace(encode, columns=(x,), item_tfms=encode.item_tfms + encode.each_epoch, each_epoch=Pipeline())
    return encode_sample(at_once, str(item)[:200], item)[0]


def _size(loader: Any) -> str:
    return f"{loader.n} rows" if isinstance(loader, Feed) else type(loader).__name__
