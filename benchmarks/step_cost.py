"""What a training step costs beyond the same step written out in PyTorch, and what importing `training` costs.

    .venv-bench/bin/python benchmarks/step_cost.py             # beside fastai (`make bench-env`)
    .venv/bin/python benchmarks/step_cost.py                   # without the peer
    ... --steps 30 --rounds 1                                  # only to see that it runs

All in one process, one thread, in rounds A, B, C, A, B, C, ...; CPU time, the minimum of the rounds. Every loop is given the
same batches, ready in memory, so that it is the loop that is compared.
"""

import argparse
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from blocks import DataLoaders  # noqa: E402
from training import Callback, Learner  # noqa: E402

Batches = list[tuple[Tensor, ...]]
Run = Callable[[], None]


class Tabular(nn.Module):
    """The size of fastai's tabular model on Adult: 8 categories, 6 numbers, layers of 200 and 100."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.ModuleList(nn.Embedding(n, min(50, n // 2)) for n in (10, 17, 8, 16, 7, 6, 3, 42))
        wide = sum(e.embedding_dim for e in self.embeddings) + 6
        self.layers = nn.Sequential(
            nn.Linear(wide, 200), nn.ReLU(), nn.BatchNorm1d(200), nn.Linear(200, 100), nn.ReLU(), nn.BatchNorm1d(100),
            nn.Linear(100, 2),
        )  # fmt: skip

    def forward(self, codes: Tensor, numbers: Tensor) -> Tensor:
        found = [embed(codes[:, i]) for i, embed in enumerate(self.embeddings)]
        return self.layers(torch.cat([*found, numbers], 1))


class Ratings(nn.Module):
    """The size of fastai's collaborative filtering on ml-100k: 50 factors and biases."""

    def __init__(self) -> None:
        super().__init__()
        self.users, self.films = nn.Embedding(944, 50), nn.Embedding(1683, 50)
        self.user_bias, self.film_bias = nn.Embedding(944, 1), nn.Embedding(1683, 1)

    def forward(self, pairs: Tensor) -> Tensor:
        user, film = pairs[:, 0], pairs[:, 1]
        score = (self.users(user) * self.films(film)).sum(1) + (self.user_bias(user) + self.film_bias(film)).squeeze(1)
        return torch.sigmoid(score) * 5.5


def linear_data(batch_size: int, steps: int) -> Batches:
    return [(torch.randn(batch_size, 4), torch.randn(batch_size, 1)) for _ in range(steps)]


def tabular_data(batch_size: int, steps: int) -> Batches:
    return [
        (torch.randint(3, (batch_size, 8)), torch.randn(batch_size, 6), torch.randint(2, (batch_size,))) for _ in range(steps)
    ]


def ratings_data(batch_size: int, steps: int) -> Batches:
    return [(torch.randint(900, (batch_size, 2)), torch.rand(batch_size) * 5) for _ in range(steps)]


def bare(make: Callable[[], nn.Module], loss: nn.Module, data: Batches) -> Run:
    def run() -> None:
        model = make().train()
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        for *inputs, target in data:
            loss(model(*inputs), target).backward()
            optimizer.step()
            optimizer.zero_grad()

    return run


def ours(
    make: Callable[[], nn.Module], loss: nn.Module, data: Batches, *, cycle: bool = False, callbacks: Sequence[Callback] = ()
) -> Run:
    def run() -> None:
        learn = Learner(DataLoaders(data, n_inp=len(data[0]) - 1), make(), loss, callbacks=callbacks)
        with learn.no_logging():
            (learn.fit_one_cycle if cycle else learn.fit)(1)

    return run


def fastais(make: Callable[[], nn.Module], loss: nn.Module, data: Batches, *, cycle: bool = False) -> Run | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import fastai.callback.schedule  # noqa: F401  adds fit_one_cycle
            from fastai.callback.progress import ProgressCallback
            from fastai.data.core import DataLoaders as FastaiDataLoaders
            from fastai.data.load import DataLoader as FastaiDataLoader
            from fastai.learner import Learner as FastaiLearner
    except ImportError:
        return None

    def run() -> None:
        loaders = FastaiDataLoaders(FastaiDataLoader(data, bs=None), FastaiDataLoader([], bs=None))
        learn = FastaiLearner(loaders, make(), loss)
        learn.remove_cb(ProgressCallback)
        with learn.no_logging():
            (learn.fit_one_cycle if cycle else learn.fit)(1)

    return run


def fastest(runs: dict[str, Run | None], rounds: int) -> dict[str, float]:
    """The least CPU seconds of each, in interleaved rounds; the first round only warms up."""
    best = {name: float("inf") for name, run in runs.items() if run is not None}
    for number in range(rounds + 1):
        for name in best:
            run = runs[name]
            assert run is not None
            torch.manual_seed(0)
            began = time.process_time()
            run()
            if number:
                best[name] = min(best[name], time.process_time() - began)
    return best


class Idle(Callback):
    """Listens to nothing."""


def imported(statement: str, rounds: int) -> float:
    """The least CPU seconds of a fresh process that runs `statement`."""
    code = f"import time; began = time.process_time(); {statement}; print(time.process_time() - began)"
    command = [sys.executable, "-c", code]
    said = [subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout for _ in range(rounds)]
    return min(float(line) for line in said)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    steps, rounds = arguments.steps, arguments.rounds
    torch.set_num_threads(1)

    def line(what: str, ratio: float, wanted: str, peer: float | None = None) -> None:
        print(f"{what:<44}{ratio:>8.2f}   wanted {wanted:<8}" + (f"fastai {peer:.2f}" if peer is not None else ""), flush=True)

    print(f"torch {torch.__version__}, {steps} steps, {rounds} rounds; times the CPU of the bare loop with fused AdamW")
    data, mse = linear_data(8, steps), nn.MSELoss()
    many = 100
    found = fastest(
        {
            "bare": bare(lambda: nn.Linear(4, 1), mse, data),
            "fit": ours(lambda: nn.Linear(4, 1), mse, data),
            "cycle": ours(lambda: nn.Linear(4, 1), mse, data, cycle=True),
            "idle": ours(lambda: nn.Linear(4, 1), mse, data, callbacks=[Idle() for _ in range(many)]),
            "fastai": fastais(lambda: nn.Linear(4, 1), mse, data),
            "fastai cycle": fastais(lambda: nn.Linear(4, 1), mse, data, cycle=True),
        },
        rounds,
    )
    base = found["bare"]
    print(f"bare step {base / steps * 1e6:.0f} us")
    line("Linear(4, 1), batch 8: fit", found["fit"] / base, "<= 1.5", found.get("fastai", 0) / base or None)
    line("    fit_one_cycle", found["cycle"] / base, "<= 1.8", found.get("fastai cycle", 0) / base or None)
    line("    an idle callback, us a step", (found["idle"] - found["fit"]) / many / steps * 1e6, "< 1")
    cases: list[tuple[str, Callable[[], nn.Module], nn.Module, Callable[[int, int], Batches], int]] = [
        ("tabular", Tabular, nn.CrossEntropyLoss(), tabular_data, 20_000),
        ("ratings", Ratings, nn.MSELoss(), ratings_data, 40_000),
    ]
    for name, make, loss, make_data, rows in cases:
        for batch_size in (64, 256, 1024):
            data = make_data(batch_size, min(steps, rows // batch_size))
            runs = {"bare": bare(make, loss, data), "fit": ours(make, loss, data), "fastai": fastais(make, loss, data)}
            found = fastest(runs, rounds)
            base = found["bare"]
            line(f"{name}, batch {batch_size}", found["fit"] / base, "<= 1.3", found.get("fastai", 0) / base or None)
    torch_alone = imported("import torch", rounds)
    line("import training, s", imported("import training", rounds), "<= 0.1")
    line(
        "Learner and Adam beyond import torch, s",
        imported("import torch; from training import Learner, Adam", rounds) - torch_alone,
        "<= 0.2",
    )


if __name__ == "__main__":
    main()
