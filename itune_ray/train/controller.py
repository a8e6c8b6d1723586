"""[Ray] Ray Train's controller, one for each start of its workers that fails: what cannot start gives its places back
and ends, for `train.workers` to wait for room and begin anew. An interrupt of the driver stays the driver's.

Written against the pinned version of Ray, whose internals it builds on. Torch is not imported, since the controller's
own process would wait for it.
"""

import asyncio
import os
import time
from typing import Any

import ray
import ray.train
from ray.train.v2._internal.constants import get_env_vars_to_propagate
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.controller.state import InitializingState, ReschedulingState, RestartingState
from ray.train.v2._internal.execution.scaling_policy import ScalingDecision
from ray.train.v2._internal.execution.scaling_policy.elastic import ElasticScalingPolicy
from ray.train.v2._internal.execution.worker_group import WorkerGroup, WorkerGroupPollStatus, WorkerGroupState

from itune_ray import room

START_TIMEOUT = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"
"""Ray's variable of how long a start waits for room."""
_QUIET = {"RAY_WARN_BLOCKING_GET_INSIDE_ASYNC": "0"}
_WITHOUT_WORKERS = (InitializingState, RestartingState, ReschedulingState)
LOOK_S = 0.5
"""How often a controller without room for the fewest workers looks again."""


class StartError(Exception):
    """A controller ended since its workers could not start.

    Args:
        cause: What kept them from it.
        failures: How often workers failed under this controller before, each time with a start that succeeded.
    """

    def __init__(self, cause: Exception, failures: int):
        super().__init__(str(cause))
        self.cause, self.failures = cause, failures

    @property
    def without_room(self) -> bool:
        """Whether all that was missing is room."""
        return isinstance(self.cause, WorkerGroupStartupTimeoutError)


class TidyWorkerGroup(WorkerGroup):
    """Where a worker dies while its group is started, after the group counts as begun (while the process group is
    made), Ray keeps the places of all of them: no later group finds room, however often it is tried."""

    def _start(self) -> None:
        try:
            super()._start()
        except Exception:
            if (begun := self._worker_group_state) is not None:
                begun.shutdown()
                self._clear_state()
            raise


class Controller(TrainController):
    """Ray Train's, of such groups, and with the same deadline for room where there is too little for the fewest workers
    as where there is too little for those it asks for: Ray's looks for it for ever, without a pause."""

    worker_group_cls = TidyWorkerGroup
    _waiting_since: float | None = None

    async def _step(self) -> Any:
        before = self.get_state()
        result = await super()._step()
        if not (isinstance(before, _WITHOUT_WORKERS) and result.next_state is before):
            self._waiting_since = None
            return result
        now = time.monotonic()
        self._waiting_since = self._waiting_since or now
        if now - self._waiting_since > float(os.environ[START_TIMEOUT]):
            raise WorkerGroupStartupTimeoutError(self._scaling_policy.scaling_config.min_workers)
        await asyncio.sleep(LOOK_S)
        return result

    def failures(self) -> int:
        """How often workers failed and were started again."""
        return self._failure_policy._worker_group_failures  # type: ignore[attr-defined]


class RoomPolicy(ElasticScalingPolicy):
    """As many workers as there is room for, where Ray's counts the whole of the cluster's nodes, what other jobs hold
    of them too: it would ask for places that never become free."""

    _held = 0
    """Workers whose places are this run's already."""

    def make_decision_for_running_worker_group(
        self, worker_group_state: WorkerGroupState, worker_group_status: WorkerGroupPollStatus
    ) -> ScalingDecision:
        self._held = worker_group_state.num_workers
        return super().make_decision_for_running_worker_group(worker_group_state, worker_group_status)

    def _count_possible_workers(self, reserved_resources: Any) -> int:
        each: Any = self.scaling_config._resources_per_worker_not_none
        most = self.scaling_config.max_workers
        return min(super()._count_possible_workers(reserved_resources), self._held + room.free(each, most))


def run_controller(arguments: dict[str, Any]) -> Any:
    """Run a controller beside the driver to its end, and return its result; whatever ends this call ends it too.

    Ray's own way leaves a handler of SIGINT behind, by which the first two interrupts of the rest of the process do
    nothing.

    Raises:
        StartError: The workers could not start.
    """
    if isinstance(policy := arguments["scaling_policy"], ElasticScalingPolicy):
        arguments = {**arguments, "scaling_policy": RoomPolicy(policy.scaling_config)}
    environment = {**_QUIET, **get_env_vars_to_propagate()}
    remote: Any = ray.remote(Controller)
    settings: dict[str, Any] = {"num_cpus": 0, "scheduling_strategy": room.beside_driver()}
    controller = remote.options(**settings, runtime_env={"env_vars": environment}).remote(**arguments)
    try:
        ray.get(controller.run.remote())
        result: Any = ray.get(controller.get_result.remote())
        if isinstance(result.error, ray.train.ControllerError):
            raise StartError(result.error.controller_failure, ray.get(controller.failures.remote()))
        return result
    finally:
        ray.kill(controller)
