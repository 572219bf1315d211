"""Generative adversarial networks, as a case study of the callbacks: the loop of the Learner is the same as ever.

A generator makes samples from inputs (noise, or pictures to improve), a critic tells them from real ones (Goodfellow et al.,
arXiv:1406.2661). They are one module that is told whose turn it is, one loss that depends on it, and a callback that changes
inputs, targets and what trains. A batch is (input, real sample), or (real sample,) with `noise`.
"""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from blocks.dataloaders import DataLoaders
from blocks.draws import normal, stream_of
from blocks.tensors import as_plain
from training import distributed
from training.callback import Callback
from training.checks import listed
from training.layers import ConvLayer, SelfAttention
from training.learner import Learner
from training.losses import MSELossFlat
from training.metrics import AccumMetric
from training.models import model_builder

GeneratorLoss = Callable[[Tensor, Tensor, Tensor], Tensor]  # of what the critic says of the output, the output, the target
CriticLoss = Callable[[Tensor, Tensor], Tensor]  # of what the critic says of real samples and of made ones


class GANModule(nn.Module):
    """A generator and a critic; its forward pass is that of the one whose turn it is."""

    def __init__(self, generator: nn.Module, critic: nn.Module, gen_mode: bool = False):
        super().__init__()
        self.generator, self.critic, self.gen_mode = generator, critic, gen_mode

    def forward(self, *x: Tensor) -> Any:
        return (self.generator if self.gen_mode else self.critic)(*x)


class GANLoss:
    """The loss of the one whose turn it is."""

    def __init__(self, model: GANModule, gen_loss_func: GeneratorLoss, crit_loss_func: CriticLoss):
        self.model, self.gen_loss_func, self.crit_loss_func = model, gen_loss_func, crit_loss_func

    def __call__(self, pred: Tensor, *other: Tensor) -> Tensor:
        return self.generator(pred, *other) if self.model.gen_mode else self.critic(pred, *other)

    def generator(self, output: Tensor, target: Tensor) -> Tensor:
        """The generator's loss of the samples it made."""
        return self.gen_loss_func(self.model.critic(output), output, target)

    def critic(self, real_pred: Tensor, *inputs: Tensor) -> Tensor:
        """The critic's loss of what it says of real samples, and of those made from the inputs."""
        with torch.no_grad():
            made = self.model.generator(*inputs)
        return self.crit_loss_func(real_pred, self.model.critic(made))


class GANTrainer(Callback):
    """Gives each batch to the one whose turn it is, and lets only that one train.

    gen_first: the generator begins. switch_eval: the other one is in evaluation mode meanwhile. clip: limit of the critic's
    weights (WGAN). noise: the batch is the real samples alone, and the generator's input so many normal numbers a sample, drawn
    by its key. Records "train/gen_loss" and "train/crit_loss". Validation has the generator's loss.
    """

    order = -5  # once the batch is transformed

    def __init__(self, gen_first: bool = False, switch_eval: bool = True, clip: float | None = None, noise: int | None = None):
        self.gen_first, self.switch_eval, self.clip, self.noise = gen_first, switch_eval, clip, noise
        self.gen_mode = gen_first
        self._sums = torch.zeros(2, 2, dtype=torch.float64)  # of the generator, of the critic: loss times rows, rows
        self._trainable: list[bool] = []  # which parameters train at all, in the model's order

    def before_fit(self, learn: Learner) -> None:
        self._trainable = [p.requires_grad for p in learn.model.parameters()]
        if learn.epoch == learn.start_epoch:  # not in a fit that goes on after a restart
            self.gen_mode = self.gen_first

    def before_train(self, learn: Learner) -> None:
        self._sums = torch.zeros(2, 2, dtype=torch.float64, device=learn.device)
        self.switch(learn, self.gen_mode)

    def before_validate(self, learn: Learner) -> None:
        _gan(learn).gen_mode = True

    def before_batch(self, learn: Learner) -> None:
        model = _gan(learn)
        if self.noise is not None:
            learn.yb = learn.yb or learn.xb
            learn.xb = (normal(learn.keys, stream_of("GAN noise"), n=self.noise),)
        if learn.training and self.clip is not None:
            with torch.no_grad():
                torch._foreach_clamp_min_(list(model.critic.parameters()), -self.clip)
                torch._foreach_clamp_max_(list(model.critic.parameters()), self.clip)
        if learn.training and model.gen_mode != self.gen_mode:
            self.switch(learn, self.gen_mode)  # in a run that goes on from the middle of an epoch
        if not model.gen_mode:
            learn.xb, learn.yb = learn.yb, tuple(map(as_plain, learn.xb))

    def after_batch(self, learn: Learner) -> None:
        if learn.training and learn.loss is not None:
            self._sums = self._sums.to(learn.device)  # those of a run that goes on come from the CPU
            sums = self._sums[0 if self.gen_mode else 1]
            sums[0] += learn.loss.double() * learn.rows
            sums[1] += learn.rows

    def after_train(self, learn: Learner) -> None:
        sums = distributed.sum_over_ranks(self._sums)
        for name, (total, rows) in zip(("gen_loss", "crit_loss"), sums.tolist(), strict=True):
            if rows:
                learn.recorder.values[f"train/{name}"] = total / rows

    def after_fit(self, learn: Learner) -> None:
        for parameter, trains in zip(learn.model.parameters(), self._trainable, strict=False):
            parameter.requires_grad_(trains)
        self._trainable = []

    def switch(self, learn: Learner, gen_mode: bool) -> None:
        """Have the generator train, or the critic."""
        model = _gan(learn)
        self.gen_mode = model.gen_mode = gen_mode
        trains = dict(zip(model.parameters(), self._trainable, strict=True))
        for part, on in ((model.generator, gen_mode), (model.critic, not gen_mode)):
            part.train(on or not self.switch_eval)
            for parameter in part.parameters():
                parameter.requires_grad_(on and trains[parameter])

    def state_dict(self) -> dict[str, Any]:
        return {"gen_mode": self.gen_mode, "trainable": list(self._trainable), "sums": self._sums.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.gen_mode, self._trainable, self._sums = state["gen_mode"], list(state["trainable"]), state["sums"].clone()

    def merged(self, states: list[dict[str, Any]]) -> dict[str, Any]:
        return states[0] | {"sums": sum(state["sums"] for state in states) * (distributed.rank() == 0)}


def _gan(learn: Learner) -> GANModule:
    assert isinstance(learn.model, GANModule)
    return learn.model


class _Switcher(Callback):
    order = 40  # after GANTrainer has noted the batch's loss

    def trainer(self, learn: Learner) -> GANTrainer:
        return next(c for c in learn.callbacks if isinstance(c, GANTrainer))


class FixedGANSwitcher(_Switcher):
    """`n_crit` steps of the critic, then `n_gen` of the generator, and so on; fastai's."""

    def __init__(self, n_crit: int = 1, n_gen: int = 1):
        if n_crit < 1 or n_gen < 1:
            raise ValueError(f"n_crit and n_gen are numbers of steps, at least 1, not {n_crit!r} and {n_gen!r}")
        self.n_crit, self.n_gen, self.done = n_crit, n_gen, 0

    def after_batch(self, learn: Learner) -> None:
        if learn.training:
            trainer = self.trainer(learn)
            self.done += 1
            if self.done >= (self.n_gen if trainer.gen_mode else self.n_crit):
                self.done = 0
                trainer.switch(learn, not trainer.gen_mode)

    def state_dict(self) -> dict[str, int]:
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.done = state["done"]


class AdaptiveGANSwitcher(_Switcher):
    """The turn changes as soon as the loss of the one who trains is below a threshold (None: after each step); fastai's."""

    def __init__(self, gen_thresh: float | None = None, critic_thresh: float | None = None):
        self.gen_thresh, self.critic_thresh = gen_thresh, critic_thresh

    def after_batch(self, learn: Learner) -> None:
        if learn.training and learn.loss is not None:
            trainer = self.trainer(learn)
            thresh = self.gen_thresh if trainer.gen_mode else self.critic_thresh
            if thresh is None or _over_ranks(learn) < thresh:
                trainer.switch(learn, not trainer.gen_mode)


def _over_ranks(learn: Learner) -> float:
    # The loss of the whole batch, so that all ranks decide alike.
    total, rows = distributed.sum_over_ranks(learn.loss.new_tensor([float(learn.loss) * learn.rows, learn.rows]))
    return float(total / rows)


class GANLearner(Learner):
    """A Learner of a generator and a critic; the arguments are those of `GANTrainer` and of Learner.

    gen_loss_func: (what the critic says of the output, output, target) -> loss; crit_loss_func: (what it says of real
    samples, of made ones) -> loss. switcher: whose turn it is, `FixedGANSwitcher(5, 1)` by default.
    """

    def __init__(
        self,
        dls: DataLoaders,
        generator: nn.Module,
        critic: nn.Module,
        gen_loss_func: GeneratorLoss,
        crit_loss_func: CriticLoss,
        switcher: Callback | None = None,
        *,
        gen_first: bool = False,
        switch_eval: bool = True,
        clip: float | None = None,
        noise: int | None = None,
        callbacks: Any = (),
        **settings: Any,
    ):
        model = GANModule(generator, critic)
        trainer = GANTrainer(gen_first, switch_eval, clip, noise)
        loss = GANLoss(model, gen_loss_func, crit_loss_func)
        callbacks = [trainer, FixedGANSwitcher(5, 1) if switcher is None else switcher, *listed(callbacks)]
        super().__init__(dls, model, loss, callbacks=callbacks, **settings)
        self.noise = noise

    @classmethod
    def from_learners(
        cls,
        gen_learn: Learner,
        crit_learn: Learner,
        switcher: Callback | None = None,
        weights_gen: tuple[float, float] = (1.0, 1.0),
        **settings: Any,
    ) -> Self:
        """From a Learner that trained the generator alone, and one that trained the critic alone.

        The data are the generator's. Its loss is `weights_gen[0]` times what the critic finds of it plus `weights_gen[1]` times
        its own; the critic's is its own, with the targets 1 for real and 0 for made samples.
        """
        judge, own = crit_learn.loss_func, gen_learn.loss_func

        def gen_loss(fake_pred: Tensor, output: Tensor, target: Tensor) -> Tensor:
            judged = judge(fake_pred, torch.ones_like(fake_pred))
            return weights_gen[0] * judged + weights_gen[1] * own(output, target)

        def crit_loss(real_pred: Tensor, fake_pred: Tensor) -> Tensor:
            return (judge(real_pred, torch.ones_like(real_pred)) + judge(fake_pred, torch.zeros_like(fake_pred))) / 2

        return cls(gen_learn.dls, gen_learn.model, crit_learn.model, gen_loss, crit_loss, switcher, **settings)

    @classmethod
    def wgan(
        cls,
        dls: DataLoaders,
        generator: nn.Module,
        critic: nn.Module,
        switcher: Callback | None = None,
        clip: float | None = 0.01,
        switch_eval: bool = False,
        **settings: Any,
    ) -> Self:
        """A Wasserstein GAN (Arjovsky et al., arXiv:1701.07875): the critic's mean of made samples less that of real ones."""
        settings = {"clip": clip, "switch_eval": switch_eval, **settings}
        return cls(dls, generator, critic, wgan_gen_loss, wgan_crit_loss, switcher, **settings)

    def generate(self, n: int, seed: int = 0) -> Tensor:
        """`n` samples from noise, on the CPU. ValueError for a generator whose inputs are not noise."""
        if self.noise is None:
            raise ValueError("this generator makes its samples from the data's inputs: call learn.model.generator(input)")
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(n, self.noise, generator=generator).to(self.device)
        model = _gan(self).generator.eval()
        with torch.no_grad():
            return model(noise).cpu()

    def export(self, path: Any, program: bool = False) -> Any:
        """Write the generator as data to the folder `path`; see `training.export`. It was made by a registered builder."""
        return Learner(self.dls, _gan(self).generator, MSELossFlat(), device=self.device).export(path, program)


def PixelDistance() -> AccumMetric:  # noqa: N802  as the other metrics that are made
    """How far made samples are from the real ones: see `frechet_distance`, of all rows."""
    return AccumMetric(frechet_distance, higher_is_better=False, name="pixel_distance")


def frechet_distance(made: Tensor, real: Tensor) -> float:
    """The squared Frechet distance of Gaussians fitted to two sets of samples (Dowson and Landau, 1982); 0 for the same."""
    a, b = made.flatten(1).double(), real.flatten(1).double()
    of_a, of_b = a.T.cov(), b.T.cov()
    common = torch.linalg.eigvals(of_a @ of_b).real.clamp(min=0).sqrt().sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + of_a.trace() + of_b.trace() - 2 * common)


def wgan_gen_loss(fake_pred: Tensor, output: Tensor, target: Tensor) -> Tensor:
    """What the critic says of made samples, which is low for real ones; the mean."""
    return fake_pred.mean()


def wgan_crit_loss(real_pred: Tensor, fake_pred: Tensor) -> Tensor:
    """The mean of real samples less that of made ones."""
    return real_pred.mean() - fake_pred.mean()


def bce_gen_loss(fake_pred: Tensor, output: Tensor, target: Tensor) -> Tensor:
    """The cross entropy of calling made samples real, of logits: the first GAN's own advice for the generator."""
    return nn.functional.softplus(-fake_pred).mean()


def bce_crit_loss(real_pred: Tensor, fake_pred: Tensor) -> Tensor:
    """The cross entropy of telling real samples from made ones, of logits; the mean of both."""
    return (nn.functional.softplus(-real_pred).mean() + nn.functional.softplus(fake_pred).mean()) / 2


def critic_dataloaders(gen_learn: Learner) -> DataLoaders:
    """What to train a critic on beforehand: batches of real and made samples, with the targets 1 and 0, (rows, 1) float."""
    gen_learn.model.to(gen_learn.device).eval()

    def mixed(batches: Any) -> list[tuple[Tensor, Tensor]]:
        found = []
        for *inputs, real in batches:
            with torch.no_grad():
                made = gen_learn.model(*(as_plain(x).to(gen_learn.device) for x in inputs)).cpu()
            target = torch.cat([torch.ones(len(real), 1), torch.zeros(len(made), 1)])
            found.append((torch.cat([as_plain(real), made]), target))
        return found

    return DataLoaders(mixed(gen_learn.dls.train), mixed(gen_learn.dls.valid))


def basic_generator(
    out_size: int, n_channels: int, in_sz: int = 100, n_features: int = 64, n_extra_layers: int = 0
) -> nn.Sequential:
    """Noise (rows, in_sz) to pictures (rows, n_channels, out_size, out_size) in -1..1 (Radford et al., arXiv:1511.06434).

    ValueError unless out_size is 4 times a power of 2.
    """
    sizes = _halvings(out_size)
    width = n_features * 2 ** (sizes - 1) if sizes else n_features
    layers: list[nn.Module] = [nn.Unflatten(1, (in_sz, 1, 1)), ConvLayer(in_sz, width, 4, padding=0, transpose=True)]
    for _ in range(max(sizes - 1, 0)):
        layers.append(ConvLayer(width, width // 2, 4, 2, padding=1, transpose=True))
        width //= 2
    layers += [ConvLayer(width, width) for _ in range(n_extra_layers)]
    layers += [nn.ConvTranspose2d(width, n_channels, 4, 2, 1) if sizes else nn.Conv2d(width, n_channels, 3, padding=1)]
    return nn.Sequential(*layers, nn.Tanh())


@model_builder
def gan_generator(*, size: int, n_channels: int, noise: int = 100, width: int = 64) -> nn.Module:
    """`basic_generator`, which an export can name: noise (rows, noise) to pictures (rows, n_channels, size, size) in -1..1."""
    return basic_generator(size, n_channels, in_sz=noise, n_features=width)


def basic_critic(in_size: int, n_channels: int, n_features: int = 64, n_extra_layers: int = 0) -> nn.Sequential:
    """Pictures (rows, n_channels, in_size, in_size) to (rows, 1), the mirror of `basic_generator`."""
    sizes, width = _halvings(in_size), n_features
    layers: list[nn.Module] = [ConvLayer(n_channels, width, 4, 2 if sizes else 1, padding=1, norm=None, act_cls=_leaky)]
    layers += [ConvLayer(width, width, act_cls=_leaky) for _ in range(n_extra_layers)]
    for _ in range(max(sizes - 1, 0)):
        layers.append(ConvLayer(width, width * 2, 4, 2, padding=1, act_cls=_leaky))
        width *= 2
    return nn.Sequential(*layers, nn.Conv2d(width, 1, 4 if sizes else 3), nn.Flatten())


def _halvings(size: int) -> int:
    if size < 4 or size & (size - 1):
        raise ValueError(f"the size of the pictures is 4 times a power of 2, not {size}")
    return (size // 4).bit_length() - 1


def gan_critic(n_channels: int = 3, nf: int = 128, n_blocks: int = 3, p: float = 0.15) -> nn.Sequential:
    """Pictures (rows, n_channels, h, w) to one logit each, (rows, 1); h and w at least 16 with three blocks.

    Spectrally normalised convolutions with dropout, self-attention among them (Miyato et al., arXiv:1802.05957).
    """

    def conv(ni: int, width: int, stride: int) -> ConvLayer:
        return ConvLayer(ni, width, 4 if stride == 2 else 3, stride, padding=1, norm="spectral", act_cls=_leaky)

    layers: list[nn.Module] = [conv(n_channels, nf, 2), nn.Dropout2d(p / 2), conv(nf, nf, 1), nn.Dropout2d(p)]
    for i in range(n_blocks):
        layers += [SelfAttention(nf)] if i == 0 else []
        layers += [conv(nf, nf * 2, 2), nn.Dropout2d(p)]
        nf *= 2
    head = nn.utils.parametrizations.spectral_norm(nn.Linear(nf, 1))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)


def _leaky() -> nn.Module:
    return nn.LeakyReLU(0.2, inplace=True)
