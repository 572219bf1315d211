"""A folder of a person's photos works untouched: of any size, turned by EXIF, CMYK, palettes, 16 bits, grey, one broken."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from blocks.errors import DataError
from pipelines import image_dataloaders, vision_learner
from training import load_predictor


def photo(draw: np.random.Generator, dark: bool) -> Image.Image:
    """A picture of any size, dark or light."""
    height, width = draw.integers(9, 260, 2)
    low, high = (0, 90) if dark else (160, 256)
    return Image.fromarray(draw.integers(low, high, (height, width, 3), dtype=np.uint8))


def turned(image: Image.Image, file: Path) -> None:
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(file.with_suffix(".jpg"), exif=exif)


def with_transparency(image: Image.Image, file: Path) -> None:
    image.quantize(16).save(file.with_suffix(".png"), transparency=0)


def of_16_bits(image: Image.Image, file: Path) -> None:
    Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257).save(file.with_suffix(".png"))


def saved(mode: str, ending: str) -> Callable[[Image.Image, Path], None]:
    return lambda image, file: image.convert(mode).save(file.with_suffix(ending))


KINDS: list[Callable[[Image.Image, Path], None]] = [
    turned,
    with_transparency,
    of_16_bits,
    *(saved("CMYK", ".jpg"), saved("L", ".jpeg"), saved("LA", ".png"), saved("RGBA", ".png"), saved("1", ".tiff")),
    *(saved("P", ".gif"), saved("RGB", ".webp"), saved("RGB", ".bmp"), saved("RGB", ".JPG")),
]


def write_photos(folder: Path, number: int) -> None:
    draw = np.random.default_rng(0)
    for i in range(number):
        file = folder / ("dark", "light")[i % 2] / f"photo {i}"
        file.parent.mkdir(parents=True, exist_ok=True)
        KINDS[i // 2 % len(KINDS)](photo(draw, dark=i % 2 == 0), file)
    whole = next(iter((folder / "light").glob("*.jpg")))
    (folder / "light" / "half a photo.jpg").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    (folder / "light" / "notes.txt").write_text("not a picture")


@pytest.mark.parametrize("number", [24, pytest.param(2000, marks=pytest.mark.slow)])
def test_photos_of_every_kind(number: int, tmp_path: Path) -> None:
    photos = tmp_path / "my photos"
    write_photos(photos, number)
    settings: dict[str, Any] = {"size": 32, "batch_size": 8}
    with pytest.raises(DataError, match=r"half a photo\.jpg"):
        image_dataloaders(photos, **settings)
    dls = image_dataloaders(photos, max_bad_rows=1, **settings)
    assert dls.prepared is not None
    assert dls.prepared.rows == number
    (bad,) = dls.prepared.index["bad_rows"]
    assert bad["id"].endswith("half a photo.jpg")
    learn = vision_learner(dls, "shufflenet_v2_x0_5", lin_ftrs=[8], precision="fp32")
    learn.fit(1)
    predictor = load_predictor(learn.export(tmp_path / "export"))
    files = sorted((photos / "dark").iterdir())[:12]
    assert len(predictor.predict(files)) == len(files)
