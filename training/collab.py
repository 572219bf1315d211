"""Models of who likes what: a user and an item have factors and a bias each (Koren et al., "Matrix factorization techniques for
recommender systems", 2009), or go through a network; and training on what was chosen alone, without ratings."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from blocks.draws import randint, stream_of
from blocks.tensors import as_plain
from training.callback import Callback
from training.layers import Embedding, SigmoidRange
from training.models import model_builder
from training.tabular import TabularModel

if TYPE_CHECKING:
    from training.learner import Learner


class EmbeddingDotBias(nn.Module):
    """Codes of user and item, (rows, 2) int64 -> (rows,): the product of their factors and both biases.

    y_range: (low, high) that the result is squeezed into.
    """

    def __init__(self, n_factors: int, n_users: int, n_items: int, y_range: Sequence[float] | None = None):
        super().__init__()
        self.u_weight, self.i_weight = Embedding(n_users, n_factors), Embedding(n_items, n_factors)
        self.u_bias, self.i_bias = Embedding(n_users, 1), Embedding(n_items, 1)
        self.range = nn.Identity() if y_range is None else SigmoidRange(*y_range)

    def forward(self, codes: Tensor) -> Tensor:
        users, items = codes[:, 0], codes[:, 1]
        dot = (self.u_weight(users) * self.i_weight(items)).sum(1)
        return self.range(dot + (self.u_bias(users) + self.i_bias(items)).squeeze(1))


class EmbeddingNN(nn.Module):
    """Codes of user and item, (rows, 2) int64 -> (rows,): a `TabularModel` of their embeddings."""

    def __init__(
        self, emb_szs: Sequence[tuple[int, int]], layers: Sequence[int] = (100,), y_range: Sequence[float] | None = None
    ):
        super().__init__()
        self.table = TabularModel(emb_szs, n_cont=0, out_sz=1, layers=layers, y_range=y_range)

    def forward(self, codes: Tensor) -> Tensor:
        return self.table(codes).squeeze(1)


@model_builder
def embedding_dot_bias(*, n_factors: int, n_users: int, n_items: int, y_range: Sequence[float] | None = None) -> nn.Module:
    """An `EmbeddingDotBias` by its arguments, as plain data."""
    return EmbeddingDotBias(n_factors, n_users, n_items, y_range)


@model_builder
def embedding_nn(
    *, emb_szs: Sequence[tuple[int, int]], layers: Sequence[int] = (100,), y_range: Sequence[float] | None = None
) -> nn.Module:
    """An `EmbeddingNN` by its arguments, as plain data."""
    return EmbeddingNN(emb_szs, layers, y_range)


class AgainstOthers(Callback):
    """Trains on what users chose: an item chosen is to score above one drawn at random, code 0 ("#na#") never being drawn.

    Bayesian personalised ranking (Rendle et al., arXiv:1205.2618): the model's output becomes the difference of the two scores,
    the target 1, for a loss such as BCEWithLogitsLossFlat. The data has inputs only, codes of user and item (rows, 2). That the
    drawn item was chosen as well happens, as rarely as a user's items are among all.
    """

    order = 5
    remove_on_fetch = True  # what is predicted is the item's own score, as an export does

    def __init__(self, n_items: int):
        if n_items < 3:
            raise ValueError(f"n_items counts the items and #na#, so it is at least 3, not {n_items}")
        self.n_items = n_items

    def before_batch(self, learn: "Learner") -> None:
        chosen = as_plain(learn.xb[0])
        others = chosen.clone()
        others[:, 1] = 1 + randint(learn.keys, stream_of(type(self).__name__), self.n_items - 1)
        learn.xb = (torch.cat([chosen, others]),)
        learn.yb = (torch.ones(len(chosen), device=chosen.device),)

    def after_pred(self, learn: "Learner") -> None:
        chosen, others = learn.pred.chunk(2)
        learn.pred = chosen - others
