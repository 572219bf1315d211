"""Which words of a text made a classifier say what it says: each word's embedding times the gradient of the class's score.

To first order that is by how much the score would fall if the word's embedding were zero (Shrikumar et al., arXiv:1605.01713).
"""

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from blocks.dataloaders import input_tensors
from blocks.tensors import as_plain
from blocks.text import text_tfm
from training.rnn import prediction_of

if TYPE_CHECKING:
    from training.learner import Learner


@dataclass(frozen=True)
class WordImportance:
    """The tokens of a text, and how much each one spoke for `label` (above 0) or against it.

    In a notebook it shows itself as the text, coloured; printed, as a table of the words that mattered most.
    """

    words: tuple[str, ...]
    scores: tuple[float, ...]
    label: Any

    def top(self, k: int = 10) -> list[tuple[str, float]]:
        """The `k` words that mattered most, for or against, with their scores."""
        return sorted(zip(self.words, self.scores, strict=True), key=lambda pair: -abs(pair[1]))[:k]

    def __str__(self) -> str:
        rows = [f"{score:+.4f}  {word}" for word, score in self.top()]
        return "\n".join([f"for {self.label} (+) or against it (-)", *rows])

    def _repr_html_(self) -> str:
        most = max(map(abs, self.scores), default=0.0) or 1.0
        spans = [
            f'<span style="background: rgba({_FOR if score > 0 else _AGAINST}, {abs(score) / most:.2f})" '
            f'title="{score:+.4f}">{html.escape(word)}</span>'
            for word, score in zip(self.words, self.scores, strict=True)
        ]
        return f"<div><b>{html.escape(str(self.label))}</b>: {' '.join(spans)}</div>"


_FOR, _AGAINST = "60, 160, 90", "210, 80, 60"


def word_importance(learn: "Learner", text: Any, label: str | None = None) -> WordImportance:
    """How much each token of `text` speaks for `label`, by default for the class that the Learner predicts.

    text: as `get_x` gives it. ValueError for a label that is no class. Tokens that a classifier does not look at have 0.
    """
    tfm, vocab = text_tfm(learn.dls), list(learn.dls.vocab)
    if label is not None and label not in vocab:
        raise ValueError(f"{label!r} is no class: there are {', '.join(map(str, vocab))}")
    learn._to_device()
    assert learn.dls.encode is not None  # text_tfm has looked
    (tokens,) = input_tensors(learn.dls.encode, text)
    ids = as_plain(tokens).long().to(learn.device)
    scores, output = token_scores(learn.model, ids, None if label is None else vocab.index(label))
    words = tuple(tfm.vocab[i] for i in ids.tolist())
    return WordImportance(words, tuple(scores.tolist()), vocab[output] if vocab else output)


def token_scores(model: nn.Module, tokens: Tensor, output: int | None = None) -> tuple[Tensor, int]:
    """Embedding times gradient of each of `tokens` (steps,), for the model's `output`, by default its largest, and which it is.

    The model's first embedding is that of the tokens; it is called with (1, steps) and gives (1, outputs).
    """
    embedding = next(m for m in model.modules() if isinstance(m, nn.Embedding))
    embedded: list[Tensor] = []

    def watch(module: nn.Module, inputs: Sequence[Any], found: Tensor) -> Tensor:
        embedded.append(found.detach().requires_grad_())
        return embedded[-1]

    hook, was_training = embedding.register_forward_hook(watch), model.training
    try:
        # cuDNN's recurrent layers differentiate only where they train.
        with torch.enable_grad(), torch.backends.cudnn.flags(enabled=False):
            pred = prediction_of(model.eval()(tokens[None]))[0]
            chosen = int(pred.argmax()) if output is None else output
            gradients = torch.autograd.grad(pred[chosen], embedded, allow_unused=True)
    finally:
        hook.remove()
        model.train(was_training)
    pieces = [e * (torch.zeros_like(e) if g is None else g) for e, g in zip(embedded, gradients, strict=True)]
    return torch.cat(pieces, dim=1)[0].sum(-1).detach().cpu(), chosen
