"""What `cache_features=True` saves: 16 trials of a head on EfficientNet-Lite0, 192 texture patches, with and without.

    .venv/bin/python benchmarks/features.py                    # two sweeps, each the whole command: about 5 minutes
    .venv/bin/python benchmarks/features.py --here             # the trials one after the other in this process, without Ray
    ... --trials 2 --epochs 2                                  # only to see that it runs

Wall time, everything included that a person waits for: with `fastray sweep` starting Ray, preparing the data, computing the
features; with `--here` the data, the features and each trial's Learner. Each begins with an empty cache. Both must end with the
same losses, of which the largest difference is printed.
"""

import argparse
import contextlib
import io
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from pipelines import textures  # noqa: E402
from training import Phase  # noqa: E402


def in_a_sweep(cached: bool, trials: int, epochs: int) -> float:
    """Seconds of the command `fastray sweep textures`."""
    phase = f"(Phase({epochs}, freeze_to=-1, cache_features={cached}),)"
    words = [f"schedule={phase}", "lr=loguniform(1e-3,1e-2)", f"trials={trials}", "scheduler=none"]
    with tempfile.TemporaryDirectory() as folder:
        places = {"FASTRAY_CACHE": f"{folder}/cache", "PYTHONPATH": str(ROOT)}
        began = time.perf_counter()
        command = [sys.executable, "-m", "pipelines", "sweep", "textures", *words]
        done = subprocess.run(command, cwd=folder, env=os.environ | places, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stdout + done.stderr)
        return time.perf_counter() - began


def here(cached: bool, trials: int, epochs: int) -> tuple[float, list[float]]:
    """Seconds of the trials in this process, and the validation losses they end with."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["FASTRAY_CACHE"] = folder
        losses = []
        began = time.perf_counter()
        for number in range(trials):
            schedule = (Phase(epochs, freeze_to=-1, cache_features=cached),)
            recipe = textures(lr=1e-3 * 10 ** (number / trials), schedule=schedule)
            with contextlib.redirect_stdout(io.StringIO()):
                dls = recipe.block.dataloaders(recipe.located(), **recipe.data_settings)
                torch.manual_seed(recipe.seed)
                learn = recipe.learner(dls)
                learn.fit(recipe.schedule, recipe.lr)
            losses.append(learn.recorder.history[-1]["valid/loss"])
        return time.perf_counter() - began, losses


def main() -> None:
    """Print the seconds of both, and their ratio."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--trials", type=int, default=16)
    asked.add_argument("--epochs", type=int, default=20)
    asked.add_argument("--here", action="store_true")
    words = asked.parse_args()
    size = (words.trials, words.epochs)
    print(f"{words.trials} trials of {words.epochs} epochs of the head alone, 192 patches, EfficientNet-Lite0", flush=True)
    if words.here:
        here(True, 1, 1)  # imports, and what libraries do once
        (without, plain), (with_them, cached) = here(False, *size), here(True, *size)
        print(f"largest difference of the last validation losses: {max(map(abs, map(float.__sub__, plain, cached))):.2g}")
    else:
        without, with_them = in_a_sweep(False, *size), in_a_sweep(True, *size)
    print(f"without  {without:7.1f} s\nwith     {with_them:7.1f} s\nratio    {without / with_them:7.1f}  (wanted: >= 10)")


if __name__ == "__main__":
    main()
