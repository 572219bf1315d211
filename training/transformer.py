"""A small Transformer of plain PyTorch under a language model or a classifier (Vaswani et al., arXiv:1706.03762).

Normalised before each part (Xiong et al., arXiv:2002.04745), so that it trains without a long warm-up.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from training.models import model_builder
from training.text import PAD, Encoder, Hidden, LanguageModel, PoolingHead, TextClassifier, layers_and_rest, mean_pool


class TransformerEncoder(Encoder):
    """Tokens int64 (rows, steps) -> (rows, steps, emb_sz), and no state: what it looks at are the tokens given at once.

    causal: a token sees those before it only. n_heads: of attention, a divisor of emb_sz. n_hid: of the layers between.
    """

    def __init__(
        self,
        n_vocab: int,
        emb_sz: int = 256,
        n_hid: int = 1024,
        n_layers: int = 4,
        n_heads: int = 4,
        *,
        dropout: float = 0.1,
        causal: bool = False,
        pad_id: int = PAD,
    ):
        super().__init__(emb_sz, pad_id)
        self.causal = causal
        self.embedding = nn.Embedding(n_vocab, emb_sz, padding_idx=pad_id)
        nn.init.normal_(self.embedding.weight, std=emb_sz**-0.5)
        self.drop = nn.Dropout(dropout)
        layer = nn.TransformerEncoderLayer(emb_sz, n_heads, n_hid, dropout, "gelu", batch_first=True, norm_first=True)
        self.body = nn.TransformerEncoder(layer, n_layers, nn.LayerNorm(emb_sz), enable_nested_tensor=False)

    def forward(self, tokens: Tensor, hidden: Hidden = None) -> tuple[Tensor, Hidden]:
        steps = tokens.shape[1]
        scaled = self.embedding(tokens) * math.sqrt(self.n_features)
        x = self.drop(scaled + sines(steps, self.n_features, scaled))
        mask = nn.Transformer.generate_square_subsequent_mask(steps, x.device) < 0 if self.causal else None
        return self.body(x, mask=mask, src_key_padding_mask=~self.attended(tokens), is_causal=self.causal), None


def sines(steps: int, features: int, like: Tensor) -> Tensor:
    """Positions as sines and cosines of falling frequency: (steps, features), type and device those of `like`."""
    place = torch.arange(steps, device=like.device, dtype=torch.float32)[:, None]
    frequency = torch.exp(torch.arange(0, features, 2, device=like.device) * (-math.log(10_000.0) / features))
    angles = place * frequency
    return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)[:, :features].to(like.dtype)


@model_builder
def transformer_lm(
    *,
    n_vocab: int,
    emb_sz: int = 256,
    n_hid: int = 1024,
    n_layers: int = 4,
    n_heads: int = 4,
    drop_mult: float = 1.0,
    dropout: float = 0.1,
    output_p: float = 0.1,
    pad_id: int = PAD,
) -> nn.Module:
    """A `LanguageModel` of a causal Transformer, which sees a batch's tokens, not those of the batches before."""
    encoder = TransformerEncoder(
        n_vocab, emb_sz, n_hid, n_layers, n_heads, dropout=dropout * drop_mult, causal=True, pad_id=pad_id
    )
    return LanguageModel(encoder, output_p * drop_mult)


@model_builder
def transformer_classifier(
    *,
    n_vocab: int,
    n_out: int,
    emb_sz: int = 256,
    n_hid: int = 1024,
    n_layers: int = 4,
    n_heads: int = 4,
    causal: bool = False,
    drop_mult: float = 1.0,
    dropout: float = 0.1,
    output_p: float = 0.4,
    lin_ftrs: Sequence[int] = (50,),
    ps: Sequence[float] = (0.1,),
    seq_len: int = 512,
    max_len: int = 1440,
    y_range: Sequence[float] | None = None,
    pad_id: int = PAD,
) -> nn.Module:
    """A `TextClassifier` of a Transformer, which sees `seq_len` tokens at once, and the mean of what it gives of each.

    causal: as in the language model that its encoder may come from.
    """
    encoder = TransformerEncoder(
        n_vocab, emb_sz, n_hid, n_layers, n_heads, dropout=dropout * drop_mult, causal=causal, pad_id=pad_id
    )
    head = PoolingHead(emb_sz, n_out, lin_ftrs, [output_p * drop_mult, *ps], y_range)
    return TextClassifier(encoder, head, seq_len, max_len, mean_pool)


def transformer_lm_split(model: nn.Module) -> list[list[nn.Parameter]]:
    """Groups of a language model for freezing: each layer, and last the embedding with the decoder, tied to it."""
    return layers_and_rest(model.encoder.body.layers, model)  # type: ignore[union-attr,arg-type]


def transformer_clas_split(model: nn.Module) -> list[list[nn.Parameter]]:
    """Groups of a classifier for freezing: the embedding, each layer (the last norm with the last one), and the head."""
    embedding, body = model.encoder.embedding, model.encoder.body  # type: ignore[union-attr]
    *layers, last = [list(layer.parameters()) for layer in body.layers]  # type: ignore[union-attr]
    return [
        list(embedding.parameters()),  # type: ignore[union-attr]
        *layers,
        [*last, *body.norm.parameters()],  # type: ignore[union-attr]
        list(model.head.parameters()),  # type: ignore[union-attr]
    ]
