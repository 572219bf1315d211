"""What a step of each optimizer costs on ResNet-50's parameters, beside fastai's and torch's.

    .venv-bench/bin/python benchmarks/optimizer.py             # beside fastai (`make bench-env`)
    .venv/bin/python benchmarks/optimizer.py                   # without it, beside torch's alone
    ... --size 2 --rounds 2                                    # only to see that it runs

Synthetic gradients are copied into place, as a backward pass leaves new ones; what is measured is `step` and `zero_grad`. One
process, one thread, rounds A, B, C, A, B, C, ...; CPU time, the minimum of the rounds. Compiled steps are measured beside eager
ones, with the time that compiling took.
"""

import argparse
import copy
import importlib.util
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))

from training import optimizer as ours
from training.composed import COMPILED, EAGER, FUSED, Optimizer

PEER = importlib.util.find_spec("fastai") is not None
NAMES = ("SGD", "RMSProp", "Adam", "RAdam", "QHAdam", "Larc", "Lamb", "ranger")
TORCHS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9, fused=True),
    "Adam": lambda p: torch.optim.AdamW(p, lr=1e-3, betas=(0.9, 0.99), eps=1e-5, weight_decay=0.01, fused=True),
}


def shapes(size: int) -> list[torch.Size]:
    """Those of ResNet-50's parameters; of the first `size` only, if given."""
    import torchvision

    found = [p.shape for p in torchvision.models.resnet50().parameters()]
    return found[:size] if size else found


class Contender:
    """One optimizer with parameters of its own."""

    def __init__(self, parameters: list[nn.Parameter], gradients: list[torch.Tensor], make: Callable[[Any], Any]):
        self.parameters, self.gradients = parameters, gradients
        self.optimizer = make(self.parameters)
        self.best = float("inf")

    def round(self, counts: bool) -> None:
        """One step; the fastest is kept."""
        for p, g in zip(self.parameters, self.gradients, strict=True):
            if p.grad is None:
                p.grad = torch.empty_like(p)
            p.grad.copy_(g)
        began = time.process_time()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if counts:
            self.best = min(self.best, time.process_time() - began)


def with_kernel(make: Callable[[Any], Optimizer], kernel: str) -> Callable[[Any], Optimizer]:
    def made(parameters: Any) -> Optimizer:
        optimizer = make(parameters)
        optimizer.kernel = kernel
        return optimizer

    return made


def contenders(name: str) -> dict[str, Callable[[Any], Any]]:
    """Ours in each way that may be chosen for it, torch's, fastai's."""
    make = getattr(ours, name)
    if name == "SGD":
        make = lambda p: ours.SGD(p, mom=0.9)  # noqa: E731
    probe = make([nn.Parameter(torch.zeros(2))])
    found: dict[str, Callable[[Any], Any]] = {}
    if probe._torchs_own():
        found[FUSED] = with_kernel(make, FUSED)
    else:
        found[EAGER] = with_kernel(make, EAGER)
        began = time.perf_counter()
        trouble = probe._cannot_be_compiled()
        print(f"  {name}: " + (f"not compiled, {trouble}" if trouble else f"compiled in {time.perf_counter() - began:.1f} s"))
        if not trouble:
            found[COMPILED] = with_kernel(make, COMPILED)
    if name in TORCHS:
        found["torch"] = TORCHS[name]
    if PEER:
        from fastai import optimizer as peers

        theirs = getattr(peers, name)
        found["fastai"] = (lambda p: theirs(p, lr=1e-3, mom=0.9)) if name == "SGD" else (lambda p: theirs(p, lr=1e-3))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=0, help="only so many of the parameters")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", nargs="*", default=NAMES, choices=NAMES)
    settings = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    start = [torch.randn(shape) for shape in shapes(settings.size)]
    gradients = [torch.randn_like(p) / 100 for p in start]
    print(f"{len(start)} parameters, {sum(p.numel() for p in start):,} numbers; ms a step with zero_grad, CPU, minimum")
    print(f"{'':9}" + "".join(f"{way:>10}" for way in (FUSED, EAGER, COMPILED, "torch", "fastai")) + "  ratios")
    for name in settings.only:
        entered = {
            way: Contender([nn.Parameter(p) for p in copy.deepcopy(start)], gradients, make)
            for way, make in contenders(name).items()
        }
        for number in range(8 + settings.rounds):  # the first ones make the states, and RAdam does not adapt yet
            for contender in entered.values():
                contender.round(counts=number >= 8)
        best = {way: contender.best * 1e3 for way, contender in entered.items()}
        cells = "".join(
            f"{best[way]:10.1f}" if way in best else f"{'':10}" for way in (FUSED, EAGER, COMPILED, "torch", "fastai")
        )
        ratios = [
            f"{way} {best[way] / best[peer]:.2f}x {peer}"
            for way in (FUSED, EAGER, COMPILED)
            for peer in ("torch", "fastai")
            if way in best and peer in best
        ]
        print(f"{name:9}{cells}  {', '.join(ratios)}", flush=True)


if __name__ == "__main__":
    main()
