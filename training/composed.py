"""`Optimizer`: a torch optimizer composed of the small functions of `training.steppers`, and how it carries them out.

One composition, three ways ("kernels"):

    fused      it is one of torch's own optimizers, or one of them with other numbers: torch's fused kernel does all in one call
    compiled   its functions as one loop over each parameter, by torch.compile: the fastest, but compiling takes seconds
    eager      its functions one by one, on pieces that stay in the processor's cache

Compiled is chosen when a compiler is there and the run is long enough to pay for it. The three differ in the last bits, so the
choice is made once, before the first step, and is part of the state: a run that is resumed goes on with the bits it had.
Parameters and gradients keep their own storage, whichever it is; small ones are gathered, worked on together, and put back.
"""

import functools
import inspect
import itertools
import math
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from training import hypers as hyper_parameters
from training.steppers import (
    adam_step,
    average_grad,
    average_sqr_grad,
    debias_grad,
    debias_sqr,
    l2_reg,
    larc_layer_lr,
    larc_step,
    momentum_step,
    nesterov_step,
    radam_adapts,
    radam_rectification,
    radam_step,
    rms_prop_step,
    sgd_step,
    step_stat,
    weight_decay,
)

FUSED, COMPILED, EAGER = "fused", "compiled", "eager"
PIECE = 1 << 17  # numbers: a parameter, its gradient and two states are 2 MB, about the cache of one core
SAVED = 1e-9  # seconds a step that compiling saves for each number: about half of what the eager operations take
COMPILING = 20.0  # seconds that a composition may take to compile on a slow or busy machine


@dataclass(frozen=True)
class _Function:
    """One function of a composition, as its signature and its marks describe it."""

    call: Callable[..., Any]
    changes: str  # its first argument
    wants: tuple[str, ...]  # the arguments it is given
    of_numbers: bool  # it changes a number, not a tensor
    elementwise: bool
    when: Callable[..., bool] | None

    def applies(self, values: dict[str, Any]) -> bool:
        return self.when is None or self.when(**{name: values[name] for name in inspect.signature(self.when).parameters})


class Optimizer(torch.optim.Optimizer):
    """A composition of stats and steppers, called in their order for each parameter that has a gradient.

    params: parameters or groups of them, as for torch. functions: see `training.steppers`. hypers: the settings that they name
    (fastai's names are `lr`, `mom`, `sqr_mom`, `eps`, `wd`); each group may have its own. `kernel`: how it is carried out, None
    until that is chosen. TypeError for an argument of a function that comes from nowhere, and for a setting that none uses.
    """

    kernel: str | None = None

    def __init__(self, params: Iterable[Any], functions: Sequence[Callable[..., Any]], **hypers: Any):
        self.functions = tuple(functions)
        self._read(hypers)
        super().__init__(params, hypers)

    def _read(self, hypers: dict[str, Any]) -> None:
        """Find what the functions need; their arguments' defaults are added to `hypers`."""
        signatures = [inspect.signature(f, eval_str=True).parameters for f in self.functions]
        firsts = [next(iter(s.values())) for s in signatures]
        self._numbers = tuple(dict.fromkeys(a.name for a in firsts if a.annotation is float))
        self._states = tuple(dict.fromkeys(a.name for a in firsts if a.name not in ("p", "grad", *self._numbers)))
        kept = {"p", "grad", *self._states, *self._numbers}
        conditions = [c for c in (getattr(f, "when", None) for f in self.functions) if c]
        arguments = [a for s in (*signatures, *(inspect.signature(c).parameters for c in conditions)) for a in s.values()]
        for a in arguments:
            if a.name not in kept and a.name not in hypers and a.default is not None:
                if a.default is a.empty:
                    raise TypeError(
                        f"{a.name!r} is needed, but no stat of the composition keeps it and no setting gives it: "
                        f"add a stat whose first argument it is, or pass {a.name}=..."
                    )
                hypers[a.name] = a.default
        unused = hypers.keys() - {a.name for a in arguments}
        if unused:
            raise TypeError(f"no function of the composition uses {', '.join(sorted(unused))}; they use {', '.join(hypers)}")
        self._steps = tuple(
            _Function(
                f,
                first.name,
                tuple(name for name in signature if name in kept or name in hypers),
                first.name in self._numbers,
                getattr(f, "elementwise", False),
                getattr(f, "when", None),
            )
            for f, signature, first in zip(self.functions, signatures, firsts, strict=True)
        )

        self._of_numbers = tuple(f for f in self._steps if f.of_numbers)
        self._of_tensors = tuple(f for f in self._steps if not f.of_numbers)
        # What a kernel of torch's might do: all that runs at each step, unless something runs between.
        runs = sum(always for always, _ in itertools.groupby(f.when is None for f in self._of_tensors))
        always = tuple(f.call for f in self._steps if f.when is None and f.call is not step_stat)
        self._at_each_step = always if runs == 1 else ()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, with hyper-parameters of its own if it gives any."""
        if "weight_decay" in param_group:  # torch's name, which `parameter_groups` uses for any optimizer's groups
            decay = param_group["weight_decay"]
            param_group = {k: v for k, v in param_group.items() if k != "weight_decay"}
            if "wd" in self.defaults:
                param_group["wd"] = decay
        super().add_param_group(param_group)
        for p in self.param_groups[-1]["params"]:
            if not p.is_floating_point():
                raise ValueError(f"a composed optimizer works on real numbers, not on parameters of type {p.dtype}")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step every parameter that has a gradient. closure: computes the loss and the gradients anew; its loss is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        fused = self._torchs_own()
        if self.kernel is None:
            self.kernel = FUSED if fused else EAGER
        for group in self.param_groups:
            for params, values in self._alike(group):
                rows = [self._laid_alike(p) for p in params]
                self._step_alike(rows, values, fused if all(map(_dense, params)) else None)
        return loss

    def _laid_alike(self, p: Tensor) -> tuple[Tensor, ...]:
        # Kernels go through memory: a state from before the model became channels_last would meet other elements.
        layout, state = p.stride(), self.state[p]
        for name in self._states:
            if state[name].stride() != layout:
                state[name] = torch.empty_like(p).copy_(state[name])
        grad = p.grad
        assert grad is not None
        if grad.stride() != layout:
            grad = torch.empty_like(p).copy_(grad)
        return (p.detach(), grad, *(state[name] for name in self._states))

    def _alike(self, group: dict[str, Any]) -> list[tuple[list[Tensor], dict[str, Any]]]:
        """The group's parameters that have gradients, by type, device and number states; the numbers are those of this step."""
        alike: dict[Any, list[Tensor]] = {}
        for p in group["params"]:
            if p.grad is None or not p.requires_grad:
                continue
            if p.grad.is_sparse:
                raise ValueError("a composed optimizer needs dense gradients: use an embedding without sparse=True")
            state = self.state[p]
            if not state:
                state.update({name: torch.zeros_like(p) for name in self._states})
                state.update(dict.fromkeys(self._numbers, 0.0))
            alike.setdefault((p.dtype, p.device, *(state[name] for name in self._numbers)), []).append(p)
        found = []
        for (_, _, *before), params in alike.items():
            values = {name: _number(group[name]) for name in self.defaults} | dict(zip(self._numbers, before, strict=True))
            for f in self._of_numbers:
                if f.applies(values):
                    values[f.changes] = float(f.call(**{name: values[name] for name in f.wants}))
            now = {name: values[name] for name in self._numbers}
            for p in params:
                self.state[p].update(now)
            found.append((params, values))
        return found

    def _step_alike(self, rows: list[tuple[Tensor, ...]], values: dict[str, Any], fused: "Fused | None") -> None:
        steps = [f for f in self._of_tensors if f.applies(values)]
        if self.kernel == EAGER:
            self._carry_out(tuple(steps), rows, values, compiled=False)
            return
        # What does not run at each step is in no kernel of torch's and would be a compilation of its own: it runs by itself.
        for always, functions in itertools.groupby(steps, lambda f: f.when is None):
            if always and self.kernel == FUSED and fused is not None:
                params, grads, *states = map(list, zip(*rows, strict=True))
                fused(params, grads, dict(zip(self._states, states, strict=False)), values)
            else:
                self._carry_out(tuple(functions), rows, values, compiled=always and self.kernel == COMPILED)

    def _carry_out(
        self, functions: tuple[_Function, ...], rows: list[tuple[Tensor, ...]], values: dict[str, Any], compiled: bool
    ) -> None:
        names = tuple(name for name in values if any(name in f.wants for f in functions))
        numbers = tuple(values[name] for name in names)
        eager = _composition(functions, self._states, names)
        elementwise = all(f.elementwise for f in functions)
        for flat in _flat(rows, gather=elementwise):
            if compiled and len(flat[0]) > 1:  # a single number would be compiled anew, as a constant size
                _compiled(functions, self._states, names)(flat, numbers)
            elif elementwise:
                for piece in zip(*(t.split(PIECE) for t in flat), strict=True):
                    eager(piece, numbers)
            else:
                eager(flat, numbers)

    get_hyper, set_hyper = hyper_parameters.get_hyper, hyper_parameters.set_hyper

    # --- the choice ------------------------------------------------------------------------------------------------------

    def choose_kernel(self, steps: int) -> str:
        """Choose how a run of so many steps is carried out, unless it is chosen; returns a line that says so, or none."""
        if self.kernel is not None:
            return ""
        self.kernel = FUSED if self._torchs_own() else EAGER
        if self.kernel == FUSED:
            return ""
        size = sum(p.numel() for group in self.param_groups for p in group["params"])
        if size * steps * SAVED < 2 * COMPILING:
            return f"optimizer not compiled: {steps} steps of {size:,} numbers are too few to pay for it"
        began = time.perf_counter()
        trouble = self._cannot_be_compiled()
        if trouble:
            return f"optimizer not compiled, {trouble}"
        self.kernel = COMPILED
        return f"optimizer compiled in {time.perf_counter() - began:.1f} s"

    def _cannot_be_compiled(self) -> str:
        """Why not; nothing once a compiled step was found equal to the eager one at several rates without compiling again."""
        if shutil.which(os.environ.get("CXX", "g++")) is None:
            return "since there is no C++ compiler (CXX or g++)"
        functions = tuple(f for f in self._of_tensors if f.when is None)
        if not all(f.elementwise for f in functions):
            return "since it looks at whole parameters, it would not become faster"
        if len(functions) < len(self._of_tensors) and any(f.changes == "grad" for f in functions):
            return "since it changes the gradient and has a function that does not run at each step"
        like = self.param_groups[0]["params"][0]
        generator = torch.Generator().manual_seed(0)
        values = {name: _number(value) for name, value in self.param_groups[0].items() if name in self.defaults}
        values |= dict.fromkeys(self._numbers, 20.0)
        names = tuple(name for name in values if any(name in f.wants for f in functions))
        try:
            for attempt in range(3):
                for f in self._of_numbers:
                    if f.applies(values):
                        values[f.changes] = float(f.call(**{name: values[name] for name in f.wants}))
                tensors = [torch.rand(1000, generator=generator).to(like) for _ in range(2 + len(self._states))]
                numbers = tuple(values[name] for name in names)
                expected = [t.clone() for t in tensors]
                _composition(functions, self._states, names)(expected, numbers)
                with (
                    torch._dynamo.config.patch(error_on_recompile=attempt > 0),
                    torch._inductor.config.patch(compile_threads=1),  # one small kernel needs no pool of processes
                ):
                    _compiled(functions, self._states, names)(tensors, numbers)
                if not all(torch.allclose(t, e, rtol=1e-3, atol=1e-5) for t, e in zip(tensors, expected, strict=True)):
                    return "since it then gives other results"
                values |= {n: v * 0.9 for n, v in values.items() if isinstance(v, float) and n not in self._numbers}
        except (RuntimeError, OSError) as error:
            return f"since that fails: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        return ""

    def _torchs_own(self) -> "Fused | None":
        """The fused kernel of torch's that does just what the composition does at each step, if there is one."""
        return _FUSED.get((self._at_each_step, *{group.get("dampening", False) for group in self.param_groups}))

    # --- state -----------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Torch's, and the kernel: a restored run must go on with the same one to go on with the same bits."""
        return {**super().state_dict(), "kernel": self.kernel}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what `state_dict` gave, the kernel too; with a warning where what was compiled there cannot be here."""
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "kernel"})
        self.kernel = state_dict.get("kernel")
        trouble = self._cannot_be_compiled() if self.kernel == COMPILED else ""
        if trouble:
            self.kernel = EAGER
            warnings.warn(
                f"the optimizer was compiled and is not here, so that the last bits will differ, {trouble}", stacklevel=2
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "functions": self.functions, "kernel": self.kernel}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.defaults.pop("differentiable", None)  # torch puts it there, and no function knows it
        self._read(self.defaults)


def _number(value: Any) -> Any:
    # A rate may be a tensor; whole numbers are floats here, since torch.compile takes an int for a constant.
    return value if isinstance(value, bool) or value is None else float(value)


# --- carrying a composition out ----------------------------------------------------------------------------------------

Run = Callable[[Sequence[Tensor], Sequence[Any]], None]


@functools.cache
def _composition(functions: tuple[_Function, ...], states: tuple[str, ...], numbers: tuple[str, ...]) -> Run:
    """The functions as one, of the tensors (p, grad, *states) and the numbers by position."""

    def composed(tensors: Sequence[Tensor], values: Sequence[Any]) -> None:
        named = dict(zip(("p", "grad", *states, *numbers), (*tensors, *values), strict=True))
        for f in functions:
            new = f.call(**{name: named[name] for name in f.wants})
            if new is not None and f.changes == "grad":
                named["grad"] = new
            elif new is not None:
                named[f.changes].copy_(new)

    return composed


@functools.cache
def _compiled(functions: tuple[_Function, ...], states: tuple[str, ...], numbers: tuple[str, ...]) -> Run:
    composed = _composition(functions, states, numbers)
    assert isinstance(composed, FunctionType)
    # torch.compile counts its attempts by code object, which all compositions share: this one gets its own.
    own = FunctionType(composed.__code__.replace(), composed.__globals__, "composed", None, composed.__closure__)
    return torch.compile(own, dynamic=True, fullgraph=True)


def _flat(rows: Sequence[tuple[Tensor, ...]], gather: bool) -> Iterator[Sequence[Tensor]]:
    """Each parameter's (p, grad, *states) as flat tensors, which are worked on in place while the generator rests.

    gather: small parameters come together, as one.
    """
    waiting: list[tuple[Tensor, ...]] = []
    size = 0
    for row in rows:
        views = _views(row)
        if views is not None and (len(views[0]) >= PIECE or not gather):
            yield views
            continue
        waiting.append(row)
        size += row[0].numel()
        if size >= PIECE or not gather:
            yield from _gathered(waiting)
            waiting, size = [], 0
    if waiting:
        yield from _gathered(waiting)


def _dense(p: Tensor) -> bool:
    """Whether torch's fused kernels may go through the memory of it."""
    return p.is_contiguous() or (p.ndim == 4 and p.is_contiguous(memory_format=torch.channels_last))


def _views(row: tuple[Tensor, ...]) -> list[Tensor] | None:
    if all(t.is_contiguous() for t in row):
        return [t.view(-1) for t in row]
    if row[0].ndim == 4 and all(t.is_contiguous(memory_format=torch.channels_last) for t in row):
        return [t.permute(0, 2, 3, 1).view(-1) for t in row]
    return None


def _gathered(rows: Sequence[tuple[Tensor, ...]]) -> Iterator[Sequence[Tensor]]:
    columns = list(zip(*rows, strict=True))
    joined = [torch.cat([t.reshape(-1) for t in column]) for column in columns]
    yield joined
    sizes = [p.numel() for p in columns[0]]
    for number, (column, values) in enumerate(zip(columns, joined, strict=True)):
        if number != 1:  # the gradient is never written to
            torch._foreach_copy_(list(column), [v.view(t.shape) for v, t in zip(values.split(sizes), column, strict=True)])


# --- torch's own -------------------------------------------------------------------------------------------------------

Fused = Callable[..., None]  # (parameters, gradients, states by name, numbers by name)


def _fused_adam(
    kernel: Callable[..., None], params: list[Tensor], grads: list[Tensor], states: dict[str, list[Tensor]], h: dict[str, Any]
) -> None:
    kernel(
        params,
        grads,
        states["grad_avg"],
        states["sqr_avg"],
        [],
        [torch.full((), h["step"], dtype=torch.float32, device=params[0].device)] * len(params),
        lr=h["lr"],
        beta1=h["mom"],
        beta2=h["sqr_mom"],
        weight_decay=h["wd"],
        eps=h["eps"],
        amsgrad=False,
        maximize=False,
    )


def _fused_sgd(
    params: list[Tensor],
    grads: list[Tensor],
    states: dict[str, list[Tensor]],
    h: dict[str, Any],
    decoupled: bool,
    nesterov: bool = False,
) -> None:
    if decoupled and h["wd"]:
        torch._foreach_mul_(params, 1 - h["lr"] * h["wd"])
    torch._fused_sgd_(
        params,
        grads,
        states.get("grad_avg", []),
        weight_decay=0.0 if decoupled else h["wd"],
        momentum=h.get("mom", 0.0),
        lr=h["lr"],
        dampening=0.0,
        nesterov=nesterov,
        maximize=False,
        is_first_step=False,
    )


def _fused_larc(params: list[Tensor], grads: list[Tensor], states: dict[str, list[Tensor]], h: dict[str, Any]) -> None:
    # SGD's kernel, parameter by parameter, at the rate of each.
    if h["wd"]:
        torch._foreach_mul_(params, 1 - h["lr"] * h["wd"])
    p_norms, grad_norms = (torch.stack(torch._foreach_norm(tensors)) for tensors in (params, grads))
    rates = larc_layer_lr(p_norms, grad_norms, h["lr"], h["trust_coeff"], h["wd"], h["eps"], h["clip"])
    for p, grad, grad_avg, rate in zip(params, grads, states["grad_avg"], rates.tolist(), strict=True):
        _fused_sgd([p], [grad], {"grad_avg": [grad_avg]}, {"lr": rate, "wd": 0.0, "mom": h["mom"]}, decoupled=True)


def _fused_rms_prop(
    kernel: Callable[..., None], params: list[Tensor], grads: list[Tensor], states: dict[str, list[Tensor]], h: dict[str, Any]
) -> None:
    # Adam that averages no gradients, so that they are their own average, and has made so many steps that nothing is debiased.
    adam = {**h, "mom": 0.0, "step": 1e9}
    # With l2 that average has the decay's gradient in it: it is written to a copy.
    average = [g.clone() for g in grads] if kernel is torch._fused_adam_ and h["wd"] else grads
    _fused_adam(kernel, params, grads, {"grad_avg": average, "sqr_avg": states["sqr_avg"]}, adam)


def _fused_radam(
    kernel: Callable[..., None],
    params: list[Tensor],
    grads: list[Tensor],
    states: dict[str, list[Tensor]],
    h: dict[str, Any],
    decoupled: bool,
) -> None:
    # Adam with another rate, by `factor`, and another eps; one that leaves nothing of the root, as long as it does not adapt.
    root = math.sqrt(h["sqr_debias"])
    eps, factor = (h["eps"] / root, h["rectification"] / root) if h["adapts"] else (1e15, 1e15)
    wd = h["wd"] / factor if decoupled else h["wd"]
    _fused_adam(kernel, params, grads, states, {**h, "lr": h["lr"] * factor, "eps": eps, "wd": wd})


_MOMENTS = (average_grad, average_sqr_grad, debias_grad, debias_sqr)
_RADAM = (*_MOMENTS, radam_adapts, radam_rectification, radam_step)
# By the functions of each step, without `step_stat`, and whether the average of the gradients is dampened.
_FUSED: dict[tuple[Any, ...], Fused] = {
    ((weight_decay, *_MOMENTS, adam_step), True): functools.partial(_fused_adam, torch._fused_adamw_),
    ((l2_reg, *_MOMENTS, adam_step), True): functools.partial(_fused_adam, torch._fused_adam_),
    ((weight_decay, *_RADAM), True): functools.partial(_fused_radam, torch._fused_adamw_, decoupled=True),
    ((l2_reg, *_RADAM), True): functools.partial(_fused_radam, torch._fused_adam_, decoupled=False),
    ((weight_decay, sgd_step), False): functools.partial(_fused_sgd, decoupled=True),
    ((l2_reg, sgd_step), False): functools.partial(_fused_sgd, decoupled=False),
    ((weight_decay, average_grad, momentum_step), False): functools.partial(_fused_sgd, decoupled=True),
    ((l2_reg, average_grad, momentum_step), False): functools.partial(_fused_sgd, decoupled=False),
    ((weight_decay, average_grad, nesterov_step), False): functools.partial(_fused_sgd, decoupled=True, nesterov=True),
    ((l2_reg, average_grad, nesterov_step), False): functools.partial(_fused_sgd, decoupled=False, nesterov=True),
    ((weight_decay, average_grad, larc_step), False): _fused_larc,
    ((weight_decay, average_sqr_grad, rms_prop_step), False): functools.partial(_fused_rms_prop, torch._fused_adamw_),
    ((l2_reg, average_sqr_grad, rms_prop_step), False): functools.partial(_fused_rms_prop, torch._fused_adam_),
}
