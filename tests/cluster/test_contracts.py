"""What a transform makes of a value here, it makes in Ray Data's tasks: the table of tests/blocks/test_contracts.py again."""

import importlib.util
from pathlib import Path

import pytest

from blocks.testing import check_carried
from cluster.data import map_on_ray

TABLE = Path(__file__).parent.parent / "blocks" / "test_contracts.py"


@pytest.mark.usefixtures("ray_running")
def test_here_is_as_through_ray_data() -> None:
    spec = importlib.util.spec_from_file_location("table_of_contracts", TABLE)
    assert spec is not None
    assert spec.loader is not None
    table = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(table)
    check_carried(table.CASES, map_on_ray)
