"""`DataLoaders`: a training and a validation iterable of batches, and what is needed to show and to predict."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
import torch

from blocks.draws import sample_keys
from blocks.encode import decode_sample, encode_sample
from blocks.errors import UserError
from blocks.feed import Batch, Feed
from blocks.fit import fitted_batch_side
from blocks.items import ItemGetter
from blocks.newitems import NewItems, only_inputs
from blocks.plan import BatchSide, Column, Encode, Plan, the_item
from blocks.prepared import Prepared
from blocks.resident import Windows
from blocks.sources import source_of
from blocks.splits import TRAIN, VALID
from blocks.streams import Streams
from blocks.tensors import TensorCategory
from blocks.transform import Pipeline, TransformLike

Kind = TypeVar("Kind")
_BOTH = ("batch_size", "pad", "samples", "sort_by_length", "lanes")
_TRAINING = ("seed", "drop_last", "weights", "partial_n")


@dataclass(frozen=True)
class DataLoaders:
    """What a `Learner` trains on: `train` and `valid` are iterables of batches, a list or a torch DataLoader as well.

    batch_tfms run on each batch on the model's device. n_inp: how many of a batch's columns are inputs.
    encode, prepared: the item side and the store, where the data came from a DataBlock.

    fastai's `from_dblock` is `block.dataloaders(source)`, `from_dsets` this constructor with loaders of any kind, `test_dl` is
    `test`, `weighted_dataloaders` `weighted`. Batches are moved to the model's device by the `Learner`.
    """

    train: Iterable[Any]
    valid: Iterable[Any] = ()
    batch_tfms: Pipeline = field(default_factory=Pipeline)
    n_inp: int = 1
    encode: Encode | None = None
    prepared: Prepared | None = None
    plan_text: str = ""  # Plan.explain()
    fingerprint: str | None = None  # the plan's; None where it could not be recognised in a later run

    def shard(self, rank: int, world: int) -> "DataLoaders":
        """The same data as one of `world` ranks sees it. TypeError when it cannot be divided."""
        train, valid = self._feeds("several workers need data that can be divided among them")
        return replace(self, train=train.shard(rank, world), valid=valid.shard(rank, world))

    def new(self, **settings: Any) -> "DataLoaders":
        """The same prepared data drawn in another way: `dls.new(batch_size=32, drop_last=True)`.

        Of the settings of `Feed`, batch_size, pad, samples, sort_by_length and lanes hold for both parts; seed, drop_last,
        weights and partial_n for training. TypeError for data that was not prepared.
        """
        unknown = sorted(settings.keys() - {*_BOTH, *_TRAINING})
        if unknown:
            raise TypeError(f"{unknown[0]!r} is not a setting of a feed; there are {', '.join((*_BOTH, *_TRAINING))}")
        train, valid = self._feeds("what is drawn from data can be changed where fastray draws it")
        both = {name: value for name, value in settings.items() if name in _BOTH}
        return replace(self, train=replace(train, **settings), valid=replace(valid, **both))

    def add_tfms(self, tfms: TransformLike | Iterable[TransformLike]) -> "DataLoaders":
        """The same data with further batch transforms, in their order among those there are."""
        return replace(self, batch_tfms=self.batch_tfms + Pipeline.of(tfms))

    def weighted(self, weights: Sequence[float] | np.ndarray | None = None) -> "DataLoaders":
        """The same data, training rows drawn with replacement, each as often as its weight says.

        weights: one number a training row, in the order of `dls.train.ids()`; by default such that all classes come equally
        often.
        """
        train, _ = self._feeds("rows can be weighted where fastray draws them")
        return self.new(weights=class_weights(train) if weights is None else weights)

    def test(self, items: Any, *, with_labels: bool = False, batch_size: int | None = None) -> NewItems:
        """Batches of new items, in their order, encoded as the validation part was: inputs alone, or `with_labels` all of it.

        items: as `get_items` gives them, or a table such as a DataFrame or a CSV file. For `learn.get_preds(dls.test(items))`.
        """
        if self.encode is None:
            raise TypeError("only data made by a DataBlock knows how to encode new items: pass batches of your own")
        encode = self.encode if with_labels else only_inputs(self.encode)
        size = batch_size or getattr(self.valid, "batch_size", None) or 64
        return NewItems(source_of(items, None), encode, size, getattr(self.valid, "pad", {}))

    def _feeds(self, why: str) -> tuple[Feed, Feed]:
        if not isinstance(self.train, Feed) or not isinstance(self.valid, Feed):
            other = self.valid if isinstance(self.train, Feed) else self.train
            raise TypeError(
                f"{why}: make it with block.dataloaders(source) or cluster.dataloaders(block, source), not from "
                f"{type(other).__name__}"
            )
        return self.train, self.valid

    def fitted_tfm(self, kind: type[Kind]) -> Kind | None:
        """The first type transform of this kind among the columns; None where there is none."""
        tfms = () if self.encode is None else (t for c in self.encode.columns for t in c.type_tfms.transforms)
        return next((t for t in tfms if isinstance(t, kind)), None)

    @property
    def vocab(self) -> tuple[str, ...]:
        """The class names of the target, in the order of their indices; empty for other targets."""
        if self.encode is None:
            return ()
        tfms = self.encode.columns[-1].type_tfms.transforms
        return next((t.vocab for t in tfms if hasattr(t, "vocab")), ())

    @property
    def target(self) -> Column | None:
        """How the target is encoded: that of the one target block, or of the input that the feed cuts targets off."""
        if self.encode is None:
            return None
        targets = self.encode.columns[self.encode.n_inp :]
        samples = getattr(self.valid, "samples", None)
        if not targets and (isinstance(samples, Streams) or (isinstance(samples, Windows) and samples.horizon)):
            return self.encode.columns[0]
        return targets[0] if len(targets) == 1 else None

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
        encode = self.encode
        if len(columns) > len(encode.layout):  # the feed cut the targets off the first stored column
            cut = replace(encode, columns=encode.columns[:1], layout=encode.layout[:1])
            return [(*decode_sample(encode, sample[:-1]), *decode_sample(cut, sample[-1:])) for sample in samples]
        if len(columns) == encode.n_input_columns < len(encode.layout):
            encode = only_inputs(encode)
        return [decode_sample(encode, sample) for sample in samples]

    def show_batch(self, n: int = 16, part: int = TRAIN) -> Any:
        """A matplotlib figure of the first `n` samples of a batch as the model sees them (`blocks.show.show_batch`)."""
        from blocks.show import show_batch

        batch = self.one_batch(part)
        target = batch[self.n_inp] if len(batch) > self.n_inp else None
        return show_batch(batch[0], target, samples=self.decode_batch(batch)[:n])

    def __repr__(self) -> str:
        return f"DataLoaders(train={_size(self.train)}, valid={_size(self.valid)}, batch_tfms={self.batch_tfms})"


def transformed(batch: Any, tfms: Pipeline, part: int) -> Any:
    """`tfms` applied to each column of a batch; the ids stay with it, and its keys are what random transforms draw by."""
    if not tfms.transforms:
        return batch
    keys = batch.keys if isinstance(batch, Batch) else sample_keys(0, 0, np.arange(len(batch[0])))
    mapped = tfms(tuple(batch), split_idx=part, keys=keys.to(batch[0].device))
    return batch.with_columns(mapped) if isinstance(batch, Batch) else mapped


def class_weights(feed: Feed) -> np.ndarray:
    """For each row of a feed, in the order of its `ids()`, one over the number of rows of its class, float64 (rows,).

    TypeError when the last column is not a category.
    """
    codes = feed.column(-1)
    if not isinstance(codes, TensorCategory) or codes.ndim != 1:
        raise TypeError(f"classes are balanced by a category, but the last column is {type(codes).__name__}: give weights")
    return 1 / np.bincount(codes.numpy())[codes.numpy()]


def dataloaders_of(plan: Plan, prepared: Prepared, *, batch_size: int, seed: int) -> DataLoaders:
    """The loaders of a plan that was carried out: resident where the store fits into this machine's memory, else in lanes."""
    side = plan.stage(BatchSide)
    lanes = side.in_lanes(prepared)
    dls = DataLoaders(
        train=Feed(prepared, TRAIN, batch_size, shuffle=True, seed=seed, lanes=lanes),
        valid=Feed(prepared, VALID, batch_size, shuffle=False, lanes=lanes),
        batch_tfms=fitted_batch_side(plan, prepared),
        n_inp=prepared.encode.n_input_columns,
        encode=prepared.encode,
        prepared=prepared,
        plan_text=plan.explain(prepared),
        fingerprint=None if plan.unkept else plan.fingerprint,
    )
    return dls.new(**side.feed)


def input_tensors(encode: Encode, item: Any) -> tuple[torch.Tensor, ...]:
    """The input columns of one item, encoded as validation data are: `item` is what `get_x` gives, a tuple for several inputs.

    UserError when that has not as many parts as there are inputs.
    """
    one = encode.n_inp == 1
    if not one and (not isinstance(item, tuple | list) or len(item) != encode.n_inp):
        raise UserError(f"an item is a tuple of {encode.n_inp} inputs, not {item!r:.200}")
    inputs = [
        replace(column, getter=the_item if one else ItemGetter(number), keeps_file=False)
        for number, column in enumerate(encode.columns[: encode.n_inp])
    ]
    at_once = replace(encode, columns=tuple(inputs), item_tfms=encode.item_tfms + encode.each_epoch, each_epoch=Pipeline())
    return tuple(at_once.flat(encode_sample(at_once, str(item)[:200], item)).values())


def _size(loader: Any) -> str:
    return f"{loader.n} rows" if isinstance(loader, Feed) else type(loader).__name__
