"""A step of a pipeline: a job whose inputs may be payloads of steps before it.

`step://NAME/PAYLOAD` in a step's config stands for that payload's path. The plan is checked whole before anything
runs: every reference names an earlier step, and every step is a valid job with the references still in place.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from itune_ray.config.base import validate
from itune_ray.config.pipeline import PipelineJob
from itune_ray.config.shared import Job
from itune_ray.errors import ConfigError, did_you_mean
from itune_ray.jobs import JOBS, job_type, resolve

REFERENCE = re.compile(r"^step://(?P<step>[^/]+)(?:/(?P<payload>.+))?$")


@dataclass(frozen=True)
class Step:
    """One job of a plan; `config` may hold references that only earlier steps can resolve."""

    name: str
    job: str
    config: Mapping[str, Any]

    def resolve(self, path_of: Callable[[str, str], str]) -> Job:
        """The job with every reference replaced by `path_of(step, payload)`."""
        return self._validated(_replaced(self.config, path_of))

    def references(self) -> set[str]:
        """Names of the steps this one reads from."""
        found: set[str] = set()

        def note(step: str, payload: str) -> str:
            found.add(step)
            return payload

        _replaced(self.config, note)
        return found

    def _validated(self, tree: Any) -> Job:
        return validate(resolve(job_type(self.job).schema), tree, where=f"step {self.name}")


def plan(job: PipelineJob) -> list[Step]:
    """The steps in order, checked: known jobs, valid configs, references to earlier steps only."""
    steps: list[Step] = []
    for name, tree in job.steps.items():
        step = _step(job, name, dict(tree))
        _check_inside(name, step)
        for reference in sorted(step.references()):
            earlier = [s.name for s in steps]
            if reference not in earlier:
                raise ConfigError(
                    f"step {name} refers to a step that does not come before it{did_you_mean(reference, earlier)}",
                    got=f"step://{reference}",
                    allowed=", ".join(earlier) or "no reference in the first step",
                )
        step.resolve(lambda step, payload: f"step://{step}/{payload}")
        steps.append(step)
    return steps


def _check_inside(name: str, step: Step) -> None:
    """A payload is a file of the artifact, and nothing beside it."""

    def check(reference: str, payload: str) -> str:
        if payload.startswith("/") or ".." in payload.split("/"):
            raise ConfigError(
                f"step {name} refers to something outside an artifact",
                got=f"step://{reference}/{payload}",
                allowed="step://NAME/PAYLOAD, with a payload inside the step's folder",
            )
        return payload

    _replaced(step.config, check)


def _step(job: PipelineJob, name: str, tree: dict[str, Any]) -> Step:
    kind = str(tree.pop("job", ""))
    stages = [known for known in JOBS if known != "pipeline"]
    if kind not in stages:
        raise ConfigError(
            f"`steps.{name}.job` names no job{did_you_mean(kind, stages)}", got=kind, allowed=", ".join(stages)
        )
    inherited = {"name": job.name, "run": job.run.model_dump(mode="json"), "seed": tree.get("seed", job.seed)}
    return Step(name, kind, {**tree, **inherited})


def _replaced(tree: Any, path_of: Callable[[str, str], str]) -> Any:
    if isinstance(tree, Mapping):
        return {key: _replaced(value, path_of) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [_replaced(item, path_of) for item in tree]
    match = REFERENCE.match(tree) if isinstance(tree, str) else None
    return path_of(match["step"], match["payload"] or "") if match else tree
