"""The MLflow model of an export: a pyfunc whose folder holds data only; this module is its loader.

A data frame with the column `image` (encoded bytes) becomes one with `label` and `probability`.
"""

from typing import Any

import pandas as pd

from training.export import Predictor, load_predictor


class ScoringModel:
    """What MLflow calls `predict` on."""

    def __init__(self, predictor: Predictor):
        self.predictor = predictor

    def predict(self, frame: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """`label` and `probability` of each row's `image`, in their order."""
        found = self.predictor.predict(list(frame["image"]))
        return pd.DataFrame({"label": [p.label for p in found], "probability": [p.probability for p in found]})


def _load_pyfunc(path: str) -> ScoringModel:
    # MLflow's name for the entry point of a loader module.
    return ScoringModel(load_predictor(path))
