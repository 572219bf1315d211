"""Who likes what, as an application: planted tastes are found, recommended, ranked, exported."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from blocks import DataError, TimeSplitter, UserError
from cluster.train import new_learner
from pipelines.collab import (
    collab_dataloaders,
    collab_learner,
    item_bias,
    nearest_items,
    planted_ratings,
    ranking_metrics,
    recommend,
)
from pipelines.recipes import find_recipe
from training import load_predictor, one_cycle, rmse
from training.recipe import SettingError

USERS, ITEMS = 60, 40


def frame() -> pd.DataFrame:
    """Synthetic ratings: even users like even films, film 7 is liked by all, film 8 by none; about half are there."""
    draw = np.random.default_rng(0)
    rows = [(u, i) for u in range(USERS) for i in range(ITEMS) if draw.random() < 0.5]
    df = pd.DataFrame(rows, columns=["who", "film"])
    df["stars"] = 3 + np.where((df.who + df.film) % 2 == 0, 1.0, -1.0) + 0.9 * (df.film == 7) - 0.9 * (df.film == 8)
    df["when"] = draw.permutation(len(df))
    return df.assign(film="film " + df.film.astype(str))


def trained(rating: str | None = "stars", df: Any = None, epochs: int = 15, splitter: Any = None, **settings: Any) -> Any:
    torch.manual_seed(0)
    source = frame() if df is None else df
    dls = collab_dataloaders(source, "who", "film", rating, splitter=splitter, batch_size=32, cache="off")
    learn = collab_learner(dls, 8, **settings)
    with learn.no_logging():
        learn.fit_one_cycle(epochs, 2e-2)
    return learn


@pytest.fixture(scope="module")
def rated() -> Any:
    return trained(y_range=(0.5, 5.5), metrics=rmse)


def test_ratings_are_learned_and_exported(rated: Any, tmp_path: Path) -> None:
    assert rated.recorder.history[-1]["valid/rmse"] < 0.4
    row = {"who": 3, "film": "film 5"}
    (said,) = load_predictor(rated.export(tmp_path)).predict([row])
    assert said.label == pytest.approx(4.0, abs=0.6)
    assert float(rated.predict(row).activations) == pytest.approx(float(said.activations))


def test_recommendations_are_unseen_and_to_the_taste(rated: Any) -> None:
    trains = {int(i) for i in rated.dls.train.ids()}
    seen = {row.film for row in frame().itertuples() if row.who == 3 and row.Index in trains}
    found = recommend(rated, 3, 5)
    assert len(found) == 5
    assert seen
    assert seen.isdisjoint(f.item for f in found)
    assert sum(int(f.item.split()[1]) % 2 for f in found) >= 4
    assert [f.score for f in found] == sorted((f.score for f in found), reverse=True)
    trained_on = recommend(rated, 3, ITEMS, seen=True)
    assert {f.item for f in trained_on} == {f"film {i}" for i in range(ITEMS)}


def test_biases_and_neighbours(rated: Any) -> None:
    order = [f.item for f in item_bias(rated)]
    assert (order[0], order[-1]) == ("film 7", "film 8")
    assert "#na#" not in order
    near = nearest_items(rated, "film 10", 5)
    assert sum(int(f.item.split()[1]) % 2 == 0 for f in near) >= 4
    assert "film 10" not in {f.item for f in near}


def test_a_network_instead() -> None:
    learn = trained(use_nn=True, layers=(16,), y_range=(0.5, 5.5), metrics=rmse)
    assert learn.recorder.history[-1]["valid/rmse"] < 0.6
    assert len(recommend(learn, 3, 5)) == 5
    with pytest.raises(TypeError, match="EmbeddingNN has no factors and biases"):
        item_bias(learn)


def test_choices_alone_rank_what_is_liked_first(tmp_path: Path) -> None:
    liked = frame().query("stars > 3").drop(columns="stars")
    learn = trained(None, liked)
    row = {"who": 3, "film": "film 5"}
    (said,) = load_predictor(learn.export(tmp_path)).predict([row])
    assert float(learn.predict(row).activations) == pytest.approx(float(said.activations))
    ranked = ranking_metrics(learn, k=5)
    untrained = ranking_metrics(trained(None, liked, epochs=1), k=5)
    assert ranked.keys() == {"recall@5", "ndcg@5"}
    assert ranked["recall@5"] > 1.5 * untrained["recall@5"]
    assert all(0 <= value <= 1 for value in ranked.values())


def test_ranking_against_a_count_by_hand(rated: Any) -> None:
    """Recall and gain of one user, from scores sorted here."""
    df, valid = frame(), {int(i) for i in rated.dls.valid.ids()}
    found = []
    for who, rows in df.groupby("who"):
        wanted = {row.film for row in rows.itertuples() if row.Index in valid and row.stars >= 4}
        if wanted:
            top = [f.item for f in recommend(rated, who, 3)]
            gain = sum(1 / np.log2(place + 2) for place, film in enumerate(top) if film in wanted)
            best = sum(1 / np.log2(place + 2) for place in range(min(3, len(wanted))))
            found.append((len(wanted & set(top)) / len(wanted), gain / best))
    recall, gain = np.mean(found, axis=0)
    assert ranking_metrics(rated, 3, at_least=4) == pytest.approx({"recall@3": recall, "ndcg@3": gain})


def test_the_latest_are_held_out() -> None:
    learn = trained(splitter=TimeSplitter("when", 0.2), epochs=1)
    df = frame()
    latest = set(df.nlargest(int(0.2 * len(df)), "when").index)
    assert {int(i) for i in learn.dls.valid.ids()} == latest


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda learn: recommend(learn, 999), UserError, "no who 999"),
        (lambda learn: nearest_items(learn, "film 700"), UserError, "no film 'film 700'.*'film 7'"),
        (lambda learn: ranking_metrics(learn, at_least=9), UserError, "so liked"),
        (lambda _: collab_dataloaders(frame(), "whom", "film", "stars"), DataError, "no column 'whom'.*'who'"),
        (
            lambda _: collab_dataloaders(frame().assign(stars=np.nan), "who", "film", "stars"),
            DataError,
            "'stars' has no value in row 0, 1, 2",
        ),
    ],
)
def test_mistakes(rated: Any, call: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        call(rated)


def test_ratings_of_ones_own_and_planted_ones(tmp_path: Path) -> None:
    frame().to_csv(tmp_path / "mine.csv", index=False)
    words = {"path": str(tmp_path / "mine.csv"), "user": "who", "item": "film", "rating": "stars"}
    recipe = find_recipe("ratings")(**words, schedule=one_cycle(2))
    block, source = recipe.data()
    learn = new_learner(recipe, block.dataloaders(source, cache="off", **recipe.data_settings))
    with learn.no_logging():
        learn.fit(recipe.schedule, recipe.lr)
    said = learn.get_preds()[0]
    stars = frame().stars
    spread = stars.max() - stars.min()
    assert ((said > stars.min() - 0.11 * spread) & (said < stars.max() + 0.11 * spread)).all()
    with pytest.raises(SettingError, match="ratings needs path"):
        find_recipe("ratings")().data()


def test_planted_tastes_are_what_factors_find() -> None:
    planted = planted_ratings(pd)
    assert len(planted) == 25_000
    assert planted.rating.between(0.5, 5).all()
    assert not planted.duplicated(["userId", "movieId"]).any()
    torch.manual_seed(0)
    dls = collab_dataloaders(planted, "userId", "movieId", cache="off", batch_size=256)
    errors = []
    for factors in (1, 30):
        learn = collab_learner(dls, factors, y_range=(0.0, 5.5), metrics=rmse, wd=0.1)
        with learn.no_logging():
            learn.fit_one_cycle(6, 1e-2)
        errors.append(learn.recorder.history[-1]["valid/rmse"])
    assert errors[1] < errors[0] - 0.05
