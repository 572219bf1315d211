"""Random numbers as a function of what they are for: (seed, epoch, sample) gives a key, key and stream give a number.

A generator's numbers depend on who drew before. Here each is an integer hash (the finaliser of SplitMix64: Steele, Lea and
Flood, "Fast splittable pseudorandom number generators", 2014) in wrapping int64 tensor operations. So a sample gets the same
numbers alone or in a batch, on one worker or eight, on a processor or a GPU, and after a restart.
"""

import hashlib
import math

import numpy as np
import torch

_GOLDEN = 0x9E3779B97F4A7C15
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_WORD = (1 << 64) - 1


def sample_keys(seed: int, epoch: int, samples: np.ndarray | torch.Tensor) -> torch.Tensor:
    """One key a sample, int64 (rows,), of int64 sample numbers (rows,); all draws of a sample in an epoch follow from it."""
    numbers = torch.as_tensor(np.asarray(samples, dtype=np.int64))
    of_epoch = _mixed_word(_mixed_word(seed + _GOLDEN) + epoch)
    return _mixed(_mixed(numbers * _signed(_GOLDEN) + _signed(of_epoch)))


def stream_of(name: str) -> int:
    """The stream of draws called `name`: a 63-bit number that stays the same in every process and version."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") >> 1


def uniform(keys: torch.Tensor, stream: int, low: float = 0.0, high: float = 1.0, n: int | None = None) -> torch.Tensor:
    """float32 of 24 random bits between `low` and `high`, (rows,), or (rows, n) numbers a sample."""
    return _bits(keys, stream, 24, n).to(torch.float32).mul_((high - low) / (1 << 24)).add_(low)


def normal(keys: torch.Tensor, stream: int, n: int | None = None) -> torch.Tensor:
    """float32 of the standard normal distribution, (rows,) or (rows, n), by the method of Box and Muller (1958).

    Worked out in float64 and rounded, so that the libraries' own last bits of log and cos do not show.
    """
    word = _words(keys, stream, n)
    upper, lower = ((half & 0xFFFFFFFF).to(torch.float64).add_(0.5).mul_(2.0**-32) for half in (word >> 32, word))
    return (upper.log_().mul_(-2).sqrt_() * lower.mul_(2 * math.pi).cos_()).to(torch.float32)


def bernoulli(keys: torch.Tensor, stream: int, p: float) -> torch.Tensor:
    """True with probability `p`, bool (rows,)."""
    return _bits(keys, stream, 24) < round(p * (1 << 24))


def randint(keys: torch.Tensor, stream: int, high: int, n: int | None = None) -> torch.Tensor:
    """int64 of 0..high-1, (rows,) or (rows, n); `high` up to 2**31."""
    return (_bits(keys, stream, 32, n) * high) >> 32


def _bits(keys: torch.Tensor, stream: int, bits: int, n: int | None = None) -> torch.Tensor:
    # The upper ones of 64, as int64 of 0 and more.
    return (_words(keys, stream, n) >> (64 - bits)) & ((1 << bits) - 1)


def _words(keys: torch.Tensor, stream: int, n: int | None) -> torch.Tensor:
    # The hash of key, stream and position.
    start = keys + _signed(_mixed_word(stream))
    if n is not None:
        start = start[..., None] + torch.arange(n, device=keys.device) * _signed(_GOLDEN)
    return _mixed(start)


def _mixed(z: torch.Tensor) -> torch.Tensor:
    # `>>` of int64 keeps the sign, so what it shifts in is masked away.
    z = (z ^ ((z >> 30) & ((1 << 34) - 1))) * _signed(_FIRST)
    z = (z ^ ((z >> 27) & ((1 << 37) - 1))) * _signed(_SECOND)
    return z ^ ((z >> 31) & ((1 << 33) - 1))


def _mixed_word(z: int) -> int:
    z &= _WORD
    z = ((z ^ (z >> 30)) * _FIRST) & _WORD
    z = ((z ^ (z >> 27)) * _SECOND) & _WORD
    return z ^ (z >> 31)


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word
