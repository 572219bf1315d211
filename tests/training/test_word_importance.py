"""Embedding times gradient, on models whose answer is known by hand."""

import torch
from torch import Tensor, nn

from training.awd_lstm import awd_lstm_classifier
from training.word_importance import WordImportance, token_scores


class Sum(nn.Module):
    """Adds the embeddings of a text, and multiplies."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(5, 2), nn.Linear(2, 3)

    def forward(self, tokens: Tensor) -> tuple[Tensor, None]:
        return self.head(self.embedding(tokens).sum(1)), None


def test_a_linear_models_scores_add_up_to_its_output() -> None:
    torch.manual_seed(0)
    model, tokens = Sum().train(), torch.tensor([4, 1, 1])
    scores, output = token_scores(model, tokens, 2)
    logits = model(tokens[None])[0][0]
    assert output == 2
    torch.testing.assert_close(scores.sum() + model.head.bias[2], logits[2])
    assert scores[1] == scores[2]
    assert token_scores(model, tokens)[1] == int(logits.argmax())
    assert model.training
    assert model.embedding.weight.grad is None
    assert not model.embedding._forward_hooks


def test_what_a_classifier_does_not_look_at_has_none() -> None:
    torch.manual_seed(0)
    model = awd_lstm_classifier(n_vocab=9, n_out=2, emb_sz=3, n_hid=4, n_layers=2, seq_len=4, max_len=6)
    scores, _ = token_scores(model, torch.tensor([2, 3, 4, 5, 6, 7, 8, 2, 3, 4, 5, 6]))
    assert scores.shape == (12,)
    assert bool((scores[:4] == 0).all())
    assert bool((scores[6:] != 0).all())


def test_how_it_shows_itself() -> None:
    found = WordImportance(("<b>", "fine", "bad"), (0.0, 0.5, -1.0), "good")
    assert found.top(2) == [("bad", -1.0), ("fine", 0.5)]
    assert str(found).splitlines() == ["for good (+) or against it (-)", "-1.0000  bad", "+0.5000  fine", "+0.0000  <b>"]
    shown = found._repr_html_()
    assert "&lt;b&gt;" in shown
    assert "rgba(210, 80, 60, 1.00)" in shown
    assert WordImportance((), (), "good")._repr_html_() == "<div><b>good</b>: </div>"
