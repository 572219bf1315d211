"""What makes language models and classifiers of an encoder of tokens, such as `AWD_LSTM`.

An encoder maps tokens int64 (rows, steps), and a state, to (rows, steps, features) and the next state. Texts are padded at
their end, so what a text gives does not depend on its padding.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from blocks.tensors import TensorText
from training.layers import LinBnDrop, SigmoidRange
from training.metrics import AvgMetric

PAD = int(TensorText.pad_value)
Hidden = Any  # of each layer, tensors without a graph; None: of a text that begins


class Encoder(nn.Module):
    """What encoders have in common: how many features they give, and which token pads."""

    def __init__(self, n_features: int, pad_id: int = PAD):
        super().__init__()
        self.n_features, self.pad_id = n_features, pad_id

    def attended(self, tokens: Tensor) -> Tensor:
        """Which tokens attention sees, bool: all but padding, and all of a row of nothing else: of none it is no number."""
        there = tokens != self.pad_id
        return there | ~there.any(1, keepdim=True)


class RNNDropout(nn.Module):
    """Drops the same features at all steps of a row, with probability `p`: (rows, steps, features) (arXiv:1512.05287)."""

    def __init__(self, p: float = 0.5):
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.p:
            return x
        return x * nn.functional.dropout(x.new_ones(len(x), 1, x.shape[2]), self.p)


class LanguageModel(nn.Module):
    """Tokens int64 (rows, steps) -> logits of the next ones (rows, steps, n_vocab), outputs, and outputs after dropout.

    Row i goes on where row i of the batch before ended, until `reset`: its state is `hidden`. tie_weights: the decoder's
    weights are the embedding's. bias: whether the decoder has one.
    """

    def __init__(self, encoder: Encoder, output_p: float = 0.1, tie_weights: bool = True, bias: bool = True):
        super().__init__()
        self.encoder, self.output_drop = encoder, RNNDropout(output_p)
        embedding: nn.Embedding = encoder.embedding  # type: ignore[assignment]
        self.decoder = nn.Linear(encoder.n_features, embedding.num_embeddings, bias)
        nn.init.uniform_(self.decoder.weight, -0.1, 0.1)
        if bias:
            nn.init.zeros_(self.decoder.bias)
        if tie_weights:
            self.decoder.weight = embedding.weight
        self.hidden: Hidden = None

    def reset(self) -> None:
        """Begin new streams of text."""
        self.hidden = None

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.hidden is not None and self.hidden[0][0].shape[1] != len(tokens):
            self.reset()
        raw, self.hidden = self.encoder(tokens, self.hidden)
        dropped = self.output_drop(raw)
        return self.decoder(dropped), raw, dropped


class TextClassifier(nn.Module):
    """Tokens int64 (rows, steps) -> (rows, n_out), the pooled outputs twice, as language models give them, and their mask.

    A text goes through the encoder in pieces of `seq_len` tokens, the state going on and no gradient through it. Only the
    last `max_len` tokens of a text are pooled: what came before is read without a graph, so that the memory needed for long
    texts is bounded (Howard and Ruder, arXiv:1801.06146). pool: how, `concat_pool` or `mean_pool`.
    """

    def __init__(
        self,
        encoder: Encoder,
        head: nn.Module,
        seq_len: int = 72,
        max_len: int = 1440,
        pool: Callable[[Tensor, Tensor], Tensor] | None = None,
    ):
        super().__init__()
        self.encoder, self.head, self.seq_len, self.max_len = encoder, head, seq_len, max_len
        self.pool = pool or concat_pool

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        outputs, pooled = self._encoded(tokens, tokens != self.encoder.pad_id)
        return self.head(self.pool(outputs, pooled)), outputs, outputs, pooled

    def _encoded(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        steps = tokens.shape[1]
        starts = range(0, steps, self.seq_len)
        if steps <= self.max_len:
            pooled, kept = mask, [True] * len(starts)
        else:
            first = mask.sum(1, keepdim=True) - self.max_len
            pooled = mask & (torch.arange(steps, device=mask.device) >= first)
            kept = torch.stack([piece.any() for piece in pooled.split(self.seq_len, dim=1)]).tolist()
        hidden: Hidden = None
        outputs = []
        for start, keep in zip(starts, kept, strict=True):
            with torch.set_grad_enabled(keep and torch.is_grad_enabled()):
                out, hidden = self.encoder(tokens[:, start : start + self.seq_len], hidden)
            if keep:
                outputs.append(out)
        pieces = [piece for piece, keep in zip(pooled.split(self.seq_len, dim=1), kept, strict=True) if keep]
        return torch.cat(outputs, dim=1), torch.cat(pieces, dim=1)


def mean_pool(outputs: Tensor, mask: Tensor) -> Tensor:
    """The mean output of each row where `mask` is true, 0 where it nowhere is: (rows, steps, f) -> (rows, f)."""
    return outputs.masked_fill(~mask.unsqueeze(2), 0).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)


def concat_pool(outputs: Tensor, mask: Tensor) -> Tensor:
    """The last, the largest and the mean output of each row where `mask` is true: (rows, steps, f) -> (rows, 3 f).

    The mask, bool (rows, steps), is true in one stretch of a row at least one step long; a row without any pools its first.
    """
    mask = mask | (~mask.any(1, keepdim=True) & (torch.arange(mask.shape[1], device=mask.device) == 0))
    last = outputs[torch.arange(len(outputs), device=outputs.device), mask.long().cumsum(1).argmax(1)]
    largest = outputs.masked_fill(~mask.unsqueeze(2), -torch.inf).amax(1)
    return torch.cat([last, largest, mean_pool(outputs, mask)], dim=1)


class PoolingHead(nn.Sequential):
    """BatchNorm, dropout and linear layers from what is pooled to outputs: (rows, n_in) -> (rows, n_out).

    lin_ftrs: features between; ps: a dropout before each layer. y_range: squeezes the output into it.
    """

    def __init__(
        self, n_in: int, n_out: int, lin_ftrs: Sequence[int], ps: Sequence[float], y_range: Sequence[float] | None = None
    ):
        sizes = [n_in, *lin_ftrs, n_out]
        if len(ps) != len(sizes) - 1:
            raise ValueError(f"the head has {len(sizes) - 1} layers, so it takes as many dropouts, not {list(ps)!r}")
        layers: list[nn.Module] = [
            LinBnDrop(a, b, p=p, act=nn.ReLU() if i < len(ps) - 1 else None)
            for i, (a, b, p) in enumerate(zip(sizes, sizes[1:], ps, strict=False))
        ]
        super().__init__(*layers, *([] if y_range is None else [SigmoidRange(y_range[0], y_range[1])]))


def layers_and_rest(layers: Iterable[nn.Module], model: nn.Module) -> list[list[nn.Parameter]]:
    """Groups of a language model's parameters for freezing: each of its encoder's `layers`, and last all others."""
    groups = [list(layer.parameters()) for layer in layers]
    of_layers = {id(p) for group in groups for p in group}
    return [*groups, [p for p in model.parameters() if id(p) not in of_layers]]


def token_accuracy() -> AvgMetric:
    """The share of tokens that are where the prediction is largest, over all tokens: the last batch has fewer steps."""

    def right(pred: Tensor, targ: Tensor) -> tuple[Tensor, Tensor]:
        return (pred.argmax(-1) == targ).sum(), torch.tensor(targ.numel())

    return AvgMetric(right, name="accuracy")
