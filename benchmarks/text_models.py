"""Language models and classifiers of texts: what a step costs beyond the same model in a bare loop, and what they learn.

    .venv/bin/python benchmarks/text_models.py                 # all three parts
    .venv/bin/python benchmarks/text_models.py step            # one of them: step, bible, reviews
    ... --steps 5 --rounds 1 --seeds 1 --epochs 1              # only to see that it runs

step: CPU of a training step of the small AWD-LSTM (128/256/2) on streams of random tokens, with all dropouts and penalties;
rounds A, B, A, B, ..., the minimum of each, one thread.
bible: perplexity on 300 texts of 30 verses (Debian: `apt-get install bible-kjv bible-kjv-text`, or `--verses FILE`, a verse a
line as `bible -f` writes them), a fifth of them for validation, 2 epochs, as it was measured with fastai (41.6).
reviews: accuracy on the last 1,000 of 5,000 reviews (fastray[examples]) from random weights, and after a language model has
read the other 4,000; tf-idf and logistic regression have .806.
"""

import argparse
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from blocks import DataBlock, DataLoaders, RandomSplitter, TextBlock  # noqa: E402
from pipelines.text_learners import language_model_learner  # noqa: E402
from training import (  # noqa: E402
    CrossEntropyLossFlat,
    Learner,
    ModelResetter,
    RNNRegularizer,
    awd_lstm_lm,
    awd_lstm_lm_split,
)

SMALL = {"emb_sz": 128, "n_hid": 256, "n_layers": 2}
N_VOCAB = 3000
Batches = list[tuple[Tensor, Tensor]]
Run = Callable[[], None]


def bare(batches: Batches) -> Run:
    """The same model, loss and penalties as written out by hand, with torch's fused AdamW."""

    def run() -> None:
        model = awd_lstm_lm(n_vocab=N_VOCAB, **SMALL).train()
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        for x, y in batches:
            pred, raw, dropped = model(x)
            loss = torch.nn.functional.cross_entropy(pred.flatten(0, 1), y.flatten())
            loss = loss + 2 * dropped.square().mean() + (raw[:, 1:] - raw[:, :-1]).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    return run


def ours(batches: Batches) -> Run:
    """The Learner of it."""

    def run() -> None:
        learn = Learner(
            DataLoaders(batches),
            awd_lstm_lm(n_vocab=N_VOCAB, **SMALL),
            CrossEntropyLossFlat(),
            splitter=awd_lstm_lm_split,
            callbacks=[RNNRegularizer(2.0, 1.0), ModelResetter()],
        )
        with learn.no_logging():
            learn.fit_one_cycle(1)

    return run


def step(steps: int, rounds: int) -> None:
    """Print what a step costs, as a ratio."""
    text = torch.randint(2, N_VOCAB, (32, 72 * steps + 1))
    batches = list(zip(text[:, :-1].split(72, dim=1), text[:, 1:].split(72, dim=1), strict=True))
    runs = {"bare": bare(batches), "ours": ours(batches)}
    best = dict.fromkeys(runs, float("inf"))
    for number in range(rounds + 1):  # the first only warms up
        for name, run in runs.items():
            torch.manual_seed(0)
            began = time.process_time()
            run()
            if number:
                best[name] = min(best[name], time.process_time() - began)
    tokens = 32 * 72 * steps
    print(
        f"step: ours {best['ours'] / tokens * 1e6:.1f} us/token, bare {best['bare'] / tokens * 1e6:.1f}, "
        f"ratio {best['ours'] / best['bare']:.3f}   wanted <= 1.05",
        flush=True,
    )


def bible(verses: Path | None, epochs: int, seeds: int) -> None:
    """Print the perplexity of the small AWD-LSTM on the Bible's first 9,000 verses, at fastai's dropout and at less."""
    if verses is not None:
        said = verses.read_text(encoding="utf-8")
    elif shutil.which("bible"):
        said = subprocess.run(["bible", "-f", "gen1:1-rev22:21"], capture_output=True, text=True, check=True).stdout
    else:
        print("bible: apt-get install bible-kjv bible-kjv-text")
        return
    lines = [line.partition(" ")[2] for line in said.split("\n") if line.strip()]
    texts = [" ".join(lines[i : i + 30]) for i in range(0, 9000, 30)]
    # As fastai was measured, then with the dropout and rate that so short a training wants.
    for drop_mult, lr in ((1.0, 1e-2), (0.1, 2e-2)):
        for seed in range(seeds):
            block = DataBlock((TextBlock(is_lm=True),), splitter=RandomSplitter(0.2, seed=seed))
            dls = block.dataloaders(texts, batch_size=32)
            torch.manual_seed(seed)
            learn = language_model_learner(dls, config=SMALL, drop_mult=drop_mult)
            began = time.process_time()
            with learn.no_logging():
                learn.fit_one_cycle(epochs, lr)
            values = learn.recorder.history[-1]
            print(
                f"bible: drop_mult {drop_mult}, lr {lr}, seed {seed}: perplexity {values['valid/perplexity']:.1f}, "
                f"accuracy {values['valid/accuracy']:.3f}, {time.process_time() - began:.0f} s   wanted <= 41.6",
                flush=True,
            )


def reviews(epochs: int | None, seeds: int) -> None:
    """Print the accuracy of the recipes `reviews` and `ulmfit`."""
    from pipelines.text import reviews as from_scratch
    from pipelines.text import ulmfit

    for seed in range(seeds):
        changes: dict[str, Any] = {} if epochs is None else {"lm_epochs": epochs}
        for recipe in (from_scratch(seed=seed), ulmfit(seed=seed, **changes)):
            began = time.process_time()
            dls = recipe.data()[0].dataloaders(recipe.located(), **recipe.data_settings)
            torch.manual_seed(seed)
            learn = recipe.learner(dls)
            with learn.no_logging():
                learn.fit(recipe.schedule, recipe.lr)
            accuracy = learn.recorder.history[-1]["valid/accuracy"]
            print(f"{recipe.name}: seed {seed}: accuracy {accuracy:.4f}, {time.process_time() - began:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=("step", "bible", "reviews"))
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=None)
    parser.add_argument("--verses", type=Path, default=None)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.part in (None, "step"):
        step(given.steps, given.rounds)
    if given.part in (None, "bible"):
        bible(given.verses, given.epochs or 2, given.seeds)
    if given.part in (None, "reviews"):
        reviews(given.epochs, given.seeds)


if __name__ == "__main__":
    main()
