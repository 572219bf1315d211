"""The ULMFiT way on tiny data: a language model, its encoder in a file, a classifier that begins from it; generated text."""

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from blocks import CategoryBlock, DataBlock, ItemGetter, RandomSplitter, TextBlock, text_vocab
from blocks.dataloaders import DataLoaders
from blocks.errors import UserError
from pipelines.text_learners import (
    language_model_learner,
    load_encoder,
    matched_rows,
    read_encoder,
    save_encoder,
    text_classifier_learner,
)
from training import Callback, CancelFitException, gradual_unfreeze, load_predictor, word_importance

CONFIG = {"emb_sz": 12, "n_hid": 16, "n_layers": 2}
GOOD, BAD = ["good", "fine", "sweet", "tasty"], ["bad", "awful", "sour", "stale"]


def rows(n: int = 120) -> list[tuple[str, str]]:
    made = []
    for i in range(n):
        words = GOOD if i % 2 else BAD
        made.append((f"this tea is {words[i % 4]} and very {words[(i // 4) % 4]} i think", "good" if i % 2 else "bad"))
    return made


@pytest.fixture(scope="module")
def lm_dls() -> DataLoaders:
    block = DataBlock(blocks=(TextBlock(is_lm=True, min_freq=1, seq_len=8),), get_x=ItemGetter(0), splitter=RandomSplitter(0.2))
    return block.dataloaders(rows(), batch_size=4, cache="off")


@pytest.fixture(scope="module")
def class_dls() -> DataLoaders:
    block = DataBlock(
        blocks=(TextBlock(min_freq=1), CategoryBlock()),
        get_x=ItemGetter(0),
        get_y=ItemGetter(1),
        splitter=RandomSplitter(0.2),
    )
    return block.dataloaders([(f"{text} indeed", label) for text, label in rows()], batch_size=8, cache="off")


def quiet(learn: Any) -> Any:
    learn.remove_cb(learn.progress)
    return learn


@pytest.fixture(scope="module")
def lm_learn(lm_dls: DataLoaders) -> Any:
    torch.manual_seed(0)
    learn = quiet(language_model_learner(lm_dls, config=CONFIG, drop_mult=0.1))
    learn.fit_one_cycle(5, 0.03)
    return learn


@pytest.fixture(scope="module")
def encoder(lm_learn: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lm_learn.save_encoder(tmp_path_factory.mktemp("encoder") / "encoder.safetensors")


def test_the_ulmfit_way(class_dls: DataLoaders, encoder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    learn = quiet(text_classifier_learner(class_dls, encoder=encoder, drop_mult=0.1))
    assert not learn.model.encoder.layers[0].weight_hh_l0.requires_grad
    learn.fit(gradual_unfreeze(1), 0.02)
    assert learn.model.encoder.layers[0].weight_hh_l0.requires_grad
    learn.fit_one_cycle(8, 0.02)
    assert learn.recorder.history[-1]["valid/accuracy"] == 1
    text = "this tea is very sour i think"
    label, _, probabilities = learn.predict(text)
    assert label == "bad"
    mattered = word_importance(learn, text)
    assert mattered.label == "bad"
    assert mattered.top(1)[0][0] == "sour"
    with pytest.raises(ValueError, match="'ugly' is no class: there are bad, good"):
        word_importance(learn, text, "ugly")
    predictor = load_predictor(learn.export(tmp_path / "exported"))
    texts = [text, "good tea", "", "a text that is much longer than the others " * 30]
    (said, *others) = predictor.predict(texts)
    assert said.label == "bad"
    assert said.probability == pytest.approx(float(probabilities.max()), abs=1e-5)
    assert [p.activations.shape for p in others] == [(2,)] * 3


def test_the_language_model_learns(lm_learn: Any) -> None:
    last = lm_learn.recorder.history[-1]
    assert last["valid/perplexity"] < 4
    assert last["valid/accuracy"] > 0.5


def test_text_goes_on(lm_learn: Any) -> None:
    text = lm_learn.predict("this tea", 3, temperature=0)
    assert text.startswith("this tea is ")
    assert len(text.split()) == 5
    drawn = [lm_learn.predict("this tea", 30, seed=seed, top_k=5, no_repeat=2) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_an_exported_language_model_says_the_next_tokens(lm_learn: Any, tmp_path: Path) -> None:
    predictor = load_predictor(lm_learn.export(tmp_path))
    twice = [predictor.predict(["this tea", "it"])[0] for _ in range(2)]  # each from the beginning of a stream
    assert twice[0].label == twice[1].label
    assert "tea is" in twice[0].label


class Breaks(Callback):
    """Stops within the second epoch."""

    def before_batch(self, learn: Any) -> None:
        if learn.training and (learn.epoch, learn.iter) == (1, 17):
            raise CancelFitException


def test_stopped_within_an_epoch_it_goes_on_with_its_streams(lm_dls: DataLoaders, tmp_path: Path) -> None:
    def fresh() -> Any:
        torch.manual_seed(0)
        return quiet(language_model_learner(lm_dls, config=CONFIG))

    unbroken = fresh()
    unbroken.fit_one_cycle(2, 0.01)
    broken = fresh()
    broken.add_cb(Breaks())
    broken.fit_one_cycle(2, 0.01)
    resumed = fresh()
    resumed.load(broken.save(tmp_path / "state.pt"))
    assert resumed.position.batch == 17
    resumed.resume()
    for name, weight in unbroken.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], weight), name


def test_an_encoder_reads_another_vocabulary(class_dls: DataLoaders, encoder: Path) -> None:
    learn = text_classifier_learner(class_dls, encoder=encoder)
    file, own = read_encoder(encoder), text_vocab(class_dls)
    assert set(own) - set(file.vocab) == {"indeed"}
    assert file.arguments["emb_sz"] == 12
    rows = learn.model.encoder.embedding.weight.detach()  # type: ignore[union-attr]
    assert torch.equal(rows[own.index("sour")], file.weights["embedding.weight"][file.vocab.index("sour")])
    torch.testing.assert_close(rows[own.index("indeed")], file.weights["embedding.weight"].mean(0))


def test_rows_by_token() -> None:
    assert matched_rows(torch.tensor([[1.0], [3.0]]), ["a", "b"], ["b", "c", "a"]).tolist() == [[3], [2], [1]]


def test_a_language_model_goes_on_from_an_encoder(lm_dls: DataLoaders, encoder: Path) -> None:
    learn = language_model_learner(lm_dls, weights=encoder)
    assert learn.model.decoder.weight is learn.model.encoder.embedding.weight  # type: ignore[union-attr]
    assert learn.validate()["valid/perplexity"] < 6
    assert [p.requires_grad for group in learn.layer_groups for p in group[:1]] == [False, False, True]


def test_what_is_no_encoder(class_dls: DataLoaders, encoder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    safetensors.torch.save_file({"a": torch.zeros(1)}, other)
    for path in (other, tmp_path / "missing.safetensors"):
        with pytest.raises(UserError, match="no file that save_encoder wrote"):
            read_encoder(path)
    about = {"builder": "os.system", "arguments": {}, "vocab": ["a"]}
    safetensors.torch.save_file({"a": torch.zeros(1)}, other, metadata={"fastray": json.dumps(about)})
    with pytest.raises(UserError, match="has no encoder"):
        read_encoder(other)
    small = text_classifier_learner(class_dls, config={"emb_sz": 4, "n_hid": 4, "n_layers": 1})
    with pytest.raises(UserError, match="other sizes"):
        load_encoder(small, encoder)
    with pytest.raises(UserError, match="arch='lstm' is not known: one of awd_lstm"):
        text_classifier_learner(class_dls, "lstm")
    with pytest.raises(UserError, match="config has 'hid'"):
        text_classifier_learner(class_dls, config={"hid": 3})
    small.model = torch.nn.Linear(1, 1)
    with pytest.raises(UserError, match="no encoder of ours"):
        save_encoder(small, other)


def test_a_transformer_goes_the_same_way(lm_dls: DataLoaders, class_dls: DataLoaders, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = {"emb_sz": 16, "n_hid": 32, "n_layers": 2, "n_heads": 2}
    learn = quiet(language_model_learner(lm_dls, "transformer", config=config, drop_mult=0.1))
    learn.fit_one_cycle(3, 0.01)
    assert learn.recorder.history[-1]["valid/perplexity"] < 6
    assert learn.predict("this tea", 2, temperature=0).startswith("this tea ")
    encoder = learn.save_encoder(tmp_path / "encoder.safetensors")
    learn = quiet(text_classifier_learner(class_dls, "transformer", encoder=encoder, drop_mult=0.1))
    assert learn.model.encoder.causal
    learn.fit(gradual_unfreeze(5), 0.02)
    assert learn.recorder.history[-1]["valid/accuracy"] > 0.9
    assert (
        load_predictor(learn.export(tmp_path / "exported")).predict(["this tea is sour and very bad i think indeed"])[0].label
        == "bad"
    )
