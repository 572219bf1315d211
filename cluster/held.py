"""What the nested trainings of trials with several workers hold: freed at once where Tune stops a trial, and at a sweep's end.

Ray removes a placement group when both the actor and the job that made it have ended, and Train's own cleaner, which would
do it earlier, asks an API that only a dashboard serves (Ray 2.60, ray#54305): the workers of a stopped trial stay, and the
next trial waits for ever. So Train's controllers tell an actor of the sweep which groups they made; the driver removes them.
"""

import contextlib
from collections.abc import Iterator
from typing import Any, Self

NAME = "fastray-held"


class _Groups:
    def __init__(self) -> None:
        self.of_trial: dict[str, list[Any]] = {}

    def add(self, trial: str, group: Any) -> None:
        self.of_trial.setdefault(trial, []).append(group)

    def pop(self, trial: str) -> list[Any]:
        return self.of_trial.pop(trial, [])


class Held:
    """The driver's side, for the trials within a `with` block: `free` removes what one of them holds."""

    def __enter__(self) -> Self:
        import ray

        self._told = ray.remote(_Groups).options(name=NAME, num_cpus=0).remote()
        return self

    def free(self, trial: str) -> None:
        """Remove what the nested training of a trial, by Tune's id, holds. Its workers end with it."""
        import ray
        from ray.util.placement_group import remove_placement_group

        for group in ray.get(self._told.pop.remote(trial)):
            remove_placement_group(group)

    def __exit__(self, *error: Any) -> None:
        import ray

        ray.kill(self._told)


def _groups_of_this_job() -> set[str]:
    # The id of a placement group ends with that of the job that made it.
    import ray
    from ray.util.placement_group import placement_group_table

    job = ray.get_runtime_context().get_job_id()
    return {group for group, known in placement_group_table().items() if group.endswith(job) and known["state"] != "REMOVED"}


@contextlib.contextmanager
def left_free() -> Iterator[None]:
    """Remove at its end the placement groups that this job made in the block, told of or not, whatever ends it."""
    from ray._raylet import PlacementGroupID  # private; a test holds that it works
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    before = _groups_of_this_job()
    try:
        yield
    finally:
        for group in _groups_of_this_job() - before:
            remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(group))))
