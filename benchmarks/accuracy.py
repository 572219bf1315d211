"""Whether ResNet-18 learns as well in bfloat16 as in float32: digits and Fashion-MNIST, some seeds of each.

    .venv/bin/python benchmarks/accuracy.py
    ... --seeds 2 --rows 200 --epochs 1                        # only to see that it runs

Fashion-MNIST is that of the Debian package `dataset-fashion-mnist` (or of `--fashion FOLDER`); without it its part is left out.
The two precisions train from the same weights on the same batches, so their difference is taken seed by seed.
"""

import argparse
import contextlib
import gzip
import math
import statistics
import sys
from pathlib import Path

import numpy as np
import torch
import torchvision
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from blocks import DataLoaders  # noqa: E402
from training import CrossEntropyLossFlat, Learner, accuracy, precision_callbacks  # noqa: E402
from training.precision import Precision, bf16_pays  # noqa: E402

CPU = torch.device("cpu")
Rows = tuple[Tensor, Tensor]  # pictures (rows, 1, h, w) of 0..1, classes
FASHION = Path("/usr/share/datasets/fashion-mnist")


def digits() -> tuple[Rows, Rows]:
    """scikit-learn's digits at 32x32 pixels: a fifth of them, chosen at random, for validation."""
    from sklearn.datasets import load_digits

    found = load_digits()
    pictures = torch.from_numpy(found.images).float()[:, None] / 16
    x = torch.nn.functional.interpolate(pictures, size=32, mode="bilinear")
    y = torch.from_numpy(found.target).long()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(42))
    valid = len(x) // 5
    return (x[order[valid:]], y[order[valid:]]), (x[order[:valid]], y[order[:valid]])


def fashion(folder: Path) -> tuple[Rows, Rows]:
    """5,000 of the first 10,000 pictures to train on, and the first 2,000 of the test set; 28x28 pixels."""
    chosen = torch.randperm(10_000, generator=torch.Generator().manual_seed(42))[:5000]
    x, y = _idx(folder, "train")
    test_x, test_y = _idx(folder, "t10k")
    return (x[chosen], y[chosen]), (test_x[:2000], test_y[:2000])


def _idx(folder: Path, part: str) -> Rows:
    (images,) = folder.rglob(f"{part}-images-idx3-ubyte.gz")
    with gzip.open(images) as pixels, gzip.open(images.with_name(f"{part}-labels-idx1-ubyte.gz")) as labels:
        x = np.frombuffer(pixels.read(), np.uint8, offset=16).reshape(-1, 1, 28, 28)
        y = np.frombuffer(labels.read(), np.uint8, offset=8)
    return torch.from_numpy(x.copy()).float() / 255, torch.from_numpy(y.astype(np.int64))


def trained(train: Rows, valid: Rows, epochs: int, precision: Precision, seed: int) -> float:
    """The accuracy of a ResNet-18 after `epochs` from random weights."""
    torch.manual_seed(seed)
    mean, std = train[0].mean(), train[0].std()
    (x, y), (valid_x, valid_y) = [(((x - mean) / std).expand(-1, 3, -1, -1), y) for x, y in (train, valid)]
    dls = DataLoaders(
        DataLoader(TensorDataset(x, y), batch_size=64, shuffle=True, drop_last=True),
        DataLoader(TensorDataset(valid_x, valid_y), batch_size=256),
    )
    model = torchvision.models.resnet18(num_classes=10)
    callbacks = precision_callbacks(precision, CPU)
    learn = Learner(dls, model, CrossEntropyLossFlat(), metrics=accuracy, callbacks=callbacks, device=CPU)
    learn.fit_one_cycle(epochs, 3e-3)
    return learn.recorder.history[-1]["valid/accuracy"]


def compared(name: str, parts: tuple[Rows, Rows], epochs: int, rows: int | None, seeds: int) -> None:
    train, valid = [(x[:rows], y[:rows]) for x, y in parts]
    half: Precision = "auto" if bf16_pays(CPU) else "bf16"  # the accuracy is the same where it is slow
    found: dict[str, list[float]] = {"fp32": [], half: []}
    for seed in range(seeds):
        for precision in found:
            with contextlib.redirect_stdout(None):
                found[precision].append(trained(train, valid, epochs, precision, seed))  # type: ignore[arg-type]
    for precision, values in found.items():
        print(f"{name}, {precision:<5} {statistics.mean(values):.4f}   " + " ".join(f"{v:.4f}" for v in values), flush=True)
    differences = [h - f for h, f in zip(found[half], found["fp32"], strict=True)]
    error = statistics.stdev(differences) / math.sqrt(seeds)
    mean = statistics.mean(differences)
    print(f"{name}, bfloat16 - float32: {mean:+.4f}, standard error {error:.4f}   wanted >= {-2 * error:.4f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, help="of both, instead of 5 and 3")
    parser.add_argument("--rows", type=int, help="at most so many of each part")
    parser.add_argument("--fashion", type=Path, default=FASHION, metavar="FOLDER")
    settings = parser.parse_args()
    compared("digits", digits(), settings.epochs or 5, settings.rows, settings.seeds)
    if not settings.fashion.exists():
        print(f"{settings.fashion} is not there: apt-get install dataset-fashion-mnist")
        return
    compared("Fashion-MNIST", fashion(settings.fashion), settings.epochs or 3, settings.rows, settings.seeds)


if __name__ == "__main__":
    main()
