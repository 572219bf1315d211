"""The small functions that optimizers are composed of: stats keep something of the gradients, steppers move the parameters.

A function says by its signature what it needs and what it changes:

* its **first argument is what it changes**: `p` (then it is a stepper), `grad`, or a state that it keeps (then it is a stat):
  a tensor like the parameter, zeros at the start, or, annotated `float`, a number. It changes it in place or returns the
  new value;
* the others are looked up by name: `p`, `grad`, states kept by a stat, hyper-parameters (a number of the parameter group).
  A default makes them optional.

`@elementwise` says that each element of the result depends on the same element of the arguments only, so that the function may
be given a piece of a parameter, or several parameters in a row; without it a function always gets one whole parameter, flat.
Torch's operations that do two things at once (`add_(x, alpha=lr)`) are the fast ones as long as nothing is compiled, but
torch.compile takes their numbers for constants and would compile again at each new rate: `add_scaled` and its kind are both.
Powers of `step` belong into a stat of a number, which is computed once a
step; in a stepper they would be computed again for each element.
"""

import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., Any])


def elementwise(function: Function) -> Function:
    """Say that `function` may be given any piece of a parameter: it treats each element by itself."""
    function.elementwise = True  # type: ignore[attr-defined]
    return function


def when(condition: Callable[..., bool]) -> Callable[[Function], Function]:
    """Say that a function only runs at steps where `condition`, of number states and hyper-parameters by name, is true."""

    def marked(function: Function) -> Function:
        function.when = condition  # type: ignore[attr-defined]
        return function

    return marked


# --- operations that are fast eagerly and when compiled -----------------------------------------------------------------


def add_scaled(x: Tensor, y: Tensor, factor: float) -> None:
    """x += y * factor."""
    if torch.compiler.is_compiling():
        x.add_(y * factor)
    else:
        x.add_(y, alpha=factor)


def add_decayed(x: Tensor, y: Tensor, decay: float) -> None:
    """x = x * decay + y."""
    if torch.compiler.is_compiling():
        x.mul_(decay).add_(y)
    else:
        torch.add(y, x, alpha=decay, out=x)


def add_product(x: Tensor, y: Tensor, z: Tensor, factor: float) -> None:
    """x += y * z * factor."""
    if torch.compiler.is_compiling():
        x.add_(y * z * factor)
    else:
        x.addcmul_(y, z, value=factor)


def add_quotient(x: Tensor, y: Tensor, z: Tensor, factor: float) -> None:
    """x += y / z * factor."""
    if torch.compiler.is_compiling():
        x.add_(y / z * factor)
    else:
        x.addcdiv_(y, z, value=factor)


def move_towards(x: Tensor, y: Tensor, share: float) -> None:
    """x += (y - x) * share."""
    if torch.compiler.is_compiling():
        x.add_((y - x) * share)
    else:
        x.lerp_(y, share)


# --- stats -------------------------------------------------------------------------------------------------------------


@elementwise
def average_grad(grad_avg: Tensor, grad: Tensor, mom: float, dampening: bool = False) -> None:
    """The gradients summed with decay `mom`; with `dampening`, their moving average."""
    if dampening:
        move_towards(grad_avg, grad, 1 - mom)
    else:
        add_decayed(grad_avg, grad, mom)


@elementwise
def average_sqr_grad(sqr_avg: Tensor, grad: Tensor, sqr_mom: float) -> None:
    """The moving average of the squared gradients."""
    sqr_avg.mul_(sqr_mom)
    add_product(sqr_avg, grad, grad, 1 - sqr_mom)


def step_stat(step: float) -> float:
    """How many steps the parameter has made, this one included."""
    return step + 1


def debias_grad(grad_debias: float, mom: float, step: float) -> float:
    """What a dampened average of the gradients, zero at the start, lacks of the mean: it is to be divided by this."""
    return 1 - mom**step


def debias_sqr(sqr_debias: float, sqr_mom: float, step: float) -> float:
    """The same of the average of the squared gradients."""
    return 1 - sqr_mom**step


def larc_layer_lr(
    p_norm: Tensor, grad_norm: Tensor, lr: float, trust_coeff: float, wd: float, eps: float, clip: bool = True
) -> Tensor:
    """The rate of a parameter by its norm and its gradient's (You et al., arXiv:1708.03888); at most `lr` if `clip`."""
    local = p_norm.div_(torch.add(grad_norm, p_norm, alpha=wd).add_(eps)).mul_(lr * trust_coeff)
    return local.clamp_(max=lr) if clip else local


def radam_adapts(adapts: float, step: float, sqr_mom: float) -> float:
    """1 once the variance of RAdam's adaptive rate is tractable, 0 in the first steps."""
    return float(_radam_length(step, sqr_mom) > 5)


def radam_rectification(rectification: float, adapts: float, step: float, sqr_mom: float) -> float:
    """RAdam's factor of the adaptive step; 1 as long as it does not adapt (Liu et al., arXiv:1908.03265)."""
    if not adapts:
        return 1.0
    r, r_inf = _radam_length(step, sqr_mom), _radam_length(math.inf, sqr_mom)
    return math.sqrt((r - 4) * (r - 2) * r_inf / ((r_inf - 4) * (r_inf - 2) * r) * (1 - sqr_mom**step))


def _radam_length(step: float, sqr_mom: float) -> float:
    r_inf = 2 / (1 - sqr_mom) - 1
    return r_inf if math.isinf(step) else r_inf - 2 * step * sqr_mom**step / (1 - sqr_mom**step)


# --- what changes the gradient or the parameter before the step --------------------------------------------------------


@elementwise
def weight_decay(p: Tensor, lr: float, wd: float) -> None:
    """Decoupled weight decay: shrink the parameter by `lr * wd` of itself (Loshchilov & Hutter, arXiv:1711.05101)."""
    if torch.compiler.is_compiling() or wd:  # in this order, else the number is a constant to torch.compile
        p.mul_(1 - lr * wd)


@elementwise
def l2_reg(grad: Tensor, p: Tensor, wd: float) -> Tensor:
    """The gradient with that of `wd / 2 * p**2` added; the parameter's own `.grad` stays as it is."""
    return grad + p * wd


# --- steppers ----------------------------------------------------------------------------------------------------------


@elementwise
def sgd_step(p: Tensor, grad: Tensor, lr: float) -> None:
    """Against the gradient."""
    add_scaled(p, grad, -lr)


@elementwise
def momentum_step(p: Tensor, grad_avg: Tensor, lr: float) -> None:
    """Against the average of the gradients."""
    add_scaled(p, grad_avg, -lr)


@elementwise
def nesterov_step(p: Tensor, grad: Tensor, grad_avg: Tensor, lr: float, mom: float) -> None:
    """Against the average of the gradients as it will be one step on (Sutskever et al., 2013)."""
    add_scaled(p, grad, -lr)
    add_scaled(p, grad_avg, -lr * mom)


@elementwise
def rms_prop_step(p: Tensor, grad: Tensor, sqr_avg: Tensor, lr: float, eps: float, grad_avg: Tensor | None = None) -> None:
    """Against the gradient, or its average where that is kept, divided by the root of the average square (Hinton 2012)."""
    add_quotient(p, grad if grad_avg is None else grad_avg, sqr_avg.sqrt().add_(eps), -lr)


@elementwise
def adam_step(
    p: Tensor, grad_avg: Tensor, sqr_avg: Tensor, lr: float, eps: float, grad_debias: float, sqr_debias: float
) -> None:
    """Adam's step on dampened averages (Kingma & Ba, arXiv:1412.6980)."""
    # lr * (grad_avg / grad_debias) / (root(sqr_avg / sqr_debias) + eps), in as few operations as it takes.
    root = math.sqrt(sqr_debias)
    add_quotient(p, grad_avg, sqr_avg.sqrt().add_(eps * root), -lr * root / grad_debias)


@elementwise
def radam_step(
    p: Tensor,
    grad_avg: Tensor,
    sqr_avg: Tensor,
    lr: float,
    eps: float,
    grad_debias: float,
    adapts: float,
    rectification: float,
) -> None:
    """Adam's step, rectified; in the first steps against the average of the gradients alone (arXiv:1908.03265)."""
    # Both cases as one formula, since a branch would have to be compiled twice.
    divisor = sqr_avg.sqrt().mul_(adapts).add_(eps * adapts + 1 - adapts)
    add_quotient(p, grad_avg, divisor, -lr * rectification / grad_debias)


@elementwise
def qhadam_step(
    p: Tensor,
    grad: Tensor,
    grad_avg: Tensor,
    sqr_avg: Tensor,
    lr: float,
    nu_1: float,
    nu_2: float,
    eps: float,
    grad_debias: float,
    sqr_debias: float,
) -> None:
    """Adam's step with averages that are mixed with the gradient itself (Ma & Yarats, arXiv:1810.06801)."""
    up, down = grad * (1 - nu_1), sqr_avg * (nu_2 / sqr_debias)
    add_scaled(up, grad_avg, nu_1 / grad_debias)
    add_product(down, grad, grad, 1 - nu_2)
    add_quotient(p, up, down.sqrt_().add_(eps), -lr)


def larc_step(
    p: Tensor,
    grad: Tensor,
    lr: float,
    trust_coeff: float,
    wd: float,
    eps: float,
    clip: bool = True,
    grad_avg: Tensor | None = None,
) -> None:
    """Against the gradient, or its average where that is kept, at the rate of `larc_layer_lr`."""
    p_norm, grad_norm = torch.linalg.vector_norm(p), torch.linalg.vector_norm(grad)
    rate = larc_layer_lr(p_norm, grad_norm, lr, trust_coeff, wd, eps, clip)
    add_product(p, grad if grad_avg is None else grad_avg, rate, -1.0)


def lamb_step(
    p: Tensor, grad_avg: Tensor, sqr_avg: Tensor, lr: float, eps: float, grad_debias: float, sqr_debias: float
) -> None:
    """Adam's step scaled to the norm of the parameter, at most tenfold (You et al., arXiv:1904.00962)."""
    root = sqr_avg.sqrt().mul_(grad_debias / math.sqrt(sqr_debias)).add_(eps * grad_debias)
    update = torch.div(grad_avg, root, out=root) if not torch.compiler.is_compiling() else grad_avg / root
    p_norm, norm = torch.linalg.vector_norm(p), torch.linalg.vector_norm(update)
    trust = torch.where((p_norm == 0) | (norm == 0), 1.0, (p_norm / norm).clamp(max=10))
    add_product(p, update, trust, -lr)


# --- lookahead ---------------------------------------------------------------------------------------------------------


@elementwise
@when(lambda step, k: (step - 1) % k == 0)
def remember_slow(slow: Tensor, p: Tensor) -> None:
    """Where the parameter stood when the last `k` steps began."""
    slow.copy_(p)


@elementwise
@when(lambda step, k: step % k == 0)
def lookahead_step(p: Tensor, slow: Tensor, alpha: float) -> None:
    """After `k` steps, only the share `alpha` of the way they went (Zhang et al., arXiv:1907.08610)."""
    p.sub_(slow).mul_(alpha).add_(slow)
