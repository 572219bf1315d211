"""The MLflow model of an export: a pyfunc whose folder holds data only; this module is its loader.

A data frame with a column an input (`image` where that is one picture, as encoded bytes) becomes one with `label`, as a person
reads it, and with its `probability` where the label is one class, or the `boxes` and `scores` of the things it names.
"""

from pathlib import Path
from typing import Any

import pandas as pd

from cluster.example import column_type, inputs_of, items_of, plain, read_items
from training.export import Predictor, load_predictor

LONGEST_LABEL = 200  # characters: a mask has more numbers than anybody reads


class ScoringModel:
    """What MLflow calls `predict` on."""

    def __init__(self, predictor: Predictor):
        self.predictor = predictor

    def predict(self, frame: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """`label` (and `probability`) of each row's item, in their order."""
        found = self.predictor.predict(items_of(self.predictor.encode.columns, frame))
        said = pd.DataFrame({"label": pd.Series([plain(p.label) for p in found], dtype=object)})
        if any(p.probability is not None for p in found):
            said["probability"] = [p.probability for p in found]
        if any(p.boxes is not None for p in found):
            said["boxes"] = pd.Series([p.boxes for p in found], dtype=object)
            said["scores"] = pd.Series([p.scores for p in found], dtype=object)
        return said


def said_of(predictor: Predictor, file: Path) -> list[str]:
    """What a predictor says of a picture, or of each row of a table, in a line each."""
    said = ScoringModel(predictor).predict(read_items(file, inputs_of(predictor.encode.columns)))
    lines = [_short(label) for label in said["label"]]
    if "probability" in said:
        return [f"{line}  {p:.4f}" for line, p in zip(lines, said["probability"], strict=True)]
    if "boxes" in said:
        return [_things(*row) for row in said[["label", "boxes", "scores"]].itertuples(index=False)]
    return lines


def _things(labels: list[str], boxes: list[list[float]], scores: list[float]) -> str:
    # A row's found things: name, score, corners.
    each = zip(labels, boxes, scores, strict=True)
    return "; ".join(f"{label} {score:.2f} at {' '.join(f'{x:.0f}' for x in box)}" for label, box, score in each) or "nothing"


def _short(label: Any) -> str:
    if isinstance(label, float):
        return f"{label:.6g}"
    text = ", ".join(map(_short, label)) if isinstance(label, list) else str(label)
    return text if len(text) <= LONGEST_LABEL else f"{text[:LONGEST_LABEL]}..."


def signature(export: Path, example: Path) -> dict[str, list[dict[str, Any]]]:
    """`inputs` and `outputs` of an export, as MLflow's schemas write them: the columns of an example and of its answer."""
    model = ScoringModel(load_predictor(export))
    items = read_items(example, inputs_of(model.predictor.encode.columns))
    answer = model.predict(items)
    found = {
        part: [_column(name, frame[name].iloc[0]) for name in frame] for part, frame in (("inputs", items), ("outputs", answer))
    }
    if model.predictor.vocab and "probability" not in answer:  # no class may apply to the example
        found["outputs"][0] = _column("label", [""])
    if "boxes" in answer:
        found["outputs"][1:] = [_column("boxes", [[0.0]]), _column("scores", [0.0])]
    return found


def _column(name: str, cell: Any) -> dict[str, Any]:
    return {"name": name, "required": True, **column_type(cell)}


def _load_pyfunc(path: str) -> ScoringModel:
    # MLflow's name for the entry point of a loader module.
    return ScoringModel(load_predictor(path))
