"""sktime's text format of labelled series, `.ts`: a head of lines such as `@classLabel true up down`, then a series a line.

1.0,2.0,?,4.0:5.0,6.0,7.0,8.0:up        two channels, a gap, and the label
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from blocks.errors import DataError

LABELS = {"@classlabel": str, "@targetlabel": float}  # what the lines end with, where the head says so


def get_ts_series(path: str | Path) -> list[dict[str, Any]]:
    """The series of a `.ts` file, or of those in a folder: values (steps, channels), label, and is_valid.

    label: a class, or a number where the file has targets; is_valid: whether the file is called `..._TEST.ts`. DataError for
    files without labels, and for a line that cannot be read, by its number.
    """
    path = Path(path)
    files = sorted(path.glob("*.ts")) if path.is_dir() else [path]
    if not files:
        raise DataError(f"{path} has no file *.ts")
    return [
        {"values": values, "label": label, "is_valid": file.stem.upper().endswith("_TEST")}
        for file in files
        for values, label in _read_ts(file)
    ]


def _read_ts(file: Path) -> list[tuple[np.ndarray, str | float]]:
    found: list[tuple[np.ndarray, str | float]] = []
    kind: Any = None
    in_data = False
    for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        if in_data:
            try:
                *channels, label = line.split(":")
                found.append((_values(channels), kind(label.strip())))
            except (ValueError, TypeError) as error:
                raise DataError(f"{file}, line {number}: {error}") from error
            continue
        word, *said = line.split()
        match word.lower(), (said[:1] or [""])[0].lower():
            case "@data", _:
                in_data = True
                if kind is None:
                    raise DataError(f"{file} says of no classes and no targets: @classLabel true ..., or @targetLabel true")
            case "@timestamps", "true":
                raise DataError(f"{file} has time stamps, which are not read from .ts files: write it as a table, a row a time")
            case ("@classlabel" | "@targetlabel") as name, "true":
                kind = LABELS[name]
    if not found:
        raise DataError(f"{file} has no series: they follow a line @data")
    return found


def _values(channels: Sequence[str]) -> np.ndarray:
    columns = [[np.nan if v.strip() == "?" else float(v) for v in c.split(",")] for c in channels]
    if not columns or len({len(c) for c in columns}) > 1:
        raise ValueError(f"channels of {', '.join(str(len(c)) for c in columns) or 'no'} steps: each needs as many")
    return np.array(columns).T
