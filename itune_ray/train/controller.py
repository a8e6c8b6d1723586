"""[Ray] Ray Train's controller, with two of its habits changed: what fails to start gives its places back, and an
interrupt of the driver stays the driver's.

Written against the pinned version of Ray, whose internals it builds on. Torch is not imported, since the controller's
own process would wait for it.
"""

from typing import Any

import ray
from ray.train.v2._internal.constants import get_env_vars_to_propagate
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.worker_group import WorkerGroup

from itune_ray import room

_QUIET = {"RAY_WARN_BLOCKING_GET_INSIDE_ASYNC": "0"}


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
    """Ray Train's, of such groups."""

    worker_group_cls = TidyWorkerGroup


def run_controller(arguments: dict[str, Any]) -> Any:
    """Run a controller beside the driver to its end, and return its result; whatever ends this call ends it too.

    Ray's own way leaves a handler of SIGINT behind, by which the first two interrupts of the rest of the process do
    nothing."""
    environment = {**_QUIET, **get_env_vars_to_propagate()}
    remote: Any = ray.remote(Controller)
    settings: dict[str, Any] = {"num_cpus": 0, "scheduling_strategy": room.beside_driver()}
    controller = remote.options(**settings, runtime_env={"env_vars": environment}).remote(**arguments)
    try:
        ray.get(controller.run.remote())
        return ray.get(controller.get_result.remote())
    finally:
        ray.kill(controller)
