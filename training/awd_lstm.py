"""AWD-LSTM: an LSTM with dropout in five places (Merity et al., arXiv:1708.02182), under a language model or a classifier.

The dropouts: of whole words (embedding), of the embedded text (input), of the recurrent weights, between the layers (hidden),
and before the decoder or the head (output). All but that of the weights drop the same features at every step of a text.
"""

import warnings
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from training.models import model_builder
from training.text import PAD, Encoder, Hidden, LanguageModel, PoolingHead, RNNDropout, TextClassifier, layers_and_rest

# cuDNN copies weights that do not lie one behind the other, and says so each time; dropped ones never do.
warnings.filterwarnings("ignore", message="RNN module weights are not part of single contiguous chunk of memory")


class EmbeddingDropout(nn.Embedding):
    """An embedding that drops whole words while it trains, with probability `p`: int64 (...) -> (..., emb_sz)."""

    def __init__(self, n_vocab: int, emb_sz: int, p: float = 0.0, pad_id: int = PAD):
        super().__init__(n_vocab, emb_sz, padding_idx=pad_id)
        self.p = p
        nn.init.uniform_(self.weight, -0.1, 0.1)

    def forward(self, tokens: Tensor) -> Tensor:
        embedded = super().forward(tokens)
        if not self.training or not self.p:
            return embedded
        # A factor a word, looked up as the words are: to drop rows of the whole table would read it all at each step.
        return embedded * F.dropout(embedded.new_ones(self.num_embeddings, 1), self.p)[tokens]


class WeightDropout(nn.LSTM):
    """One layer of torch's LSTM, in its fused kernel, that drops recurrent weights while it trains, with probability `p`.

    (rows, steps, n_in) and a state, a pair of (1, rows, n_out) -> (rows, steps, n_out) and the next state.
    """

    def __init__(self, n_in: int, n_out: int, p: float = 0.0):
        super().__init__(n_in, n_out, batch_first=True)
        self.p = p

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:  # type: ignore[override]
        if not self.training or not self.p:
            return super().forward(x, state)
        if state is None:
            state = (x.new_zeros(1, len(x), self.hidden_size),) * 2
        of_input, recurrent, *biases = self.parameters()
        weights = [of_input, F.dropout(recurrent, self.p), *biases]
        out, hidden, cell = torch.lstm(x, state, weights, True, 1, 0.0, True, False, True)
        return out, (hidden, cell)


class AWD_LSTM(Encoder):  # noqa: N801  fastai's name
    """Tokens int64 (rows, steps), and the state after the steps before -> (rows, steps, emb_sz) and the state after these.

    No gradient goes back through the state. emb_sz: of the embedding and of the last layer's output; n_hid: of the layers
    between. embed_p, input_p, weight_p, hidden_p: the dropouts' probabilities.
    """

    def __init__(
        self,
        n_vocab: int,
        emb_sz: int = 400,
        n_hid: int = 1152,
        n_layers: int = 3,
        *,
        embed_p: float = 0.02,
        input_p: float = 0.25,
        weight_p: float = 0.2,
        hidden_p: float = 0.15,
        pad_id: int = PAD,
    ):
        super().__init__(emb_sz, pad_id)
        self.embedding = EmbeddingDropout(n_vocab, emb_sz, embed_p, pad_id)
        sizes = [emb_sz, *[n_hid] * (n_layers - 1), emb_sz]
        self.layers = nn.ModuleList(WeightDropout(a, b, weight_p) for a, b in pairwise(sizes))
        self.input_drop, self.hidden_drop = RNNDropout(input_p), RNNDropout(hidden_p)

    def forward(self, tokens: Tensor, hidden: Hidden = None) -> tuple[Tensor, Hidden]:
        x = self.input_drop(self.embedding(tokens))
        after = []
        for i, layer in enumerate(self.layers):
            x, (h, c) = layer(self.hidden_drop(x) if i else x, hidden[i] if hidden else None)
            after.append((h.detach(), c.detach()))
        return x, tuple(after)


@model_builder
def awd_lstm_lm(
    *,
    n_vocab: int,
    emb_sz: int = 400,
    n_hid: int = 1152,
    n_layers: int = 3,
    drop_mult: float = 1.0,
    embed_p: float = 0.02,
    input_p: float = 0.25,
    weight_p: float = 0.2,
    hidden_p: float = 0.15,
    output_p: float = 0.1,
    tie_weights: bool = True,
    out_bias: bool = True,
    pad_id: int = PAD,
) -> nn.Module:
    """A `LanguageModel` of an AWD-LSTM. drop_mult: a factor for all its dropouts; tie_weights, out_bias: of the decoder."""
    drops = {"embed_p": embed_p, "input_p": input_p, "weight_p": weight_p, "hidden_p": hidden_p}
    drops = {name: p * drop_mult for name, p in drops.items()}
    encoder = AWD_LSTM(n_vocab, emb_sz, n_hid, n_layers, **drops, pad_id=pad_id)
    return LanguageModel(encoder, output_p * drop_mult, tie_weights, out_bias)


@model_builder
def awd_lstm_classifier(
    *,
    n_vocab: int,
    n_out: int,
    emb_sz: int = 400,
    n_hid: int = 1152,
    n_layers: int = 3,
    drop_mult: float = 1.0,
    embed_p: float = 0.05,
    input_p: float = 0.4,
    weight_p: float = 0.5,
    hidden_p: float = 0.3,
    output_p: float = 0.4,
    lin_ftrs: Sequence[int] = (50,),
    ps: Sequence[float] = (0.1,),
    seq_len: int = 72,
    max_len: int = 1440,
    y_range: Sequence[float] | None = None,
    pad_id: int = PAD,
) -> nn.Module:
    """A `TextClassifier` of an AWD-LSTM and a `PoolingHead`. drop_mult: a factor for the dropouts of the encoder and
    before the head."""
    drops = {"embed_p": embed_p, "input_p": input_p, "weight_p": weight_p, "hidden_p": hidden_p}
    drops = {name: p * drop_mult for name, p in drops.items()}
    encoder = AWD_LSTM(n_vocab, emb_sz, n_hid, n_layers, **drops, pad_id=pad_id)
    head = PoolingHead(3 * emb_sz, n_out, lin_ftrs, [output_p * drop_mult, *ps], y_range)
    return TextClassifier(encoder, head, seq_len, max_len)


def awd_lstm_lm_split(model: nn.Module) -> list[list[nn.Parameter]]:
    """Groups of a language model for freezing: each layer of the LSTM, and last the embedding with the decoder, tied to it."""
    return layers_and_rest(model.encoder.layers, model)  # type: ignore[union-attr,arg-type]


def awd_lstm_clas_split(model: nn.Module) -> list[list[nn.Parameter]]:
    """Groups of a classifier for freezing: the embedding, each layer of the LSTM, and the head."""
    parts = [model.encoder.embedding, *model.encoder.layers, model.head]  # type: ignore[union-attr,misc]
    return [list(part.parameters()) for part in parts]
