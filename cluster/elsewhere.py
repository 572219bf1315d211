"""The proof that a model loads elsewhere: a fresh process, started while the training runs, that is told the model at its end.

    with Elsewhere() as elsewhere:
        ...train...
        elsewhere.tell(model, file)
        elsewhere.answer()

Most of what a fresh process costs is importing, which passes meanwhile.
"""

import contextlib
import gc
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self


class Elsewhere:
    """A process that has imported what predicting needs and waits for a model; it ends with the `with` block."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "cluster.elsewhere"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is answered by the process that trains
        )

    def tell(self, model: str, file: Path, trust: Sequence[str] = ()) -> None:
        """Have it load `model` and predict `file`. trust: the modules of the person's own that the model may need."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended: `answer` says why
            self._process.stdin.write(json.dumps([model, str(file), list(trust)]) + "\n")
            self._process.stdin.flush()

    def answer(self) -> str:
        """What it predicts. RuntimeError when the model cannot be loaded there."""
        answer, errors = self._process.communicate()
        if self._process.returncode:
            raise RuntimeError(f"the model cannot be loaded back:\n{errors}")
        return answer.strip()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._process.kill()
        self._process.communicate()


def _predict_when_told() -> None:
    os.nice(19)  # what trains comes first
    import torchvision  # noqa: F401

    from cluster.models import load_model
    from cluster.scoring import said_of

    told = sys.stdin.readline()
    if not told:  # the other process has ended
        return
    model, file, trust = json.loads(told)
    print(said_of(load_model(model, trust), Path(file))[0])
    gc.freeze()  # nobody waits for a last look through all objects


if __name__ == "__main__":
    _predict_when_told()
