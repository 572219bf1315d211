"""What cannot be had, and what goes wrong on a worker, is said soon, once, and as itself."""

import time
from collections.abc import Iterator

import pytest
import ray

from cluster import Workers, runtime
from cluster.runtime import ResourceError

pytestmark = pytest.mark.usefixtures("ray_running")

# --- too few resources -------------------------------------------------------------------------------------------------


def test_more_than_the_cluster_has_is_refused_at_once() -> None:
    cpus = int(ray.cluster_resources()["CPU"])
    began = time.monotonic()
    with pytest.raises(ResourceError) as caught:
        Workers(640).check(batch_size=640)
    assert str(caught.value) == (
        f"no room for 640 workers: it takes 640 CPUs, the cluster has {cpus} CPUs. Give {cpus} or fewer, or start more nodes"
    )
    with pytest.raises(ResourceError) as caught:
        Workers(2, gpu=True).check(batch_size=2)
    assert str(caught.value) == (
        f"no room for 2 workers: it takes 2 CPUs and 2 GPUs, the cluster has {cpus} CPUs and 0 GPUs. "
        "Leave gpu=True out, or start nodes with GPUs"
    )
    with pytest.raises(ResourceError, match="no room for at least 64 workers: it takes 64 CPUs"):
        Workers((64, 80)).check(batch_size=640)
    assert time.monotonic() - began < 10  # far below it: nothing is waited for


@pytest.fixture
def all_but_one_cpu() -> Iterator[int]:
    """Somebody holds all CPUs but one; gives how many there are."""
    cpus = int(ray.cluster_resources()["CPU"])
    held = ray.util.placement_group([{"CPU": 1}] * (cpus - 1))
    ray.get(held.ready())
    yield cpus
    ray.util.remove_placement_group(held)


def test_what_others_hold_is_waited_for_but_not_for_ever(
    all_but_one_cpu: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runtime, "BUSY_SECONDS", 1.0)
    monkeypatch.setattr(runtime, "RELEASE_SECONDS", 0.1)
    Workers(1).check(batch_size=2)
    assert capsys.readouterr().out == ""
    told = f"it takes 2 CPUs, others hold all but 1 CPU of the cluster's {all_but_one_cpu} CPUs"
    with pytest.raises(ResourceError) as caught:
        Workers(2).check(batch_size=2)
    assert str(caught.value) == (
        f"no room for 2 workers within 1 s: {told}. Give 1 or fewer, or start more nodes, or wait until they are done"
    )
    assert capsys.readouterr().out == f"wait: {told}; at most 1 s for 2 workers\n"
