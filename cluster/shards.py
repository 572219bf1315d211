"""Shards on the disks of a cluster's nodes, where neither a folder nor a storage is shared by all.

A task of Ray Data leaves the shard it made on the disk of its node, under the fingerprint. Whoever needs one that is not
here asks the other nodes for it, by tasks that are pinned to them; the first time it asks all of them at once what they
have. A shard that no node has any more is made again from the plan. So no list of copies is kept that could be wrong.
"""

import contextlib
import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from blocks.cache import INDEX, folder_here, kept_index, place_of
from blocks.feed import Feed
from blocks.plan import Plan
from blocks.prepare import made_again
from blocks.prepared import Prepared
from blocks.storage import put
from cluster.runtime import is_own, start_ray
from training.distributed import gather, rank, world

_KNOWN: dict[Path, dict[str, list[str]]] = {}  # what this process last heard of each folder: the nodes that have a file


@dataclass(frozen=True)
class Nodes:
    """The other nodes of the cluster. plan: a reference to the plan, for shards that no node has; None: they cannot be made."""

    plan: Any = None

    def held(self, prepared: Prepared) -> set[str]:
        """The files of those shards that another node has."""
        return set(_asked(prepared))

    def bring(self, prepared: Prepared, number: int) -> None:
        """Write the file of a shard into this node's folder."""
        shard = prepared.index["shards"][number]
        for known in (_KNOWN.get(prepared.folder, {}), None):
            for node in (_asked(prepared) if known is None else known).get(shard["file"], ()):
                content = _on(node, content_here, str(prepared.folder), shard["file"])
                if content is not None and zlib.crc32(content) == shard["crc32"]:
                    put(prepared.folder, shard["file"], content)
                    return
        self.make(prepared, [number])

    def make(self, prepared: Prepared, numbers: list[int]) -> None:
        """Make some shards again, here."""
        import ray

        if self.plan is not None:
            made_again(prepared, ray.cloudpickle.loads(ray.get(self.plan)), numbers)


def nodes_for(plan: Plan) -> Nodes | None:
    """The other nodes for what is prepared by `plan`; None where Ray is this process's own, on one machine for good."""
    import ray

    if is_own():
        return None
    start_ray()
    return Nodes(ray.put(ray.cloudpickle.dumps(plan)))


def find_elsewhere(plan: Plan, cache: str) -> None:
    """Have the index of what another node keeps under the plan's fingerprint here as well; shards follow when needed."""
    place = place_of(cache)
    folder = place.home / plan.fingerprint
    if is_own() or place.url is not None or cache == "off" or plan.unkept is not None or kept_index(folder) is not None:
        return
    start_ray()
    for index in _on_all(index_here, str(folder)).values():
        if index is not None:
            folder.mkdir(parents=True, exist_ok=True)
            put(folder, INDEX, json.dumps(index, indent=1).encode())
            return


def tell_elsewhere(prepared: Prepared) -> None:
    """Have the index of what was just prepared on the other nodes that wrote some of it: their drivers may look for it."""
    if prepared.others is not None and not prepared.reused:
        _on_all(keep_index_here, str(prepared.folder), prepared.index)


def across_nodes(dls: Any) -> Any:
    """The same data for workers on any node: shards that lie in a folder of this one are fetched by the others."""
    prepared, train, valid = getattr(dls, "prepared", None), dls.train, dls.valid
    if prepared is None or prepared.url or prepared.others or is_own():
        return dls
    assert isinstance(train, Feed)  # what is prepared is drawn from by feeds
    assert isinstance(valid, Feed)
    prepared = replace(prepared, others=Nodes())
    return replace(dls, prepared=prepared, train=replace(train, prepared=prepared), valid=replace(valid, prepared=prepared))


def make_lost_again(dls: Any) -> None:
    """Have each rank make its share of the shards that no node has any more. Every rank must call it."""
    prepared = getattr(dls, "prepared", None)
    if prepared is None or not isinstance(prepared.others, Nodes):
        return
    lost = gather(prepared.damaged() if rank() == 0 else [])[0]
    if lost[rank() :: world()]:
        prepared.others.make(prepared, lost[rank() :: world()])
    gather(None)  # who needs one of the others' finds it


# --- asking ------------------------------------------------------------------------------------------------------------


def files_here(folder: str) -> list[str]:
    """The shards in what stands on this node for a folder of prepared data."""
    return [path.name for path in folder_here(Path(folder)).glob("*.arrow")]


def content_here(folder: str, file: str) -> np.ndarray | None:
    """The content of a shard on this node as uint8 (bytes,); None when it is not there."""
    with contextlib.suppress(FileNotFoundError):
        return np.fromfile(folder_here(Path(folder)) / file, np.uint8)
    return None


def index_here(folder: str) -> dict[str, Any] | None:
    """The index of what stands on this node for a folder of prepared data, or None."""
    return kept_index(folder_here(Path(folder)))


def keep_index_here(folder: str, index: dict[str, Any]) -> None:
    """Write the index beside the shards that stand on this node for a folder of prepared data."""
    here = folder_here(Path(folder))
    if here.is_dir():
        put(here, INDEX, json.dumps(index, indent=1).encode())


def _asked(prepared: Prepared) -> dict[str, list[str]]:
    nodes_of: dict[str, list[str]] = {}
    for node, files in _on_all(files_here, str(prepared.folder)).items():
        for file in files:
            nodes_of.setdefault(file, []).append(node)
    _KNOWN[prepared.folder] = nodes_of
    return nodes_of


def _on_all(function: Callable[..., Any], *args: Any) -> dict[str, Any]:
    # What it returns on each other node that lives, by node.
    import ray

    here = ray.get_runtime_context().get_node_id()
    asked = {
        node["NodeID"]: _pinned(node["NodeID"], function).remote(*args)
        for node in ray.nodes()
        if node["Alive"] and node["NodeID"] != here
    }
    found = {}
    for node, answer in asked.items():
        with contextlib.suppress(ray.exceptions.RayError):  # it has died meanwhile
            found[node] = ray.get(answer)
    return found


def _on(node: str, function: Callable[..., Any], *args: Any) -> Any:
    # What it returns on a node; None where that has died.
    import ray

    with contextlib.suppress(ray.exceptions.RayError):
        return ray.get(_pinned(node, function).remote(*args))
    return None


def _pinned(node: str, function: Callable[..., Any]) -> Any:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here_only = NodeAffinitySchedulingStrategy(node, soft=False)
    return ray.remote(num_cpus=0, max_retries=0)(function).options(scheduling_strategy=here_only)
