"""What the command line prints when a command has done its work."""

import shlex
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from blocks.errors import UnreadableRow, UserError
from blocks.storage import shown

if TYPE_CHECKING:
    from blocks.cache import Kept
    from cluster.elsewhere import Elsewhere
    from cluster.flush import Flushed
    from cluster.sweep import Swept
    from cluster.train import Trained
    from training.export import Predictor

Say = Callable[[str], None]


def report_training(trained: "Trained", elsewhere: "Elsewhere", say: Say) -> None:
    """Accuracy, where things lie, a prediction by the logged model in the process `elsewhere`, and what to do next."""
    from cluster.places import places
    from cluster.runtime import stop_ray
    from training.export import own_modules

    model = trained.model_uri or str(trained.export)
    elsewhere.tell(model, trained.example, trust=own_modules(trained.export))  # they have just been trained with
    stop_ray()
    learn = trained.learn
    last = learn.recorder.history[-1] if learn.recorder.history else {}
    scores = [f"{k.removeprefix('valid/')} {v:.4f}" for k, v in last.items() if k.startswith("valid/") and k != "valid/loss"]
    say(f"{', '.join(scores)} after {len(learn.recorder.history)} epochs; {trained.seconds:.0f} s in all")
    say(f"run      {trained.run_id or 'not sent'}  in {shown(places().tracking)}")
    say(f"model    {trained.model_uri or 'not sent'}  exported to {trained.export}")
    if trained.registered:
        say(f"         {trained.registered}")
    assert learn.dls.prepared is not None
    say(f"data     {learn.dls.prepared.where}")
    if trained.trouble:
        say(_not_sent(trained.trouble, trained.folder))
    say(f"loaded   in a fresh process: {trained.example}  {elsewhere.answer()}")
    say(_next_page(trained.folder))
    say(f"         fastray predict {shlex.quote(model)} {shlex.quote(str(trained.example))}")


def report_predictions(predictor: "Predictor", files: Sequence[str], say: Say) -> None:
    """One line an item: its file, the label, its probability. UserError when a file holds no items for this model."""
    from cluster.scoring import said_of

    for file in files:
        try:
            found = said_of(predictor, Path(file))
        except UnreadableRow as unreadable:
            raise UserError(f"{file}: {unreadable}") from unreadable
        for line in found:
            say(f"{file}  {line}")


def report_sweep(swept: "Swept", name: str, say: Say) -> None:
    """A table of the trials, best first, and where they are recorded."""
    from cluster.places import places

    say(swept.table())
    best = swept.best
    say(f"best     {best.describe()}: {swept.metric} {best.score:.4f}; {swept.seconds:.0f} s in all")
    failed = [t.error_file for t in swept.trials if t.error_file is not None]
    if failed:
        say(f"failed   {len(failed)} of {len(swept.trials)} trials; all that is known of them is in {failed[0].parent}")
    say(f"run      {swept.run_id or 'not sent'}  in {shown(places().tracking)}, one child run a trial")
    if swept.export is not None:
        say(f"model    {swept.model_uri or 'not sent'}  of the best trial, exported to {swept.export}")
    if swept.registered:
        say(f"         {swept.registered}")
    if swept.trouble:
        say(_not_sent(swept.trouble, swept.folder))
    say(_next_page(swept.folder))
    words = " ".join(shlex.quote(f"{key}={value}") for key, value in best.words().items())
    say(f"         fastray train {name} {words}")


def _next_page(folder: Path) -> str:
    from cluster.places import places
    from cluster.ui import page_of, server_of

    return f"next     fastray ui {shlex.quote(folder.name)}  {page_of(folder, server_of(places().tracking))}"


def _not_sent(trouble: str, folder: Path) -> str:
    return f"records  not all sent to MLflow: {trouble}. They are kept: fastray records flush {shlex.quote(folder.name)}"


def report_flushed(flushed: "Sequence[Flushed]", say: Say) -> None:
    """What was sent, run by run. UserError when something still is not."""
    for f in flushed:
        say(f"{f.folder.name}  {'sent' if f.trouble is None else f'not all sent: {f.trouble}'}")
    if not flushed:
        say("all records were sent")
    unsent = [f for f in flushed if f.trouble is not None]
    if unsent:
        raise UserError(f"the records of {len(unsent)} of {len(flushed)} runs were not all sent: they stay where they are")


def report_kept(kept: "Sequence[Kept]", say: Say) -> None:
    """A table of the prepared data that are kept, and what they take together."""
    if not kept:
        say("no prepared data are kept")
        return
    rows = [("fingerprint", "rows", "size", "last used", "in use", "source", "kept in")]
    for k in kept:
        used = "?" if k.used is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(k.used))
        busy = {None: "?", True: "yes", False: "no"}[k.in_use]
        rows.append((k.fingerprint, f"{k.rows:,}", _megabytes(k.size), used, busy, k.source, shown(k.where)))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        numbers = [
            cell.rjust(width) if i in (1, 2) else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        say("  ".join(numbers).rstrip())
    say(f"{len(kept)} prepared data sets, {_megabytes(sum(k.size for k in kept))}")


def report_cleared(removed: "Sequence[Kept]", stays: "Sequence[Kept]", say: Say) -> None:
    """What was removed, and what stays and why."""
    for k in removed:
        say(f"removed  {k.fingerprint}  {_megabytes(k.size)}  {shown(k.where)}")
    for k in stays:
        why = "is in use" if k.in_use is not None else "other machines may use it: name its fingerprint to remove it"
        say(f"stays    {k.fingerprint}  {_megabytes(k.size)}  {shown(k.where)}  {why}")
    say(f"{len(removed)} prepared data sets removed, {_megabytes(sum(k.size for k in removed))}")


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
