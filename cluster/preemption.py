"""Notice that a node is about to be taken away, as Ray Train passes it on to its workers.

The only place that knows Ray's preemption API, which is alpha in Ray 2.60. Whoever takes a node tells Ray by draining it: a
cloud's agent, the autoscaler, `ray drain-node`. An actor of Ray Train's looks for that every few seconds and marks all workers
of the run. It is there only where a cluster was joined: a Ray of one's own is one node, with which all goes.
"""

WATCHER = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"  # the environment variable that turns that actor on


def noticed() -> bool:
    """Whether a node of the run that this process is a worker of is to go. Costs a look at an attribute."""
    # `ray.train.get_preemption_info` is a collective of all workers, through an actor: too much for each batch.
    from ray.train.v2._internal.execution.context import get_train_context

    return get_train_context().preemption_context.preemption_info is not None
