"""Models of table rows: embeddings of the categories beside the numbers, then a stack of linear layers.

fastai's tabular model, and a residual one (Gorishniy et al., "Revisiting Deep Learning Models for Tabular Data", 2021).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from training.layers import Embedding, LinBnDrop, SigmoidRange
from training.models import model_builder

Sizes = Sequence[tuple[int, int]]


def emb_sz_rule(n_cat: int) -> int:
    """fastai's width of the embedding of `n_cat` categories."""
    return min(600, round(1.6 * n_cat**0.56))


class TableInput(nn.Module):
    """Codes and numbers as one row each: (rows, categories) int64 and (rows, n_cont) float32 -> (rows, width).

    emb_szs: categories and width of each embedding; columns of one kind are given alone. embed_p: dropout of the embeddings.
    """

    def __init__(self, emb_szs: Sizes, n_cont: int, embed_p: float = 0.0, bn_cont: bool = True):
        super().__init__()
        self.embeds = nn.ModuleList(Embedding(n, width) for n, width in emb_szs)
        self.emb_drop = nn.Dropout(embed_p)
        self.bn_cont = nn.BatchNorm1d(n_cont) if bn_cont and n_cont else nn.Identity()
        self.width = sum(width for _, width in emb_szs) + n_cont

    def forward(self, *columns: Tensor) -> Tensor:
        parts = []
        if len(self.embeds):
            codes, *columns = columns  # type: ignore[assignment]
            parts.append(self.emb_drop(torch.cat([e(codes[:, i]) for i, e in enumerate(self.embeds)], dim=1)))
        parts += [self.bn_cont(numbers) for numbers in columns]
        return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]


class TabularModel(nn.Module):
    """fastai's model of table rows: (rows, categories) int64 and (rows, n_cont) float32 -> (rows, out_sz).

    layers: their widths. ps: dropout after each. use_bn: BatchNorm in each, bn_final: in the last, bn_cont: of the numbers.
    lin_first: linear and activation come before BatchNorm and dropout. y_range: (low, high) that outputs are squeezed into.
    """

    def __init__(
        self,
        emb_szs: Sizes,
        n_cont: int,
        out_sz: int,
        layers: Sequence[int] = (200, 100),
        ps: float | Sequence[float] = 0.0,
        embed_p: float = 0.0,
        y_range: Sequence[float] | None = None,
        use_bn: bool = True,
        bn_final: bool = False,
        bn_cont: bool = True,
        lin_first: bool = True,
    ):
        super().__init__()
        dropouts = [ps] * len(layers) if isinstance(ps, int | float) else list(ps)
        if len(dropouts) != len(layers):
            raise ValueError(f"ps has one dropout a layer: {len(layers)}, not {len(dropouts)}")
        self.columns = TableInput(emb_szs, n_cont, embed_p, bn_cont)
        sizes = [self.columns.width, *layers]
        hidden = [
            LinBnDrop(n_in, n_out, use_bn, p, nn.ReLU(inplace=True), lin_first)
            for n_in, n_out, p in zip(sizes, layers, dropouts, strict=False)
        ]
        last: list[nn.Module] = [LinBnDrop(sizes[-1], out_sz, use_bn and bn_final, lin_first=lin_first)]
        self.layers = nn.Sequential(*hidden, *last, *_ranged(y_range))

    def forward(self, *columns: Tensor) -> Tensor:
        return self.layers(self.columns(*columns))


class _Residual(nn.Module):
    def __init__(self, width: int, hidden: int, p: float):
        super().__init__()
        self.layers = nn.Sequential(
            nn.BatchNorm1d(width),
            nn.Linear(width, hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(p),
            nn.Linear(hidden, width),
            nn.Dropout(p / 2),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class TabularResNet(nn.Module):
    """A residual model of table rows, of the same inputs and outputs as `TabularModel`: `depth` blocks of `width`."""

    def __init__(
        self,
        emb_szs: Sizes,
        n_cont: int,
        out_sz: int,
        width: int = 128,
        depth: int = 3,
        p: float = 0.1,
        y_range: Sequence[float] | None = None,
    ):
        super().__init__()
        self.columns = TableInput(emb_szs, n_cont, bn_cont=False)
        self.layers = nn.Sequential(
            nn.Linear(self.columns.width, width),
            *(_Residual(width, 2 * width, p) for _ in range(depth)),
            nn.BatchNorm1d(width),
            nn.ReLU(inplace=True),
            nn.Linear(width, out_sz),
            *_ranged(y_range),
        )

    def forward(self, *columns: Tensor) -> Tensor:
        return self.layers(self.columns(*columns))


def _ranged(y_range: Sequence[float] | None) -> list[nn.Module]:
    return [] if y_range is None else [SigmoidRange(*y_range)]


@model_builder
def tabular_model(*, emb_szs: Sizes, n_cont: int, out_sz: int, **settings: object) -> nn.Module:
    """A `TabularModel` by its arguments, as plain data."""
    return TabularModel(emb_szs, n_cont, out_sz, **settings)  # type: ignore[arg-type]


@model_builder
def tabular_resnet(*, emb_szs: Sizes, n_cont: int, out_sz: int, **settings: object) -> nn.Module:
    """A `TabularResNet` by its arguments, as plain data."""
    return TabularResNet(emb_szs, n_cont, out_sz, **settings)  # type: ignore[arg-type]
