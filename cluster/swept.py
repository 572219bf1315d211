"""What a sweep leaves: its trials, best first, as a table, a DataFrame and figures, and the best one's Learner."""

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.space import space_words
from training.recipe import Recipe, RecipeFunction
from training.schedule import as_words

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from training.learner import Learner


@dataclass(frozen=True)
class Trial:
    """One trial: the settings it drew and those that were fixed, its epochs, and how it ended.

    drawn: as they were at its end, where population-based training changed them. score: at its last epoch. history: a dict
    an epoch, as the Recorder's. ended: "finished", "stopped" by the scheduler, "failed", with the reason in `error`, a line,
    and the whole text in `error_file`; "running" or "waiting" while the sweep runs. state: the folder of its last state,
    kept of the best few.
    """

    number: int
    drawn: Mapping[str, Any]
    fixed: Mapping[str, Any]
    score: float = math.nan
    epochs: int = 0
    ended: str = "waiting"
    error: str = ""
    error_file: Path | None = None
    history: Sequence[Mapping[str, float]] = field(default=(), repr=False)
    state: Path | None = None

    @property
    def name(self) -> str:
        """What it is called in tables, folders and records."""
        return f"{self.number:04d}"

    def rank(self, mode: str) -> tuple[bool, float]:
        """Sorts the best first; what failed, or has no number for a score, last."""
        usable = self.ended != "failed" and not math.isnan(self.score)
        return not usable, (-self.score if mode == "max" else self.score) if usable else 0.0

    def words(self) -> dict[str, str]:
        """The settings as the command line takes them."""
        return {key: as_words(value) for key, value in {**self.fixed, **self.drawn}.items()}

    def describe(self) -> str:
        """The drawn settings for reading: numbers in four digits."""
        return described(self.drawn)


def described(drawn: Mapping[str, Any]) -> str:
    """Drawn settings for reading: numbers in four digits."""
    return " ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={as_words(v)}" for k, v in drawn.items())


@dataclass(frozen=True)
class Swept:
    """What a sweep left: its trials, best first, MLflow's id of the parent run, the best trial's export (None: its
    model has none).

    metric, mode: what decides, and whether "max" or "min" of it is best. space: what was drawn from. trouble: what was not
    sent to MLflow.
    """

    metric: str
    mode: str
    trials: tuple[Trial, ...]
    make: RecipeFunction = field(repr=False)
    space: Mapping[str, Any]
    folder: Path
    seconds: float
    run_id: str | None = None
    model_uri: str | None = None
    registered: str | None = None
    export: Path | None = None
    trouble: str | None = None

    @property
    def best(self) -> Trial:
        """The trial with the best score."""
        return self.trials[0]

    def best_recipe(self) -> Recipe:
        """The recipe with the best trial's settings."""
        return self.make(**{**self.best.fixed, **self.best.drawn})

    def best_learner(self) -> "Learner":
        """The best trial's Learner, with the weights and the history of its end."""
        return learner_of(self.best, self.best_recipe())

    def table(self) -> str:
        """The trials as text, best first."""
        return text_table(self.trials, self.metric)

    def dataframe(self) -> "pd.DataFrame":
        """A row a trial, best first: the settings, what its last epoch recorded, how it ended."""
        import pandas as pd

        rows = [
            {
                "trial": t.name,
                **{key: value if isinstance(value, float | int) else as_words(value) for key, value in t.drawn.items()},
                self.metric: t.score,
                "epochs": t.epochs,
                "ended": t.ended,
                "error": t.error,
                **{
                    key: value
                    for key, value in (t.history[-1] if t.history else {}).items()
                    if key not in ("epoch", self.metric)
                },
            }
            for t in self.trials
        ]
        return pd.DataFrame(rows)

    def _repr_html_(self) -> str:
        return html_table(self.trials, self.metric)

    def plot_parallel(self) -> "Figure":
        """A line a trial over the drawn settings to the score."""
        from cluster.sweep_plots import parallel

        return parallel(self)

    def plot_settings(self) -> "Figure":
        """The score against each drawn setting."""
        from cluster.sweep_plots import against_settings

        return against_settings(self)

    def plot_curves(self) -> "Figure":
        """The score of each trial, epoch by epoch."""
        from cluster.sweep_plots import curves

        return curves(self)


def learner_of(trial: Trial, recipe: Recipe) -> "Learner":
    """A trial's Learner, from the state it left. ValueError when it left none."""
    import torch

    from cluster.train import new_learner
    from cluster.trial import STATE

    if trial.state is None or not (trial.state / STATE).is_file():
        raise ValueError(f"trial {trial.name}, which {trial.ended}, has left no weights in {trial.state}: {trial.error}")
    block, source = recipe.data()
    learn = new_learner(recipe, block.dataloaders(source, **recipe.data_settings))
    saved = torch.load(trial.state / STATE, map_location="cpu", weights_only=True)
    learn.model.load_state_dict(saved["model"])
    learn.recorder.history = [dict(values) for values in trial.history]
    return learn


def _rows(trials: Sequence[Trial]) -> list[tuple[str, ...]]:
    return [(t.name, f"{t.score:.4f}", str(t.epochs), t.ended, t.describe(), t.error) for t in trials]


def text_table(trials: Sequence[Trial], metric: str) -> str:
    """Trials as lines of text."""
    rows = [("trial", metric, "epochs", "ended", "settings", ""), *_rows(trials)]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = []
    for row in rows:
        cells = [cell.rjust(w) if c in (1, 2) else cell.ljust(w) for c, (cell, w) in enumerate(zip(row, widths, strict=False))]
        lines.append("  ".join([*cells, *row[4:]]).rstrip())
    return "\n".join(lines)


def html_table(trials: Sequence[Trial], metric: str) -> str:
    """Trials as an HTML table: what a notebook shows."""
    names = list(dict.fromkeys(name for t in trials for name in t.drawn))
    head = "".join(f"<th>{html.escape(n)}</th>" for n in ("trial", metric, "epochs", "ended", *names, ""))
    body = ""
    for t, row in zip(trials, _rows(trials), strict=True):
        drawn = [described({n: t.drawn[n]}).partition("=")[2] if n in t.drawn else "" for n in names]
        cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in (*row[:4], *drawn, t.error))
        body += f"<tr>{cells}</tr>"
    return f"<table><tr>{head}</tr>{body}</table>"


def space_text(space: Mapping[str, Any]) -> dict[str, str]:
    """Each setting's space or value as words."""
    return {name: space_words(value) for name, value in space.items()}
