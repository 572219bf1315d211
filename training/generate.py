"""Text from a language model, token by token."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from training.rnn import prediction_of


@torch.no_grad()
def generate(
    model: nn.Module,
    tokens: Sequence[int],
    n: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    min_p: float | None = None,
    no_repeat: int | None = None,
    banned: Sequence[int] = (),
    seed: int | None = None,
) -> list[int]:
    """`n` tokens that go on from `tokens`, drawn from the model's distributions; the model is what it was afterwards.

    temperature: what logits are divided by; 0 takes the most probable token. top_k: among the k most probable only. min_p:
    among those at least so probable. no_repeat: no stretch of so many tokens comes twice. banned: tokens that never come.
    seed: of the draws, which else come from torch's global generator. ValueError for settings that leave nothing to draw.
    """
    _check(tokens, n, temperature, top_k, no_repeat)
    device = next(model.parameters()).device
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    was_training, hidden = model.training, getattr(model, "hidden", None)
    model.eval()
    text, new = list(tokens), list(tokens)
    try:
        model.hidden = None  # type: ignore[assignment]
        for _ in range(n):
            logits = prediction_of(model(torch.tensor([new], device=device)))[0, -1].float().cpu()
            logits[list({*banned, *_repeating(text, no_repeat)})] = -torch.inf
            token = _drawn(logits, temperature, top_k, min_p, generator)
            text.append(token)
            new = text if getattr(model, "hidden", None) is None else [token]  # one without a state reads all again
    finally:
        model.hidden = hidden  # type: ignore[assignment]
        model.train(was_training)
    return text[len(tokens) :]


def _check(tokens: Sequence[int], n: int, temperature: float, top_k: int | None, no_repeat: int | None) -> None:
    if not len(tokens):
        raise ValueError("there is no token to go on from: give a text")
    for name, value, least in (("n", n, 0), ("temperature", temperature, 0), ("top_k", top_k, 1), ("no_repeat", no_repeat, 1)):
        if value is not None and value < least:
            raise ValueError(f"{name} is at least {least}, not {value!r}")


def _repeating(text: Sequence[int], no_repeat: int | None) -> set[int]:
    # The tokens after which the last `no_repeat` ones would have been there before.
    if no_repeat is None or len(text) < no_repeat:
        return set()
    end = list(text[len(text) - no_repeat + 1 :])
    stretches = (text[i : i + no_repeat] for i in range(len(text) - no_repeat + 1))
    return {stretch[-1] for stretch in stretches if list(stretch[:-1]) == end}


def _drawn(
    logits: Tensor, temperature: float, top_k: int | None, min_p: float | None, generator: torch.Generator | None
) -> int:
    if not bool((logits > -torch.inf).any()):
        raise ValueError("no token is left to draw: each would repeat a stretch, or is banned. Give a larger no_repeat")
    if temperature == 0:
        return int(logits.argmax())
    if top_k is not None and top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], -torch.inf)
    probabilities = torch.softmax(logits / temperature, dim=0)
    if min_p is not None and bool((probabilities >= min_p).any()):
        probabilities = probabilities.masked_fill(probabilities < min_p, 0)
    return int(torch.multinomial(probabilities, 1, generator=generator))
