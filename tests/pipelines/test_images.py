"""Pictures from folders, patterns, functions and tables."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from blocks import (
    BBoxBlock,
    BBoxLblBlock,
    DataLoaders,
    MaskBlock,
    PointBlock,
    RegressionBlock,
    Resize,
    TensorBBox,
    TensorBBoxLabel,
    TensorCategory,
    TensorMask,
    TensorPoint,
)
from blocks.errors import UserError
from pipelines import image_dataloaders, unet_learner, vision_learner
from training import load_predictor


def number_of(path: Path) -> str:
    return "even" if int(path.stem) % 2 == 0 else "odd"


def of_batch(dls: DataLoaders) -> tuple[Any, Any]:
    x, y = next(iter(dls.train))
    return x, y


@pytest.mark.parametrize(
    ("label", "classes"),
    [(None, ("0", "1", "2")), (r"/(\d)/\d+\.png$", ("0", "1", "2")), (number_of, ("even", "odd"))],
    ids=["folder", "pattern", "function"],
)
def test_labels_of_files(few_digits: Path, label: Any, classes: tuple[str, ...]) -> None:
    dls = image_dataloaders(few_digits, label=label, size=16, batch_size=8)
    assert dls.vocab == classes
    assert of_batch(dls)[0].shape == (8, 3, 20, 20)  # presized
    assert dls.one_batch()[0].shape == (8, 3, 16, 16)
    assert dls.one_batch(0)[0].shape == (8, 3, 16, 16)


def test_folders_for_training_and_validation(few_digits: Path, tmp_path: Path) -> None:
    for part in ("train", "valid"):
        (tmp_path / "both" / part).mkdir(parents=True)
    for folder in few_digits.iterdir():
        for i, file in enumerate(sorted(folder.iterdir())):
            new = tmp_path / "both" / ("valid" if i < 5 else "train") / folder.name / file.name
            new.parent.mkdir(exist_ok=True)
            new.write_bytes(file.read_bytes())
    dls = image_dataloaders(tmp_path / "both", size=16)
    assert (dls.valid.n, dls.train.n) == (15, 105)  # type: ignore[attr-defined]


@pytest.fixture
def table(few_digits: Path) -> pd.DataFrame:
    files = sorted(few_digits.rglob("*.png"))
    digits = [int(f.parent.name) for f in files]
    return pd.DataFrame(
        {
            "name": [f.relative_to(few_digits).with_suffix("").as_posix() for f in files],
            "digit": [f"d{d}" for d in digits],
            "tags": [("even " if d % 2 == 0 else "") + f"d{d}" for d in digits],
            "value": [float(d) for d in digits],
            "half": [d / 2 for d in digits],
            "held": [i % 4 == 0 for i in range(len(files))],
        }
    )


def test_a_table_and_a_csv_file_beside_the_pictures(table: pd.DataFrame, few_digits: Path, tmp_path: Path) -> None:
    dls = image_dataloaders(table, folder=few_digits, suffix=".png", valid="held", size=16, batch_size=8)
    assert dls.vocab == ("d0", "d1", "d2")
    assert dls.valid.n == 30  # type: ignore[attr-defined]
    home = tmp_path / "home_of_csv"
    home.mkdir()
    (home / "pictures").symlink_to(few_digits)
    table.assign(name="pictures/" + table["name"] + ".png").to_csv(home / "labels.csv", index=False)
    from_file = image_dataloaders(home / "labels.csv", label="digit", valid="held", size=16, batch_size=8)
    assert from_file.vocab == dls.vocab
    assert torch.equal(of_batch(from_file)[0], of_batch(dls)[0])


def test_several_labels_and_several_numbers(table: pd.DataFrame, few_digits: Path) -> None:
    settings: dict[str, Any] = {"folder": few_digits, "suffix": ".png", "valid": "held", "size": 32, "batch_size": 32}
    tagged = image_dataloaders(table, label="tags", label_delim=" ", **settings)
    assert tagged.vocab == ("d0", "d1", "d2", "even")
    learn = vision_learner(tagged, "shufflenet_v2_x0_5", precision="fp32")
    learn.fit(1)
    assert "valid/accuracy_multi" in learn.recorder.history[0]
    assert learn.get_preds()[0].shape == (30, 4)
    numbers = image_dataloaders(table, label=["value", "half"], y_block=RegressionBlock(n_out=2), **settings)
    learn = vision_learner(numbers, "shufflenet_v2_x0_5", y_range=(-0.5, 2.5), precision="fp32")
    learn.fit(1)
    assert "valid/rmse" in learn.recorder.history[0]
    assert learn.get_preds()[0].shape == (30, 2)


def test_masks_and_points_are_blocks_of_the_target(few_digits: Path, tmp_path: Path) -> None:
    def mask_of(path: Path) -> np.ndarray:
        return (np.asarray(Image.open(path)) > 99).astype(np.uint8)

    masked = image_dataloaders(few_digits, label=mask_of, y_block=MaskBlock(["paper", "ink"]), size=16, batch_size=4)
    y = masked.one_batch(0)[1]
    assert isinstance(y, TensorMask)
    assert y.shape == (4, 16, 16)

    def middle(path: Path) -> list[tuple[float, float]]:
        return [(4.0, 4.0)]

    pointed = image_dataloaders(few_digits, label=middle, y_block=PointBlock(), size=16, batch_size=4)
    assert isinstance(pointed.one_batch()[1], TensorPoint)
    assert isinstance(of_batch(image_dataloaders(few_digits, size=16))[1], TensorCategory)


def test_what_does_not_go_together_is_told(few_digits: Path) -> None:
    with pytest.raises(UserError, match="label_delim splits a column of a table"):
        image_dataloaders(few_digits, label_delim=" ")
    with pytest.raises(UserError, match="valid='held' names a column"):
        image_dataloaders(few_digits, valid="held")
    with pytest.raises(UserError, match="a function of its path, or a pattern"):
        image_dataloaders(few_digits, label=["a", "b"])


def ink_of(path: Path) -> np.ndarray:
    return (np.asarray(Image.open(path)) > 99).astype(np.uint8)


def test_masks_are_learned_from_the_picture(few_digits: Path, tmp_path: Path) -> None:
    """Where a digit is dark, from random weights; predictions survive the export."""
    settings: dict[str, Any] = {"item_tfms": Resize(32), "batch_tfms": (), "batch_size": 16}
    dls = image_dataloaders(few_digits, label=ink_of, y_block=MaskBlock(["paper", "ink"]), **settings)
    learn = unet_learner(dls, "resnet18", precision="fp32")
    learn.fit(1, 3e-3)
    assert "valid/jaccard_coeff_multi" in learn.recorder.history[-1]
    assert learn.recorder.losses[-1] < 0.6 * learn.recorder.losses[0]
    photo = next((few_digits / "1").iterdir())
    (again,) = load_predictor(learn.export(tmp_path / "export")).predict([photo])
    assert torch.equal(torch.as_tensor(np.asarray(again.label)), torch.as_tensor(np.asarray(learn.predict(photo).decoded)))


def test_boxes_and_their_labels_from_a_table(few_digits: Path) -> None:
    files = [f.relative_to(few_digits).as_posix() for f in sorted(few_digits.rglob("*.png"))]
    boxes = pd.DataFrame({"file": files, "boxes": [[[0, 0, 4, 8]]] * 120, "labels": [["left"]] * 120})
    settings: dict[str, Any] = {"folder": few_digits, "y_block": (BBoxBlock(), BBoxLblBlock()), "size": 16, "batch_tfms": ()}
    dls = image_dataloaders(boxes, label=("boxes", "labels"), item_tfms=Resize(16), batch_size=8, **settings)
    image, corners, labels = dls.one_batch()
    assert (image.shape, type(corners), type(labels)) == ((8, 3, 16, 16), TensorBBox, TensorBBoxLabel)
    torch.testing.assert_close(corners[0, 0].tolist(), [-1.0, -1.0, 0.0, 1.0])
    assert dls.vocab == ("#na#", "left")
    with pytest.raises(UserError, match="y_block has 2 blocks"):
        image_dataloaders(boxes, label="boxes", **settings)


def test_points_from_columns(few_digits: Path) -> None:
    files = [f.relative_to(few_digits).as_posix() for f in sorted(few_digits.rglob("*.png"))]
    eyes = pd.DataFrame({"file": files, "x": 2.0, "y": 4.0, "x2": 6.0, "y2": 8.0})
    settings: dict[str, Any] = {"folder": few_digits, "y_block": PointBlock(), "item_tfms": Resize(16), "batch_tfms": ()}
    dls = image_dataloaders(eyes, label=("x", "y", "x2", "y2"), batch_size=8, **settings)
    _, points = dls.one_batch()
    torch.testing.assert_close(points[0].tolist(), [[-0.5, 0.0], [0.5, 1.0]])
