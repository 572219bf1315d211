"""Any export becomes a model that tells its columns and loads everywhere: by address, name and alias, in a clean process."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow.pyfunc
import numpy as np
import pandas as pd
import pytest
import torch
from mlflow import MlflowClient
from torch import nn

from blocks import (
    CategoryBlock,
    ColReader,
    DataBlock,
    ImageBlock,
    MaskBlock,
    MultiCategoryBlock,
    RegressionBlock,
    Resize,
)
from blocks.errors import UserError
from cluster.elsewhere import Elsewhere
from cluster.models import load_model
from cluster.places import places
from cluster.recording import Recording
from cluster.scoring import said_of
from cluster.spool import SPOOL, append
from cluster.tracking import Tracker, start_run
from cluster.train import record_model
from training import Learner, model_builder, torchvision_classifier

pytestmark = pytest.mark.usefixtures("store")


@model_builder
def pooled(*, n_out: int) -> nn.Module:
    """A few numbers of a picture."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, n_out))


@model_builder
def rows(*, n_in: int, n_out: int) -> nn.Module:
    """A linear layer."""
    return nn.Linear(n_in, n_out)


class TwoPictures(nn.Module):
    """A score of two pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(6, 3)

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return self.net(torch.cat([a.mean((2, 3)), b.mean((2, 3))], 1))


@model_builder
def two_pictures() -> nn.Module:
    return TwoPictures()


@model_builder
def pixels(*, n_out: int) -> nn.Module:
    """A class for each pixel."""
    return nn.Conv2d(3, n_out, 1)


def table() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(rng.normal(size=(40, 2)), columns=["long", "wide"])
    return frame.assign(kind=["a", "b"] * 20, area=frame.long * frame.wide)


def first_class(path: Path) -> list[str]:
    return ["dark"] if path.parent.name == "0" else []


def one_class(few_digits: Path, block: DataBlock) -> Learner:
    return Learner(block.dataloaders(few_digits), pooled(n_out=3))


def several_classes(few_digits: Path, block: DataBlock) -> Learner:
    changed = replace(block, blocks=(ImageBlock(), MultiCategoryBlock()), get_y=first_class)
    return Learner(changed.dataloaders(few_digits), pooled(n_out=1))


def two_inputs(few_digits: Path, block: DataBlock) -> Learner:
    changed = replace(block, blocks=(ImageBlock(), ImageBlock(), CategoryBlock()), n_inp=2)
    return Learner(changed.dataloaders(few_digits), two_pictures())


def itself(path: Path) -> Path:
    return path


def a_mask(few_digits: Path, block: DataBlock) -> Learner:
    changed = replace(block, blocks=(ImageBlock(), MaskBlock()), get_y=itself, item_tfms=Resize(8), batch_tfms=())
    return Learner(changed.dataloaders(few_digits), pixels(n_out=256))


def kinds(few_digits: Path, block: DataBlock) -> Learner:
    data = DataBlock((RegressionBlock(2), CategoryBlock()), get_x=ColReader(["long", "wide"]), get_y=ColReader("kind"))
    return Learner(data.dataloaders(table()), rows(n_in=2, n_out=2))


def numbers(few_digits: Path, block: DataBlock) -> Learner:
    data = DataBlock((RegressionBlock(2), RegressionBlock(1)), get_x=ColReader(["long", "wide"]), get_y=ColReader("area"))
    return Learner(data.dataloaders(table()), rows(n_in=2, n_out=1))


def logged(learn: Learner, home: Path, recording: Recording = Recording()) -> Tracker:  # noqa: B008
    """The learner's model as a run records it."""
    folder = home / "runs" / "r"
    folder.mkdir(parents=True, exist_ok=True)
    with Tracker(folder / SPOOL, places().tracking, "tests") as tracker:
        start_run(folder / SPOOL, "r", "r", {})
        record_model(folder / SPOOL, "r", folder, learn, recording)
        append(folder / SPOOL, "end", "r", status="FINISHED")
    assert tracker.trouble is None
    return tracker


IMAGE, STRING, DOUBLE = {"type": "binary"}, {"type": "string"}, {"type": "double"}


@pytest.mark.parametrize(
    ("make", "inputs", "outputs"),
    [
        (one_class, {"image": IMAGE}, {"label": STRING, "probability": DOUBLE}),
        (several_classes, {"image": IMAGE}, {"label": {"type": "array", "items": STRING}}),
        (two_inputs, {"x0": IMAGE, "x1": IMAGE}, {"label": STRING, "probability": DOUBLE}),
        (a_mask, {"image": IMAGE}, {"label": {"type": "array", "items": {"type": "array", "items": DOUBLE}}}),
        (kinds, {"x": {"type": "array", "items": DOUBLE}}, {"label": STRING, "probability": DOUBLE}),
        (numbers, {"x": {"type": "array", "items": DOUBLE}}, {"label": DOUBLE}),
    ],
)
def test_signature_and_example_follow_the_kind(
    make: Callable[[Path, DataBlock], Learner],
    inputs: dict[str, Any],
    outputs: dict[str, Any],
    few_digits: Path,
    digits_block: DataBlock,
    own_places: Path,
) -> None:
    """Nothing in them comes from a file's name; the example, by MLflow and by `fastray predict`, gives one answer."""
    tracker = logged(make(few_digits, digits_block), own_places)
    uri = tracker.model_uri("r")
    assert uri is not None
    client = MlflowClient(places().tracking)
    model = mlflow.pyfunc.load_model(client.get_logged_model(uri.removeprefix("models:/")).artifact_location)
    for schema, expected in ((model.metadata.signature.inputs, inputs), (model.metadata.signature.outputs, outputs)):
        assert schema.to_dict() == [{**kind, "name": name, "required": True} for name, kind in expected.items()]
    answer = model.predict(model.input_example)
    assert list(answer) == list(outputs)
    (line,) = said_of(load_model(uri), next((own_places / "runs" / "r").glob("example.*")))
    if "probability" in outputs:
        assert line == f"{answer.label[0]}  {answer.probability[0]:.4f}"
    assert not [f for f in (own_places / "mlruns").rglob("*") if f.suffix in (".py", ".pkl", ".pt", ".pth")]


def test_a_registered_model(few_digits: Path, digits_block: DataBlock, own_places: Path) -> None:
    """By name and alias, and by number; a second training becomes version 2, and the alias moves there."""
    learn = one_class(few_digits, digits_block)
    recording = Recording(register="digits-model", alias="champion")
    first = logged(learn, own_places / "a", recording)
    second = logged(one_class(few_digits, digits_block), own_places / "b", recording)
    assert [t.registered("r") for t in (first, second)] == ["models:/digits-model/1", "models:/digits-model/2"]
    item = next((few_digits / "1").iterdir())
    uris = ("models:/digits-model/1", str(first.model_uri("r")), "models:/digits-model@champion", "models:/digits-model/2")
    answers = [load_model(uri).predict([item])[0].probabilities for uri in uris]
    assert answers[0] == answers[1]
    assert answers[2] == answers[3]
    assert answers[0] != answers[2]
    version = MlflowClient(places().tracking).get_model_version_by_alias("digits-model", "champion")
    assert version.run_id == second.run_id("r")
    for missing in ("models:/digits-model@nobody", "models:/digits-model/7", "models:/nothing@champion"):
        with pytest.raises(UserError, match="there is no model"):
            load_model(missing)


def test_a_clean_process_loads_it(few_digits: Path, digits_block: DataBlock, own_places: Path) -> None:
    """MLflow alone, by the address of the registry: nothing of ours is imported before."""
    # Of ours: a builder of one's own is code, which has to be imported before.
    model = torchvision_classifier(arch="shufflenet_v2_x0_5", n_out=3)
    learn = Learner(digits_block.dataloaders(few_digits), model)
    logged(learn, own_places, Recording(register="clean", alias="champion"))
    code = (
        "import json, mlflow.pyfunc\n"
        "model = mlflow.pyfunc.load_model('models:/clean@champion')\n"
        "print(json.dumps(model.predict(model.input_example).to_dict('records')))"
    )
    environment = {**os.environ, "MLFLOW_TRACKING_URI": places().tracking}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)
    assert row.keys() == {"label", "probability"}


def test_what_mlflow_would_not_take_is_said_before_the_training() -> None:
    with pytest.raises(UserError, match="say register=NAME as well"):
        Recording(alias="champion")
    with pytest.raises(UserError, match=r"register=a/b alias=: .*name"):
        Recording(register="a/b").check()
    with pytest.raises(UserError, match="alias=v1: "):
        Recording(register="a", alias="v1").check()


def test_a_fresh_process_that_has_ended_is_told_as_such() -> None:
    with Elsewhere() as elsewhere:
        elsewhere._process.kill()
        elsewhere._process.wait()
        elsewhere.tell("models:/m-1", Path("a.png"))
        with pytest.raises(RuntimeError, match="the model cannot be loaded back"):
            elsewhere.answer()


def test_no_items_for_a_model(few_digits: Path, digits_block: DataBlock, own_places: Path) -> None:
    (own_places / "items.csv").write_text("long,wide\n1,2\n")
    logged(kinds(few_digits, digits_block), own_places)
    model = load_model(str(own_places / "runs" / "r" / "export"))
    with pytest.raises(UserError, match="has no column 'x'; the model wants x"):
        said_of(model, own_places / "items.csv")
    with pytest.raises(UserError, match=r"items with x are the rows of a table \(.json, .csv, .parquet\), not '.png'"):
        said_of(model, own_places / "items.png")
