"""Where training runs: strategies and workers of `itune train`."""

from typing import Annotated, ClassVar, Literal, cast

from pydantic import BeforeValidator, Field, model_validator

from itune_ray.config.base import Schema
from itune_ray.config.roles import Env, Holder, Role
from itune_ray.config.shared import Positive


class DdpConfig(Schema):
    """Replicated weights, gradients averaged (torch DistributedDataParallel)."""

    type: Literal["ddp"] = "ddp"


class Fsdp2Config(Schema):
    """Weights, gradients and optimizer state sharded per decoder layer (torch `fully_shard`)."""

    beside_identity = frozenset({"shard_over"})

    type: Literal["fsdp2"] = "fsdp2"
    shard_over: Literal["all", "node"] | Positive = "all"
    """Workers that share one copy of the model: all; those of a node, so that weights are gathered within nodes and
    only gradients cross them (HSDP); or so many, neighbours by rank. Their number must divide that of the workers."""
    reshard_after_forward: bool = True
    """Free gathered weights after each forward: less memory, one more all-gather (ZeRO-3 against ZeRO-2)."""


class DeepspeedConfig(Schema):
    """DeepSpeed's ZeRO (Rajbhandari et al. 2020): optimizer state, gradients and weights cut into equal runs."""

    beside_identity = frozenset({"offload"})

    type: Literal["deepspeed"] = "deepspeed"
    stage: Literal[1, 2, 3] = 3
    """What is sharded: optimizer state and fp32 master weights (1), gradients too (2), weights too (3)."""
    persist_below: Annotated[int, Field(ge=0)] | None = None
    """Stage 3 keeps weights of at most so many elements gathered on every rank; default: 100,000."""

    offload: bool = False
    """Keep optimizer state and fp32 weights, in stage 3 the sharded weights too, in host memory, and update them
    there: room on the GPU for time."""

    @model_validator(mode="after")
    def _weights_are_sharded(self) -> "DeepspeedConfig":
        if self.persist_below is not None and self.stage != 3:
            raise ValueError(f"persist_below is for stage 3, and stage {self.stage} never shards weights: leave it out")
        return self


StrategyConfig = Annotated[DdpConfig | Fsdp2Config | DeepspeedConfig, Field(discriminator="type")]


def _count(value: object) -> object:
    pair = cast(list[object] | tuple[object, ...], value) if type(value) in (list, tuple) else (value, value)
    few, many = pair if len(pair) == 2 else (0, 0)
    if type(few) is not int or type(many) is not int or not 0 < few <= many:
        raise ValueError("must be a positive number, or [fewest, most]")
    return value


WorkerCount = Annotated[int | tuple[int, int], BeforeValidator(_count)]
"""A number of workers, or the fewest and the most."""


class TrainWorkers(Holder):
    """Ray Train workers. Any number gives the same optimisation."""

    role: ClassVar[Role] = "train"

    num: WorkerCount = 1
    """How many; or [fewest, most]: as many as the cluster has room for, fewer when machines go and more when they come,
    each time from the last checkpoint."""
    resize_every_s: Annotated[float, Field(gt=0)] = 60.0
    """How often [fewest, most] looks whether there is room for more."""
    env: Env = {}
    """Environment variables of every worker, e.g. {NCCL_SOCKET_IFNAME: ens5, FI_PROVIDER: efa}."""
    torch_threads: Positive | None = None
    """Threads of one CPU worker; default: 1, since two on a busy machine are ten times slower."""
    max_failures: Annotated[int, Field(ge=0)] = 3
    """Restarts from the last checkpoint before the job gives up."""
    peak_tflops: Annotated[float, Field(gt=0)] | None = None
    """Of one device in the precision used, e.g. 989 for bf16 on an H100: utilisation (MFU) is then reported."""
    start_timeout_s: Annotated[float, Field(gt=0)] = 900.0
    """Deadline of placing all workers together, new nodes included."""
    backend: Literal["auto", "nccl", "gloo"] = "auto"
    """Of torch.distributed; auto: nccl where workers have GPUs, else gloo."""
    collective_timeout_s: Positive = 600
    """Deadline of one collective; a rank that did not come is named."""

    @property
    def fewest(self) -> int:
        """Workers without which nothing is trained."""
        return self.num if isinstance(self.num, int) else self.num[0]

    @property
    def most(self) -> int:
        """The most workers that there may be at once."""
        return self.num if isinstance(self.num, int) else self.num[1]
