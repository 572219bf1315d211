"""The Transformer: what tokens see, padding, pieces, and the contracts of language models and classifiers."""

from typing import Any

import torch
from torch import Tensor

from training.text import PAD
from training.transformer import (
    TransformerEncoder,
    sines,
    transformer_clas_split,
    transformer_classifier,
    transformer_lm,
    transformer_lm_split,
)

SMALL: dict[str, Any] = {"n_vocab": 20, "emb_sz": 8, "n_hid": 16, "n_layers": 2, "n_heads": 2}


def tokens(rows: int, steps: int) -> Tensor:
    return torch.randint(2, 20, (rows, steps), generator=torch.Generator().manual_seed(0))


def test_a_causal_one_does_not_see_what_comes_after() -> None:
    torch.manual_seed(0)
    model, x = transformer_lm(**SMALL, drop_mult=0.0), tokens(3, 7)
    logits, raw, dropped = model(x)
    assert logits.shape == (3, 7, 20)
    assert model.hidden is None
    torch.testing.assert_close(raw, dropped)
    changed = x.clone()
    changed[:, 4:] = 2
    torch.testing.assert_close(model(changed)[0][:, :4], logits[:, :4])
    torch.testing.assert_close(model.eval()(x)[0], logits)
    seen = TransformerEncoder(20, 8, 16, 1, 2, dropout=0.0)
    assert not torch.allclose(seen(changed)[0][:, :4], seen(x)[0][:, :4])


def test_order_matters() -> None:
    encoder = TransformerEncoder(20, 8, 16, 1, 2, dropout=0.0)
    out = encoder(torch.tensor([[3, 3, 3]]))[0]
    assert not torch.allclose(out[0, 0], out[0, 1])
    places = sines(5, 8, torch.zeros(1))
    torch.testing.assert_close(places[0], torch.tensor([0.0, 1.0] * 4))
    torch.testing.assert_close(places[:, 0], torch.arange(5.0).sin())
    assert sines(3, 7, torch.zeros(1)).shape == (3, 7)


def test_a_text_alone_gives_what_it_gives_in_a_batch() -> None:
    torch.manual_seed(0)
    model = transformer_classifier(**SMALL, n_out=3, seq_len=5, max_len=12).eval()
    texts = [tokens(1, n)[0] for n in (23, 4, 11, 1)]
    padded = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=PAD)
    together = model(padded)[0]
    for text, row in zip(texts, together, strict=True):
        torch.testing.assert_close(model(text[None])[0][0], row, rtol=1e-4, atol=1e-5)
    model.train()(padded)[0].sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)


def test_groups_for_freezing() -> None:
    lm, classifier = transformer_lm(**SMALL), transformer_classifier(**SMALL, n_out=3)
    for groups, model, number in (
        (transformer_lm_split(lm), lm, 3),
        (transformer_clas_split(classifier), classifier, 4),
    ):
        assert len(groups) == number
        assert {id(p) for group in groups for p in group} == {id(p) for p in model.parameters()}
    assert groups[0][0] is classifier.encoder.embedding.weight  # type: ignore[union-attr]
