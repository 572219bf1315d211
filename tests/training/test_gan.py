"""The case study: two models that train against each other by callbacks alone. It learns: a ring of Gaussians, and digits."""

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from blocks import (
    DataBlock,
    DataLoaders,
    ImageBlock,
    Normalize,
    PILImageBW,
    RandomSplitter,
    RegressionBlock,
    Resize,
    get_image_files,
)
from training import BCEWithLogitsLossFlat, Callback, Curve, Learner, MSELossFlat, Phase, load_predictor
from training.gan import (
    AdaptiveGANSwitcher,
    FixedGANSwitcher,
    GANLearner,
    PixelDistance,
    basic_critic,
    basic_generator,
    bce_crit_loss,
    bce_gen_loss,
    critic_dataloaders,
    frechet_distance,
    gan_critic,
    gan_generator,
)

AnnealedAdam = partial(torch.optim.Adam, betas=(0.5, 0.9))


def annealed(epochs: int) -> tuple[Phase, ...]:
    return (Phase(epochs, lr=Curve(((0.0, 1.0), (0.4, 1.0), (1.0, 0.02)))),)


def mlp(n_in: int, n_out: int, width: int = 64) -> nn.Module:
    hidden = [nn.Linear(n_in, width), nn.LeakyReLU(0.2), nn.Linear(width, width), nn.LeakyReLU(0.2)]
    return nn.Sequential(*hidden, nn.Linear(width, n_out))


def small_gan(*callbacks: Callback, switcher: Callback | None = None, batches: int = 6, **settings: Any) -> GANLearner:
    """A generator of points from 3 numbers, and a critic of them."""
    torch.manual_seed(1)
    real = [(torch.randn(8, 2),) for _ in range(batches)]
    settings = {"lr": 0.01, "noise": 3, **settings}
    switcher = switcher or FixedGANSwitcher(1, 1)
    losses = (bce_gen_loss, bce_crit_loss)
    return GANLearner(
        DataLoaders(real, real[:1]), mlp(3, 2, 4), mlp(2, 1, 4), *losses, switcher, callbacks=callbacks, **settings
    )


class Turns(Callback):
    """Notes which of the two changed in each step: "g", "c", "gc" or ""."""

    order = 30

    def __init__(self) -> None:
        self.seen: list[str] = []

    def before_batch(self, learn: Learner) -> None:
        self.before = [weights(part) for part in learn.model.children()]

    def after_batch(self, learn: Learner) -> None:
        if learn.training:
            now = map(weights, learn.model.children())
            changed = (not torch.equal(a, b) for a, b in zip(self.before, now, strict=True))
            self.seen.append("".join(name for name, moved in zip("gc", changed, strict=True) if moved))


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten().clone() for p in model.parameters()])


@pytest.mark.parametrize(
    ("n_crit", "n_gen", "gen_first", "turns"),
    [(1, 1, False, "cgcgcg"), (2, 1, False, "ccgccg"), (1, 2, True, "ggcggc"), (4, 1, False, "ccccgc")],
)
def test_the_two_take_turns(n_crit: int, n_gen: int, gen_first: bool, turns: str) -> None:
    seen = Turns()
    small_gan(seen, switcher=FixedGANSwitcher(n_crit, n_gen), gen_first=gen_first).fit(1)
    assert seen.seen == list(turns)


def test_turns_go_on_over_epochs() -> None:
    seen = Turns()
    small_gan(seen, switcher=FixedGANSwitcher(2, 1), batches=4).fit(2)
    assert "".join(seen.seen) == "ccgccgcc"


@pytest.mark.parametrize(
    ("gen_thresh", "critic_thresh", "turns"),
    [(None, None, "cgcgcg"), (math.inf, -math.inf, "cccccc"), (-math.inf, None, "cggggg")],
)
def test_the_turn_changes_when_a_loss_is_low(gen_thresh: float | None, critic_thresh: float | None, turns: str) -> None:
    seen = Turns()
    small_gan(seen, switcher=AdaptiveGANSwitcher(gen_thresh, critic_thresh)).fit(1)
    assert "".join(seen.seen) == turns


def test_both_losses_are_recorded_and_the_generators_is_validated() -> None:
    learn = small_gan()
    learn.fit(2)
    assert {"train/gen_loss", "train/crit_loss", "valid/loss"} <= learn.recorder.history[1].keys()
    assert learn.recorder.history[0]["valid/loss"] == pytest.approx(learn.recorder.history[0]["train/gen_loss"], rel=0.2)


def test_what_was_frozen_stays_so_and_the_rest_trains_again_afterwards() -> None:
    learn = small_gan()
    frozen = learn.model.generator[0].weight.requires_grad_(False)
    before = frozen.clone()
    learn.fit(1)
    assert torch.equal(frozen, before)
    assert [p.requires_grad for p in learn.model.parameters()].count(False) == 1


@pytest.mark.parametrize("switch_eval", [True, False])
def test_the_other_one_is_in_evaluation_mode(switch_eval: bool) -> None:
    modes: list[tuple[bool, bool, bool]] = []

    class Modes(Callback):
        def after_pred(self, learn: Learner) -> None:
            if learn.training:
                modes.append((learn.model.gen_mode, learn.model.generator.training, learn.model.critic.training))

    small_gan(Modes(), batches=2, switch_eval=switch_eval).fit(1)
    assert modes == ([(False, False, True), (True, True, False)] if switch_eval else [(False, True, True), (True, True, True)])


def test_the_noise_of_a_sample_follows_from_its_key() -> None:
    seen: list[Tensor] = []

    class Noise(Callback):
        order = -20

        def before_batch(self, learn: Learner) -> None:
            self.keys = learn.keys

        def after_loss(self, learn: Learner) -> None:
            if learn.training:
                seen.append(learn.xb[0] if learn.model.gen_mode else learn.yb[0])

    for _ in range(2):
        small_gan(Noise(), batches=2).fit(2)
    assert all(torch.equal(a, b) for a, b in zip(seen[:4], seen[4:], strict=True))
    assert len({float(s.sum()) for s in seen[:4]}) == 4
    assert seen[0].shape == (8, 3)


def test_a_wasserstein_gan_clips_the_critic_and_matches_a_gaussian() -> None:
    torch.manual_seed(0)
    real = torch.tensor([1.0, -0.5]) + torch.randn(6400, 2) * torch.tensor([0.5, 0.2])
    dls = DataLoaders([(batch,) for batch in real.split(128)])
    learn = GANLearner.wgan(
        dls, mlp(4, 2), mlp(2, 1), FixedGANSwitcher(5, 1), clip=0.1, noise=4, lr=2e-3, opt_func=torch.optim.RMSprop
    )
    learn.fit(annealed(30))
    made = learn.generate(2000)
    torch.testing.assert_close(made.mean(0), real.mean(0), atol=0.15, rtol=0)
    assert float((made.std(0) / real.std(0)).log().abs().max()) < math.log(2)
    limit = max(float(p.detach().abs().max()) for p in learn.model.critic.parameters())
    assert 0.05 < limit < 0.12  # clipped before each batch, so one step over it at most


# --- from Learners that have trained before -------------------------------------------------------------------------------


def test_a_pretrained_generator_and_critic_go_on_together() -> None:
    """Noisy points are moved to a circle; a mean square error alone leaves them inside of it."""
    torch.manual_seed(0)
    angle = torch.rand(2048) * 2 * math.pi
    clean = torch.stack([angle.cos(), angle.sin()], dim=1)
    noisy = clean + 0.7 * torch.randn_like(clean)
    dls = DataLoaders(list(zip(noisy.split(64), clean.split(64), strict=True)), [(noisy, clean)])
    gen_learn = Learner(dls, mlp(2, 2), MSELossFlat(), AnnealedAdam, lr=5e-3)
    gen_learn.fit(8)
    crit_learn = Learner(critic_dataloaders(gen_learn), mlp(2, 1), BCEWithLogitsLossFlat(), AnnealedAdam, lr=5e-3)
    crit_learn.fit(4)
    assert crit_learn.validate()["valid/loss"] < 0.35  # ln 2 is a coin's

    def off_the_circle() -> float:
        with torch.no_grad():
            return float((gen_learn.model(noisy).norm(dim=1) - 1).abs().mean())

    before, error = off_the_circle(), gen_learn.validate()["valid/loss"]
    learn = GANLearner.from_learners(gen_learn, crit_learn, weights_gen=(1.0, 2.0), opt_func=AnnealedAdam, lr=2e-3)
    assert learn.model.generator is gen_learn.model
    learn.fit(annealed(25))
    assert off_the_circle() < 0.75 * before
    assert gen_learn.validate()["valid/loss"] < 1.5 * error


def test_the_generators_loss_is_weighted() -> None:
    gen_learn = Learner(DataLoaders([(torch.zeros(2, 2), torch.ones(2, 2))]), mlp(2, 2), MSELossFlat())
    crit_learn = Learner(DataLoaders([(torch.zeros(2, 2), torch.ones(2, 1))]), mlp(2, 1), BCEWithLogitsLossFlat())
    loss = GANLearner.from_learners(gen_learn, crit_learn, weights_gen=(2.0, 3.0)).loss_func
    output, target = torch.randn(4, 2), torch.randn(4, 2)
    judged = crit_learn.model(output).detach()
    expected = 2 * nn.functional.softplus(-judged).mean() + 3 * (output - target).square().mean()
    torch.testing.assert_close(loss.generator(output, target).detach(), expected)
    real = torch.randn(4, 1)
    with torch.no_grad():
        made = crit_learn.model(gen_learn.model(target))
    expected = (nn.functional.softplus(-real).mean() + nn.functional.softplus(made).mean()) / 2
    torch.testing.assert_close(loss.critic(real, target).detach(), expected)
    with pytest.raises(ValueError, match=r"call learn\.model\.generator"):
        GANLearner.from_learners(gen_learn, crit_learn).generate(2)


def test_what_is_exported_is_the_generator(few_digits: Path, tmp_path: Path) -> None:
    block = DataBlock(
        blocks=(RegressionBlock(3), ImageBlock(PILImageBW)),
        get_items=get_image_files,
        get_x=lambda file: [float(n) for n in f"{int(file.stem):03d}"],
        splitter=RandomSplitter(0.25, seed=1),
        item_tfms=Resize(8),
        batch_tfms=Normalize((0.5,), (0.5,)),
    )
    dls = block.dataloaders(few_digits, batch_size=30)
    models = gan_generator(size=8, n_channels=1, noise=3, width=4), basic_critic(8, 1, n_features=4)
    losses = (bce_gen_loss, bce_crit_loss)
    learn = GANLearner(dls, *models, *losses, FixedGANSwitcher(1, 1), metrics=PixelDistance(), device=torch.device("cpu"))
    learn.fit(1)
    assert learn.recorder.history[0]["valid/pixel_distance"] > 0
    own = learn.predict([0.5, -1.0, 2.0])
    (again,) = load_predictor(learn.export(tmp_path / "export")).predict([[0.5, -1.0, 2.0]])
    torch.testing.assert_close(again.activations, own.activations)
    assert again.label.shape == (1, 8, 8)
    learn.show_results(4)


# --- models ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [4, 8, 32])
def test_generators_and_critics_of_pictures(size: int) -> None:
    made = basic_generator(size, 2, in_sz=5, n_features=8, n_extra_layers=1)(torch.randn(3, 5))
    assert made.shape == (3, 2, size, size)
    assert float(made.detach().abs().max()) <= 1
    assert basic_critic(size, 2, n_features=8, n_extra_layers=1)(made).shape == (3, 1)


def test_the_critic_of_larger_pictures() -> None:
    assert gan_critic(3, nf=8)(torch.randn(2, 3, 32, 32)).shape == (2, 1)
    with pytest.raises(ValueError, match="4 times a power of 2, not 12"):
        basic_generator(12, 1)
    with pytest.raises(ValueError, match="at least 1, not 0"):
        FixedGANSwitcher(0, 1)


# --- it learns ------------------------------------------------------------------------------------------------------------

ANGLES = torch.arange(8) * math.pi / 4
CENTRES = 2 * torch.stack([ANGLES.cos(), ANGLES.sin()], dim=1)
SIGMA = 0.1


def ring(n: int) -> Tensor:
    """Samples of 8 Gaussians on a circle of radius 2."""
    generator = torch.Generator().manual_seed(0)
    which = torch.randint(8, (n,), generator=generator)
    return CENTRES[which] + SIGMA * torch.randn(n, 2, generator=generator)


def ring_learned(seed: int, epochs: int, lr: float, width: int, rows: int) -> tuple[float, int]:
    """The share of 2,000 made samples within 3 sigma of a centre, and how many centres have 2 % of them there."""
    torch.manual_seed(seed)
    dls = DataLoaders([(batch,) for batch in ring(50 * rows).split(rows)])
    models = mlp(8, 2, width), mlp(2, 1, width)
    learn = GANLearner(dls, *models, bce_gen_loss, bce_crit_loss, FixedGANSwitcher(1, 1), noise=8, opt_func=AnnealedAdam, lr=lr)
    learn.fit(annealed(epochs))
    distance, nearest = torch.cdist(learn.generate(2000), CENTRES).min(dim=1)
    good = distance < 3 * SIGMA
    return float(good.double().mean()), int((torch.bincount(nearest[good], minlength=8) > 40).sum())


def test_it_learns_a_ring_of_gaussians() -> None:
    """All 8 of them, and 0.58 of the samples, measured with two seeds; which of them may hang on the last bits of a sum."""
    share, modes = ring_learned(seed=0, epochs=30, lr=5e-3, width=64, rows=128)
    assert modes >= 7
    assert share > 0.45


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_it_learns_the_ring_better_with_more_time(seed: int) -> None:
    """0.75, 0.75 and 0.82 of the samples, measured with two threads; 0.81 (of 7 Gaussians), 0.78 and 0.81 with one."""
    share, modes = ring_learned(seed, epochs=60, lr=5e-3, width=64, rows=256)
    assert modes >= 7
    assert share > 0.65


@pytest.mark.slow
def test_it_learns_digits() -> None:
    """By the Frechet distance of Gaussians fitted to the pixels: 39 for noise, 37 untrained, 2.8 trained, 0.3 real to real.

    A classifier of real digits is sure of what it sees (0.96 for real ones, 0.32 untrained, 0.75 trained), and sees all ten.
    """
    data = load_digits()
    x = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    classifier = LogisticRegression(max_iter=2000).fit(x.flatten(1).numpy(), data.target)
    torch.manual_seed(0)
    dls = DataLoaders([(batch,) for batch in x[torch.randperm(len(x))].split(64)])
    learn = GANLearner(
        dls,
        basic_generator(8, 1, in_sz=16, n_features=32),
        basic_critic(8, 1, n_features=32),
        bce_gen_loss,
        bce_crit_loss,
        FixedGANSwitcher(1, 1),
        switch_eval=False,
        noise=16,
        opt_func=AnnealedAdam,
        lr=1e-3,
    )
    learn.fit(annealed(100))
    made = learn.generate(len(x))
    probabilities = torch.tensor(classifier.predict_proba(made.flatten(1).numpy()))
    assert frechet_distance(made, x) < 6
    assert float(probabilities.amax(dim=1).mean()) > 0.65
    assert int(torch.bincount(probabilities.argmax(dim=1), minlength=10).min()) > 0.02 * len(x)
