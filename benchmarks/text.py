"""Texts as token ids: the cost of a token beside fastai's with spaCy, vocabularies on any number of workers, a million reviews.

    .venv-bench/bin/python benchmarks/text.py              # beside fastai (`make bench-env`); needs fastray[examples]
    ... --many 20000 --rounds 1                            # only to see that it runs

Tokenising and looking up the 4,000 reviews of fine foods: one process, one thread, rounds A, B, A, B, ..., the CPU a token of
each one's own tokens, the minimum of the rounds. Vocabularies: of the same reviews by Ray Data with 1 and with 3 CPUs.
Many reviews: the 5,000 repeated, each with a number and a changed word, as Parquet, through Ray Data: the driver's own memory
must not grow with the rows.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from prepare_larger_than_memory import PeakMemory

sys.path.insert(0, str(Path(__file__).parent.parent))

from blocks import text_vocab
from blocks.tokens import EncodeWords, TokenCounts
from pipelines import text_block
from pipelines.examples import reviews_table

GROUP = 20_000  # rows of a row group


def ours(texts: list[str]) -> Callable[[], int]:
    """Tokenises and looks up; returns how many tokens that were."""
    column = pa.array(texts)
    counts = TokenCounts()
    counts.observe_column(column, pa.array(range(len(texts))))
    encode = EncodeWords()
    encode.setups(counts, TokenCounts())

    def run() -> int:
        from blocks.words import expanded

        expanded.cache_clear()  # as in a process of its own
        return len(encode.encodes_column(column).values)

    return run


def fastais(texts: list[str]) -> Callable[[], int]:
    from fastai.text.all import Numericalize, TokenizeWithRules, WordTokenizer, defaults

    tokenize = TokenizeWithRules(WordTokenizer(), defaults.text_proc_rules)
    numericalize = Numericalize(min_freq=3)
    numericalize.setup(list(tokenize(texts)))
    return lambda: sum(len(numericalize(tokens)) for tokens in tokenize(texts))


def cost_of_a_token(texts: list[str], rounds: int) -> None:
    work = {"ours": ours(texts)}
    try:
        work["fastai"] = fastais(texts)
    except ImportError as missing:
        print(f"fastai: left out, {missing}: run it by .venv-bench/bin/python", flush=True)
    best = dict.fromkeys(work, float("inf"))
    for _ in range(rounds):
        for name, run in work.items():
            began = time.process_time()
            tokens = run()
            best[name] = min(best[name], (time.process_time() - began) / tokens * 1e6)
    told = ", ".join(f"{name} {us:.2f} us" for name, us in best.items())
    ratio = f", ratio {best['ours'] / best['fastai']:.3f}" if "fastai" in best else ""
    print(f"a token found and looked up: {told}{ratio}; wanted <= 2 us", flush=True)


def many_reviews(file: Path, rows: int) -> None:
    few = pd.read_parquet(reviews_table())
    review, score = few.review.tolist(), few.score.tolist()
    schema = pa.schema({"review": pa.string(), "score": pa.string()})
    with pq.ParquetWriter(file, schema) as writer:
        for first in range(0, rows, GROUP):
            numbers = range(first, min(first + GROUP, rows))
            changed = [f"{review[i % len(review)]} again{i % 997} {i}" for i in numbers]
            writer.write_table(pa.table({"review": changed, "score": [score[i % len(score)] for i in numbers]}, schema))


def on_ray(cpus: int, source: Any, **block: Any) -> Any:
    """The data that Ray Data makes with so many CPUs."""
    import ray

    from cluster import dataloaders
    from cluster.runtime import stop_ray

    own = ray.init("local", num_cpus=cpus, include_dashboard=False, log_to_driver=False)
    try:
        return dataloaders(text_block("review", "score", **block), source, cache="off")
    finally:
        stop_ray()
        own.disconnect()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--many", type=int, default=1_000_000, help="reviews that are prepared through Ray Data")
    parser.add_argument("--cpus", type=int, default=2, help="of Ray, for these")
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    os.environ["PYTHONPATH"] = str(Path(__file__).parent.parent)

    cost_of_a_token(pd.read_parquet(reviews_table()).review.tolist()[:4000], asked.rounds)

    for tokenizer in ("words", "bpe", "unigram"):
        found = [text_vocab(on_ray(cpus, reviews_table(), tokenizer=tokenizer)) for cpus in (1, 3)]
        print(f"{tokenizer}: {len(found[0])} tokens, the same on 1 and 3 workers: {found[0] == found[1]}", flush=True)

    watched = PeakMemory()
    watched.start()
    for rows in (asked.many // 10, asked.many):
        with tempfile.TemporaryDirectory() as folder:
            many_reviews(Path(folder, "reviews.parquet"), rows)
            watched.peak = 0
            began = time.perf_counter()
            dls = on_ray(asked.cpus, Path(folder, "reviews.parquet"))
            seconds = time.perf_counter() - began
            stored = dls.prepared.nbytes / 1e6
        told = f"{seconds:.1f} s, {stored:.0f} MB of token ids, the driver's own memory reached {watched.peak / 1e6:.0f} MB"
        print(f"{rows} reviews by Ray: {told}", flush=True)


if __name__ == "__main__":
    main()
