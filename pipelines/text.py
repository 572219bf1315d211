"""Texts: from a table or a folder of files to a classifier, or to a language model.

dls = text_dataloaders("reviews.csv", text="review", label="sentiment")
learn = text_classifier_learner(dls)
learn.fit_one_cycle(3, 1e-2)
learn.predict("great food").label

A classifier learns more from a language model's encoder: `lm_dataloaders(dls)` has the same texts as streams (`ulmfit`).
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt

from blocks.cache import cache_folder
from blocks.category import CategoryBlock
from blocks.datablock import DataBlock, TransformBlock
from blocks.dataloaders import DataLoaders
from blocks.feed import Feed
from blocks.fingerprint import fingerprint
from blocks.items import ColReader, get_text_files, parent_label
from blocks.newitems import only_inputs
from blocks.splits import ColSplitter, GrandparentSplitter, RandomSplitter, Splitter
from blocks.streams import Streams
from blocks.text import TextBlock
from blocks.tokens import read_text
from pipelines.examples import pydoc_topics, reviews_table
from pipelines.settings import BatchSize, given_path
from pipelines.text_learners import language_model_learner, save_encoder, text_classifier_learner
from training import Learner, Recipe, Schedule, gradual_unfreeze, one_cycle, recipe
from training.recipe import SettingError

Tokens = Literal["words", "bpe", "unigram"]

# --- data --------------------------------------------------------------------------------------------------------------


def text_block(
    text: str | tuple[str, ...] = "text",
    label: str | None = None,
    *,
    y_block: TransformBlock | None = None,
    splitter: Splitter | None = None,
    **texts: Any,
) -> DataBlock:
    """The DataBlock of a table's column of texts: with `label` for a classifier, without for a language model.

    text: several columns are fields of one text. y_block: of the column `label`, by default CategoryBlock(). texts: of
    `TextBlock`, such as tokenizer="bpe".
    """
    splitter = splitter or RandomSplitter(0.2, seed=42)
    if label is None:
        if y_block is not None:
            raise ValueError("y_block is what the column label holds: name it, or leave y_block out for a language model")
        return DataBlock((TextBlock(is_lm=True, **texts),), get_x=ColReader(text), splitter=splitter)
    blocks = (TextBlock(**texts), y_block or CategoryBlock())
    return DataBlock(blocks, get_x=ColReader(text), get_y=ColReader(label), splitter=splitter)


def text_files_block(is_lm: bool = False, *, splitter: Splitter | None = None, **texts: Any) -> DataBlock:
    """The DataBlock of a folder of .txt files: for a classifier by the folder each lies in, or for a language model."""
    settings: dict[str, Any] = {
        "get_items": get_text_files,
        "get_x": read_text,
        "splitter": splitter or RandomSplitter(0.2, seed=42),
    }
    if is_lm:
        return DataBlock((TextBlock(is_lm=True, **texts),), **settings)
    return DataBlock((TextBlock(**texts), CategoryBlock()), get_y=parent_label, **settings)


def text_dataloaders(
    source: Any,
    text: str | tuple[str, ...] = "text",
    label: str | None = None,
    *,
    batch_size: int = 64,
    seed: int = 0,
    max_bad_rows: int = 0,
    cache: str = "disk",
    **block: Any,
) -> DataLoaders:
    """Prepare texts in this process, and feed them: `cluster.dataloaders(text_block(...), source)` does so on a cluster.

    source: a DataFrame, or a CSV or Parquet file, several, or a folder of them, by path or URL. Rows without a text are named,
    and left out up to `max_bad_rows`. block: further settings of `text_block`.
    """
    made = text_block(text, label, **block)
    return made.dataloaders(source, batch_size=batch_size, seed=seed, max_bad_rows=max_bad_rows, cache=cache)


def lm_dataloaders(dls: DataLoaders, seq_len: int = 72, batch_size: int | None = None) -> DataLoaders:
    """The texts of a classifier's data as streams for a language model, by the same vocabulary: nothing is prepared again.

    batch_size: how many streams, by default as many as the classifier's batches have rows.
    """
    train, valid = dls.train, dls.valid
    if dls.encode is None or not isinstance(train, Feed) or not isinstance(valid, Feed):
        raise TypeError("only data made by a DataBlock can be read as streams: make it by text_dataloaders")
    changes: dict[str, Any] = {
        "samples": Streams(seq_len),
        "sort_by_length": None,
        "batch_size": batch_size or train.batch_size,
    }
    return replace(
        dls, train=replace(train, **changes), valid=replace(valid, **changes), encode=only_inputs(dls.encode), n_inp=1
    )


# --- recipes -----------------------------------------------------------------------------------------------------------

SMALL: Mapping[str, int] = {"emb_sz": 128, "n_hid": 256, "n_layers": 2}  # of an AWD-LSTM: minutes on a few cores
LM_DROP = 0.15  # so few epochs do not overfit: they learn more, and at higher rates, with little dropout


@recipe
def reviews(
    *,
    tokenizer: Tokens = "words",
    lr: PositiveFloat = 1e-2,
    schedule: Schedule = one_cycle(4),
    batch_size: BatchSize = 32,
    seed: int = 42,
) -> Recipe:
    """Great or not: 5,000 reviews of fine foods, the last 1,000 validate, from random weights. Needs fastray[examples].

    tokenizer: words, bpe or unigram. seed: of the order and the weights.
    """
    return Recipe(
        block=_reviews(tokenizer),
        source=reviews_table,
        learner=partial(text_classifier_learner, config=SMALL),
        lr=lr,
        schedule=schedule,
        batch_size=batch_size,
        seed=seed,
    )


@recipe
def ulmfit(
    *,
    tokenizer: Tokens = "words",
    lm_epochs: PositiveInt = 4,
    lm_lr: PositiveFloat = 2e-2,
    lr: PositiveFloat = 1e-2,
    schedule: Schedule = gradual_unfreeze(3, stages=1, decay=1.0, spread=1.0),
    batch_size: BatchSize = 32,
    seed: int = 42,
) -> Recipe:
    """The same reviews, by an encoder that first learned to foretell their words. Needs fastray[examples].

    lm_epochs, lm_lr: of the language model, which is trained in this process before and kept in the cache. tokenizer: words,
    bpe or unigram. seed: of the order and the weights.
    """
    return Recipe(
        block=_reviews(tokenizer),
        source=reviews_table,
        learner=partial(_from_language_model, epochs=lm_epochs, lr=lm_lr, seed=seed),
        lr=lr,
        schedule=schedule,
        batch_size=batch_size,
        seed=seed,
    )


@recipe
def docs_lm(
    *,
    tokenizer: Tokens = "words",
    seq_len: PositiveInt = 72,
    lr: PositiveFloat = 1e-2,
    schedule: Schedule = one_cycle(5),
    batch_size: BatchSize = 16,
    seed: int = 42,
) -> Recipe:
    """A language model of what Python's help() says of the language: 80 pages, on a bare install.

    tokenizer: words, bpe or unigram. seq_len: tokens a batch goes on by; batch_size: streams. seed: of the split, the order and
    the weights.
    """
    return Recipe(
        block=text_block(tokenizer=tokenizer, seq_len=seq_len, splitter=RandomSplitter(0.2, seed=seed)),
        source=pydoc_topics,
        learner=partial(language_model_learner, config=SMALL, drop_mult=LM_DROP),
        lr=lr,
        schedule=schedule,
        batch_size=batch_size,
        seed=seed,
    )


@recipe
def texts(
    *,
    path: str = "",
    text: str = "text",
    label: str = "",
    split: str = "",
    valid: str = "",
    tokenizer: str = "words",
    min_freq: PositiveInt = 3,
    lr: PositiveFloat = 1e-2,
    schedule: Schedule = one_cycle(4),
    batch_size: BatchSize = 32,
    max_bad_rows: Annotated[int, Field(ge=0)] = 0,
    seed: int = 42,
) -> Recipe:
    """Your own texts: a CSV or Parquet file, or a folder of .txt files in a folder a class.

    path: that file or folder. text, label: the columns of a table. split: a column that is true where a row validates, or with
    `valid` has that value; of files, folders train and valid. tokenizer: words, bpe, unigram, or the path of a
    tokenizer.json. min_freq: how often a word of the vocabulary occurs. max_bad_rows: how many rows without a text may be left
    out. seed: of the split, the order and the weights.
    """
    return Recipe(
        block=partial(
            _own_block, text=text, label=label, split=split, valid=valid, seed=seed, tokenizer=tokenizer, min_freq=min_freq
        ),
        source=partial(
            given_path, "texts", path, "a CSV or Parquet file with text=... and label=..., or a folder of .txt files"
        ),
        learner=partial(text_classifier_learner, config=SMALL),
        lr=lr,
        schedule=schedule,
        batch_size=batch_size,
        max_bad_rows=max_bad_rows,
        seed=seed,
    )


def _reviews(tokenizer: str) -> DataBlock:
    return text_block("review", "score", tokenizer=tokenizer, splitter=ColSplitter("is_valid"))


def _from_language_model(dls: DataLoaders, epochs: int, lr: float, seed: int) -> Learner:
    assert dls.prepared is not None
    batch_size = getattr(dls.train, "batch_size", None)
    key = fingerprint(dls.prepared.fingerprint, batch_size, epochs, lr, seed, dict(SMALL), LM_DROP)
    encoder = cache_folder() / "encoders" / f"{key}.safetensors"
    if not encoder.exists():
        learn = language_model_learner(lm_dataloaders(dls), config=SMALL, drop_mult=LM_DROP)
        learn.fit_one_cycle(epochs, lr)
        save_encoder(learn, encoder)
        torch.manual_seed(seed)  # the head's weights are the same whether the encoder was there or not
    return text_classifier_learner(dls, encoder=encoder, drop_mult=0.3)


def _own_block(path: Path, text: str, label: str, split: str, valid: str, seed: int, **how: Any) -> DataBlock:
    by_chance = RandomSplitter(0.2, seed=seed)
    if path.is_dir() and get_text_files(path):
        apart = (path / "train").is_dir() and (path / "valid").is_dir()
        return text_files_block(splitter=GrandparentSplitter() if apart else by_chance, **how)
    if not label:
        raise SettingError("texts of a table need label=..., the column to predict (and text=..., by default 'text')")
    return text_block(text, label, splitter=ColSplitter(split, valid or None) if split else by_chance, **how)
