"""A person's own series: what is found in a file and said, forecasts and labels, and mistakes."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from blocks import DataError, get_ts_series
from cluster.train import new_learner
from pipelines.recipes import find_recipe
from training import Learner, one_cycle
from training.recipe import SettingError


def hours(n: int = 300) -> pd.DataFrame:
    """Two stations' hourly values, synthetic, in a long table whose rows are in no order."""
    when = pd.date_range("2024-01-01", periods=n, freq="h")
    one = pd.DataFrame({"when": when, "station": "a", "heat": np.sin(np.arange(n) / 24 * 2 * np.pi)})
    both = pd.concat([one, one.assign(station="b", heat=2 * one.heat + 1)]).assign(wind=0.5)
    return both.sample(frac=1, random_state=0)


def shapes() -> pd.DataFrame:
    """Forty series of 20 to 29 steps, synthetic, slow waves and fast ones, by number."""
    draw, rows = np.random.default_rng(0), []
    for i in range(40):
        t = np.arange(20 + i % 10)
        values = np.sin(t * (1 + i % 2) / 2 + draw.uniform(0, 6))
        rows.append(pd.DataFrame({"t": t, "patient": i, "pulse": values, "state": "fast" if i % 2 else "slow"}))
    return pd.concat(rows)


def run(path: Path, epochs: int = 3, **words: Any) -> Learner:
    recipe = find_recipe("series")(path=str(path), schedule=one_cycle(epochs), **words)
    block, source = recipe.data()
    learn = new_learner(recipe, block.dataloaders(source, cache="off", **recipe.data_settings))
    with learn.no_logging():
        learn.fit(recipe.schedule, recipe.lr)
    return learn


def test_a_table_of_times_is_forecast(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hours().to_csv(tmp_path / "mine.csv", index=False)
    learn = run(tmp_path / "mine.csv")
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "series: 24 steps ahead of heat, wind from 48, by when, a series for each station"
    assert "24 steps before" in said[1]
    assert {"valid/mae", "valid/mae_naive", "valid/mae_linear"} <= learn.recorder.history[-1].keys()


def test_a_table_of_labels_is_told_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shapes().to_parquet(tmp_path / "mine.parquet")
    learn = run(tmp_path / "mine.parquet", 8, label="state", batch_size=8)
    assert capsys.readouterr().out == (
        "series: 40 of 20 to 29 steps and 1 channel, of 2 classes; 20% of each patient at random validate\n"
    )
    assert learn.recorder.history[-1]["valid/accuracy"] > 0.8


HEAD = "# a remark\n@problemName x\n@univariate false\n@classLabel true up down\n@data\n"
UP, DOWN = "1,2,3,4,5:0,?,0,1,0:up\n", "5,4,3,2:0,1,0,1:down\n"


def test_ts_files_by_their_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "X_TRAIN.ts").write_text(HEAD + (UP + DOWN) * 6)
    (tmp_path / "X_TEST.ts").write_text(HEAD + UP + DOWN)
    learn = run(tmp_path, 1, batch_size=4)
    assert capsys.readouterr().out == "series: 14 of 4 to 5 steps and 2 channels, of 2 classes; *_TEST.ts validates\n"
    assert learn.dls.valid.n == 2
    assert learn.dls.vocab == ("down", "up")


def test_numbers_as_targets(tmp_path: Path) -> None:
    (tmp_path / "y.ts").write_text("@targetLabel true\n@data\n" + "".join(f"{i},{i + 1},{i}:{i / 2}\n" for i in range(60)))
    assert [row["label"] for row in get_ts_series(tmp_path / "y.ts")][:3] == [0, 0.5, 1]
    assert "valid/r2_score" in run(tmp_path / "y.ts", 1, batch_size=4).recorder.history[-1]


@pytest.mark.parametrize(
    ("words", "error", "match"),
    [
        ({"path": ""}, SettingError, "series needs path"),
        ({"time": "whem"}, DataError, "no column 'whem'.*'when'"),
        ({"arch": "resnet1d"}, SettingError, "here it is nlinear or tcn"),
        ({"label": "heat"}, DataError, "station 'a' has ... labels"),
        ({"group": "wind", "values": "heat"}, DataError, "of wind 0.5 come twice"),
        ({"values": "station", "group": "station"}, DataError, "column 'station' of station 'a' holds no numbers"),
    ],
)
def test_mistakes(tmp_path: Path, words: dict[str, Any], error: type[Exception], match: str) -> None:
    hours().to_csv(tmp_path / "mine.csv", index=False)
    with pytest.raises(error, match=match):
        run(**{"path": tmp_path / "mine.csv", **words})


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("@data\n1,2:a\n", "says of no classes"),
        (HEAD + "1,2:1:up\n", "line 6: channels of 2, 1 steps"),
        (HEAD + "1,x:1,2:up\n", "line 6: could not convert"),
        ("@timestamps true\n", "has time stamps"),
        (HEAD, "has no series"),
    ],
)
def test_ts_files_that_are_none(tmp_path: Path, text: str, match: str) -> None:
    (tmp_path / "bad.ts").write_text(text)
    with pytest.raises(DataError, match=match):
        get_ts_series(tmp_path / "bad.ts")
