"""What a sweep's trials hold is freed when they are over, whatever ends them: groups of places, and with them who has one.

Ray removes a placement group when both the actor and the job that made it have ended, and Train's own cleaner, which would do
it earlier, asks an API that only a dashboard serves (Ray 2.60, ray#54305): the workers of a stopped trial stay, and the next
trial waits for ever. Nor does the death of Train's controller end it: one that sees its workers go with its trial begins to
replace them, and its process is there for a moment after Ray calls it dead. So the driver looks for groups by who made them,
and at a sweep's end until the processes have ended that could make another.
"""

import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import psutil

LOOK_SECONDS = 0.5  # between two looks
KILL_SECONDS = 6.0  # Ray calls an actor dead when it tells its process to end, and kills that after five seconds
END_SECONDS = 60.0  # actors that were told to end have ended by then


@contextlib.contextmanager
def left_free(nested: bool, say: Callable[[str], None] = print) -> Iterator[None]:
    """Remove the placement groups that this job makes in the block: all at its end, whatever ends it.

    nested: the actors of the block make some, too. Those of a dead one are removed at once, and the end waits until no process
    of the block is left to make another; `say` tells where one is after `END_SECONDS`.
    """
    groups_before, actors_before, dead_since, over = set(_groups()), set(_actors()), dict[bytes, float](), threading.Event()

    def look() -> list[_Actor]:
        """The actors of the block; and how long the dead ones are so."""
        there = [actor for actor in _actors().values() if actor.id not in actors_before]
        dead_since.update({a.id: time.monotonic() for a in there if a.dead and a.id not in dead_since})
        return there

    def watch() -> None:
        while not over.wait(LOOK_SECONDS):
            look()
            _remove(group for group, maker in _groups().items() if maker in dead_since)

    thread = threading.Thread(target=watch, name="fastray-held", daemon=True)
    if nested:
        thread.start()
    try:
        yield
    finally:
        over.set()
        if nested:
            thread.join()
        until = time.monotonic() + END_SECONDS
        while True:
            # In this order: who has ended before the look at the groups makes none after it.
            actors = look() if nested else []
            gone = time.monotonic() - KILL_SECONDS
            living = [a for a in actors if dead_since.get(a.id, math.inf) > gone and not (a.dead and a.is_gone_from_here())]
            left = set(_groups()) - groups_before
            _remove(left)  # the actors in them end with them, and those that these have made
            if not nested or not (living or left):
                break
            if time.monotonic() > until:
                say(f"{len(living)} processes of the sweep do not end: what they hold is free when this one ends")
                break
            time.sleep(LOOK_SECONDS / 10)


# --- Ray's tables ----------------------------------------------------------------------------------------------------------
# Private: the public ones leave out who made a group and what became of an actor that has ended. Tests hold that this works.


def _tables() -> Any:
    from ray._private.state import state

    return state._connect_and_get_accessor()


def _groups() -> dict[bytes, bytes]:
    """The placement groups that this job made, each with the actor that made it; of the driver's, with Ray's id of none."""
    import ray
    from ray.core.generated.gcs_pb2 import PlacementGroupTableData

    job = bytes.fromhex(ray.get_runtime_context().get_job_id())
    known = map(PlacementGroupTableData.FromString, _tables().get_placement_group_table())
    there = (g for g in known if g.creator_job_id == job and g.state != PlacementGroupTableData.REMOVED)
    return {group.placement_group_id: group.creator_actor_id for group in there}


@dataclass(frozen=True)
class _Actor:
    id: bytes
    dead: bool
    node: str
    pid: int

    def is_gone_from_here(self) -> bool:
        """Whether its process was one of this node and has ended, or never was."""
        import ray

        if not self.pid:
            return True
        if self.node != ray.get_runtime_context().get_node_id():
            return False
        try:
            return psutil.Process(self.pid).status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True


def _actors() -> dict[bytes, _Actor]:
    """The actors of this job that do not outlast who made them; those that have ended as well."""
    import ray
    from ray.core.generated.gcs_pb2 import ActorTableData

    job = ray.JobID(bytes.fromhex(ray.get_runtime_context().get_job_id()))
    known = map(ActorTableData.FromString, _tables().get_actor_table(job, None))
    return {
        a.actor_id: _Actor(a.actor_id, a.state == ActorTableData.DEAD, a.address.node_id.hex(), a.pid)
        for a in known
        if not a.is_detached
    }


def _remove(groups: Iterable[bytes]) -> None:
    from ray._raylet import PlacementGroupID
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    for group in groups:
        remove_placement_group(PlacementGroup(PlacementGroupID(group)))
