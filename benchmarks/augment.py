"""What the usual augmentation of a batch of pictures costs: bytes to floats and `aug_transforms()`, ours beside fastai's.

    .venv-bench/bin/python benchmarks/augment.py                 # beside fastai (`make bench-env`)
    .venv/bin/python benchmarks/augment.py                       # without the peer
    ... --rounds 2 --rows 8 --size 32                            # only to see that it runs

All in one process, one thread, in rounds A, B, A, B, ...; CPU time, the minimum of the rounds. Both are given the same batch
of bytes and draw anew in each round.
"""

import argparse
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from blocks import Hue, IntToFloatTensor, Pipeline, RandomErasing, Saturation, TensorImage, aug_transforms
from blocks.draws import sample_keys

Run = Callable[[int], Any]  # of the number of the round


def ours(pixels: torch.Tensor, extra: list[Any]) -> Run:
    pipeline, batch = Pipeline.of([IntToFloatTensor(), *aug_transforms(xtra_tfms=extra)]), pixels.as_subclass(TensorImage)
    rows = np.arange(len(pixels))
    return lambda number: pipeline(batch, split_idx=0, keys=sample_keys(0, number, rows))


def fastais(pixels: torch.Tensor, extra: list[str]) -> Run | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from fastai.data.transforms import IntToFloatTensor as FastaiIntToFloat
            from fastai.torch_core import TensorImage as FastaiImage
            from fastai.vision import augment
            from fasttransform import Pipeline as FastaiPipeline
    except ImportError:
        return None
    more = [getattr(augment, name)() for name in extra]
    pipeline = FastaiPipeline([FastaiIntToFloat(), *augment.aug_transforms(xtra_tfms=more)], split_idx=0)
    return lambda number: pipeline(FastaiImage(pixels))


def fastest(runs: dict[str, Run | None], rounds: int) -> dict[str, float]:
    """The least CPU milliseconds of each, in interleaved rounds; the first two rounds only warm up."""
    best = {name: float("inf") for name, run in runs.items() if run is not None}
    for number in range(rounds + 2):
        for name in best:
            run = runs[name]
            assert run is not None
            began = time.process_time()
            run(number)
            if number >= 2:
                best[name] = min(best[name], (time.process_time() - began) * 1000)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--size", type=int, default=128)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    pixels = torch.randint(0, 256, (arguments.rows, 3, arguments.size, arguments.size), dtype=torch.uint8)
    print(f"torch {torch.__version__}, {arguments.rows} pictures of {arguments.size} px, {arguments.rounds} rounds")
    for what, wanted, extra in (
        ("aug_transforms()", "<= 0.5", []),
        ("and Saturation, Hue", "", [Saturation(), Hue()]),
        ("and RandomErasing", "", [RandomErasing()]),
    ):
        names = [type(t).__name__ for t in extra]
        found = fastest({"ours": ours(pixels, extra), "fastai": fastais(pixels, names)}, arguments.rounds)
        peer = found.get("fastai")
        told = f"   wanted {wanted}" if wanted else ""
        beside = "" if peer is None else f"   fastai {peer:6.1f} ms   ratio {found['ours'] / peer:.2f}{told}"
        print(f"{what:<22}{found['ours']:6.1f} ms{beside}", flush=True)


if __name__ == "__main__":
    main()
