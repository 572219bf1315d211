"""How busy the driver's machine is, by MLflow's own monitors: for the page "System metrics" of a run, on request."""

import time
from pathlib import Path

from cluster.spool import append, read

SECONDS = 10.0  # between samples, MLflow's own interval


class SystemMetrics:
    """Samples processor, memory, disk, network and GPUs into the spool, as the record of `run`."""

    def __init__(self, spool: Path, run: str):
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        self.spool, self.run = spool, run
        self._monitor = SystemMetricsMonitor(run_id="")  # it is asked, never started: its thread would send by itself
        self._step = sum(record["kind"] == "system" for record, _ in read(spool))  # after those of a process before
        self._next = 0.0

    def sample(self) -> None:
        """Take a sample if it is time for one."""
        if time.monotonic() < self._next or not self.spool.exists():
            return
        self._next = time.monotonic() + SECONDS
        self._monitor.collect_metrics()
        values = {f"system/{name}": value for name, value in self._monitor.aggregate_metrics().items()}
        for monitor in self._monitor.monitors:  # else the next sample is the mean of all so far
            monitor.clear_metrics()
        append(self.spool, "system", self.run, step=self._step, values=values)
        self._step += 1
