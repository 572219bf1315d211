"""Exports are data, not code: weights as safetensors, the way to build and to use the model as JSON.

    learner.json         model builder and arguments, input-side and batch transforms, class names, loss, versions
    model.safetensors    the weights

Loading builds from our own registries only: it runs no pickle and imports nothing that a file names.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

import blocks.category
import blocks.vision  # noqa: F401  registers its transforms
from blocks.dataloaders import input_tensor
from blocks.errors import UserError
from blocks.plan import Column, Encode
from blocks.tensors import as_plain
from blocks.transform import Pipeline
from training.losses import BaseLoss, loss_from_plain, loss_to_plain
from training.models import ModelSpec

if TYPE_CHECKING:
    from training.learner import Learner

FORMAT = 1
SPEC_FILE, WEIGHTS_FILE = "learner.json", "model.safetensors"


@dataclass(frozen=True)
class Prediction:
    """What the model says of one item: the most probable class, its probability, and those of all classes."""

    label: str
    probability: float
    probabilities: dict[str, float]


def export(learn: "Learner", path: str | Path) -> Path:
    """Write `learn`'s model and input side to the folder `path`. ValueError when something of it is code, not data."""
    spec = getattr(learn.model, "spec", None)
    if not isinstance(spec, ModelSpec):
        raise ValueError(
            f"{type(learn.model).__name__} was not made by a registered builder, so it cannot be built again from data: "
            "build it in a function decorated with @training.model_builder"
        )
    loss = loss_to_plain(learn.loss_func)
    if learn.dls.encode is None:
        raise ValueError("the data was not made from a DataBlock, so an export cannot know how to read an item")
    encode = learn.dls.encode
    written = {
        "format": FORMAT,
        "model": {"builder": spec.builder, "arguments": spec.arguments},
        "input": encode.columns[0].type_tfms.to_plain(),
        "item_tfms": (encode.item_tfms + encode.each_epoch).to_plain(),
        "batch_tfms": learn.dls.batch_tfms.to_plain(),
        "vocab": list(learn.dls.vocab),
        "loss": loss,
        "versions": {"torch": torch.__version__},
    }
    try:
        text = json.dumps(written, indent=1)
    except TypeError as error:
        raise ValueError(f"{spec.builder}: the model's arguments {spec.arguments!r} are not plain data: {error}") from error
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: w.detach().cpu().contiguous() for name, w in learn.model.state_dict().items()}
    safetensors.torch.save_file(weights, folder / WEIGHTS_FILE)
    (folder / SPEC_FILE).write_text(text, encoding="utf-8")
    return folder


@dataclass(frozen=True)
class Predictor:
    """An exported model, ready to predict in float32 on the CPU or where `model` was moved to."""

    model: nn.Module
    encode: Encode
    batch_tfms: Pipeline
    vocab: tuple[str, ...]
    loss: BaseLoss

    def probabilities(self, items: Sequence[Any]) -> Tensor:
        """Class probabilities (items, classes) of paths, encoded bytes, PIL images or arrays."""
        columns = [input_tensor(self.encode, item) for item in items]
        batch = self.batch_tfms(torch.stack(columns))
        with torch.no_grad():
            return self.loss.activation(self.model(as_plain(batch)))

    def predict(self, items: Sequence[Any]) -> list[Prediction]:
        """One `Prediction` an item, in their order. UnreadableRow when an item is no picture."""
        if not len(items):
            return []
        found = []
        rows = self.probabilities(items)
        if rows.shape[1] != len(self.vocab):
            raise UserError(f"the export names {len(self.vocab)} classes, but its model has {rows.shape[1]} outputs")
        for row in rows:
            best = int(row.argmax())
            named = dict(zip(self.vocab, row.tolist(), strict=True))
            found.append(Prediction(self.vocab[best], float(row[best]), named))
        return found


def load_predictor(path: str | Path) -> Predictor:
    """The predictor that `export` wrote to the folder `path`.

    UserError (a ValueError) when it is not an export, it asks for what is not registered here, or its weights
    do not fit its model.
    """
    folder = Path(path)
    if not (folder / SPEC_FILE).is_file() or not (folder / WEIGHTS_FILE).is_file():
        raise UserError(f"{str(folder)!r} is not an exported model: {SPEC_FILE} and {WEIGHTS_FILE} are not both there")
    try:
        return _predictor(folder)
    # What is read is a stranger's file: whatever is wrong with it is said as one thing.
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, SafetensorError) as error:
        raise UserError(f"the export {str(folder)!r} cannot be used: {type(error).__name__}: {error}") from error


def _predictor(folder: Path) -> Predictor:
    spec = json.loads((folder / SPEC_FILE).read_text(encoding="utf-8"))
    if spec.get("format") != FORMAT:
        raise ValueError(f"it has format {spec.get('format')!r}; this version of fastray reads {FORMAT}")
    loss = loss_from_plain(spec["loss"])
    model = ModelSpec(spec["model"]["builder"], spec["model"]["arguments"]).build()
    weights = safetensors.torch.load_file(folder / WEIGHTS_FILE)
    try:
        model.load_state_dict(weights)
    except RuntimeError as mismatch:
        raise ValueError(f"its weights do not fit its model: {mismatch}") from mismatch
    return Predictor(
        model=model.eval(),
        encode=Encode((Column("x", the_item, Pipeline.from_plain(spec["input"])),), Pipeline.from_plain(spec["item_tfms"])),
        batch_tfms=Pipeline.from_plain(spec["batch_tfms"]),
        vocab=tuple(spec["vocab"]),
        loss=loss,
    )


def the_item(item: Any) -> Any:
    return item
