"""Learning classes of photo-like JPEGs end to end, data, training and validation together: ours against fastai's learner.

    .venv/bin/python benchmarks/images_end_to_end.py [--images 1000] [--epochs 3] [--rounds 2]
    ... --images 60 --epochs 2 --rounds 1 --size 32            # only to see that it runs

ResNet-18 from random weights at 128 px, `aug_transforms()`, batch size 32, one cycle, each library's defaults for all else: so
ours in bfloat16 where the processor has it. fastai has an environment of its own (`make bench-env`): each round is a process of
one thread, A, B, A, B, ..., the minimum of each side counts. The first epoch is all from the files on, ours with its preparing.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
BENCH_PYTHON = ROOT / ".venv-bench/bin/python"
BATCH, LR = 32, 3e-3
COLOURS = ((220, 60, 50), (60, 190, 70), (60, 90, 220), (230, 210, 60), (190, 70, 200))


def make_pictures(folder: Path, number: int) -> None:
    """JPEGs of 320x240: slow light, a sensor's noise, grey shapes anywhere; its class is one shape's form and colour."""
    import numpy as np
    from PIL import Image, ImageDraw

    rng = np.random.default_rng(0)
    for i in range(number):
        light = Image.fromarray(rng.integers(40, 215, (4, 5, 3), dtype=np.uint8)).resize((320, 240), Image.Resampling.BICUBIC)
        draw, label = ImageDraw.Draw(light), i % 10
        for shape in range(7):
            x, y, size = rng.integers([0, 0, 50], [220, 140, 100])
            colour = COLOURS[label // 2] if shape == 6 else tuple(int(c) for c in rng.integers(90, 160, 1).repeat(3))
            ellipse = label % 2 if shape == 6 else rng.random() < 0.5
            (draw.ellipse if ellipse else draw.rectangle)([x, y, x + size, y + size], fill=colour)
        noisy = np.asarray(light).astype(np.int16) + rng.normal(0, 8, (240, 320, 1)).astype(np.int16)
        file = folder / f"class{label}" / f"{i:05d}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, quality=90)


def ours(folder: Path, epochs: int, size: int) -> dict[str, Any]:
    """Seconds of each epoch, the first from the files on, and the accuracy in the end."""
    import torch

    from blocks import IMAGENET_STATS, Normalize, aug_transforms
    from pipelines import image_classifier, image_dataloaders
    from training import Callback

    torch.set_num_threads(1)
    torch.manual_seed(0)

    class Clock(Callback):
        order = 100

        def after_epoch(self, learn: Any) -> None:
            ends.append(time.perf_counter())

    ends = [time.perf_counter()]
    tfms = [*aug_transforms(size=size), Normalize.from_stats(*IMAGENET_STATS)]
    dls = image_dataloaders(folder, size=size, batch_tfms=tfms, batch_size=BATCH)
    learn = image_classifier(dls)
    with learn.no_logging():
        learn.fit_one_cycle(epochs, LR, callbacks=Clock())
    return {"ends": ends, "accuracy": learn.recorder.history[-1]["valid/accuracy"]}


def fastai(folder: Path, epochs: int, size: int) -> dict[str, Any]:
    """The same by fastai."""
    import torch
    from fastai.vision.all import (
        Callback,
        ImageDataLoaders,
        Learner,
        Normalize,
        Resize,
        accuracy,
        aug_transforms,
        imagenet_stats,
        set_seed,
    )
    from torchvision.models import resnet18

    torch.set_num_threads(1)
    set_seed(0)

    class Clock(Callback):
        order = 100

        def after_epoch(self) -> None:
            ends.append(time.perf_counter())

    ends = [time.perf_counter()]
    dls = ImageDataLoaders.from_folder(
        folder,
        valid_pct=0.2,
        item_tfms=Resize(size * 5 // 4),
        batch_tfms=[*aug_transforms(size=size), Normalize.from_stats(*imagenet_stats)],
        bs=BATCH,
        num_workers=0,
        device=torch.device("cpu"),
    )
    learn = Learner(dls, resnet18(num_classes=len(dls.vocab)), metrics=accuracy)
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(epochs, LR, cbs=Clock())
    return {"ends": ends, "accuracy": float(learn.recorder.values[-1][-1])}


def round_of(side: str, folder: Path, asked: argparse.Namespace) -> dict[str, Any]:
    python = sys.executable if side == "ours" else str(BENCH_PYTHON)
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"FASTRAY_CACHE": cache, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        environment["PYTHONPATH"] = "" if side == "fastai" else str(ROOT)
        words = ["--side", side, "--folder", str(folder), "--epochs", str(asked.epochs), "--size", str(asked.size)]
        done = subprocess.run([python, __file__, *words], env=environment, check=True, stdout=subprocess.PIPE, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    seconds = [b - a for a, b in zip(found["ends"], found["ends"][1:], strict=False)]
    return {"first": seconds[0], "later": sum(seconds[1:]) / len(seconds[1:]), "accuracy": found["accuracy"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--side", choices=["ours", "fastai"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.side:
        print(json.dumps({"ours": ours, "fastai": fastai}[asked.side](asked.folder, asked.epochs, asked.size)))
        return
    if not BENCH_PYTHON.exists():
        sys.exit(f"{BENCH_PYTHON} is not there: `make bench-env` first")
    if asked.epochs < 2:
        sys.exit("--epochs is at least 2: a first one and a later one")
    found: dict[str, list[dict[str, Any]]] = {"ours": [], "fastai": []}
    with tempfile.TemporaryDirectory() as home:
        make_pictures(Path(home), asked.images)
        for _ in range(asked.rounds):
            for side, rounds in found.items():
                rounds.append(round_of(side, Path(home), asked))
    for what, wanted in (("first", 1.5), ("later", 2.0)):
        mine, theirs = (min(r[what] for r in rounds) for rounds in found.values())
        print(f"{what:<5} epoch: {mine:.1f} s, fastai {theirs:.1f} s: {theirs / mine:.2f} times as fast   wanted >= {wanted}")
    for side, rounds in found.items():
        print(f"accuracy, {side:<6} " + " ".join(f"{r['accuracy']:.3f}" for r in rounds))


if __name__ == "__main__":
    main()
