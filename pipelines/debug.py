"""`--debug`: Python's debugger, opened on an exception of the training loop at the person's own line."""

import builtins
import pdb
import traceback
from typing import Any

from training.failure import is_own_file, learner_of


def open_debugger(error: BaseException) -> None:
    """Look around where `error` was raised; `learn` and `batch` are names there, unless the code has its own of that name."""
    learn = learner_of(error)
    names: dict[str, Any] = {"learn": learn, "batch": getattr(learn, "batch", None)}
    traceback.print_exception(error)
    print("debugger: `learn` and `batch` are at hand, `w` shows where you are, `q` ends", flush=True)
    files = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)]
    own = [number for number, file in enumerate(files) if is_own_file(file)]
    debugger = pdb.Pdb()
    debugger.reset()
    if own and own[-1] + 1 < len(files):
        debugger.cmdqueue.append(f"up {len(files) - 1 - own[-1]}")
    # As built-in names they are found from every frame, and hide nothing.
    vars(builtins).update(names)
    try:
        debugger.interaction(None, error.__traceback__)
    finally:
        for name in names:
            delattr(builtins, name)
