"""Synthetic pictures, to learn where something is: shapes drawn on crops of three real photographs of scikit-image.

Nothing but the picture tells where they are: kinds, places, sizes, angles and colours are drawn at random, the same ones on
each machine. What validates lies on the bottom quarter of the photographs, which no picture to train on shows. They are written
once to the cache as the files that a person's own data would be: pictures with masks, with a CSV file, or with a Parquet file.
"""

import io
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from pipelines.picture_sets import TEXTURES, photo_of, written_once

SIDE = 64  # of a picture, in pixels
RADIUS = 8.0, 14.0  # of a shape, in pixels
CONTRAST = 60  # at least, between a shape's colour and the mean of its picture
TRAIN, VALID = 480, 120  # pictures
CORNERS = {"disk": 0, "square": 4, "triangle": 3}
KINDS = tuple(CORNERS)
CODES = ("background", *KINDS)  # of the masks


@dataclass(frozen=True)
class Shape:
    """A shape of a kind: its middle, its radius and its angle, in pixels and radians."""

    kind: str
    middle: tuple[float, float]
    radius: float
    angle: float

    def mask(self) -> np.ndarray:
        """Which pixels it covers, bool (SIDE, SIDE)."""
        layer = Image.new("1", (SIDE, SIDE))
        (x, y), r = self.middle, self.radius
        if self.kind == "disk":
            ImageDraw.Draw(layer).ellipse((x - r, y - r, x + r, y + r), fill=1)
        else:
            ImageDraw.Draw(layer).regular_polygon((x, y, r), CORNERS[self.kind], np.degrees(self.angle), fill=1)
        return np.asarray(layer)


def segments_folder() -> Path:
    """Pictures with up to three shapes, and masks: `pictures/train/grass/001.png`, `masks/train/grass/001.png`. `pictures`."""

    def files() -> Iterator[tuple[str, np.ndarray]]:
        for part, number, name, background, draw in _backgrounds(seed=1):
            picture, mask = background, np.zeros((SIDE, SIDE), np.uint8)
            for shape in _apart(draw, int(draw.integers(1, 4))):
                mask[shape.mask()] = CODES.index(shape.kind)
                picture = _painted(picture, shape, _colour(draw, background))
            yield f"pictures/{part}/{name}/{number:03d}.png", picture
            yield f"masks/{part}/{name}/{number:03d}.png", mask

    return written_once("segments", files) / "pictures"


def mask_of(picture: Path) -> Path:
    """The mask that belongs to a picture of `segments_folder`."""
    root = picture.parents[3]
    return root / "masks" / picture.relative_to(root / "pictures")


def points_table() -> Path:
    """Pictures with a light and a dark disk: a CSV file of their middles in pixels, light_x, light_y, dark_x and dark_y."""

    def files() -> Iterator[tuple[str, np.ndarray | bytes]]:
        rows = ["file,light_x,light_y,dark_x,dark_y,valid"]
        for part, number, _, background, draw in _backgrounds(seed=2):
            light, dark = _apart(draw, 2, kinds=("disk",))
            picture = _painted(_painted(background, light, np.full(3, 240.0)), dark, np.full(3, 15.0))
            rows.append(",".join(map(str, (f"{part}/{number:03d}.png", *light.middle, *dark.middle, part == "valid"))))
            yield f"{part}/{number:03d}.png", picture
        yield "points.csv", "\n".join(rows).encode()

    return written_once("points", files) / "points.csv"


def boxes_table() -> Path:
    """Pictures with up to three shapes: a Parquet file of their boxes, (left, top, right, bottom) in pixels, and labels."""

    def files() -> Iterator[tuple[str, np.ndarray | bytes]]:
        import pandas as pd

        rows = []
        for part, number, _, background, draw in _backgrounds(seed=3):
            picture, shapes = background, _apart(draw, int(draw.integers(1, 4)))
            for shape in shapes:
                picture = _painted(picture, shape, _colour(draw, background))
            boxes, labels = [_box_of(shape.mask()) for shape in shapes], [shape.kind for shape in shapes]
            rows.append({"file": f"{part}/{number:03d}.png", "boxes": boxes, "labels": labels, "valid": part == "valid"})
            yield f"{part}/{number:03d}.png", picture
        table = io.BytesIO()
        pd.DataFrame(rows).to_parquet(table, index=False)
        yield "boxes.parquet", table.getvalue()

    return written_once("boxes", files) / "boxes.parquet"


def _backgrounds(seed: int) -> Iterator[tuple[str, int, str, np.ndarray, np.random.Generator]]:
    # For each picture its part, number, the photograph's name, a tinted crop of it, and what the rest is drawn by.
    photos = {name: np.asarray(Image.open(photo_of(name)), np.float32) for name in TEXTURES}
    for part, count in (("train", TRAIN), ("valid", VALID)):
        for number in range(count):
            draw = np.random.default_rng((seed, part == "valid", number))
            name = TEXTURES[draw.integers(len(TEXTURES))]
            photo = photos[name]
            border = photo.shape[0] * 3 // 4
            rows = (border, photo.shape[0]) if part == "valid" else (0, border)
            top, left = draw.integers(rows[0], rows[1] - SIDE + 1), draw.integers(photo.shape[1] - SIDE + 1)
            crop = photo[top : top + SIDE, left : left + SIDE, None] * draw.uniform(0.5, 1, 3)
            yield part, number, name, crop.astype(np.uint8), draw


def _apart(draw: np.random.Generator, number: int, kinds: tuple[str, ...] = KINDS) -> list[Shape]:
    # So many shapes, all drawn again until none touches another one; none touches the border.
    while True:
        radii = draw.uniform(*RADIUS, number)
        middles = [draw.uniform(r + 1, SIDE - r - 1, 2) for r in radii]
        pairs = itertools.combinations(zip(middles, radii, strict=True), 2)
        if all(np.hypot(*(m - n)) > r + s + 2 for (m, r), (n, s) in pairs):
            return [
                Shape(str(draw.choice(kinds)), (float(x), float(y)), float(r), float(draw.uniform(0, np.pi)))
                for (x, y), r in zip(middles, radii, strict=True)
            ]


def _colour(draw: np.random.Generator, background: np.ndarray) -> np.ndarray:
    # One that can be seen.
    while True:
        colour = draw.uniform(0, 255, 3)
        if np.abs(colour - background.mean((0, 1))).mean() >= CONTRAST:
            return colour


def _painted(picture: np.ndarray, shape: Shape, colour: np.ndarray) -> np.ndarray:
    # The ground shines through a little.
    mask = shape.mask()[..., None]
    return np.where(mask, 0.8 * colour + 0.2 * picture, picture).astype(np.uint8)


def _box_of(mask: np.ndarray) -> list[float]:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return [float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)]
