"""What training on Ray Train workers costs: one worker beside this process, the start of two, and a checkpoint.

    .venv/bin/python benchmarks/workers.py
    ... --size 32 --rounds 1 --epochs 2                        # only to see that it runs

ResNet-18 on scikit-learn's digits, one thread a process. The size of the pictures decides how long an epoch is: 30 s or more
at 224 px. Rounds A, B, A, B, ...; the minimum of each.

    one worker    an epoch by the record of the Learner, on `Workers(1)` over in this process, the first of a run left out
    start         from `fit` to the first batch, two workers, Ray running and data prepared
    a checkpoint  an epoch with one every few batches over one without, by their number: what a copy in memory takes, and
                  what the thread that writes it takes from the training
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from blocks import DataLoaders  # noqa: E402
from cluster import Workers, dataloaders  # noqa: E402
from cluster.runtime import stop_ray  # noqa: E402
from pipelines.vision import digits  # noqa: E402
from training import Callback, Learner  # noqa: E402

EVERY = 4  # batches a checkpoint


class NotesFirstBatch(Callback):
    """Writes when the first batch of a run began."""

    def __init__(self, note: Path):
        self.note = note

    def before_batch(self, learn: Learner) -> None:
        if not self.note.exists():
            self.note.write_text(str(time.time()))


def epoch_seconds(learn: Learner) -> float:
    """The fastest epoch's training part after the first epoch."""
    return min(values["time/train"] for values in learn.recorder.history[1:])


def start_seconds(new: partial[Learner], dls: DataLoaders) -> float:
    with tempfile.TemporaryDirectory() as folder:
        note = Path(folder, "first")
        learn = new(dls)
        learn.add_callback(NotesFirstBatch(note))
        began = time.time()
        learn.fit(1, on=Workers(2))
        return float(note.read_text()) - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=224, help="side of the pictures in pixels")
    parser.add_argument("--small", type=int, default=32, help="side of the pictures where the start is measured")
    parser.add_argument("--epochs", type=int, default=3, help="of a run, the first of which does not count; at least 2")
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ.setdefault("FASTRAY_CACHE", tempfile.mkdtemp(prefix="fastray-bench-"))

    def prepared(size: int) -> DataLoaders:
        recipe = digits(size=size)
        return dataloaders(recipe.block, recipe.located(), batch_size=64)

    new = partial(_quiet, digits(size=asked.size).learner)
    large, small = prepared(asked.size), prepared(asked.small)
    start_seconds(new, small)  # Ray and the page cache are warm from here on
    starts = [start_seconds(new, small) for _ in range(asked.rounds)]

    here: list[float] = []
    there: list[float] = []
    saving: list[float] = []
    for _ in range(asked.rounds):
        for runner, seconds in ((None, here), (Workers(1), there), (Workers(1, checkpoint_steps=EVERY), saving)):
            learn = new(large)
            learn.fit(asked.epochs, on=runner)
            seconds.append(epoch_seconds(learn))
    checkpoints = (len(large.train) - 1) // EVERY  # type: ignore[arg-type]
    added = min(there) / min(here) - 1
    cost = (min(saving) - min(there)) / checkpoints
    print(f"one worker    an epoch of {min(here):.1f} s here, {min(there):.1f} s on a worker: {added:+.1%} (wanted <= 3 %)")
    print(f"start         {min(starts):.1f} s to the first batch on two workers (wanted <= 10 s)")
    print(f"a checkpoint  {cost:.3f} s of training time, {checkpoints} an epoch (wanted <= 0.3 s)")
    stop_ray()


def _quiet(make: Callable[[DataLoaders], Learner], dls: DataLoaders) -> Learner:
    learn = make(dls)
    learn.remove_callback(learn.progress)  # type: ignore[attr-defined]
    return learn


if __name__ == "__main__":
    main()
