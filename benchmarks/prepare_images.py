"""CPU to prepare JPEGs 320x240 as samples of 128 px: ours against one epoch of fastai's loader, one process, one thread.

    .venv/bin/python benchmarks/prepare_images.py [--images 4000] [--rounds 3]

fastai has an environment of its own (`make bench-env`), so each round is a process that does a few pictures first, for what is
imported and set up once, and then measures its own work: A, B, A, B, ... The minimum of each side counts. Ours is the whole
preparing (list, fit, decode, resize, write); fastai's is the same items through its DataLoaders once. Then ours trains on: a
second epoch and a second run must decode nothing.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

SIZE, BATCH = 128, 64
BENCH_PYTHON = Path(__file__).parent.parent / ".venv-bench/bin/python"


def make_pictures(folder: Path, number: int) -> None:
    """JPEGs like photos: light that changes slowly, shapes with edges, and the noise of a sensor."""
    import numpy as np
    from PIL import Image, ImageDraw

    rng = np.random.default_rng(0)
    for i in range(number):
        light = Image.fromarray(rng.integers(40, 215, (4, 5, 3), dtype=np.uint8)).resize((320, 240), Image.Resampling.BICUBIC)
        draw = ImageDraw.Draw(light)
        for _ in range(12):
            x, y, w, h = rng.integers(0, [320, 240, 120, 120])
            colour = tuple(int(c) for c in rng.integers(0, 256, 3))
            (draw.ellipse if rng.random() < 0.5 else draw.rectangle)([x, y, x + w, y + h], fill=colour)
        noisy = np.asarray(light).astype(np.int16) + rng.normal(0, 8, (240, 320, 1)).astype(np.int16)
        file = folder / f"class{i % 10}" / f"{i:05d}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, quality=90)


def measured(work: Callable[[], int]) -> dict[str, float]:
    """CPU and wall seconds of `work`, which returns how many pictures it made."""
    cpu, wall = time.process_time(), time.perf_counter()
    images = work()
    return {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall, "images": images}


def ours(folder: Path, few: Path) -> dict[str, float]:
    """Prepare the pictures, feed two epochs, prepare them again; counts the decoded ones after the first time."""
    import torch

    from blocks import CategoryBlock, DataBlock, ImageBlock, PILImage, Resize, get_image_files, parent_label

    torch.set_num_threads(1)
    block = DataBlock((ImageBlock(), CategoryBlock()), get_items=get_image_files, get_y=parent_label, item_tfms=Resize(SIZE))
    block.dataloaders(few, batch_size=2)
    made = []
    found = measured(lambda: made.append(block.dataloaders(folder, batch_size=BATCH)) or made[0].prepared.rows)
    decoded = 0
    create = PILImage.create.__func__

    def counted(cls: type, source: object) -> object:
        nonlocal decoded
        decoded += 1
        return create(cls, source)

    PILImage.create = classmethod(counted)
    for epoch in (0, 1):
        made[0].train.set_epoch(epoch)
        assert sum(len(batch.ids) for batch in made[0].train)
    again = block.dataloaders(folder, batch_size=BATCH)
    assert again.prepared.reused
    return found | {"decoded_again": decoded}


def fastai(folder: Path, few: Path) -> dict[str, float]:
    """One epoch of both of fastai's loaders over the same pictures, in this process."""
    import torch
    from fastai.vision.all import CategoryBlock, DataBlock, ImageBlock, Resize, get_image_files, parent_label

    torch.set_num_threads(1)
    block = DataBlock((ImageBlock, CategoryBlock), get_items=get_image_files, get_y=parent_label, item_tfms=Resize(SIZE))

    def epoch(of: Path) -> int:
        dls = block.dataloaders(of, bs=BATCH, num_workers=0, device=torch.device("cpu"))
        dls.train.drop_last = False
        return sum(len(x) for loader in (dls.train, dls.valid) for x, _ in loader)

    epoch(few)
    return measured(lambda: epoch(folder))


def round_of(side: str, folder: Path, few: Path) -> dict[str, float]:
    python = sys.executable if side == "ours" else str(BENCH_PYTHON)
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"FASTRAY_CACHE": cache, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        environment["PYTHONPATH"] = "" if side == "fastai" else str(Path(__file__).parent.parent)
        command = [python, __file__, "--side", side, "--folder", str(folder), "--few", str(few)]
        done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", choices=["ours", "fastai"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--few", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.side:
        print(json.dumps({"ours": ours, "fastai": fastai}[asked.side](asked.folder, asked.few)))
        return
    if not BENCH_PYTHON.exists():
        sys.exit(f"{BENCH_PYTHON} is not there: `make bench-env` first")
    with tempfile.TemporaryDirectory() as home:
        folder, few = Path(home, "all"), Path(home, "few")
        make_pictures(folder, asked.images)
        make_pictures(few, 40)
        found = {"ours": [], "fastai": []}
        for _ in range(asked.rounds):
            for side, rounds in found.items():
                rounds.append(round_of(side, folder, few))
    best = {
        side: {what: min(r[what] / r["images"] for r in rounds) * 1e3 for what in ("cpu", "wall")}
        for side, rounds in found.items()
    }
    for side, times in best.items():
        print(f"{side:<7} {times['cpu']:.3f} ms CPU, {times['wall']:.3f} ms wall an image")
    cpu, wall = (best["ours"][what] / best["fastai"][what] for what in ("cpu", "wall"))
    print(f"ratio   {cpu:.2f} of the CPU, {wall:.2f} of the wall time (wanted: <= 0.6 of the CPU)")
    print(f"decoded again in a second epoch and a second run: {max(r['decoded_again'] for r in found['ours']):.0f} (wanted: 0)")


if __name__ == "__main__":
    main()
