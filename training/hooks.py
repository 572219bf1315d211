"""Hooks: look at what layers compute. Each is removed when its `with` block or the training ends."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from training.callback import Callback

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from training.learner import Learner

HookFunction = Callable[[nn.Module, Any, Any], Any]


class Hook:
    """Calls `function(module, input, output)` after each forward pass of `module`, and keeps the result in `stored`.

    is_forward: False for the backward pass, with the gradients of input and output. detach: give tensors cut off from the
    graph; cpu: on the CPU. Use it in a `with` block, or call `remove`.
    """

    def __init__(
        self, module: nn.Module, function: HookFunction, is_forward: bool = True, detach: bool = True, cpu: bool = False
    ):
        self.function, self.detach, self.cpu = function, detach, cpu
        self.stored: Any = None
        register = module.register_forward_hook if is_forward else module.register_full_backward_hook
        self._handle = register(self._call)

    def _call(self, module: nn.Module, given: Any, result: Any) -> None:
        if self.detach:
            given, result = _detached(given, self.cpu), _detached(result, self.cpu)
        self.stored = self.function(module, given, result)

    def remove(self) -> None:
        """Call the function no more."""
        self._handle.remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()


class Hooks:
    """A `Hook` for each of some modules."""

    def __init__(
        self,
        modules: Iterable[nn.Module],
        function: HookFunction,
        is_forward: bool = True,
        detach: bool = True,
        cpu: bool = False,
    ):
        self.hooks = [Hook(m, function, is_forward, detach, cpu) for m in modules]

    @property
    def stored(self) -> list[Any]:
        """What each hook kept."""
        return [hook.stored for hook in self.hooks]

    def remove(self) -> None:
        """Call the function no more."""
        for hook in self.hooks:
            hook.remove()

    def __getitem__(self, i: int) -> Hook:
        return self.hooks[i]

    def __len__(self) -> int:
        return len(self.hooks)

    def __iter__(self) -> Iterator[Hook]:
        return iter(self.hooks)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()


def _detached(x: Any, cpu: bool) -> Any:
    if isinstance(x, Tensor):
        return x.detach().cpu() if cpu else x.detach()
    return type(x)(_detached(e, cpu) for e in x) if isinstance(x, tuple | list) else x


def the_output(module: nn.Module, given: Any, result: Any) -> Any:
    """The hook function that keeps what the layer gave."""
    return result


def the_gradient(module: nn.Module, given: Any, result: Any) -> Any:
    """The hook function that keeps, in the backward pass, the gradient of what the layer gave."""
    return result[0]


def hook_output(module: nn.Module, detach: bool = True, cpu: bool = False, grad: bool = False) -> Hook:
    """A hook that stores the output of `module`, or with `grad` the gradient of it."""
    return Hook(module, the_gradient if grad else the_output, is_forward=not grad, detach=detach, cpu=cpu)


def hook_outputs(modules: Iterable[nn.Module], detach: bool = True, cpu: bool = False, grad: bool = False) -> Hooks:
    """Hooks that store the output of each module, or with `grad` the gradients of them."""
    return Hooks(modules, the_gradient if grad else the_output, is_forward=not grad, detach=detach, cpu=cpu)


def output_sizes(model: nn.Module, x: Tensor) -> list[tuple[int, ...]]:
    """The shape of what each child of `model` gives for the input `x`; fastai's model_sizes."""
    was_training = model.training
    with hook_outputs(model.children()) as hooks, torch.no_grad():
        model.eval()(x)
    model.train(was_training)
    return [tuple(hook.stored.shape) for hook in hooks if hook.stored is not None]


class HookCallback(Callback):
    """Hooks on `modules` (None: each innermost layer with parameters) for the length of a fit; override `hook`.

    every: look at every n-th training batch only. What `hook` returned is in `self.hooks.stored` after the forward pass.
    """

    def __init__(self, modules: Sequence[nn.Module] | None = None, every: int = 1, cpu: bool = True):
        if every < 1:
            raise ValueError(f"every is a number of batches, at least 1, not {every!r}")
        self.modules, self.every, self.cpu = modules, every, cpu
        self._hooks: Hooks | None = None

    def hook(self, module: nn.Module, given: Any, result: Any) -> Any:
        """What to keep of one layer's forward pass."""
        raise NotImplementedError(f"{self.name} must say what to keep: def hook(self, module, given, result)")

    @property
    def hooks(self) -> Hooks:
        """The hooks of the batch that is on its way."""
        assert self._hooks is not None, "there are hooks while a batch is looked at only"
        return self._hooks

    def before_batch(self, learn: "Learner") -> None:
        if learn.training and learn.iter % self.every == 0:
            self._remove()
            self._hooks = Hooks(self.modules or layers_with_parameters(learn.model), self.hook, cpu=self.cpu)

    def after_batch(self, learn: "Learner") -> None:
        self._remove()

    def after_fit(self, learn: "Learner") -> None:
        self._remove()

    def _remove(self) -> None:
        if self._hooks is not None:
            self._hooks.remove()
            self._hooks = None


def layers_with_parameters(model: nn.Module) -> list[nn.Module]:
    """The innermost modules that have parameters of their own."""
    return [m for m in model.modules() if not any(True for _ in m.children()) and any(True for _ in m.parameters())]


class ActivationStats(HookCallback):
    """Records the mean, the standard deviation and the share of near zeros of layers' outputs, batch by batch; fastai's.

    `stats[b][l]` is a dict for batch b and layer l: "mean", "std", "near_zero"; with_hist: "hist", 40 counts of -10..10 too.
    """

    def __init__(self, modules: Sequence[nn.Module] | None = None, every: int = 1, with_hist: bool = False):
        super().__init__(modules, every)
        self.with_hist = with_hist
        self.stats: list[list[dict[str, Any]]] = []

    def before_fit(self, learn: "Learner") -> None:
        if learn.epoch == learn.start_epoch:  # not in a fit that goes on after a restart
            self.stats = []

    def hook(self, module: nn.Module, given: Any, result: Any) -> dict[str, Any]:
        values = result[0] if isinstance(result, tuple) else result
        values = values.float()
        found = {
            "mean": values.mean().item(),
            "std": values.std(correction=0).item(),
            "near_zero": (values.abs() <= 0.05).float().mean().item(),
        }
        return found | {"hist": values.histc(40, -10, 10).tolist()} if self.with_hist else found

    def after_batch(self, learn: "Learner") -> None:
        if self._hooks is not None:
            self.stats.append([s for s in self._hooks.stored if s is not None])
        super().after_batch(learn)

    def layer_stats(self, layer: int) -> dict[str, list[float]]:
        """The means, standard deviations and shares of near zeros of one layer, batch by batch."""
        names = ("mean", "std", "near_zero")
        return {name: [batch[layer][name] for batch in self.stats] for name in names}

    def plot_layer_stats(self, layer: int) -> "Figure":
        """A figure of `layer_stats`: three curves over the batches looked at."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(12, 3), layout="constrained")
        for axes, (name, values) in zip(figure.subplots(1, 3), self.layer_stats(layer).items(), strict=True):
            axes.plot(values)
            axes.set_title(name)
        return figure

    def state_dict(self) -> dict[str, Any]:
        return {"stats": self.stats}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stats = state["stats"]
