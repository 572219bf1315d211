"""What runs in Train's controller. Apart, because the controller imports this file and should not wait for torch."""

from typing import Any

import ray.train

from cluster.spool import append_epoch


class ToSpool(ray.train.UserCallback):
    """Appends rank 0's epochs to the spool; the controller is on the driver's node."""

    def __init__(self, spool: str, run: str):
        self.spool, self.run = spool, run

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        if "epoch" in metrics[0]:
            append_epoch(self.spool, self.run, metrics[0])
