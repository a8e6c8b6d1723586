"""What one rank holds of a tensor that training spreads over ranks.

FSDP2 cuts a parameter along its first dimension (`DTensor`). ZeRO-3 flattens it and gives every rank a run of ⌈n/W⌉
elements; DeepSpeed keeps the run as `ds_tensor` on the parameter, beside its shape, rank and group, and empties the
parameter itself.
"""

import copy
import math
from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

Offsets = tuple[int, ...]
Sizes = tuple[int, ...]


def full_shape(tensor: Tensor) -> torch.Size:
    """The shape of the whole tensor, wherever its elements are."""
    return torch.Size(getattr(tensor, "ds_shape", tensor.shape))


def whole(tensor: Tensor) -> Tensor:
    """The full tensor on CPU; collective when it is sharded."""
    if (run := getattr(tensor, "ds_tensor", None)) is not None:
        return _joined(tensor, run).cpu()
    detached: Any = tensor.detach()
    return (detached.full_tensor() if isinstance(tensor, DTensor) else detached).cpu()


def reshard(model: nn.Module) -> None:
    """Give up the full weights that a forward pass without a backward one left gathered under FSDP2, so that parameters
    are the shards again, tied ones one object."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _joined(parameter: Any, run: Tensor) -> Tensor:
    ranks = parameter.ds_zero_partition_world_size
    flat = run.new_empty(ranks * run.numel())
    dist.all_gather_single(flat, run.detach().contiguous(), group=parameter.ds_process_group)
    return flat[: parameter.ds_numel].view(parameter.ds_shape)


def whole_copy(module: nn.Module) -> Any:
    """A copy of a module on CPU with whole tensors, those of a float type in fp32, and without hooks. Collective when
    it is sharded."""
    tensors = {id(p): nn.Parameter(_writable(whole(p)), requires_grad=False) for p in module.parameters()}
    copied = copy.deepcopy(module, {**tensors, **{id(b): _writable(whole(b)) for b in module.buffers()}})
    for part in copied.modules():  # ZeRO-3 gathers in hooks, and in a dictionary of its own
        part._parameters = dict(part._parameters)
        for hooks in (part._forward_hooks, part._forward_pre_hooks, part._backward_hooks, part._backward_pre_hooks):
            hooks.clear()
    return copied


def _writable(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float32 if tensor.is_floating_point() else tensor.dtype, copy=True)


def held(tensor: Any) -> Iterator[tuple[Offsets, Tensor]]:
    """(offsets in the whole tensor, writable local memory) of every box this rank holds."""
    if (run := getattr(tensor, "ds_tensor", None)) is not None:
        start = tensor.ds_zero_partition_rank * run.numel()
        yield from Run(full_shape(tensor), start, run[: max(0, tensor.ds_numel - start)]).boxes()
    elif isinstance(tensor, DTensor):
        shape, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
        if 0 not in shape:
            yield tuple(offsets), tensor.to_local()
    else:
        yield (0,) * tensor.ndim, tensor


def snapshot(value: Any) -> Any:
    """A copy in host memory of a tree of tensors that training goes on changing; a shard becomes a `Run`."""
    if isinstance(value, dict):
        return {key: snapshot(item) for key, item in cast(dict[Any, Any], value).items()}
    if isinstance(value, list):
        return [snapshot(item) for item in cast(list[Any], value)]
    if isinstance(value, Run):
        return Run(value.shape, value.start, value.elements.to("cpu", copy=True))
    if isinstance(value, DTensor):
        local: Tensor = value.to_local()
        shape, offsets = compute_local_shape_and_global_offset(value.shape, value.device_mesh, value.placements)
        assert tuple(shape[1:]) == tuple(value.shape[1:]), "cut along the first dimension"
        start = offsets[0] * math.prod(shape[1:]) if offsets else 0
        return Run(value.shape, start, local.detach().to("cpu", copy=True).reshape(-1))
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value


class Run(Tensor):
    """Consecutive elements of a tensor flattened in row-major order, which torch DCP reads and writes like any shard.

    The dunder methods are DCP's protocol for shards (`torch.distributed._checkpointable`), asked of tensors only. In a
    checkpoint a run is a few boxes of the whole tensor, so that any other sharding can load it.
    """

    start: int
    """Position of the first element in the flattened tensor."""
    elements: Tensor
    """[n] memory that is written from and read into."""

    @staticmethod
    def __new__(cls, shape: torch.Size, start: int, elements: Tensor) -> "Run":
        run = Tensor._make_wrapper_subclass(cls, shape, dtype=elements.dtype, device=elements.device)
        run.start, run.elements = start, elements
        return run

    @classmethod
    def __torch_dispatch__(cls, function: Any, *_: Any) -> Any:
        raise NotImplementedError(f"a run of a tensor is read and written, not computed with: {function}")

    def boxes(self) -> Iterator[tuple[Offsets, Tensor]]:
        """(offsets, view of `elements`) of the boxes that make up the run, in order."""
        position = 0
        for offsets, sizes in boxes(tuple(self.shape), self.start, self.start + self.elements.numel()):
            count = math.prod(sizes)
            yield offsets, self.elements[position : position + count].view(sizes)
            position += count

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size(offsets), box.shape) for offsets, box in self.boxes()]

    def __create_write_items__(self, fqn: str, _: object) -> list[WriteItem]:
        properties = TensorProperties.create_from_tensor(self.elements)
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, properties, self.shape),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        return next(box for offsets, box in self.boxes() if torch.Size(offsets) == index.offset)


def boxes(shape: Sizes, start: int, stop: int) -> Iterator[tuple[Offsets, Sizes]]:
    """(offsets, sizes) of the boxes that elements [start, stop) of a flattened tensor make up, in row-major order.

    A run is the rest of a row, whole rows, and the beginning of a row, and each row again such a run: at most
    2 · ndim - 1 boxes.
    """
    if start >= stop:
        return
    if len(shape) < 2:
        yield ((start,), (stop - start,)) if shape else ((), ())
        return
    inner = shape[1:]
    row = math.prod(inner)
    first, end = -(-start // row), stop // row
    if first > end:  # within one row
        yield from _in_row(end, inner, start - end * row, stop - end * row)
        return
    yield from _in_row(first - 1, inner, start - (first - 1) * row, row) if start % row else ()
    if first < end:
        yield (first, *(0 for _ in inner)), (end - first, *inner)
    yield from _in_row(end, inner, 0, stop - end * row)


def _in_row(index: int, inner: Sizes, start: int, stop: int) -> Iterator[tuple[Offsets, Sizes]]:
    for offsets, sizes in boxes(inner, start, stop):
        yield (index, *offsets), (1, *sizes)
