"""Text from a model whose distributions the test knows."""

import pytest
import torch
from torch import Tensor, nn

from training import generate


class Next(nn.Module):
    """After token i most probably i + 1 of 5, then the one after it, and so on; a state only counts the tokens read."""

    def __init__(self, with_state: bool = True) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.with_state, self.hidden, self.read = with_state, None, 0

    def forward(self, tokens: Tensor) -> tuple[Tensor, None]:
        self.read += tokens.shape[1]
        self.hidden = torch.zeros(1) if self.with_state else None  # type: ignore[assignment]
        return -self.scale * ((torch.arange(5) - tokens[..., None] - 1) % 5).float(), None


def test_the_most_probable() -> None:
    assert generate(Next(), [3], 4, temperature=0) == [4, 0, 1, 2]
    assert generate(Next(), [3], 0) == []


@pytest.mark.parametrize(("with_state", "read"), [(True, 2 + 3), (False, 2 + 3 + 4 + 5)])
def test_a_model_without_a_state_reads_all_again(with_state: bool, read: int) -> None:
    model = Next(with_state).train()
    model.hidden = kept = torch.ones(1)  # type: ignore[assignment]
    generate(model, [1, 2], 4)
    assert model.read == read
    assert model.training
    assert model.hidden is kept


def test_nothing_comes_twice() -> None:
    assert generate(Next(), [3, 4, 3], 2, temperature=0, no_repeat=2) == [0, 1]
    assert sorted(generate(Next(), [3], 4, no_repeat=1)) == [0, 1, 2, 4]
    with pytest.raises(ValueError, match="no token is left"):
        generate(Next(), [3], 5, no_repeat=1)


def test_what_draws_are_limited_to() -> None:
    assert set(generate(Next(), [0], 40, top_k=1)) == {0, 1, 2, 3, 4}
    assert generate(Next(), [0], 4, top_k=1, seed=1) == generate(Next(), [0], 4, min_p=0.6) == [1, 2, 3, 4]
    assert 1 not in generate(Next(), [0], 40, banned=[1])


def test_draws_are_the_seeds_and_have_the_models_distribution() -> None:
    model = Next()
    assert generate(model, [0], 20, seed=5) == generate(model, [0], 20, seed=5) != generate(model, [0], 20, seed=6)
    before = torch.get_rng_state()
    drawn = [generate(model, [0], 1, seed=i, temperature=2.0)[0] for i in range(800)]
    assert torch.equal(torch.get_rng_state(), before)
    wanted = torch.softmax(torch.tensor([-4.0, 0, -1, -2, -3]) / 2, dim=0)
    torch.testing.assert_close(torch.bincount(torch.tensor(drawn), minlength=5) / 800, wanted, atol=0.06, rtol=0)


@pytest.mark.parametrize("wrong", [{"n": -1}, {"temperature": -1}, {"top_k": 0}, {"no_repeat": 0}])
def test_settings_that_mean_nothing(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} is at least"):
        generate(Next(), [1], **{"n": 1} | wrong)
    with pytest.raises(ValueError, match="no token to go on from"):
        generate(Next(), [], 1)
