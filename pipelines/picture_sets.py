"""Real pictures that packages carry, written once to the cache as image files: digits, photographs' textures, clothes."""

import gzip
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from blocks.cache import cache_folder
from blocks.errors import UserError
from pipelines.examples import package_folder


def digits_folder() -> Path:
    """scikit-learn's 1,797 handwritten digits (8x8, 0..16) as PNG files in ten class folders, written once to the cache."""

    def pictures() -> Iterator[tuple[str, np.ndarray]]:
        from sklearn.datasets import load_digits

        data = load_digits()
        for number, (pixels, label) in enumerate(zip(data.images, data.target, strict=True)):
            yield f"{label}/{number:04d}.png", (pixels * (255 / 16)).round().astype(np.uint8)

    return written_once("digits", pictures)


TEXTURES = ("brick", "grass", "gravel")


def textures_folder() -> Path:
    """192 patches of 64x64 pixels of three photographs of scikit-image, as PNG files written once to the cache.

    One folder a texture in train/, and in valid/ for the bottom quarter of each photograph. UserError without scikit-image.
    """

    def pictures() -> Iterator[tuple[str, np.ndarray]]:
        from PIL import Image

        for name in TEXTURES:
            photo = np.asarray(Image.open(photo_of(name)))
            for row in range(8):
                for column in range(8):
                    part = "valid" if row >= 6 else "train"
                    patch = photo[64 * row : 64 * (row + 1), 64 * column : 64 * (column + 1)]
                    yield f"{part}/{name}/{row}{column}.png", patch

    return written_once("textures", pictures)


FASHION = Path("/usr/share/datasets/fashion-mnist")
CLOTHES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")


def fashion_folder(source: Path = FASHION) -> Path:
    """Fashion-MNIST (Xiao et al., arXiv:1708.07747), 28x28, as PNG files written once to the cache, one folder a class.

    In train/ 5,000 of the first 10,000 pictures to train on, in valid/ the first 2,000 to test on. source: where the files of
    the Debian package are. UserError where they are not.
    """

    def pictures() -> Iterator[tuple[str, np.ndarray]]:
        chosen = np.random.default_rng(42).permutation(10_000)[:5000]
        for part, name, rows in (("train", "train", chosen), ("valid", "t10k", np.arange(2000))):
            pixels, labels = _idx(source, f"{name}-images-idx3-ubyte"), _idx(source, f"{name}-labels-idx1-ubyte")
            for row in rows:
                yield f"{part}/{CLOTHES[labels[row]]}/{row:05d}.png", pixels[row]

    return written_once("fashion", pictures)


def _idx(folder: Path, name: str) -> np.ndarray:
    # The numbers of a file in MNIST's form, of bytes: magic number, sizes, content.
    file = next(folder.rglob(f"{name}.gz"), None)
    if file is None:
        raise UserError(f"{name}.gz is not in {folder}: apt-get install dataset-fashion-mnist")
    content = gzip.decompress(file.read_bytes())
    sizes = [int.from_bytes(content[4 + 4 * i : 8 + 4 * i], "big") for i in range(content[3])]
    return np.frombuffer(content, np.uint8, offset=4 + 4 * len(sizes)).reshape(sizes)


def photo_of(name: str) -> Path:
    """The file of one of scikit-image's photographs. UserError when that is not installed."""
    return package_folder("skimage") / "data" / f"{name}.png"


def written_once(name: str, files: Callable[[], Iterator[tuple[str, np.ndarray | bytes]]]) -> Path:
    """The folder of that name in the cache, with these files in it: (path below the folder, uint8 pixels or content)."""
    folder = cache_folder() / name
    if folder.is_dir():
        return folder
    from PIL import Image

    unfinished = folder.with_name(f".{name}-{os.getpid()}")
    try:
        for file, content in files():
            path = unfinished / file
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, bytes):
                path.write_bytes(content)
            else:
                Image.fromarray(content).save(path)
        unfinished.rename(folder)
    except OSError:  # another process wrote the same meanwhile
        if not folder.is_dir():
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder
