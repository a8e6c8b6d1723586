"""Roles: which nodes of a cluster do what.

Every section that asks a cluster for processes is a `Holder` with a role; `run.ray.roles` says which custom resource
the nodes of a role carry. Where a process runs never changes what it makes, so none of this is part of any identity.
"""

import re
from typing import Annotated, ClassVar, Literal, TypeVar

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from itune_ray.config.base import SECRET, Schema, mapped

Role = Literal["data", "infer", "train"]
SHARE = 0.001
"""How much of its role's resource a process takes: enough to choose the node, too little to fill it."""
J = TypeVar("J", bound=Schema)


class Roles(Schema):
    """The custom resource that the nodes of each role carry, `gpu-infer` for example; none: any node will do."""

    data: str | None = None
    """Recipe workers, curation and eval actors."""
    infer: str | None = None
    """Engine replicas."""
    train: str | None = None
    """Training workers and the pruning actor."""


_SECRET = re.compile(r"TOKEN|SECRET|PASSW|API_?KEY|ACCESS_KEY|CREDENTIAL", re.IGNORECASE)


def _no_secret(env: dict[str, str]) -> dict[str, str]:
    for name in env:
        if _SECRET.search(name):
            told = "the variable {name} looks like a secret, and configs are kept: set it in the environment"
            raise PydanticCustomError(SECRET, told, {"name": name})
    return env


Env = Annotated[dict[str, str], AfterValidator(_no_secret)]
"""Environment variables of processes; never secrets, since the resolved config is kept."""


class Holder(Schema):
    """Processes that hold resources of the cluster while they live."""

    role: ClassVar[Role]

    cpus_each: Annotated[float, Field(ge=0)] = 1.0
    gpus_each: Annotated[float, Field(ge=0)] = 0.0
    resources_each: dict[str, float] = {}
    """Custom Ray resources of each, e.g. {gpu-infer: 1}."""

    @property
    def each(self) -> dict[str, float]:
        """Everything that one of them takes, by resource name."""
        named = {"CPU": self.cpus_each, "GPU": self.gpus_each, **self.resources_each}
        return {name: amount for name, amount in named.items() if amount > 0}


def placed(job: J, roles: Roles) -> J:
    """The job with each holder asking for a share of its role's resource, unless it asks for some of it already."""

    def change(section: Schema) -> Schema:
        resource = getattr(roles, section.role) if isinstance(section, Holder) else None
        if not isinstance(section, Holder) or resource is None or resource in section.resources_each:
            return section
        return section.model_copy(update={"resources_each": {**section.resources_each, resource: SHARE}})

    return mapped(job, change)
