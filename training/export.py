"""Exports are data, not code: weights as safetensors, the way to build and to use the model as JSON.

    learner.json         model builder and arguments, transforms of inputs, target and batches, loss, hash of the weights
    model.safetensors    the weights
    model.pt2            instead of them, on request: the model as a torch.export program, which is code

Loading builds from our own registries only: it runs no pickle and imports nothing that a file names. Code (the modules of
your own builders and transforms, a program) is loaded only where who loads has named it: `load_predictor(path, trust=...)`.
"""

import hashlib
import importlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from blocks.errors import UserError
from blocks.gather import collate
from blocks.plan import Column, Encode
from blocks.splits import TRAIN, VALID
from blocks.tensors import as_plain, tensor_type
from blocks.transform import Pipeline
from training.losses import BaseLoss, loss_from_plain, loss_to_plain
from training.models import ModelSpec
from training.results import Target, as_label, targets_of
from training.rnn import prediction_of

if TYPE_CHECKING:
    from training.learner import Learner

FORMAT = 3
SPEC_FILE, WEIGHTS_FILE, PROGRAM_FILE = "learner.json", "model.safetensors", "model.pt2"
PROGRAM = "torch.export"  # the name by which a program is trusted


# --- writing -----------------------------------------------------------------------------------------------------------


def export(learn: "Learner", path: str | Path, program: bool = False) -> Path:
    """Write `learn`'s model, and how items become its inputs and outputs labels, to the folder `path`.

    program: for a model that no registered builder made: traced by torch.export on a batch of the data, for any number of
    rows; whoever loads it has to trust it. ValueError when something of it is code, not data.
    """
    encode = learn.dls.encode
    if encode is None:
        raise ValueError("the data was not made from a DataBlock, so an export cannot know how to read an item")
    batch, targets = _a_batch(learn), targets_of(learn.dls, learn.target_kinds)
    if len(encode.columns) - encode.n_inp > max(1, len(targets)):
        raise ValueError(
            f"an export predicts one target, or boxes and their labels, and the data has {len(encode.columns) - encode.n_inp}"
        )
    written: dict[str, Any] = {
        "format": FORMAT,
        "model": {"program": True} if program else _spec_of(learn.model),
        "loss": loss_to_plain(learn.loss_func),
        "inputs": [{"name": c.name, "tfms": _to_predict(c.type_tfms)} for c in encode.columns[: encode.n_inp]],
        "layout": list(encode.layout[: encode.n_input_columns]),
        "item_tfms": _to_predict(encode.item_tfms) + _to_predict(encode.each_epoch),
        "pad": dict(getattr(learn.dls.valid, "pad", {})),
        "batch_tfms": _to_predict(learn.dls.batch_tfms),
        "targets": [{"type": t.kind.__name__, "tfms": t.tfms.to_plain()} for t in targets or (Target(Tensor, Pipeline()),)],
        "versions": {"torch": torch.__version__},
    }
    content = _program(learn, batch) if program else _weights(learn.model)
    written["sha256"] = hashlib.sha256(content).hexdigest()
    try:
        text = json.dumps(written, indent=1)
    except TypeError as error:
        raise ValueError(f"{written['model']} is not plain data: {error}") from error
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / (PROGRAM_FILE if program else WEIGHTS_FILE)).write_bytes(content)
    (folder / (WEIGHTS_FILE if program else PROGRAM_FILE)).unlink(missing_ok=True)  # of an export before
    (folder / SPEC_FILE).write_text(text, encoding="utf-8")
    return folder


def _spec_of(model: nn.Module) -> dict[str, Any]:
    spec = getattr(model, "spec", None)
    if not isinstance(spec, ModelSpec):
        raise ValueError(
            f"{type(model).__name__} was not made by a registered builder, so it cannot be built again from data: "
            "build it in a function decorated with @training.model_builder (or export(..., program=True), which is code)"
        )
    return {"builder": spec.builder, "arguments": spec.arguments}


def _to_predict(tfms: Pipeline) -> list[dict[str, Any]]:
    # What runs on training data only stays behind.
    return Pipeline(tuple(t for t in tfms.transforms if t.split_idx != TRAIN)).to_plain()


def _a_batch(learn: "Learner") -> Sequence[Any]:
    for batch in learn.dls.valid:
        return batch
    return next(iter(learn.dls.train))


def _weights(model: nn.Module) -> bytes:
    # Copies, because tied weights share their memory.
    return safetensors.torch.save({name: w.detach().cpu().clone().contiguous() for name, w in model.state_dict().items()})


def _program(learn: "Learner", batch: Sequence[Any]) -> bytes:
    import copy
    import io

    rows = learn.dls.batch_tfms(tuple(batch[: learn.dls.n_inp]), split_idx=VALID)
    examples = tuple(as_plain(x)[:2].cpu() for x in rows)
    model = copy.deepcopy(learn.model).cpu().eval()
    any_rows = tuple({0: torch.export.Dim("rows")} for _ in examples)
    file = io.BytesIO()
    torch.export.save(torch.export.export(model, examples, dynamic_shapes=any_rows), file)
    return file.getvalue()


# --- predicting --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prediction:
    """What the model says of one item.

    label: the target as a person reads it: a class, the list of those that apply, a number or several, a mask.
    probability: of the label, where it is one class. probabilities: of each class.
    activations: the model's output as the loss reads it. boxes, scores: of found things, whose names `label` then is: (left,
    top, right, bottom) in pixels of the item's picture, and how sure the model is.
    """

    label: Any
    probability: float | None
    probabilities: dict[str, float]
    activations: Tensor = field(compare=False, repr=False)
    boxes: list[list[float]] | None = None
    scores: list[float] | None = None


@dataclass(frozen=True)
class Predictor:
    """An exported model, ready to predict in float32 on the CPU or where `model` was moved to."""

    model: nn.Module
    encode: Encode
    batch_tfms: Pipeline
    pad: dict[str, float]
    targets: tuple[Target, ...]
    loss: BaseLoss

    @property
    def vocab(self) -> tuple[str, ...]:
        """The names of the classes, in their order; empty where the target is no class."""
        return next((t.vocab for t in self.targets[-1].tfms.transforms if hasattr(t, "vocab")), ())

    def activations(self, items: Sequence[Any]) -> Tensor:
        """The model's outputs as the loss reads them, (items, ...): probabilities of classes, or values.

        An item is what `get_x` gives: a path, encoded bytes, a PIL image or an array for a picture; a tuple for several inputs.
        """
        samples = [self._inputs(item) for item in items]
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        columns = tuple(column.to(device) for column in collate(self.encode.layout, samples, self.pad))
        batch = self.batch_tfms(columns, split_idx=VALID)
        if callable(reset := getattr(self.model, "reset", None)):
            reset()  # items are no stream
        with torch.no_grad():
            return self.loss.activation(prediction_of(self.model(*map(as_plain, batch)))).cpu()

    def probabilities(self, items: Sequence[Any]) -> Tensor:
        """Class probabilities (items, classes); `activations` of a classifier."""
        return self.activations(items)

    def predict(self, items: Sequence[Any], batch_size: int = 64) -> list[Prediction]:
        """One `Prediction` an item, in their order. UnreadableRow when an item cannot be read."""
        if isinstance(items, str | Path):
            raise TypeError(f"predict takes a list of items: predict([{str(items)!r}])")
        return [
            self._said(item, row)
            for some in (items[start : start + batch_size] for start in range(0, len(items), batch_size))
            for item, row in zip(some, self.activations(some), strict=True)
        ]

    def _inputs(self, item: Any) -> list[Tensor]:
        given = item if len(self.encode.columns) > 1 else (item,)
        if len(given) != len(self.encode.columns):
            raise UserError(f"an item has {len(self.encode.columns)} inputs, not {len(given)}")
        values = tuple(c.type_tfms(value) for c, value in zip(self.encode.columns, given, strict=True))
        return list(self.encode.flat(self.encode.item_tfms(values, split_idx=VALID)).values())

    def _said(self, item: Any, row: Tensor) -> Prediction:
        decoded = self.loss.decodes(row[None])
        decoded = tuple(d[0] for d in decoded) if isinstance(decoded, tuple) else decoded[0]
        vocab = self.vocab if row.ndim == 1 else ()
        if vocab and len(vocab) != len(row):
            raise UserError(f"the export names {len(vocab)} classes, but its model has {len(row)} outputs")
        opened = partial(self.encode.columns[0].type_tfms, item)
        label = as_label(decoded, self.targets, self.batch_tfms, self.encode.item_tfms, opened)
        if isinstance(decoded, tuple):
            boxes, names = label
            scores = row[decoded[1] > 0, -1]
            return Prediction(names, None, {}, row, boxes.tolist(), scores.tolist())
        one_class = bool(vocab) and decoded.ndim == 0
        probabilities = dict(zip(vocab, row.tolist(), strict=True)) if vocab else {}
        return Prediction(label, float(row[int(decoded)]) if one_class else None, probabilities, row)


# --- loading -----------------------------------------------------------------------------------------------------------


def load_predictor(path: str | Path, trust: Sequence[str] = ()) -> Predictor:
    """The predictor that `export` wrote to the folder `path`.

    trust: packages and modules of yours that may be imported because the export names something of them; "torch.export"
    for programs. UserError (a ValueError) when it is not an export, was changed since, asks for what is neither registered here
    nor trusted, or its weights do not fit its model.
    """
    folder = Path(path)
    try:
        return _predictor(folder, tuple(trust))
    except _NotAnExport as error:
        raise UserError(f"{str(folder)!r} is not an exported model: {error}") from None
    # What is read is a stranger's file: whatever is wrong with it is said as one thing.
    except (*DAMAGED, SafetensorError) as error:
        raise UserError(f"the export {str(folder)!r} cannot be used: {type(error).__name__}: {error}") from error


load_learner = load_predictor  # fastai's name

DAMAGED = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


class _NotAnExport(Exception):
    pass


def _predictor(folder: Path, trust: tuple[str, ...]) -> Predictor:
    spec = json.loads(_read(folder, SPEC_FILE).decode("utf-8"))
    if spec.get("format") != FORMAT:
        raise ValueError(f"it has format {spec.get('format')!r}; this version of fastray reads {FORMAT}")
    program = bool(spec["model"].get("program"))
    if program and PROGRAM not in trust:
        raise ValueError(f"it is a program, which is code: if you trust where it comes from, say trust=({PROGRAM!r},)")
    content = _read(folder, PROGRAM_FILE if program else WEIGHTS_FILE)
    if hashlib.sha256(content).hexdigest() != spec["sha256"]:
        raise ValueError(f"{PROGRAM_FILE if program else WEIGHTS_FILE} is not the file that was exported: its sha256 differs")
    for name in _names(spec):
        _import_trusted(name, trust)
    loss, layout = loss_from_plain(spec["loss"]), tuple(map(str, spec["layout"]))
    columns = tuple(Column(str(c["name"]), the_item, Pipeline.from_plain(c["tfms"])) for c in spec["inputs"])
    return Predictor(
        model=_loaded_program(content) if program else _built(spec["model"], content),
        encode=Encode(columns, Pipeline.from_plain(spec["item_tfms"]), n_inp=len(columns), layout=layout),
        batch_tfms=Pipeline.from_plain(spec["batch_tfms"]),
        pad={str(name): float(value) for name, value in spec["pad"].items()},
        targets=tuple(Target(tensor_type(t["type"]), Pipeline.from_plain(t["tfms"])) for t in spec["targets"]),
        loss=loss,
    )


def _read(folder: Path, name: str) -> bytes:
    # The file is read once, so that what was hashed is what is loaded.
    file = folder / name
    if not file.is_file():
        raise _NotAnExport(f"{name} is not there")
    if not file.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{name} is a link that leads out of the folder, to {str(file.resolve())!r}")
    return file.read_bytes()


def _names(spec: dict[str, Any]) -> Iterator[str]:
    # Of all the builders and transforms it asks for.
    pending: list[Any] = [spec]
    while pending:
        match pending.pop():
            case dict() as found:
                yield from (found[key] for key in ("name", "builder") if isinstance(found.get(key), str))
                pending.extend(found.values())
            case list() as found:
                pending.extend(found)


def own_modules(path: str | Path) -> tuple[str, ...]:
    """The modules of a person's own that an export of ours names something of: what `trust` has to name to load it."""
    names = _names(json.loads(_read(Path(path), SPEC_FILE).decode("utf-8")))
    return tuple(sorted({name.partition(":")[0] for name in names if ":" in name}))


def _import_trusted(name: str, trust: tuple[str, ...]) -> None:
    # Ours are called by one word, a user's by module:name.
    module, colon, _ = name.partition(":")
    if not colon or module in sys.modules:
        return
    if not any(module == t or module.startswith(f"{t}.") for t in trust):
        root = module.partition(".")[0]
        raise ValueError(f"it asks for {name!r}, code of the module {module!r}: if you trust it, say trust=({root!r},)")
    importlib.import_module(module)


def _built(described: dict[str, Any], content: bytes) -> nn.Module:
    spec, weights = ModelSpec(described["builder"], described["arguments"]), safetensors.torch.load(content)
    # First without memory: what a changed file asks for may be larger than any.
    try:
        with torch.device("meta"):
            shapes = spec.build()
    except RuntimeError:  # a builder that reads numbers, which are not there
        pass
    else:
        _take_weights(shapes, weights, assign=True)
    model = spec.build()
    _take_weights(model, weights)
    return model.eval()


def _take_weights(model: nn.Module, weights: dict[str, Tensor], assign: bool = False) -> None:
    try:
        model.load_state_dict(weights, assign=assign)
    except RuntimeError as mismatch:
        raise ValueError(f"its weights do not fit its model: {mismatch}") from mismatch


def _loaded_program(content: bytes) -> nn.Module:
    import io

    return torch.export.load(io.BytesIO(content)).module()


def the_item(item: Any) -> Any:
    return item
