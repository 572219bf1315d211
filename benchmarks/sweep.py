"""Wall seconds of a sweep of 8 configurations of digits, start-up included: ours on Ray Tune against fastai in a plain loop.

    .venv/bin/python benchmarks/sweep.py [--repeats 5] [--epochs 5] [--size 32]

4 rates x 2 schedules (one cycle; the head first, then all layers), ResNet-18 from random weights, on whatever processors there
are. Each side is a process of its own, from its start to its end: fastai in its environment (`make bench-env`), one
configuration after the other with the same epochs; ours without early stopping, and with ASHA. Rounds A, B, C, A, B, C, ...
with another seed each; data is prepared within the first round of ours and found by the others, as a person's second sweep
does. The best accuracy of each side over the rounds must not differ by more than 2 standard errors to our disadvantage.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RATES = (3e-4, 1e-3, 3e-3, 1e-2)
BENCH_PYTHON = Path(__file__).parent.parent / ".venv-bench/bin/python"
HOME = Path(__file__).parent.parent


def ours(folder: Path, epochs: int, size: int, seed: int, scheduler: str) -> list[float]:
    """The accuracies that our sweep ends with; the pictures are those of the recipe."""
    from cluster import grid, sweep
    from cluster.runtime import stop_ray
    from pipelines import digits
    from training import fine_tune, one_cycle

    space = {"lr": grid(*RATES), "schedule": grid(one_cycle(epochs), fine_tune(epochs - 1, freeze_epochs=1))}
    found = sweep(digits, space | {"size": size, "seed": seed}, search="grid", scheduler=scheduler)
    stop_ray()
    return [trial.score for trial in found.trials]


def fastai(folder: Path, epochs: int, size: int, seed: int, scheduler: str) -> list[float]:
    """The accuracies of the same configurations, one after the other."""
    from fastai.vision.all import (
        CategoryBlock,
        DataBlock,
        ImageBlock,
        Learner,
        Normalize,
        RandomSplitter,
        Resize,
        accuracy,
        get_image_files,
        imagenet_stats,
        parent_label,
        set_seed,
    )
    from torchvision.models import resnet18

    def body_and_head(model):
        head = list(model.fc.parameters())
        return [[p for n, p in model.named_parameters() if not n.startswith("fc.")], head]

    block = DataBlock(
        blocks=(ImageBlock, CategoryBlock),
        get_items=get_image_files,
        get_y=parent_label,
        splitter=RandomSplitter(0.2, seed=42),
        item_tfms=Resize(size),
        batch_tfms=Normalize.from_stats(*imagenet_stats),
    )
    dls = block.dataloaders(folder, bs=64)
    scores = []
    for rate in RATES:
        for schedule in ("one_cycle", "fine_tune"):
            set_seed(seed)
            learn = Learner(dls, resnet18(num_classes=10), metrics=accuracy, splitter=body_and_head)
            with learn.no_bar(), learn.no_logging():
                if schedule == "one_cycle":
                    learn.fit_one_cycle(epochs, rate)
                else:
                    learn.fine_tune(epochs - 1, rate, freeze_epochs=1)
            scores.append(float(learn.validate()[1]))
    return scores


SIDES = {"fastai": fastai, "none": ours, "asha": ours}


def one_run(side: str, folder: Path, home: str, epochs: int, size: int, seed: int) -> tuple[float, float]:
    """Seconds of one side's process, and the best accuracy of its configurations."""
    python = str(BENCH_PYTHON) if side == "fastai" else sys.executable
    places = {
        "FASTRAY_CACHE": f"{home}/cache",
        "FASTRAY_STORAGE": f"{home}/runs",
        "MLFLOW_TRACKING_URI": f"sqlite:///{home}/m.db",
    }
    began = time.perf_counter()
    done = subprocess.run(
        [python, __file__, "--side", side, "--folder", str(folder), f"--epochs={epochs}", f"--size={size}", f"--seed={seed}"],
        env={**os.environ, "PYTHONPATH": "" if side == "fastai" else str(HOME), **places},
        capture_output=True,
        text=True,
    )
    seconds = time.perf_counter() - began
    if done.returncode:
        raise SystemExit(f"{side}: {done.stdout}\n{done.stderr}")
    return seconds, max(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--side", choices=list(SIDES))
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    if given.side:
        print(json.dumps(SIDES[given.side](given.folder, given.epochs, given.size, given.seed, given.side)))
        return
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    best: dict[str, list[float]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as home:
        os.environ["FASTRAY_CACHE"] = f"{home}/cache"
        from pipelines import digits_folder

        folder = digits_folder()
        for seed in range(given.repeats):
            for side in SIDES:
                took, score = one_run(side, folder, home, given.epochs, given.size, seed)
                seconds[side].append(took)
                best[side].append(score)
                print(f"{side:7} seed {seed}  {took:7.1f} s  best accuracy {score:.4f}", flush=True)
    peer = min(seconds["fastai"])
    for side, wanted in (("none", 2.0), ("asha", 4.0)):
        gap = statistics.mean(best[side]) - statistics.mean(best["fastai"])
        errors = [
            statistics.stdev(best[s]) / math.sqrt(given.repeats) if given.repeats > 1 else math.nan for s in (side, "fastai")
        ]
        print(
            f"scheduler {side}: {peer / min(seconds[side]):.2f} times as fast as fastai (wanted {wanted:g}); best accuracy "
            f"{gap:+.4f}, two standard errors of the difference {2 * math.hypot(*errors):.4f}"
        )


if __name__ == "__main__":
    main()
