"""How fast ResNet-18 trains at 128 px with `precision="auto"`, and what the Learner costs beyond a bare loop.

    .venv-bench/bin/python benchmarks/precision.py             # beside fastai (`make bench-env`)
    .venv/bin/python benchmarks/precision.py                   # without the peer
    ... --steps 1 --rounds 1 --size 32                         # only to see that it runs

One process, one thread, rounds A, B, C, A, B, C, ...; CPU time of the training alone, the minimum of the rounds. Every loop is
given the same batches of floats, ready in memory: it is the training that is compared.
"""

import argparse
import contextlib
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from blocks import DataLoaders  # noqa: E402
from training import CrossEntropyLossFlat, Learner, precision_callbacks  # noqa: E402
from training.precision import Precision  # noqa: E402

Batches = list[tuple[Tensor, Tensor]]
Prepare = Callable[[], Callable[[], None]]  # makes the model, gives what is timed


def resnet18() -> nn.Module:
    torch.manual_seed(0)
    return torchvision.models.resnet18(num_classes=10)


def bare(data: Batches, half: bool) -> Prepare:
    """The loop written out: fused AdamW, and with `half` bfloat16 and channels last."""

    def prepare() -> Callable[[], None]:
        model, loss_func = resnet18().train(), nn.CrossEntropyLoss()
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)

        def run() -> None:
            if half:
                model.to(memory_format=torch.channels_last)
            for x, y in data:
                with torch.autocast("cpu", torch.bfloat16) if half else contextlib.nullcontext():
                    pred = model(x.contiguous(memory_format=torch.channels_last) if half else x)
                loss_func(pred.float(), y).backward()
                optimizer.step()
                optimizer.zero_grad()

        return run

    return prepare


def ours(data: Batches, precision: Precision) -> Prepare:
    def prepare() -> Callable[[], None]:
        callbacks = precision_callbacks(precision, torch.device("cpu"))
        learn = Learner(DataLoaders(data), resnet18(), CrossEntropyLossFlat(), callbacks=callbacks)
        learn.remove_cbs([c for c in learn.callbacks if c.name == "Progress"])
        return lambda: learn.fit(1)

    return prepare


def fastais(data: Batches) -> Prepare | None:
    """fastai's Learner with its defaults, without the progress bar; None where it is not installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from fastai.callback.progress import ProgressCallback
            from fastai.data.core import DataLoaders as FastaiDataLoaders
            from fastai.data.load import DataLoader as FastaiDataLoader
            from fastai.learner import Learner as FastaiLearner
    except ImportError:
        return None

    def prepare() -> Callable[[], None]:
        loaders = FastaiDataLoaders(FastaiDataLoader(data, bs=None), FastaiDataLoader([], bs=None))
        learn = FastaiLearner(loaders, resnet18(), nn.CrossEntropyLoss())
        learn.remove_cb(ProgressCallback)

        def run() -> None:
            with learn.no_logging():
                learn.fit(1)

        return run

    return prepare


def fastest(prepared: dict[str, Prepare], rounds: int) -> dict[str, float]:
    """The least CPU seconds of each, in interleaved rounds; the first round only warms up."""
    best = dict.fromkeys(prepared, float("inf"))
    for number in range(rounds + 1):
        for name, prepare in prepared.items():
            run = prepare()
            began = time.process_time()
            run()
            if number:
                best[name] = min(best[name], time.process_time() - began)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--size", type=int, default=128, help="pixels a side")
    parser.add_argument("--batch-size", type=int, default=32)
    settings = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows, size = settings.batch_size, settings.size
    data = [(torch.rand(rows, 3, size, size), torch.randint(10, (rows,))) for _ in range(settings.steps)]
    auto = bool(precision_callbacks("auto", torch.device("cpu")))  # says so
    runs = {
        "bare loop, float32": bare(data, half=False),
        "Learner, float32": ours(data, "fp32"),
        "bare loop, auto": bare(data, half=auto),
        "Learner, auto": ours(data, "auto"),
    }
    peer = fastais(data)
    if peer is not None:
        runs["fastai, its defaults"] = peer
    with contextlib.redirect_stdout(None):  # each Learner says its precision again
        found = fastest(runs, settings.rounds)
    print(f"torch {torch.__version__}, ResNet-18, {size} px, batch {rows}, {settings.steps} steps, {settings.rounds} rounds")
    for name, seconds in found.items():
        print(f"{name:<24}{rows * settings.steps / seconds:>8.1f} images/s")
    for precision in ("float32", "auto"):
        speed = found[f"bare loop, {precision}"] / found[f"Learner, {precision}"]
        print(f"speed of the Learner, {precision}, times the bare loop's: {speed:.3f}   wanted >= 0.98")
    if peer is not None:
        print(f"speed of auto, times fastai's: {found['fastai, its defaults'] / found['Learner, auto']:.2f}   wanted >= 2")


if __name__ == "__main__":
    main()
