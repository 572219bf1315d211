"""What predicting one decoded picture costs beyond the model's forward pass on a batch that is ready.

    .venv-bench/bin/python benchmarks/predict.py     # beside fastai (`make bench-env`)
    .venv/bin/python benchmarks/predict.py           # without the peer
    ... --rounds 3                                   # only to see that it runs

One process, one thread, rounds A, B, A, B, ...; the minimum of each, since what the framework adds is the same each time. The
picture is a PIL image of the model's size, the model ResNet-18: the wanted share is an absolute time, so a small size will do.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from blocks import IMAGENET_STATS, CategoryBlock, DataBlock, ImageBlock, Normalize, Resize, get_image_files, parent_label  # noqa: E402
from training import Learner, load_predictor, torchvision_classifier  # noqa: E402


def pictures(folder: Path, size: int) -> Path:
    """16 pictures of two classes."""
    generator = np.random.default_rng(0)
    for i in range(16):
        file = folder / "ab"[i % 2] / f"{i}.png"
        file.parent.mkdir(exist_ok=True, parents=True)
        Image.fromarray(generator.integers(0, 255, (size, size, 3), dtype=np.uint8)).save(file)
    return folder


def ours(folder: Path, size: int, image: Image.Image) -> tuple[Callable[[], Any], torch.nn.Module]:
    """Predict by an export that was loaded, and its model."""
    block = DataBlock(
        blocks=(ImageBlock(), CategoryBlock()),
        get_items=get_image_files,
        get_y=parent_label,
        item_tfms=Resize(size),
        batch_tfms=Normalize.from_stats(*IMAGENET_STATS),
    )
    learn = Learner(block.dataloaders(folder / "data", batch_size=4), torchvision_classifier(arch="resnet18", n_out=2))
    predictor = load_predictor(learn.export(folder / "export"))
    return lambda: predictor.predict([image]), predictor.model


def fastais(folder: Path, size: int, image: Image.Image) -> Callable[[], Any] | None:
    """`learn.predict` of fastai, without its progress bar; None where it is not installed."""
    try:
        from fastai.vision.all import ImageDataLoaders, PILImage, resnet18, vision_learner
        from fastai.vision.all import Resize as FastaiResize
    except ImportError:
        return None
    dls = ImageDataLoaders.from_folder(
        folder / "data", valid_pct=0.5, seed=0, item_tfms=FastaiResize(size), bs=4, num_workers=0
    )
    learn = vision_learner(dls, resnet18, pretrained=False)
    picture = PILImage.create(np.asarray(image))

    def predict() -> Any:
        with learn.no_bar():
            return learn.predict(picture)

    return predict


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--size", type=int, default=64)
    settings = parser.parse_args()
    torch.set_num_threads(1)
    image = Image.fromarray(np.random.default_rng(1).integers(0, 255, (settings.size, settings.size, 3), dtype=np.uint8))
    with tempfile.TemporaryDirectory() as name:
        pictures(Path(name, "data"), settings.size)
        predict, model = ours(Path(name), settings.size, image)
        x = torch.rand(1, 3, settings.size, settings.size)

        def forward() -> Any:
            with torch.no_grad():
                return model(x)

        runs: dict[str, Callable[[], Any]] = {"forward": forward, "ours": predict}
        peer = fastais(Path(name), settings.size, image)
        if peer is not None:
            runs["fastai"] = peer
        best = dict.fromkeys(runs, float("inf"))
        for _ in range(settings.rounds):
            for what, run in runs.items():
                start = time.perf_counter()
                run()
                best[what] = min(best[what], time.perf_counter() - start)
    print(f"forward pass {best['forward'] * 1e3:.2f} ms; wanted: at most 1 ms beyond it")
    for what in [w for w in runs if w != "forward"]:
        print(f"{what}: {best[what] * 1e3:.2f} ms, {(best[what] - best['forward']) * 1e3:.2f} ms beyond it")


if __name__ == "__main__":
    main()
