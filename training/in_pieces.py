"""A batch through the model in pieces, where all of its rows at once would need more memory than there is.

The prediction is the whole batch's, so the loss, metrics and callbacks notice nothing, and the one backward pass accumulates
the gradient piece by piece: of each piece only the rows are kept, and its activations are computed again when its turn comes
(Chen et al., arXiv:1604.06174). That is the gradient of the whole to float error, at the price of another forward pass.
BatchNorm takes the statistics of each piece, and its running ones move once a piece.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from blocks.errors import UserError


def in_pieces(predict: Callable[..., Any], model: nn.Module, inputs: Sequence[Any], most: int) -> Any:
    """`predict(*inputs)`, with at most `most` rows at a time going through `model`.

    inputs: tensors (rows, ...); what is predicted is such tensors too, or tuples, lists or dicts of them. UserError for others,
    and for a model that carries a state from one batch to the next.
    """
    rows = len(inputs[0])
    if rows <= most:
        return predict(*inputs)
    if hasattr(model, "hidden") or not all(isinstance(x, Tensor) and len(x) == rows for x in inputs):
        raise UserError(
            f"max_rows={most} cuts batches by rows: the inputs are tensors with the same rows, and the model carries no hidden "
            "state from batch to batch. Give a smaller batch_size instead"
        )
    pieces = -(-rows // most)
    cut = list(zip(*(x.tensor_split(pieces) for x in inputs), strict=True))
    if not torch.is_grad_enabled():
        return _joined([_rows_of(predict(*piece), piece, most) for piece in cut])
    return _joined([_rows_of(_kept_as_rows(predict, model, piece), piece, most) for piece in cut])


def _kept_as_rows(predict: Callable[..., Any], model: nn.Module, piece: Sequence[Tensor]) -> Any:
    return checkpoint(predict, *piece, use_reentrant=False, context_fn=lambda: (contextlib.nullcontext(), _norms_kept(model)))


@contextlib.contextmanager
def _norms_kept(model: nn.Module) -> Iterator[None]:
    # The second time a piece goes through, running statistics have seen it already.
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
    buffers = [b for norm in norms for b in norm.buffers()]
    before = [b.clone() for b in buffers]
    try:
        yield
    finally:
        for buffer, value in zip(buffers, before, strict=True):
            buffer.data.copy_(value)  # by .data: what the backward pass has saved of it is not used, but would be missed


def _rows_of(found: Any, piece: Sequence[Tensor], most: int) -> Any:
    for tensor in _tensors(found):
        if not isinstance(tensor, Tensor) or tensor.ndim == 0 or len(tensor) != len(piece[0]):
            raise UserError(f"max_rows={most} needs a model that gives tensors with a row for each row of its input")
    return found


def _tensors(found: Any) -> Iterator[Any]:
    if isinstance(found, tuple | list):
        for part in found:
            yield from _tensors(part)
    elif isinstance(found, dict):
        yield from _tensors(list(found.values()))
    else:
        yield found


def _joined(parts: Sequence[Any]) -> Any:
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(list(parts))
    if isinstance(first, dict):
        return {key: _joined([part[key] for part in parts]) for key in first}
    return type(first)(_joined(of) for of in zip(*parts, strict=True))
