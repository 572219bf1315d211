"""New pictures like those there are: the recipe `digits_gan`, a generator and a critic that train against each other."""

import zlib
from functools import partial
from pathlib import Path

import numpy as np
import torch
from pydantic import PositiveFloat, PositiveInt

from blocks import DataBlock, ImageBlock, Normalize, PILImageBW, RandomSplitter, RegressionBlock, Resize, get_image_files
from blocks.dataloaders import DataLoaders
from pipelines.picture_sets import digits_folder
from pipelines.settings import BatchSize
from training import Recipe, Schedule, flat_cos, recipe
from training.gan import (
    FixedGANSwitcher,
    GANLearner,
    PixelDistance,
    basic_critic,
    bce_crit_loss,
    bce_gen_loss,
    gan_generator,
)

SIZE = 8  # the side of the pictures that there are, in pixels
NOISE = 16  # numbers from which a picture is made


def noise_of(file: Path) -> list[float]:
    """Normal numbers that follow from a file's name: what the generator makes its counterpart of."""
    return np.random.default_rng(zlib.crc32(file.name.encode())).standard_normal(NOISE).tolist()


@recipe
def digits_gan(
    *,
    width: PositiveInt = 32,
    lr: PositiveFloat = 1e-3,
    schedule: Schedule = flat_cos(60),
    batch_size: BatchSize = 64,
    seed: int = 42,
) -> Recipe:
    """Handwritten digits that nobody wrote: a generator of 8x8 pictures, from 16 numbers each. Its figure: pixel_distance.

    width: of the generator's and the critic's layers. seed: of the order and the weights.
    """
    block = DataBlock(
        blocks=(RegressionBlock(NOISE), ImageBlock(PILImageBW)),
        get_items=get_image_files,
        get_x=noise_of,
        splitter=RandomSplitter(0.2, seed=42),
        item_tfms=Resize(SIZE),
        batch_tfms=Normalize((0.5,), (0.5,)),
    )
    return Recipe(
        block=block,
        source=digits_folder,
        learner=partial(_learner, width=width),
        lr=lr,
        schedule=schedule,
        batch_size=batch_size,
        seed=seed,
    )


def _learner(dls: DataLoaders, width: int) -> GANLearner:
    return GANLearner(
        dls,
        gan_generator(size=SIZE, n_channels=1, noise=NOISE, width=width),
        basic_critic(SIZE, 1, n_features=width),
        bce_gen_loss,
        bce_crit_loss,
        FixedGANSwitcher(1, 1),
        switch_eval=False,
        opt_func=partial(torch.optim.Adam, betas=(0.5, 0.9)),
        metrics=PixelDistance(),
    )
