"""Pictures of which neither the object store nor the driver could hold what they become are prepared all the same."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks/prepare_larger_than_memory.py"


def prepared(gigabytes: float) -> dict[str, int]:
    """What `gigabytes` of JPEGs cost to prepare through an object store of 80 MB."""
    command = [sys.executable, str(SCRIPT), "--gigabytes", str(gigabytes), "--store-megabytes", "80"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_the_drivers_memory_is_flat_when_rows_grow_tenfold() -> None:
    few, many = prepared(0.03), prepared(0.3)
    assert many["rows"] > 9 * few["rows"]
    assert many["stored_bytes"] > 3 * 80e6
    assert many["peak_bytes_of_the_driver"] < 1.1 * few["peak_bytes_of_the_driver"] + 200 * many["rows"]
    assert many["spilled_bytes"] == 0
