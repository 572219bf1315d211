"""Pictures: from a folder, a pattern, a function, or a table of names and labels, to batches.

dls = image_dataloaders("pets")                                            # a folder a class, or train/ and valid/ of these
dls = image_dataloaders("pets", label=r"([^/]+)_\\d+\\.jpg$")                # a pattern in the path
dls = image_dataloaders("pets", label=is_cat, size=128)                    # a function of the path
dls = image_dataloaders("labels.csv", label="tags", label_delim=" ")       # a table: the file in its first column
dls = image_dataloaders("scans", label=mask_of, y_block=MaskBlock(codes))  # masks, points: as y_block
dls = image_dataloaders("boxes.parquet", label=("boxes", "labels"), y_block=(BBoxBlock(), BBoxLblBlock()))
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blocks.augment import aug_transforms
from blocks.category import CategoryBlock, MultiCategoryBlock
from blocks.datablock import DataBlock, TransformBlock
from blocks.dataloaders import DataLoaders
from blocks.errors import UserError
from blocks.images import PILImage
from blocks.items import ColReader, RegexLabeller, get_image_files, parent_label
from blocks.plan import the_item
from blocks.resize import Resize
from blocks.sources import TABLE_ENDINGS
from blocks.splits import ColSplitter, GrandparentSplitter, RandomSplitter, Splitter
from blocks.storage import is_url
from blocks.transform import TransformLike
from blocks.vision import ImageBlock

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

Label = str | Sequence[str] | Callable[[Any], Any]


def image_block(
    source: "str | Path | pd.DataFrame | pa.Table",
    *,
    label: Label | None = None,
    file: str | int = 0,
    folder: str | Path | None = None,
    suffix: str = "",
    label_delim: str | None = None,
    valid: str | Splitter | None = None,
    valid_pct: float = 0.2,
    split_seed: int = 42,
    size: int | tuple[int, int] = 224,
    y_block: TransformBlock | Sequence[TransformBlock] | None = None,
    x_cls: type[PILImage] = PILImage,
    item_tfms: TransformLike | Sequence[TransformLike] | None = None,
    batch_tfms: TransformLike | Sequence[TransformLike] | None = None,
) -> DataBlock:
    """The DataBlock of some pictures and what is to be said of them.

    source: a folder or URL of pictures, or a table of them: a DataFrame, an Arrow table, a CSV or Parquet file.
    label: of a folder's files a function of the path, or a pattern whose first group is the label, by default the name of the
    folder a file lies in; of a table the column, or several of numbers, by default the second one.
    file: the table's column that names the file, below `folder` (by default the one the table is in), with `suffix` added.
    label_delim: a row's label is a text of several, split there. y_block: what the label is, by default a class, or several.
    Of several blocks, such as those of boxes and their names, each has a label of its own: as many columns, or functions.
    valid: the column that is true where a row validates, or a splitter; by default the folders train/ and valid/ where there
    are both, else `valid_pct` of the rows by `split_seed`.
    size: of the pictures in the end. They are made a quarter larger once (item_tfms), then turned, zoomed, warped and cut to
    size anew each epoch on the device (batch_tfms): presizing.
    """
    table = not isinstance(source, str | Path) or _is_table(source)
    if label_delim is not None and not table:
        raise UserError("label_delim splits a column of a table, and the source is a folder: give a label=function of the path")
    if y_block is None:
        y_block = CategoryBlock() if label_delim is None else MultiCategoryBlock()
    if isinstance(y_block, TransformBlock):
        targets, labels = [y_block], [label]
    else:
        targets, labels = list(y_block), _each(label, len(y_block))
    return DataBlock(
        blocks=(ImageBlock(x_cls), *targets),
        get_items=None if table else get_image_files,
        get_x=ColReader(file, pref=_folder_of(source, folder), suff=suffix) if table else the_item,
        get_y=[_column(one, label_delim) if table else _of_path(one) for one in labels],
        n_inp=1,
        splitter=_splitter(source, table, valid, valid_pct, split_seed),
        item_tfms=Resize(_larger(size)) if item_tfms is None else item_tfms,
        batch_tfms=aug_transforms(size=size) if batch_tfms is None else batch_tfms,
    )


def image_dataloaders(
    source: "str | Path | pd.DataFrame | pa.Table",
    *,
    batch_size: int = 64,
    seed: int = 0,
    max_bad_rows: int = 0,
    cache: str = "disk",
    **block: Any,
) -> DataLoaders:
    """`image_block(source, **block)` of these pictures, prepared in this process; `cluster.dataloaders` does so on Ray.

    batch_size, seed, max_bad_rows, cache: as `DataBlock.dataloaders` takes them.
    """
    made = image_block(source, **block)
    return made.dataloaders(source, batch_size=batch_size, seed=seed, max_bad_rows=max_bad_rows, cache=cache)


def _is_table(source: str | Path) -> bool:
    return Path(str(source).partition("?")[0]).suffix.lower() in TABLE_ENDINGS


def _folder_of(source: Any, folder: str | Path | None) -> str | Path:
    if folder is not None:
        return f"{str(folder).rstrip('/')}/" if is_url(str(folder)) else Path(folder)
    if not isinstance(source, str | Path):
        return ""
    return f"{source.rpartition('/')[0]}/" if isinstance(source, str) and is_url(source) else Path(source).parent


def _each(label: Any, number: int) -> list[Any]:
    if isinstance(label, str) or not isinstance(label, Sequence) or len(label) != number:
        raise UserError(f"y_block has {number} blocks, so label has a column or a function for each of them, not {label!r}")
    return list(label)


def _column(label: Label | None, label_delim: str | None) -> Callable[[Any], Any]:
    if callable(label):
        return label
    column = 1 if label is None else label if isinstance(label, str) else tuple(label)
    return ColReader(column, label_delim=label_delim)


def _of_path(label: Label | None) -> Callable[[Any], Any]:
    if label is None:
        return parent_label
    if callable(label):
        return label
    if not isinstance(label, str):
        raise UserError(f"the label of a file is a function of its path, or a pattern with a group, not {label!r}")
    return RegexLabeller(label)


def _splitter(source: Any, table: bool, valid: str | Splitter | None, valid_pct: float, seed: int) -> Splitter:
    if isinstance(valid, str):
        if not table:
            raise UserError(f"valid={valid!r} names a column, and the source is a folder: give a splitter")
        return ColSplitter(valid)
    if valid is not None:
        return valid
    both = not table and not is_url(str(source)) and all(Path(source, part).is_dir() for part in ("train", "valid"))
    return GrandparentSplitter() if both else RandomSplitter(valid_pct, seed=seed)


def _larger(size: int | tuple[int, int]) -> int | tuple[int, int]:
    return size * 5 // 4 if isinstance(size, int) else (size[0] * 5 // 4, size[1] * 5 // 4)
