"""Bodies of transformers, without its pretrained weights: a tiny BERT and a tiny DistilBERT."""

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from blocks.errors import UserError
from training.huggingface import (
    huggingface_classifier,
    huggingface_config,
    huggingface_split,
    load_huggingface_weights,
)
from training.models import ModelSpec

BERT: dict[str, Any] = {
    "model_type": "bert",
    "vocab_size": 20,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 6,
}
DISTIL: dict[str, Any] = {"model_type": "distilbert", "vocab_size": 20, "dim": 8, "n_layers": 3, "n_heads": 2, "hidden_dim": 16}


def classifier(config: dict[str, Any]) -> Any:
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    return huggingface_classifier(config=config, n_vocab=20, n_out=3, pad_id=0)


@pytest.mark.parametrize("config", [BERT, DISTIL])
def test_a_text_alone_gives_what_it_gives_in_a_batch(config: dict[str, Any]) -> None:
    model = classifier(config).eval()
    texts = [torch.randint(1, 20, (n,)) for n in (15, 4, 6)]
    together = model(torch.nn.utils.rnn.pad_sequence(texts, batch_first=True))[0]
    for text, row in zip(texts, together, strict=True):
        torch.testing.assert_close(model(text[None])[0][0], row, rtol=1e-4, atol=1e-5)
    assert isinstance(model.spec, ModelSpec)
    model.spec.build().load_state_dict(model.state_dict())


@pytest.mark.parametrize(("config", "layers"), [(BERT, 2), (DISTIL, 3)])
def test_groups_for_freezing(config: dict[str, Any], layers: int) -> None:
    model = classifier(config)
    groups = huggingface_split(model)
    assert len(groups) == layers + 2
    assert sum(map(len, groups)) == len({id(p) for group in groups for p in group}) == len(list(model.parameters()))
    model.train()(torch.randint(1, 20, (4, 5)))[0].sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_weights_of_a_folder(tmp_path: Path) -> None:
    one, other = classifier(BERT), classifier(BERT | {"initializer_range": 0.5})
    other.encoder.body.save_pretrained(tmp_path)
    assert huggingface_config(tmp_path)["hidden_size"] == 8
    load_huggingface_weights(one, tmp_path)
    for name, weight in other.encoder.body.state_dict().items():
        torch.testing.assert_close(one.encoder.body.state_dict()[name], weight)
    file = tmp_path / "model.safetensors"
    weights = safetensors.torch.load_file(file)
    safetensors.torch.save_file({f"bert.{name}": weight for name, weight in weights.items()}, file)
    load_huggingface_weights(one, tmp_path)
    weights.pop("embeddings.word_embeddings.weight")
    safetensors.torch.save_file(weights, file)
    with pytest.raises(UserError, match=r"has not the weights of a BertModel: embeddings\.word_embeddings\.weight"):
        load_huggingface_weights(one, tmp_path)
    file.write_bytes(b"")
    with pytest.raises(UserError, match="cannot be read"):
        load_huggingface_weights(one, tmp_path)


def test_what_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no folder of a model of transformers, with a config\.json"):
        huggingface_config(tmp_path)
    with pytest.raises(UserError, match="the texts have 30 tokens, the model 20"):
        huggingface_classifier(config=BERT, n_vocab=30, n_out=3, pad_id=0)
    pytest.importorskip("transformers")
    with pytest.raises(UserError, match="cannot build the model_type 'no-such'"):
        huggingface_classifier(config={"model_type": "no-such"}, n_vocab=20, n_out=3, pad_id=0)
