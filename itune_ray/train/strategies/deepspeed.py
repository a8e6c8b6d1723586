"""ZeRO stages 1, 2 and 3 (Rajbhandari et al. 2020) by DeepSpeed, which wraps model and optimizer in an engine.

The engine sees accumulation over one micro-batch, with boundaries set by hand: told of K it would divide the loss by K.
The optimizer is torch's own AdamW over the fp32 run each rank owns, so that the update rule is that of the other
strategies, and no op is compiled. Checkpoints name parameters as the other strategies do; a rank writes and reads the
boxes that its runs cover.
"""

import contextlib
import os
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from itune_ray.config.optimizer import OptimizerConfig
from itune_ray.config.strategies import DeepspeedConfig
from itune_ray.model.load import parameters_on_meta
from itune_ray.model.sharding import Run, full_shape
from itune_ray.train.optimizer import Optimizers, build_optimizers
from itune_ray.train.strategies.base import materialise
from itune_ray.train.world import World, ensure_process_group

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")  # it reads no other setting
import deepspeed
import deepspeed.ops

# The one op DeepSpeed would compile on CPU, an all-reduce through shared memory, serves inference only: without it
# training needs no compiler, and a killed worker leaves no segment in /dev/shm.
deepspeed.ops.__dict__["__compatible_ops__"] = {}
warnings.filterwarnings("ignore", message=r"`torch\.distributed\..*` is deprecated", category=FutureWarning)

BUCKET_ELEMENTS = 50_000_000
"""Gradients reduced together; the buffer is 200 MB in fp32 (DeepSpeed's default takes 2 GB)."""
_MOMENTS = ("exp_avg", "exp_avg_sq")


class Deepspeed:
    """Each rank updates 1/W of the trained weights; stages 2 and 3 reduce gradients to their owner in every
    micro-batch, stage 1 in the last one.

    Bytes a rank holds per weight between steps, with W ranks: trained fp32 weights 4 + 12/W (stage 1: + 4 of
    gradients, stage 2: + 4/W) or, in stage 3, 20/W; frozen bf16 weights 2, or 2/W. A layer's weights are gathered for
    its forward and backward; while a model is loaded, one whole parameter at a time. bf16 is autocast over fp32. With
    offload, what a rank holds between steps is in host memory.
    """

    def __init__(self, config: DeepspeedConfig, world: World, precision: Literal["bf16", "fp32"]):
        ensure_process_group()
        self._config, self._world, self._bf16 = config, world, precision == "bf16"
        self.gradient_divisor = world.size
        self._engine: Any = None
        self._groups: list[list[str]] = []  # parameter names by optimizer group, tied ones once

    def init_context(self) -> AbstractContextManager[None]:
        return parameters_on_meta()

    def prepare(self, model: nn.Module) -> nn.Module:
        """Stage 3 gives one parameter after the other memory, and leaves this rank its run of it."""
        if self._config.stage == 3:
            with _local_rank(self._world):
                _partition(model, self._world.device, "cpu" if self._config.offload else None)
        materialise(model, self._world.device)
        return model.to(self._world.device)

    def optimise(self, model: nn.Module, config: OptimizerConfig) -> tuple[nn.Module, Optimizers]:
        """Only now may DeepSpeed take its copies: it splits weights into runs, and optimizer groups with them."""
        optimizers = build_optimizers(model, config)
        (adamw,) = optimizers.optimizers
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._groups = [[names[id(p)] for p in group["params"]] for group in adamw.param_groups]
        with _local_rank(self._world):
            self._engine = deepspeed.initialize(model=model, optimizer=adamw, config=self._settings())[0]
        return self._engine, optimizers

    def _settings(self) -> dict[str, Any]:
        zero: dict[str, Any] = {"stage": self._config.stage, "reduce_bucket_size": BUCKET_ELEMENTS}
        if self._config.offload:
            zero["offload_optimizer"] = {"device": "cpu"}
            if self._config.stage == 3:
                zero["offload_param"] = {"device": "cpu"}
        if self._config.persist_below is not None:
            zero["stage3_param_persistence_threshold"] = self._config.persist_below
        return {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "zero_optimization": zero,
            "zero_force_ds_cpu_optimizer": False,  # torch's AdamW updates in host memory too
            # With modules named here DeepSpeed would reduce their gradients in bf16.
            "torch_autocast": {"enabled": self._bf16, "dtype": "bfloat16", "lower_precision_safe_modules": []},
        }

    @contextlib.contextmanager
    def forward_context(self, last: bool) -> Iterator[None]:
        """Autocast may not keep bf16 copies of gathered weights: all layers together are the whole model."""
        self._engine.set_gradient_accumulation_boundary(last)
        cached = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(cached and self._config.stage != 3)
        try:
            with _local_rank(self._world):
                yield
        finally:
            torch.set_autocast_cache_enabled(cached)

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss)

    def step(self, optimizers: Optimizers, clip_norm: float | None) -> float:
        """An infinite or undefined gradient skips the update; its norm is returned as infinite."""
        zero = self._engine.optimizer
        zero.clip_grad = clip_norm or 0.0
        self._engine.step()
        return float("inf") if zero.overflow else float(self._engine.get_global_grad_norm())

    def state(self, model: nn.Module, optimizers: Optimizers) -> dict[str, Any]:
        (adamw,) = optimizers.optimizers
        self._create_moments(adamw)
        step = next(iter(adamw.state.values()))["step"]
        weights: dict[str, Run] = {}
        moments: dict[str, dict[str, Any]] = {}
        parameters = dict(self._engine.module.named_parameters(remove_duplicate=False))
        for name, parameter in parameters.items():
            if parameter.requires_grad and (owned := self._owned(parameter)) is not None:
                weights[name] = owned.run(owned.flat, full_shape(parameter))
        for name in (name for names in self._groups for name in names):
            moments[name] = {"step": step}
            if (owned := self._owned(parameters[name])) is not None:
                for key in _MOMENTS:
                    moments[name][key] = owned.run(adamw.state[owned.flat][key], full_shape(parameters[name]))
        groups = [
            {**{k: v for k, v in group.items() if k != "params"}, "params": names}
            for group, names in zip(adamw.param_groups, self._groups, strict=True)
        ]
        return {"model": weights, "optimizer": {"state": moments, "param_groups": groups}}

    def load_state(self, model: nn.Module, optimizers: Optimizers, state: dict[str, Any]) -> None:
        """`state` already was read into our own memory; what is derived from it follows."""
        (adamw,) = optimizers.optimizers
        step = next(iter(state["optimizer"]["state"].values()))["step"]
        for moments in adamw.state.values():
            moments["step"].copy_(step)
        zero = self._engine.optimizer
        if self._config.stage < 3:
            zero.update_lp_params()
            return
        zero._partition_all_parameters()
        for index in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(index)

    def _create_moments(self, adamw: torch.optim.Optimizer) -> None:
        """AdamW's state as it is before the first step, which makes it otherwise."""
        zero, sharded = self._engine.optimizer, self._config.stage == 3
        for flat in zero.fp32_partitioned_groups_flat if sharded else zero.single_partition_of_fp32_groups:
            if not adamw.state[flat]:
                step = torch.zeros((), dtype=torch.float32, device=flat.device)
                adamw.state[flat] = {"step": step, **{key: torch.zeros_like(flat) for key in _MOMENTS}}

    def _owned(self, parameter: Any) -> "_Owned | None":
        zero = self._engine.optimizer
        if self._config.stage == 3:
            group, offset, count = zero.grad_position[zero.get_param_id(parameter)]
            start = parameter.ds_zero_partition_rank * count
            count = min(count, max(0, parameter.ds_numel - start))  # what is beyond the end is padding
            return _Owned(zero.fp32_partitioned_groups_flat[group], offset, count, start)
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        place, start = mapping.hp_fragment_address, mapping.lp_fragment_address.start
        return _Owned(zero.single_partition_of_fp32_groups[mapping.param_group_index], place.start, place.numel, start)


@contextlib.contextmanager
def _local_rank(world: World) -> Iterator[None]:
    """DeepSpeed finds its device by an environment variable; left behind, it would tell other libraries of the process
    (accelerate) that a launcher started it."""
    before = os.environ.get("LOCAL_RANK")
    os.environ["LOCAL_RANK"] = str(world.device.index or 0)
    try:
        yield
    finally:
        del os.environ["LOCAL_RANK"]
        if before is not None:
            os.environ["LOCAL_RANK"] = before


class _Owned(NamedTuple):
    """The run of a parameter that this rank updates."""

    flat: Tensor
    """The fp32 memory of a whole optimizer group on this rank."""
    offset: int
    """Where the run begins in it."""
    count: int
    start: int
    """Where it begins in the flattened parameter."""

    def run(self, memory: Tensor, shape: torch.Size) -> Run:
        return Run(shape, self.start, memory.detach()[self.offset : self.offset + self.count])


class _EmptyInit(deepspeed.zero.Init):
    """Parameters that hold nothing yet. DeepSpeed would send rank 0's to all others, which fills the whole tensor's
    pages there and is the traffic of a whole model."""

    def _zero_init_param(self, param: Any) -> None:
        self._convert_to_deepspeed_param(param)
        param.partition()


def _partition(model: nn.Module, device: torch.device, home: str | None) -> None:
    """Replace every parameter by a ZeRO-3 one, on this rank a run of it, kept at `home` (None: on the device); meta
    parameters (uninitialised) get memory."""
    placed: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in placed:
                values = torch.empty_like(parameter, device=device) if parameter.is_meta else parameter.data.to(device)
                placed[id(parameter)] = nn.Parameter(values, requires_grad=parameter.requires_grad)
                split = _EmptyInit if parameter.is_meta else deepspeed.zero.Init
                split(module=nn.ParameterList([placed[id(parameter)]]), remote_device=home)
            module._parameters[name] = placed[id(parameter)]
