"""Exports: what is predicted before is predicted after, nothing but data is written, nothing but data is read."""

import contextlib
import copy
import dataclasses
import functools
import hashlib
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from blocks import (
    CategoryBlock,
    DataBlock,
    DataLoaders,
    FlipItem,
    ImageBlock,
    ItemGetter,
    MaskBlock,
    MultiCategoryBlock,
    Pipeline,
    PointBlock,
    RandomResizedCrop,
    RandomSplitter,
    RandTransform,
    RegressionBlock,
    Resize,
    TensorImage,
    TensorMask,
    TensorNumber,
    TensorPoint,
    Transform,
    get_image_files,
    parent_label,
)
from blocks.errors import UnreadableRow, UserError
from blocks.tensors import as_plain
from blocks.transform import registered_name
from training import (
    Learner,
    Predictor,
    accuracy,
    body_and_head,
    load_learner,
    load_predictor,
    model_builder,
    torchvision_classifier,
)
from training.models import BUILDERS, ModelSpec


@model_builder
def little(*, width: int, n_out: int = 3) -> nn.Module:
    """A small convolutional classifier with running statistics."""
    return nn.Sequential(
        nn.Conv2d(3, width, 3, stride=2),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, n_out),
    )


@pytest.fixture
def learn(few_digits: Path, digits_block: DataBlock) -> Learner:
    """A Learner of few digits that has trained a little."""
    learn = Learner(digits_block.dataloaders(few_digits, batch_size=16), little(width=4), lr=0.01, metrics=accuracy)
    learn.fit(1)
    return learn


@pytest.fixture
def exported(learn: Learner, tmp_path: Path) -> Path:
    return learn.export(tmp_path / "exported")


def valid_files(learn: Learner, root: Path) -> list[Path]:
    return [root / row_id for batch in learn.dls.valid for row_id in batch.ids]


def rewritten(folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """The export with its JSON changed in place."""
    file = folder / "learner.json"
    spec = json.loads(file.read_text())
    change(spec)
    file.write_text(json.dumps(spec))
    return folder


def test_the_predictor_says_what_the_learner_says(learn: Learner, exported: Path, few_digits: Path) -> None:
    expected, targets = learn.get_preds()
    files = valid_files(learn, few_digits)
    predictor = load_predictor(exported)
    torch.testing.assert_close(predictor.probabilities(files), expected, rtol=0, atol=1e-6)
    assert [few_digits / learn.dls.vocab[int(t)] for t in targets] == [file.parent for file in files]
    predicted = predictor.predict(files)
    assert [p.label for p in predicted] == [learn.dls.vocab[int(row.argmax())] for row in expected]
    for prediction, row in zip(predicted, expected, strict=True):
        assert list(prediction.probabilities) == ["0", "1", "2"]
        assert list(prediction.probabilities.values()) == pytest.approx(row.tolist(), abs=1e-6)
        assert prediction.probability == max(prediction.probabilities.values())
    assert len({p.probability for p in predicted}) > 1


@pytest.mark.parametrize("item_tfms", [RandomResizedCrop(16), [Resize(16), FlipItem()]], ids=["stored files", "stored pixels"])
def test_steps_of_each_epoch_are_exported(few_digits: Path, digits_block: DataBlock, tmp_path: Path, item_tfms: Any) -> None:
    """Outside training they are steady, and what follows them has to run for a prediction."""
    dls = replace(digits_block, item_tfms=item_tfms).dataloaders(few_digits, batch_size=16)
    learn = Learner(dls, little(width=8, n_out=len(dls.vocab)))
    learn.export(tmp_path / "exported")
    files = valid_files(learn, few_digits)
    probabilities = load_predictor(tmp_path / "exported").probabilities(files)
    learn.model.eval()
    with torch.no_grad():
        expected = torch.cat([learn.model(as_plain(dls.batch_tfms(b[0]))).softmax(1) for b in dls.valid])
    torch.testing.assert_close(probabilities, expected)


def test_paths_bytes_and_one_by_one_are_the_same(learn: Learner, exported: Path, few_digits: Path) -> None:
    files = valid_files(learn, few_digits)[:5]
    predictor = load_predictor(exported)
    at_once = predictor.probabilities(files)
    for items in ([str(f) for f in files], [f.read_bytes() for f in files]):
        assert torch.equal(predictor.probabilities(items), at_once)
    torch.testing.assert_close(torch.cat([predictor.probabilities([f]) for f in files]), at_once)


def test_nothing_to_predict_and_what_is_no_picture(exported: Path, tmp_path: Path) -> None:
    predictor = load_predictor(exported)
    assert predictor.predict([]) == []
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(UnreadableRow):
        predictor.predict([tmp_path / "text.png"])


def test_the_folder_holds_data_only(learn: Learner, exported: Path) -> None:
    assert sorted(f.name for f in exported.iterdir()) == ["learner.json", "model.safetensors"]
    weights = safetensors.torch.load_file(exported / "model.safetensors")
    assert weights.keys() == learn.model.state_dict().keys()
    assert json.loads((exported / "learner.json").read_text())["model"] == {
        "builder": registered_name(little),
        "arguments": {"width": 4},
    }


def test_exporting_leaves_the_learner_as_it_was(learn: Learner, exported: Path) -> None:
    before = learn.validate()
    learn.export(exported)
    assert learn.validate() == before


def test_an_export_loads_in_a_process_that_knows_only_the_library(
    few_digits: Path, digits_block: DataBlock, tmp_path: Path
) -> None:
    model = torchvision_classifier(arch="shufflenet_v2_x0_5", n_out=3)
    learn = Learner(digits_block.dataloaders(few_digits, batch_size=30), model, splitter=body_and_head)
    learn.fit(1)
    folder, files = learn.export(tmp_path / "exported"), valid_files(learn, few_digits)
    code = (
        "import json, sys; from training import load_predictor; "
        "print(json.dumps(load_predictor(sys.argv[1]).probabilities(sys.argv[2:]).tolist())); assert 'ray' not in sys.modules"
    )
    command = [sys.executable, "-W", "error", "-c", code, str(folder), *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(torch.tensor(json.loads(done.stdout)), learn.get_preds()[0], rtol=0, atol=1e-5)


# --- what cannot be exported -------------------------------------------------------------------------------------------


def assert_not_exported(learn: Learner, folder: Path, because: str) -> None:
    with pytest.raises(ValueError, match=because):
        learn.export(folder)
    assert not folder.exists()


def test_a_model_without_a_builder_is_not_exported(learn: Learner, tmp_path: Path) -> None:
    learn.model = nn.Sequential(nn.Flatten(), nn.Linear(768, 3))
    assert_not_exported(learn, tmp_path / "no", "Sequential was not made by a registered builder.*@training.model_builder")


def test_a_builder_given_code_is_not_exported(learn: Learner, tmp_path: Path) -> None:
    @model_builder
    def given_code(*, layer: Any) -> nn.Module:
        return nn.Sequential(nn.Flatten(), layer(768, 3))

    try:
        learn.model = given_code(layer=nn.Linear)
        assert_not_exported(learn, tmp_path / "no", "given_code")
    finally:
        BUILDERS.pop(registered_name(given_code))


def test_a_function_as_transform_is_not_exported(few_digits: Path, tmp_path: Path) -> None:
    def darker(image: Any) -> Any:
        return image.point(lambda v: v // 2) if hasattr(image, "point") else image

    block = DataBlock(
        blocks=(ImageBlock(), CategoryBlock()),
        get_items=get_image_files,
        get_y=parent_label,
        splitter=RandomSplitter(0.25, seed=1),
        item_tfms=[darker, Resize(16)],
    )
    learn = Learner(block.dataloaders(few_digits, batch_size=16), little(width=4))
    assert_not_exported(learn, tmp_path / "no", "the function 'darker' is code.*subclass of Transform")


def test_a_loss_of_ones_own_is_not_exported(learn: Learner, tmp_path: Path) -> None:
    learn.loss_func = nn.functional.cross_entropy
    assert_not_exported(learn, tmp_path / "no", "is not one of the losses an export can name: CrossEntropyLossFlat")


def test_data_without_a_block_is_not_exported(learn: Learner, tmp_path: Path) -> None:
    learn.dls = DataLoaders(list(learn.dls.train), list(learn.dls.valid))
    assert_not_exported(learn, tmp_path / "no", "the data was not made from a DataBlock")


# --- what is not loaded ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "because"),
    [
        (lambda spec: spec.update(format=4), "has format 4; this version of fastray reads 3"),
        (lambda spec: spec.pop("format"), "has format None"),
        (lambda spec: spec.update(loss={"name": "os.system"}), "names the loss 'os.system'; known: CrossEntropyLossFlat"),
        (lambda spec: spec["model"].update(builder="os.system"), "unknown model builder 'os.system'; known: .*little"),
        (lambda spec: spec["model"].update(arguments={"depth": 4}), "depth"),
        (lambda spec: spec["item_tfms"].append({"name": "os:system"}), "unknown transform 'os:system'"),
        (
            lambda spec: spec["batch_tfms"].insert(0, {"name": "FunctionTransform", "function": "os.system"}),
            "FunctionTransform",
        ),
        (lambda spec: spec["inputs"][0]["tfms"][0].update(command="ls"), "OpenImage has the fields"),
        (lambda spec: spec["model"]["arguments"].update(width=5), "do not fit its model"),
        (lambda spec: spec.pop("targets"), "targets"),
        (lambda spec: spec["targets"][0].update(type="os.system"), "unknown tensor type"),
        (lambda spec: spec.update(sha256="0" * 64), "is not the file that was exported"),
        (lambda spec: spec["model"].update(builder=["little"]), "unhashable"),
        (lambda spec: spec.update(inputs=17), "int"),
        (lambda spec: spec.update(model={"program": True}), "is a program, which is code.*trust"),
        (
            lambda spec: spec["model"].update(builder="no_such_package.models:build"),
            "asks for 'no_such_package.models:build', code of the module .*trust=.'no_such_package',",
        ),
    ],
)
def test_an_export_that_asks_for_something_else_is_refused(
    exported: Path, change: Callable[[dict[str, Any]], Any], because: str
) -> None:
    with pytest.raises(UserError, match=because):
        load_predictor(rewritten(exported, change))


def test_weights_of_another_model_are_refused(exported: Path) -> None:
    """Even where whoever changed them wrote their hash down, too."""
    safetensors.torch.save_file(little(width=7).state_dict(), exported / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.safetensors is not the file that was exported: its sha256 differs"):
        load_predictor(exported)
    content = (exported / "model.safetensors").read_bytes()
    rewritten(exported, lambda spec: spec.update(sha256=hashlib.sha256(content).hexdigest()))
    with pytest.raises(UserError, match=r"do not fit its model: (.|\n)*size mismatch"):
        load_predictor(exported)


@pytest.mark.parametrize("missing", ["learner.json", "model.safetensors"])
def test_an_export_with_a_file_missing_is_refused(exported: Path, missing: str) -> None:
    (exported / missing).unlink()
    with pytest.raises(UserError, match=f"is not an exported model: {missing} is not there"):
        load_predictor(exported)


@pytest.mark.parametrize("name", ["learner.json", "model.safetensors"])
def test_a_file_that_lies_elsewhere_is_refused(exported: Path, tmp_path: Path, name: str) -> None:
    (exported / name).rename(tmp_path / "elsewhere")
    (exported / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=rf"{name} is a link that leads out of the folder, to .*elsewhere"):
        load_predictor(exported)


def test_a_description_nested_without_end_is_refused(exported: Path) -> None:
    (exported / "learner.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="cannot be used"):
        load_predictor(exported)


def test_a_path_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not an exported model"):
        load_predictor(tmp_path / "nowhere")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\ud83d"], ids=["empty", "cut", "list", "null", "no utf-8"])
def test_a_file_that_is_no_description_is_refused(exported: Path, text: str) -> None:
    (exported / "learner.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(UserError, match="export"):
        load_predictor(exported)


class Bomb:
    """Unpickled, it makes a folder."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


def test_a_pickle_in_place_of_the_weights_runs_nothing(exported: Path, tmp_path: Path) -> None:
    bomb = pickle.dumps(Bomb(tmp_path / "made"))
    weights = exported / "model.safetensors"
    weights.write_bytes(bomb)
    with pytest.raises(Exception):  # noqa: B017, PT011  which one is the next test's matter
        load_predictor(exported)
    torch.save(Bomb(tmp_path / "made"), weights)
    with pytest.raises(Exception):  # noqa: B017, PT011
        load_predictor(exported)
    assert not (tmp_path / "made").exists()
    pickle.loads(bomb)  # noqa: S301  the bomb is a real one
    assert (tmp_path / "made").exists()


@pytest.mark.parametrize("content", [b"", b"no weights at all", pickle.dumps([1])], ids=["empty", "text", "pickle"])
def test_a_file_that_holds_no_weights_is_refused(exported: Path, content: bytes) -> None:
    (exported / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="export"):
        load_predictor(exported)


# --- code that is trusted ------------------------------------------------------------------------------------------------


def test_modules_named_by_an_export_are_imported_where_they_are_trusted(
    learn: Learner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a builder and of a transform; only by who loads it, and nothing else of that name."""
    package = tmp_path / "code" / "petkit"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "models.py").write_text(
        "from torch import nn\nfrom training import model_builder\n"
        "@model_builder\ndef flat(*, n: int) -> nn.Module:\n    return nn.Sequential(nn.Flatten(), nn.Linear(768, n))\n"
    )
    (package / "tfms.py").write_text(
        "import dataclasses\nfrom blocks import TensorImage, Transform\n"
        "@dataclasses.dataclass\nclass Darker(Transform):\n    by: float = 0.5\n"
        "    def encodes(self, x: TensorImage) -> TensorImage:\n        return x * self.by\n"
    )
    monkeypatch.syspath_prepend(tmp_path / "code")
    from petkit.models import flat
    from petkit.tfms import Darker

    learn.model = flat(n=3)
    learn.dls = dataclasses.replace(learn.dls, batch_tfms=learn.dls.batch_tfms + Pipeline.of(Darker(0.25)))
    expected, _ = learn.get_preds()
    folder, items = learn.export(tmp_path / "exported"), list(map(str, valid_files(learn, few_digits_of(learn))))
    code = (
        "import json, sys; from training import load_predictor; folder, trust, *items = sys.argv[1:]; "
        "print(json.dumps(load_predictor(folder, trust=(trust,)).probabilities(items).tolist()))"
    )
    path = f"{tmp_path / 'code'}:{os.environ.get('PYTHONPATH', '')}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [sys.executable, "-c", code, str(folder), "petkit", *items]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(torch.tensor(json.loads(done.stdout)), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("trust", [(), ("wav",), ("wave.other",), ("",)])
def test_trust_is_in_whole_names(exported: Path, trust: tuple[str, ...]) -> None:
    """A module of Python's that nothing here has imported stands for a stranger's."""
    assert "wave" not in sys.modules
    folder = rewritten(exported, lambda spec: spec["model"].update(builder="wave:open"))
    with pytest.raises(UserError, match=r"asks for 'wave:open', code of the module 'wave': .* trust=\('wave',\)"):
        load_predictor(folder, trust=trust)
    assert "wave" not in sys.modules


def few_digits_of(learn: Learner) -> Path:
    return Path(learn.dls.plan_text.split(" of ")[1].splitlines()[0])


def test_a_program_is_loaded_where_programs_are_trusted(learn: Learner, tmp_path: Path, few_digits: Path) -> None:
    learn.model = nn.Sequential(nn.Flatten(), nn.Linear(768, 3))  # no builder made it
    files = valid_files(learn, few_digits)
    folder = learn.export(tmp_path / "program", program=True)
    assert sorted(f.name for f in folder.iterdir()) == ["learner.json", "model.pt2"]
    with pytest.raises(UserError, match=r"is a program, which is code: if you trust .* trust=\('torch\.export',\)"):
        load_predictor(folder)
    predictor = load_predictor(folder, trust=("torch.export",))
    torch.testing.assert_close(predictor.probabilities(files), learn.get_preds()[0])
    assert predictor.predict(files[:1])[0].label == predictor.predict(files)[0].label


# --- other targets ----------------------------------------------------------------------------------------------------------


def of_points(*blocks: Any, get_y: Any, n_out: int, **settings: Any) -> Learner:
    """A Learner of 40 rows of two numbers, whose target `get_y` makes."""
    generator = torch.Generator().manual_seed(0)
    items = [tuple(map(float, row)) for row in torch.randn(40, 2, generator=generator).tolist()]
    block = DataBlock(blocks=(RegressionBlock(2), *blocks), get_y=get_y, splitter=RandomSplitter(0.25, seed=1), **settings)
    return Learner(block.dataloaders(items, batch_size=8), linear(n_in=2, n_out=n_out), lr=0.1)


@model_builder
def linear(*, n_in: int, n_out: int) -> nn.Module:
    return nn.Linear(n_in, n_out)


def signs(item: tuple[float, float]) -> list[str]:
    return [name for name, x in zip(("left", "right"), item, strict=True) if x > 0]


def total(item: tuple[float, float]) -> float:
    return sum(item)


def test_several_labels_an_item(tmp_path: Path) -> None:
    learn = of_points(MultiCategoryBlock(), get_y=signs, n_out=2)
    learn.fit(10)
    predictor = load_predictor(learn.export(tmp_path / "exported"))
    items = [(1.5, -1.5), (1.5, 1.5), (-1.5, -1.5)]
    found = predictor.predict(items)
    assert [list(p.label) for p in found] == [["left"], ["left", "right"], []]
    assert found[0].probability is None
    assert list(found[0].probabilities) == ["left", "right"]
    assert found[0].probabilities["left"] > 0.5 > found[0].probabilities["right"]
    expected = torch.sigmoid(learn.model(torch.tensor(items))).detach()
    torch.testing.assert_close(predictor.activations(items), expected)


def test_numbers(tmp_path: Path) -> None:
    learn = of_points(RegressionBlock(), get_y=total, n_out=1)
    learn.fit(30)
    predictor = load_predictor(learn.export(tmp_path / "exported"))
    (one,) = predictor.predict([(0.5, 0.25)])
    assert isinstance(one.label, float)
    assert one.label == pytest.approx(0.75, abs=0.2)
    assert (one.probability, one.probabilities) == (None, {})
    learn = of_points(RegressionBlock(2), get_y=list, n_out=2)
    (two,) = load_predictor(learn.export(tmp_path / "two")).predict([(0.5, 0.25)])
    assert two.label == pytest.approx(learn.model(torch.tensor([0.5, 0.25])).tolist())


def thresholded(file: Path) -> Any:
    return (np.asarray(Image.open(file)) > 100).astype(np.uint8)


def corner(file: Path) -> list[tuple[float, float]]:
    return [(2.0, 6.0)]


@model_builder
def a_layer(*, n_out: int, pool: bool) -> nn.Module:
    pooled = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Unflatten(1, (-1, 2))] if pool else []
    return nn.Sequential(nn.Conv2d(3, n_out, 1), *pooled)


def test_masks_and_points(few_digits: Path, tmp_path: Path) -> None:
    block = DataBlock(
        blocks=(ImageBlock(), MaskBlock(("paper", "ink"))),
        get_items=get_image_files,
        get_y=thresholded,
        splitter=RandomSplitter(0.25, seed=1),
    )
    learn = Learner(block.dataloaders(few_digits, batch_size=16), a_layer(n_out=2, pool=False), lr=0.3)
    learn.fit(4)
    file = get_image_files(few_digits)[0]
    (mask,) = load_predictor(learn.export(tmp_path / "mask")).predict([file])
    assert isinstance(mask.label, TensorMask)
    assert mask.activations.shape == (2, 8, 8)
    assert float((np.asarray(mask.label) == thresholded(file)).mean()) > 0.9
    assert mask.probability is None

    block = dataclasses.replace(block, blocks=(ImageBlock(), PointBlock()), get_y=corner)
    learn = Learner(block.dataloaders(few_digits, batch_size=16), a_layer(n_out=2, pool=True))
    (points,) = load_predictor(learn.export(tmp_path / "points")).predict([file])
    assert isinstance(points.label, TensorPoint)
    assert points.label.shape == (1, 2)


def test_many_items_are_predicted_in_batches(exported: Path, learn: Learner, few_digits: Path) -> None:
    files, rows = valid_files(learn, few_digits), []
    predictor = load_predictor(exported)
    predictor.model.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    at_once = predictor.predict(files)
    assert rows == [len(files)]
    rows.clear()
    assert [p.label for p in predictor.predict(files, batch_size=8)] == [p.label for p in at_once]
    assert max(rows) == 8
    assert sum(rows) == len(files)


def test_several_inputs(tmp_path: Path) -> None:
    items = [((float(i), 1.0), (float(-i), 2.0), i % 2) for i in range(40)]
    block = DataBlock(
        blocks=(RegressionBlock(2), RegressionBlock(2), CategoryBlock()),
        n_inp=2,
        getters=[ItemGetter(0), ItemGetter(1), ItemGetter(2)],
        splitter=RandomSplitter(0.25, seed=1),
    )
    learn = Learner(block.dataloaders(items, batch_size=8), added(n_out=2))
    learn.fit(1)
    predictor = load_predictor(learn.export(tmp_path / "exported"))
    given = [(i[0], i[1]) for i in items[:3]]
    expected = learn.model(*(torch.tensor(column) for column in zip(*given, strict=True))).softmax(dim=1).detach()
    torch.testing.assert_close(predictor.activations(given), expected)
    with pytest.raises(UserError, match="an item has 2 inputs, not 3"):
        predictor.predict([items[0]])


@model_builder
def added(*, n_out: int) -> nn.Module:
    class Added(nn.Linear):
        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return super().forward(a + 2 * b)

    return Added(2, n_out)


def test_tied_weights_are_exported(learn: Learner, tmp_path: Path) -> None:
    learn.dls = dataclasses.replace(learn.dls)
    learn.model = tied(n=768)
    torch.testing.assert_close(load_predictor(learn.export(tmp_path / "exported")).model.state_dict(), learn.model.state_dict())


@model_builder
def tied(*, n: int) -> nn.Module:
    first, second = nn.Linear(n, n), nn.Linear(n, n)
    second.weight = first.weight
    return nn.Sequential(nn.Flatten(), first, second)


def test_what_runs_in_training_only_stays_behind(learn: Learner, tmp_path: Path) -> None:
    @dataclasses.dataclass
    class Noise(RandTransform):
        def draw(self, x: Any, keys: torch.Tensor) -> torch.Tensor:
            return keys

        def encodes(self, x: TensorImage, drawn: torch.Tensor) -> TensorImage:
            return x + 1000

    before, _ = learn.get_preds()
    learn.dls = dataclasses.replace(learn.dls, batch_tfms=learn.dls.batch_tfms + Pipeline.of(Noise()))
    folder = learn.export(tmp_path / "exported")
    assert "Noise" not in (folder / "learner.json").read_text()
    assert learn.dls.train
    files = valid_files(learn, few_digits_of(learn))
    torch.testing.assert_close(load_predictor(folder).probabilities(files), before)


# --- builders ----------------------------------------------------------------------------------------------------------


def test_a_model_remembers_how_it_was_built() -> None:
    model = little(width=2, n_out=5)
    assert model.spec == ModelSpec(registered_name(little), {"width": 2, "n_out": 5})
    again = model.spec.build()
    assert [p.shape for p in again.parameters()] == [p.shape for p in model.parameters()]
    assert again.spec == model.spec


def test_a_builder_takes_no_positional_arguments() -> None:
    with pytest.raises(TypeError):
        little(2)


def test_a_builder_of_a_taken_name_does_not_stand_in_for_the_librarys() -> None:
    """Else an export of a torchvision model would be loaded as something else."""

    def torchvision_classifier(*, arch: str, n_out: int) -> nn.Module:
        return nn.Linear(1, n_out)

    original = BUILDERS["torchvision_classifier"]
    assert model_builder(torchvision_classifier)(arch="x", n_out=2).spec.builder != "torchvision_classifier"
    assert BUILDERS["torchvision_classifier"] is original


def test_an_unknown_architecture_suggests_others() -> None:
    with pytest.raises(UserError, match=r"torchvision has no classifier 'resnet8': did you mean .*'resnet18'"):
        torchvision_classifier(arch="resnet8", n_out=2)


# --- one answer ---------------------------------------------------------------------------------------------------------


def test_the_learner_predicts_the_label_that_its_export_does(few_digits: Path, tmp_path: Path) -> None:
    """Once numbers were tensors in one and floats in the other, and classes that apply a tuple and a list."""
    scaled = RegressionBlock(), {"get_y": total, "n_out": 1, "batch_tfms": Scaled()}
    for blocks, how in (
        (MultiCategoryBlock(), {"get_y": signs, "n_out": 2}),
        (RegressionBlock(), {"get_y": total, "n_out": 1}),
        (RegressionBlock(2), {"get_y": list, "n_out": 2}),
        (CategoryBlock(), {"get_y": lambda item: "up" if total(item) > 0 else "down", "n_out": 2}),
        scaled,
    ):
        learn = of_points(blocks, **how)
        learn.fit(2)
        (there,) = load_predictor(learn.export(tmp_path / "exported")).predict([(0.5, 0.25)])
        here = learn.predict((0.5, 0.25))
        assert type(here.decoded) is type(there.label)
        assert here.decoded == there.label
        torch.testing.assert_close(here.activations, there.activations)
    assert here.decoded == pytest.approx(float(here.activations) * 10)


@dataclasses.dataclass
class Scaled(Transform):
    """Targets in tenths."""

    def encodes(self, x: TensorNumber) -> TensorNumber:
        return x / 10 if x.shape[-1:] != (2,) else x

    def decodes(self, x: TensorNumber) -> TensorNumber:
        return x * 10 if x.shape[-1:] != (2,) else x


@pytest.mark.parametrize("error", [OverflowError, ZeroDivisionError, AssertionError, MemoryError, ImportError, RecursionError])
def test_whatever_fails_while_an_export_is_loaded_is_said_as_one_thing(
    exported: Path, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(**arguments: Any) -> nn.Module:
        raise error("here")

    monkeypatch.setitem(BUILDERS, registered_name(little), fails)
    with pytest.raises(UserError, match=rf"cannot be used: {error.__name__}: here"):
        load_predictor(exported)


def test_a_number_beyond_floats_is_refused(exported: Path) -> None:
    with pytest.raises(UserError, match="cannot be used: OverflowError"):
        load_predictor(rewritten(exported, lambda spec: spec.update(pad={"x": 10**400})))


def test_a_model_too_large_for_any_memory_is_refused_before_it_is_built(exported: Path) -> None:
    built: list[torch.device] = []
    original = BUILDERS[registered_name(little)]

    def noting(**arguments: Any) -> nn.Module:
        built.append(torch.empty(0).device)
        return original(**arguments)

    BUILDERS[registered_name(little)] = noting
    try:
        with pytest.raises(UserError, match="do not fit its model"):
            load_predictor(rewritten(exported, lambda spec: spec["model"]["arguments"].update(width=10**9)))
    finally:
        BUILDERS[registered_name(little)] = original
    assert built == [torch.device("meta")]


def test_fastais_name_of_loading() -> None:
    assert load_learner is load_predictor


# --- any damage ----------------------------------------------------------------------------------------------------------

ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from(
        [-1, 0, 1, 3, 7, 2**31, 2**63, 10**30, 1e308, -0.5, float("inf"), float("nan"), "", "x", "os.system", "1", [], {}]
    ),
    st.lists(st.integers(-2, 5), max_size=3),
    st.dictionaries(st.sampled_from(["name", "builder", "type", "tfms"]), st.sampled_from(["Resize", "little", 1]), max_size=2),
)


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to each value within a description."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inner:
        yield (*at, key)
        yield from places(part, (*at, key))


def loaded_or_refused(folder: Path) -> None:
    with contextlib.suppress(UserError):
        assert isinstance(load_predictor(folder), Predictor)


def test_a_description_damaged_anywhere_is_loaded_or_refused(exported: Path) -> None:
    whole = json.loads((exported / "learner.json").read_text())

    @settings(deadline=None, max_examples=150, derandomize=True)
    @given(data=st.data(), odd=ODD, gone=st.booleans())
    def damaged(data: st.DataObject, odd: Any, gone: bool) -> None:
        spec = copy.deepcopy(whole)
        *way, last = data.draw(st.sampled_from(sorted(places(spec), key=repr)))
        holder = functools.reduce(lambda part, key: part[key], way, spec)
        if gone:
            del holder[last]
        else:
            holder[last] = odd
        (exported / "learner.json").write_text(json.dumps(spec))
        loaded_or_refused(exported)

    damaged()


def test_weights_damaged_anywhere_are_loaded_or_refused(exported: Path) -> None:
    """Also where whoever damaged them wrote their hash down."""
    whole = (exported / "model.safetensors").read_bytes()
    header = int.from_bytes(whole[:8], "little") + 8

    @settings(deadline=None, max_examples=150, derandomize=True)
    @given(st.integers(0, header + 8), st.binary(min_size=1, max_size=4), st.integers(0, 4))
    def damaged(at: int, new: bytes, instead_of: int) -> None:
        content = whole[:at] + new + whole[at + instead_of :]
        (exported / "model.safetensors").write_bytes(content)
        rewritten(exported, lambda spec: spec.update(sha256=hashlib.sha256(content).hexdigest()))
        loaded_or_refused(exported)

    damaged()
