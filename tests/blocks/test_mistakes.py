"""Mistakes in the words of a DataBlock: each is answered by what was given, what is allowed and what to write instead."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from blocks import (
    CategoryBlock,
    DataBlock,
    DataError,
    ImageBlock,
    MaskBlock,
    RandomSplitter,
    Resize,
    UnreadableRow,
    get_image_files,
    parent_label,
)
from blocks.errors import UserError
from blocks.images import OpenMask, PILImage

BLOCKS = (ImageBlock(), CategoryBlock())


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: DataBlock(ImageBlock()), r"blocks is a tuple"),  # type: ignore[arg-type]
        (lambda: DataBlock(BLOCKS, get_y="label"), r"write ColReader\('label'\)"),
        (lambda: DataBlock(BLOCKS, get_items="*.jpg"), r"get_items is a function of the source"),  # type: ignore[arg-type]
        (lambda: DataBlock(BLOCKS, splitter="random"), r"a splitter is one such as RandomSplitter"),  # type: ignore[arg-type]
        (lambda: DataBlock(BLOCKS, splitter=RandomSplitter), r"a splitter is one such as RandomSplitter"),  # type: ignore[arg-type]
    ],
)
def test_words_of_the_wrong_type(make: Callable[[], Any], said: str) -> None:
    with pytest.raises(TypeError, match=said):
        make()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"batch_size": "8"}, "batch_size is a whole number of rows, at least 1, not '8'"),
        ({"batch_size": 4.0}, "batch_size is a whole number of rows, at least 1, not 4.0"),
        ({"batch_size": 0}, "batch_size is a whole number of rows, at least 1, not 0"),
        ({"max_bad_rows": "2"}, "max_bad_rows is a whole number of rows, at least 0, not '2'"),
        ({"max_bad_rows": -1}, "max_bad_rows is a whole number of rows, at least 0, not -1"),
    ],
)
def test_settings_of_the_wrong_type(settings: dict[str, Any], said: str, digits_block: DataBlock, few_digits: Path) -> None:
    with pytest.raises(UserError, match=said):
        digits_block.dataloaders(few_digits, **settings)


def test_a_file_that_is_no_picture_is_named_without_an_address_in_memory(tmp_path: Path) -> None:
    file = tmp_path / "text.png"
    file.write_text("no picture")
    with pytest.raises(UnreadableRow, match=r"^not a readable image: of no format that PIL knows$"):
        PILImage.create(file)


def test_a_mask_with_a_class_that_codes_do_not_name(tmp_path: Path) -> None:
    for name, most in (("a", 1), ("b", 2)):
        numbers = np.zeros((8, 8), np.uint8)
        numbers[2, 3] = most
        Image.fromarray(numbers).save(tmp_path / f"{name}.png")
    block = DataBlock(
        (ImageBlock(), MaskBlock(codes=["ground", "cat"])),
        get_items=get_image_files,
        splitter=lambda items: ([0], [1]),
        item_tfms=Resize(8),
    )
    with pytest.raises(DataError, match=r"b\.png: the mask holds class 2, but codes names 2: 0 to 1"):
        block.dataloaders(tmp_path, batch_size=1)
    assert OpenMask(("ground", "cat"), div=255)(Image.fromarray(np.full((2, 2), 255, np.uint8))) is not None


def test_a_block_that_is_right_is_taken() -> None:
    assert DataBlock(BLOCKS, get_items=get_image_files, get_y=parent_label).n_inp is None
