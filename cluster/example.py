"""One item to predict, as a file: what a model's page shows, and what `fastray predict` is first tried with.

It comes from the data as the model sees it, decoded: so there is one whatever the source is, a folder, a table or a bucket.
A single picture is a PNG file, anything else a JSON table of one row, with pictures in base64 as MLflow's servers take them.
"""

import base64
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blocks.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

    from blocks.dataloaders import DataLoaders
    from blocks.plan import Column
    from blocks.tabular import EncodeTable

TABLES = (".json", ".csv", ".parquet")


def inputs_of(columns: "Sequence[Column]") -> dict[str, bool]:
    """What the columns of a table of items are called, and whether each is a picture: encoded bytes, or a file."""
    table = _table(columns)
    if table is not None:
        return dict.fromkeys((*table.cat_names, *table.cont_names), False)
    pictures = [any(t.opens_file for t in c.type_tfms.transforms[:1]) for c in columns]
    return {"image": True} if pictures == [True] else dict(zip([c.name for c in columns], pictures, strict=True))


def items_of(columns: "Sequence[Column]", frame: "pd.DataFrame") -> list[Any]:
    """The rows of a table of items as a predictor takes them: rows by column of a table, else a value an input."""
    names = list(inputs_of(columns))
    if _table(columns) is not None:
        return frame[names].to_dict("records")
    return list(frame[names[0]]) if len(names) == 1 else list(zip(*(frame[n] for n in names), strict=True))


def _table(columns: "Sequence[Column]") -> "EncodeTable | None":
    # Of an item that is itself a row of a table.
    from blocks.tabular import EncodeTable

    tfms = columns[0].type_tfms.transforms if len(columns) == 1 else ()
    return next((t for t in tfms if isinstance(t, EncodeTable)), None)


def write_example(dls: "DataLoaders", folder: Path) -> Path:
    """Write the inputs of the first validation row to `folder`; where."""
    from blocks.encode import decode_sample
    from blocks.newitems import only_inputs

    assert dls.encode is not None
    encode = only_inputs(dls.encode)
    first = [column[0] for column in next(iter(dls.valid))[: dls.n_inp]]
    inputs, values = inputs_of(encode.columns), decode_sample(encode, first)
    if list(inputs) == ["image"]:
        file = folder / "example.png"
        file.write_bytes(_png(values[0]))
        return file
    if _table(encode.columns) is not None:
        values = tuple(values[0].values())
    row = {
        name: base64.b64encode(_png(value)).decode() if picture else plain(value)
        for (name, picture), value in zip(inputs.items(), values, strict=True)
    }
    file = folder / "example.json"
    file.write_text(json.dumps([row]), encoding="utf-8")
    return file


def example_in(folder: Path) -> Path:
    """What `write_example` wrote there."""
    return next(folder.glob("example.*"))


def read_items(file: Path, inputs: Mapping[str, bool]) -> "pd.DataFrame":
    """A table of items, a row each: from a JSON, CSV or Parquet file, or of one picture or one text. UserError when it lacks a
    column.

    inputs: as `inputs_of` gives them.
    """
    import pandas as pd

    names = list(inputs)
    if file.suffix not in TABLES and names == ["image"]:
        return pd.DataFrame({"image": [file.read_bytes()]})
    match file.suffix:
        case ".txt" if list(inputs.values()) == [False]:
            from blocks.tokens import read_text

            return pd.DataFrame({names[0]: [read_text(file)]})
        case ".json":
            table = pd.DataFrame(json.loads(file.read_text(encoding="utf-8")))
        case ".csv":
            table = pd.read_csv(file)
        case ".parquet":
            table = pd.read_parquet(file)
        case other:
            raise UserError(
                f"{file}: items with {', '.join(names)} are the rows of a table ({', '.join(TABLES)}), not {other!r}"
            )
    lacking = [n for n in names if n not in table.columns]
    if lacking:
        raise UserError(f"{file} has no column {lacking[0]!r}; the model wants {', '.join(names)}")
    for name, picture in inputs.items():
        if picture and file.suffix == ".json":
            table[name] = [base64.b64decode(text) for text in table[name]]
    return table[names]


def plain(value: Any) -> Any:
    """A decoded value as a table's cell or JSON holds it: text, numbers, and lists of them."""
    if isinstance(value, str):
        return str(value)
    if hasattr(value, "tolist"):  # a tensor, an array, or a number of theirs
        return value.tolist()
    return [plain(v) for v in value] if isinstance(value, tuple | list) else value


def column_type(cell: Any) -> dict[str, Any]:
    """MLflow's type of a cell, as its schemas write it. Numbers are doubles: an integer column has no missing values."""
    match cell:
        case bytes():
            return {"type": "binary"}
        case str():
            return {"type": "string"}
        case bool():
            return {"type": "boolean"}
        case list():
            return {"type": "array", "items": column_type(cell[0]) if cell else {"type": "string"}}
        case dict():
            return {"type": "object", "properties": {k: {"required": True, **column_type(v)} for k, v in cell.items()}}
    return {"type": "double"}


def _png(value: Any) -> bytes:
    from PIL import Image

    picture = value if isinstance(value, Image.Image) else Image.fromarray(_as_array(value))
    file = io.BytesIO()
    picture.save(file, format="PNG")
    return file.getvalue()


def _as_array(value: Any) -> Any:
    # Channels last, and none where there is one.
    array = value.numpy() if hasattr(value, "numpy") else value
    if array.ndim == 3 and array.shape[0] in (1, 3):
        array = array.transpose(1, 2, 0)
    return array.squeeze(-1) if array.ndim == 3 and array.shape[-1] == 1 else array
