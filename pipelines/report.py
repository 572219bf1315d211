"""What the command line prints when a command has done its work."""

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from blocks.errors import UnreadableRow, UserError

if TYPE_CHECKING:
    from cluster.elsewhere import Elsewhere
    from cluster.sweep import Swept
    from cluster.train import Trained
    from training.export import Predictor

Say = Callable[[str], None]


def report_training(trained: "Trained", elsewhere: "Elsewhere", say: Say) -> None:
    """Accuracy, where things lie, a prediction by the logged model in the process `elsewhere`, and what to do next."""
    from cluster.places import places, shown
    from cluster.runtime import stop_ray

    model = trained.model_uri or str(trained.export)
    elsewhere.tell(model, trained.example)
    stop_ray()
    learn = trained.learn
    last = learn.recorder.history[-1] if learn.recorder.history else {}
    scores = [f"{k.removeprefix('valid/')} {v:.4f}" for k, v in last.items() if k.startswith("valid/") and k != "valid/loss"]
    say(f"{', '.join(scores)} after {len(learn.recorder.history)} epochs; {trained.seconds:.0f} s in all")
    say(f"run      {trained.run_id or 'not sent'}  in {shown(places().tracking)}")
    say(f"model    {trained.model_uri or 'not sent'}  exported to {trained.export}")
    assert learn.dls.prepared is not None
    say(f"data     {learn.dls.prepared.folder}")
    if trained.trouble:
        say(f"records  not all sent to MLflow: {trained.trouble}. They are in {trained.folder}")
    label, probability = elsewhere.answer()
    say(f"loaded   in a fresh process: {trained.example}  {label}  {probability:.4f}")
    say("next     fastray ui")
    say(f"         fastray predict {shlex.quote(model)} {shlex.quote(str(trained.example))}")


def report_predictions(predictor: "Predictor", files: Sequence[str], say: Say) -> None:
    """One line a file: its name, the label, its probability. UserError when a file is no picture."""
    for file in files:
        try:
            (found,) = predictor.predict([Path(file)])
        except UnreadableRow as unreadable:
            raise UserError(f"{file}: {unreadable}") from unreadable
        say(f"{file}  {found.label}  {found.probability:.4f}")


def report_sweep(swept: "Swept", name: str, say: Say) -> None:
    """A table of the trials, best first, and where they are recorded."""
    from cluster.places import places, shown

    say(swept.table())
    best = swept.trials[0]
    say(f"best     {best.describe()}: {swept.metric} {best.score:.4f}; {swept.seconds:.0f} s in all")
    say(f"run      {swept.run_id or 'not sent'}  in {shown(places().tracking)}, one child run a trial")
    if swept.trouble:
        say(f"records  not all sent to MLflow: {swept.trouble}. They are in {swept.folder}")
    say("next     fastray ui")
    words = " ".join(shlex.quote(f"{key}={value}") for key, value in best.words().items())
    say(f"         fastray train {name} {words}")
