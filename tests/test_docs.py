"""docs/fastai.md: what it says has a name here has it."""

import importlib
import re
from pathlib import Path
from typing import Any

import pytest

from blocks.house import HOUSE

PAGE = (Path(__file__).parent.parent / "docs" / "fastai.md").read_text()
OURS = sorted(set(re.findall(rf"`((?:{'|'.join(HOUSE)})\.[\w.]+)`", PAGE)))


def test_the_page_names_ours() -> None:
    assert len(OURS) > 20


@pytest.mark.parametrize("name", OURS)
def test_each_name_is_there(name: str) -> None:
    package, *attributes = name.split(".")
    found: Any = importlib.import_module(package)
    for attribute in attributes:
        found = getattr(found, attribute)  # its error says what is not there
    assert found is not None


def test_what_fastais_users_write_is_there_under_fastais_name() -> None:
    """The names that the page says are the same."""
    training = importlib.import_module("training")
    for name in ("LRFinder", "load_learner", "SaveModelCallback", "OptimWrapper", "ClassificationInterpretation"):
        assert getattr(training, name)
