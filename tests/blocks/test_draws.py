"""Draws are a function of (seed, epoch, sample, stream), spread as they should be, and independent of company."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blocks.draws import bernoulli, normal, randint, sample_keys, stream_of, uniform

words = st.integers(-(2**63), 2**63 - 1)
some = settings(deadline=None, max_examples=25)


def keys(n: int = 4096, seed: int = 0, epoch: int = 0) -> torch.Tensor:
    return sample_keys(seed, epoch, np.arange(n))


def test_known_numbers() -> None:
    """What is drawn is promised: a checkpoint resumed with a later version draws on."""
    few = sample_keys(7, 3, np.array([0, 1, 2**40]))
    assert few.tolist() == [-8753253790185874969, 7432763024821660549, 9012993601829833833]
    assert randint(few, stream_of("Flip"), 1000).tolist() == [880, 416, 623]
    assert stream_of("Flip") == 6166070207980062035


def splitmix(z: int) -> int:
    """The finaliser in Python's own integers."""
    mask = 2**64 - 1
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


@some
@given(words, st.integers(0, 2**62))
def test_the_tensor_hash_is_the_integer_hash(key: int, stream: int) -> None:
    """Shifts and products of signed tensors wrap as unsigned words do."""
    word = splitmix((key + splitmix(stream)) % 2**64)
    drawn = uniform(torch.tensor([key]), stream)
    assert drawn.dtype == torch.float32
    assert float(drawn) == (word >> 40) / 2**24


@some
@given(words, words, st.integers(0, 90), st.integers(1, 90))
def test_alone_as_in_a_batch(seed: int, stream: int, start: int, length: int) -> None:
    batch = sample_keys(seed, 1, np.arange(100))
    part = sample_keys(seed, 1, np.arange(100)[start : start + length])
    assert torch.equal(part, batch[start : start + length])
    for draw in (
        lambda k: uniform(k, stream, -2, 5),
        lambda k: uniform(k, stream, n=3),
        lambda k: normal(k, stream),
        lambda k: normal(k, stream, n=3),
        lambda k: bernoulli(k, stream, 0.3),
        lambda k: randint(k, stream, 8),
        lambda k: randint(k, stream, 2**31, n=2),
    ):
        assert torch.equal(draw(part), draw(batch)[start : start + length])


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-10.0, 10.0), (0.5, 0.5)])
def test_uniform_fills_its_range(low: float, high: float) -> None:
    drawn = uniform(keys(), 1, low, high, n=8).double()
    width = high - low
    assert low <= float(drawn.min()) <= low + width / 1000
    assert high - width / 1000 <= float(drawn.max()) <= high
    assert float(drawn.mean()) == pytest.approx((low + high) / 2, abs=0.01 * width)
    assert float(drawn.var()) == pytest.approx(width**2 / 12, abs=0.002 * width**2)


def test_normal_has_the_moments_of_one() -> None:
    drawn = normal(keys(), 1, n=8).double()
    moments = [float((drawn**k).mean()) for k in (1, 2, 3, 4)]
    assert moments == pytest.approx([0, 1, 0, 3], abs=0.1)
    assert drawn.isfinite().all()


@pytest.mark.parametrize("p", [0.0, 0.25, 1.0])
def test_bernoulli_frequency(p: float) -> None:
    drawn = bernoulli(keys(), 1, p)
    assert drawn.dtype == torch.bool
    assert float(drawn.double().mean()) == pytest.approx(p, abs=0.02 if 0 < p < 1 else 0)


def test_randint_draws_each_number_alike() -> None:
    counts = randint(keys(), 1, 8, n=8).flatten().bincount()
    assert len(counts) == 8
    assert counts.double().div(4096).sub(1).abs().max() < 0.06


@pytest.mark.parametrize(
    "others",
    [
        lambda: uniform(keys(), 2),  # another stream
        lambda: uniform(keys(seed=1), 1),
        lambda: uniform(keys(epoch=1), 1),
        lambda: uniform(sample_keys(0, 0, np.arange(1, 4097)), 1),  # the neighbour
        lambda: uniform(keys(), 1, n=2)[:, 1],
        lambda: uniform(keys(), stream_of("Flip 1")),
    ],
)
def test_whatever_differs_makes_the_draws_independent(others: object) -> None:
    pair = torch.stack([uniform(keys(), 1), others()])  # type: ignore[operator]
    assert float(torch.corrcoef(pair)[0, 1].abs()) < 0.06
    assert float((pair[0] == pair[1]).double().mean()) < 0.01


def test_keys_of_many_samples_differ() -> None:
    assert len(set(keys(20_000).tolist())) == 20_000
