"""Composed optimizers: equal to torch's where torch has the same one, to the papers' formulas in numpy for the others.

What every optimizer must do is in `training.testing`; here are the numbers, and what is particular to compositions.
"""

import copy
import itertools
import math
import pickle
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from training import composed, optimizer
from training.composed import COMPILED, EAGER, FUSED, Optimizer
from training.optimizer import SGD, Adam, Lamb, Larc, Lookahead, QHAdam, RAdam, RMSProp, ranger
from training.steppers import average_grad, elementwise, sgd_step, when

T = torch.optim
Make = Callable[..., torch.optim.Optimizer]


def net() -> nn.Sequential:
    """Two small layers in double precision, one of them channels_last."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2)).double().to(memory_format=torch.channels_last)


def gradients(model: nn.Module, steps: int) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [[torch.randn(p.shape, generator=generator).to(p) for p in model.parameters()] for _ in range(steps)]


def trained(make: Make, kernel: str | None = None, steps: int = 9, rates: Callable[[int], float] | None = None) -> list[Tensor]:
    """The parameters after some steps; the rate changes as it does under a schedule."""
    model = net()
    opt = make(model.parameters(), lr=0.1)
    if kernel:
        opt.kernel = kernel  # type: ignore[attr-defined]
    for number, grads in enumerate(gradients(model, steps)):
        opt.param_groups[0]["lr"] = 0.1 / (1 + number)
        for p, g in zip(model.parameters(), grads, strict=True):
            p.grad = g.clone()
        opt.step()
    return [p.detach() for p in model.parameters()]


ADAM = {"eps": 1e-3, "sqr_mom": 0.97, "mom": 0.8}
TORCHS = {"eps": 1e-3, "betas": (0.8, 0.97)}

SAME: dict[str, tuple[Make, Make]] = {
    "sgd": (partial(SGD, wd=0.3, decouple_wd=False), partial(T.SGD, weight_decay=0.3)),
    "momentum": (partial(SGD, mom=0.9), partial(T.SGD, momentum=0.9)),
    "nesterov": (partial(SGD, mom=0.9, nesterov=True), partial(T.SGD, momentum=0.9, nesterov=True)),
    "nesterov, l2": (
        partial(SGD, mom=0.9, nesterov=True, wd=0.3, decouple_wd=False),
        partial(T.SGD, momentum=0.9, nesterov=True, weight_decay=0.3),
    ),
    "momentum, l2": (partial(SGD, mom=0.9, wd=0.3, decouple_wd=False), partial(T.SGD, momentum=0.9, weight_decay=0.3)),
    "rmsprop": (partial(RMSProp, eps=1e-3, wd=0.3, decouple_wd=False), partial(T.RMSprop, eps=1e-3, weight_decay=0.3)),
    "adamw": (partial(Adam, wd=0.3, **ADAM), partial(T.AdamW, weight_decay=0.3, **TORCHS)),
    "adam": (partial(Adam, wd=0.3, decouple_wd=False, **ADAM), partial(T.Adam, weight_decay=0.3, **TORCHS)),
    "radam": (partial(RAdam, wd=0.3, **ADAM), partial(T.RAdam, weight_decay=0.3, decoupled_weight_decay=True, **TORCHS)),
    "radam, short memory": (partial(RAdam, eps=1e-3, sqr_mom=0.6), partial(T.RAdam, eps=1e-3, betas=(0.9, 0.6))),
}


@pytest.mark.parametrize("kernel", [None, EAGER])
@pytest.mark.parametrize(("ours", "theirs"), SAME.values(), ids=SAME)
def test_numbers_are_torchs(ours: Make, theirs: Make, kernel: str | None) -> None:
    """In the way that is chosen, and in the eager one, against torch's plain loop."""
    for p, q in zip(trained(ours, kernel), trained(partial(theirs, foreach=False)), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


# --- the others, in numpy ----------------------------------------------------------------------------------------------

Numbers = np.ndarray


def qhadam(p: Numbers, g: Numbers, s: dict[str, Any], lr: float, t: int) -> Numbers:
    m = s["m"] = 0.8 * s.get("m", 0) + 0.2 * g
    v = s["v"] = 0.97 * s.get("v", 0) + 0.03 * g * g
    up = 0.3 * g + 0.7 * m / (1 - 0.8**t)
    return p - lr * up / (np.sqrt(0.1 * g * g + 0.9 * v / (1 - 0.97**t)) + 1e-3)


def larc(p: Numbers, g: Numbers, s: dict[str, Any], lr: float, t: int, clip: bool = True) -> Numbers:
    p = p * (1 - lr * 0.3)
    m = s["m"] = 0.9 * s.get("m", 0) + g
    local = lr * 0.02 * np.linalg.norm(p) / (np.linalg.norm(g) + 0.3 * np.linalg.norm(p) + 1e-8)
    return p - (min(local, lr) if clip else local) * m


def lamb(p: Numbers, g: Numbers, s: dict[str, Any], lr: float, t: int) -> Numbers:
    m = s["m"] = 0.8 * s.get("m", 0) + 0.2 * g
    v = s["v"] = 0.97 * s.get("v", 0) + 0.03 * g * g
    update = m / (1 - 0.8**t) / (np.sqrt(v / (1 - 0.97**t)) + 1e-3)
    rms = [np.sqrt(np.mean(x**2)) for x in (p, update)]
    return p - lr * min(rms[0] / rms[1], 10) * update


def rms_prop(p: Numbers, g: Numbers, s: dict[str, Any], lr: float, t: int) -> Numbers:
    m = s["m"] = 0.8 * s.get("m", 0) + g
    v = s["v"] = 0.99 * s.get("v", 0) + 0.01 * g * g
    return p * (1 - lr * 0.3) - lr * m / (np.sqrt(v) + 1e-3)


def decoupled(p: Numbers, g: Numbers, s: dict[str, Any], lr: float, t: int) -> Numbers:
    m = s["m"] = 0.9 * s.get("m", 0) + g
    return p * (1 - lr * 0.3) - lr * m


def lookahead(p: Numbers, g: Numbers, s: dict[str, Any], lr: float, t: int) -> Numbers:
    slow = s.setdefault("slow", p)
    p = p - lr * g
    if t % 3 == 0:
        s["slow"] = p = slow + 0.25 * (p - slow)
    return p


FORMULAS: list[tuple[Make, Callable[..., Numbers]]] = [
    (partial(QHAdam, nu_2=0.9, **ADAM), qhadam),
    (partial(Larc, wd=0.3), larc),
    (partial(Larc, wd=0.3, trust_coeff=0.02, clip=False), partial(larc, clip=False)),
    (partial(Lamb, **ADAM), lamb),
    (partial(RMSProp, mom=0.8, eps=1e-3, wd=0.3), rms_prop),
    (partial(SGD, mom=0.9, wd=0.3), decoupled),
    (lambda params, lr: Lookahead(SGD(params, lr), k=3, alpha=0.25), lookahead),
]


@pytest.mark.parametrize(("make", "formula"), FORMULAS)
def test_numbers_are_those_of_the_formula(make: Make, formula: Callable[..., Numbers]) -> None:
    model = net()
    expected = [p.detach().numpy().copy() for p in model.parameters()]
    states: list[dict[str, Any]] = [{} for _ in expected]
    for number, grads in enumerate(gradients(model, 9)):
        lr = 0.1 / (1 + number)
        expected = [formula(p, g.numpy(), s, lr, number + 1) for p, g, s in zip(expected, grads, states, strict=True)]
    for p, e in zip(trained(make), expected, strict=True):
        np.testing.assert_allclose(p.numpy(), e, rtol=1e-9, atol=1e-12)


def test_ranger_is_lookahead_around_radam() -> None:
    def by_hand(params: Iterable[Any], lr: float) -> Optimizer:
        return Lookahead(RAdam(params, lr, mom=0.95, wd=0.01, eps=1e-6), k=6, alpha=0.5)

    for p, q in zip(trained(ranger), trained(by_hand), strict=True):
        assert torch.equal(p, q)


# --- ways to carry out ---------------------------------------------------------------------------------------------------


def one_parameter(values: Tensor, make: Make, grads: list[Tensor], kernel: str) -> Tensor:
    p = nn.Parameter(values.clone())
    opt = make([p], lr=0.1)
    opt.kernel = kernel  # type: ignore[attr-defined]
    for g in grads:
        p.grad = g
        opt.step()
    return p.detach()


def test_a_parameter_in_pieces_is_as_one_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    values, grads = torch.randn(1000), [torch.randn(1000) for _ in range(3)]
    whole = one_parameter(values, QHAdam, grads, EAGER)
    monkeypatch.setattr(composed, "PIECE", 64)
    assert torch.equal(one_parameter(values, QHAdam, grads, EAGER), whole)


def test_whole_parameters_are_given_to_functions_that_are_not_elementwise(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def own_step(p: Tensor, grad: Tensor, lr: float) -> None:
        seen.append(p.numel())
        p.sub_(grad * lr)

    monkeypatch.setattr(composed, "PIECE", 64)
    params = [nn.Parameter(torch.randn(n)) for n in (100, 3, 5)]
    for p in params:
        p.grad = torch.ones_like(p)
    Optimizer(params, [own_step], lr=0.1).step()
    assert seen == [100, 3, 5]


def test_a_parameter_that_is_a_slice_of_another_tensor_is_stepped_in_place() -> None:
    storage = torch.randn(6, 4)
    p = nn.Parameter(storage[:, ::2])
    before = storage.clone()
    p.grad = torch.ones(6, 2)
    opt = QHAdam([p], lr=0.1)
    opt.step()
    assert p.untyped_storage().data_ptr() == storage.untyped_storage().data_ptr()
    assert not torch.equal(storage[:, ::2], before[:, ::2])
    assert torch.equal(storage[:, 1::2], before[:, 1::2])


@pytest.mark.parametrize(
    "make",
    [
        ranger,
        partial(RAdam, wd=0.3, decouple_wd=False),
        RMSProp,
        partial(Larc, wd=0.3),
        partial(Larc, clip=False),
        lambda p, lr: Lookahead(SGD(p, lr), 2),
    ],
)
def test_a_fused_composition_does_what_the_eager_one_does(make: Make) -> None:
    assert make([nn.Parameter(torch.zeros(1))], lr=0.1)._torchs_own()  # type: ignore[attr-defined]
    for p, q in zip(trained(make), trained(make, EAGER), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


def test_gradients_are_left_as_they_are() -> None:
    for kernel, make in itertools.product(
        (FUSED, EAGER),
        (partial(Adam, decouple_wd=False), partial(RMSProp, wd=0.5), partial(RMSProp, wd=0.5, decouple_wd=False)),
    ):
        p = nn.Parameter(torch.randn(5))
        p.grad = torch.randn(5)
        before = p.grad.clone()
        opt = make([p])
        opt.kernel = kernel
        opt.step()
        assert torch.equal(p.grad, before)


def test_short_runs_are_not_compiled_and_the_choice_is_made_once() -> None:
    opt = QHAdam(net().parameters())
    assert opt.choose_kernel(1000) == "optimizer not compiled: 1000 steps of 146 numbers are too few to pay for it"
    assert (opt.kernel, opt.choose_kernel(10**12)) == (EAGER, "")
    adam = Adam(net().parameters())
    assert (adam.choose_kernel(10**12), adam.kernel) == ("", FUSED)


def test_without_a_compiler_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    opt = QHAdam(net().parameters())
    assert opt.choose_kernel(10**12) == "optimizer not compiled, since there is no C++ compiler (CXX or g++)"
    state = {**opt.state_dict(), "kernel": COMPILED}
    with pytest.warns(UserWarning, match="the optimizer was compiled and is not here"):
        opt.load_state_dict(state)
    assert opt.kernel == EAGER


def compiles_like_eager(make: Make) -> None:
    opt = make([nn.Parameter(torch.randn(300)), nn.Parameter(torch.randn(1))])
    said = opt.choose_kernel(10**12)  # type: ignore[attr-defined]
    assert said.startswith("optimizer compiled in "), said
    values, grads = torch.randn(1000), [torch.randn(1000) for _ in range(13)]
    for size in (1, 1000):
        compiled, eager = (one_parameter(values[:size], make, [g[:size] for g in grads], k) for k in (COMPILED, EAGER))
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-6)


@pytest.fixture
def traced_only(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch.compile without the compiler of C++, which takes long: what it traced is run as it is."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    composed._compiled.cache_clear()
    yield
    composed._compiled.cache_clear()


@pytest.mark.usefixtures("traced_only")
def test_a_traced_optimizer_does_what_the_eager_one_does() -> None:
    """QHAdam within Lookahead: whatever tracing could trip over."""
    compiles_like_eager(lambda params, lr=0.1: Lookahead(QHAdam(params, lr)))


@pytest.mark.slow
@pytest.mark.parametrize("make", [QHAdam, partial(RMSProp, mom=0.9), partial(QHAdam, wd=0.1, decouple_wd=False)])
def test_compositions_compile(make: Make) -> None:
    compiles_like_eager(make)


@pytest.mark.usefixtures("traced_only")
def test_what_would_compile_again_at_each_rate_is_not_compiled() -> None:
    @elementwise
    def careless_step(p: Tensor, grad: Tensor, lr: float) -> None:
        p.add_(grad, alpha=-lr)

    opt = Optimizer([nn.Parameter(torch.randn(9))], [careless_step], lr=0.1)
    assert "since that fails: RecompileError" in opt.choose_kernel(10**12)
    assert opt.kernel == EAGER


# --- one's own ---------------------------------------------------------------------------------------------------------


def test_an_optimizer_of_ones_own() -> None:
    """A stat that returns its new value, a number, a condition, and a stepper that returns the parameter."""

    @elementwise
    def largest(largest: Tensor, grad: Tensor) -> Tensor:
        return torch.maximum(largest, grad.abs())

    def count(count: float) -> float:
        return count + 1

    @elementwise
    @when(lambda count, every: count % every == 0)
    def sign_step(p: Tensor, largest: Tensor, lr: float = 0.5) -> Tensor:
        return p - lr * largest

    p = nn.Parameter(torch.zeros(2))
    opt = Optimizer([p], [largest, count, sign_step], every=2)
    for g in ([1.0, -2.0], [-3.0, 0.0], [9.0, 9.0]):
        p.grad = torch.tensor(g)
        opt.step()
    assert p.tolist() == [-1.5, -1.0]
    assert opt.defaults == {"lr": 0.5, "every": 2}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: Optimizer(p, [sgd_step]), "'lr' is needed, but no stat of the composition keeps it and no setting gives it"),
        (
            lambda p: Optimizer(p, [optimizer.momentum_step], lr=1.0),
            "'grad_avg' is needed.*add a stat whose first argument it is",
        ),
        (lambda p: Optimizer(p, [sgd_step], lr=1.0, momentum=0.9), "no function of the composition uses momentum; they use lr"),
    ],
)
def test_a_composition_that_does_not_fit_is_said(make: Callable[[Any], Optimizer], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        make([nn.Parameter(torch.zeros(2))])


def test_sparse_gradients_and_whole_numbers_are_refused() -> None:
    table = nn.Embedding(3, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="needs dense gradients"):
        Adam(table.parameters()).step()
    with pytest.raises(ValueError, match=r"not on parameters of type torch\.complex64"):
        Adam([nn.Parameter(torch.zeros(2, dtype=torch.complex64))])


def test_copies_and_pickles_go_on_alike() -> None:
    p = nn.Parameter(torch.randn(4))
    p.grad = torch.randn(4)
    opt = Lookahead(QHAdam([p], lr=0.1))
    opt.step()
    opt = copy.deepcopy(opt)
    other = pickle.loads(pickle.dumps(opt))  # noqa: S301  our own bytes
    for o in (opt, other):
        (q,) = o.param_groups[0]["params"]
        q.grad = torch.ones(4)
        o.step()
    assert torch.equal(opt.param_groups[0]["params"][0], other.param_groups[0]["params"][0])
    assert other.kernel == EAGER


def test_dampening_may_differ_from_group_to_group() -> None:
    """Then no kernel of torch's does it."""
    params = [nn.Parameter(torch.ones(1)) for _ in range(2)]
    opt = Optimizer(
        [{"params": [params[0]], "dampening": True}, {"params": [params[1]]}],
        [optimizer.weight_decay, average_grad, optimizer.momentum_step],
        lr=1.0,
        mom=0.75,
        wd=0.0,
    )
    for p in params:
        p.grad = torch.ones(1)
    opt.step()
    assert opt.kernel == EAGER
    assert [p.item() for p in params] == [0.75, 0.0]
    assert math.isclose(opt.state[params[0]]["grad_avg"].item(), 0.25)
