"""Packed rows to tensors, with attention that keeps packed documents apart.

Shapes: B rows, T tokens of the longest row. Three ways to isolate documents, one collator:

- `eager` and `sdpa` get an explicit 4-D block-diagonal causal mask (`sdpa` only where rows are packed: without a mask
  it may take its fastest causal kernel). transformers would derive one from `position_ids`, but only without a 2-D
  mask and without a KV cache, and `use_cache` is on by default: the explicit mask is immune to that trap (measured: a
  logit error of 2.6 against 1e-6).
- `flash_attention_2`, and on a CPU attention by document, get one flat row and the documents' cumulative lengths, so no
  mask. The little padding of a flat row belongs to its last document, whose tokens come before it and so do not see it.
- Sliding-window layers need their own window in the mask, so for such models transformers builds it from
  `position_ids`; `use_cache=False` is passed always.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from itune_ray.data.order import PackedRow

IGNORED = -100
"""Label of a position that is no training target."""
WIDTH_MULTIPLE = 8
"""Widths are rounded up, since each new shape costs a kernel look-up."""
FLAT_MULTIPLE = 32
"""The same for a flat row; packed ones are nearly full. Products in bf16 on a CPU compile a kernel for each new shape,
2 % of a step of four rows of 1,024 tokens."""
Masking = Literal["mask_4d", "mask_4d_if_packed", "positions", "varlen"]
"""How a model keeps documents apart; see the module docstring."""


@dataclass(frozen=True)
class Batch:
    """One micro-batch. Labels sit at the token itself (the head shifts them) and are -100 at document starts."""

    input_ids: Tensor
    """[B, T] int64."""
    labels: Tensor
    """[B, T] int64."""
    position_ids: Tensor
    """[B, T] int64, from 0 in every document."""
    segments: Tensor
    """[B, T] int64: which segment of its packed row a token belongs to; -1 in padding. A chat is one segment, a
    preference pair two, chosen then rejected."""
    num_segments: tuple[int, ...]
    """Segments of each row."""
    keys: tuple[tuple[str, ...], ...]
    """Row keys of the documents, per packed row."""
    columns: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    """What the objective needs beside the ids, flat over the rows: [N, ...] in the order of the supervised tokens
    (`labels[:, 1:] != -100`), [S] in the order of the segments, or [D] in that of the documents."""
    boundaries: Tensor | None = None
    """[D+1] int32, where the documents of a flat row begin and end; None of rows that are not flat."""
    longest: int = 0
    """Tokens of a flat row's longest document, known without asking a device."""
    seed: int | None = None
    """Of what the model draws at random in this micro-batch's forward (see `itune_ray.train.randomness`)."""

    @property
    def num_supervised(self) -> int:
        """Training targets in this micro-batch."""
        return int((self.labels != IGNORED).sum())

    @property
    def is_packed(self) -> bool:
        """Whether any row holds more than one segment."""
        return any(count > 1 for count in self.num_segments)

    def to(self, device: torch.device) -> Self:
        """The same batch on another device."""
        moved = {
            name: getattr(self, name).to(device, non_blocking=True)
            for name in ("input_ids", "labels", "position_ids", "segments")
        }
        columns = {name: column.to(device, non_blocking=True) for name, column in self.columns.items()}
        boundaries = None if self.boundaries is None else self.boundaries.to(device, non_blocking=True)
        return replace(self, **moved, columns=columns, boundaries=boundaries)


def collate(rows: Sequence[PackedRow], pad_id: int, flat: bool = False, at_least: int = 2) -> Batch:
    """Rows to one batch, padded on the right; `flat` lays all rows end to end in one row instead.

    No rows give a dummy of padding with no target: a rank that has run out of rows still takes part in
    every forward and backward, since the others wait for it in collectives.
    """
    if flat and len(rows) > 1:
        rows = [join(rows)]
    width = max([at_least, *(len(row.input_ids) for row in rows)])
    multiple = FLAT_MULTIPLE if flat else WIDTH_MULTIPLE
    width = -(-width // multiple) * multiple
    shape = (max(len(rows), 1), width)
    ids = np.full(shape, pad_id, dtype=np.int64)
    labels = np.full(shape, IGNORED, dtype=np.int64)
    segments = np.full(shape, -1, dtype=np.int64)
    positions = np.tile(np.arange(width, dtype=np.int64), (shape[0], 1))
    for b, row in enumerate(rows):
        length = len(row.input_ids)
        starts = np.cumsum(row.lengths) - row.lengths
        ids[b, :length] = row.input_ids
        labels[b, :length] = np.where(row.supervised, row.input_ids, IGNORED)
        labels[b, starts] = IGNORED
        segments[b, :length] = np.repeat(np.arange(len(row.lengths)), row.lengths)
        positions[b, :length] -= np.repeat(starts, row.lengths)
        if flat:
            positions[b, length:] = max(1, row.lengths[-1] - 1)  # 0 would begin a document, a higher one may not exist
        elif len(row.lengths) > 1:
            positions[b, length:] = np.arange(width - length)
    if not rows:
        positions = positions.clip(max=1)
    described: dict[str, Any] = {}
    if flat:
        boundaries = np.append(np.flatnonzero(positions[0] == 0), width).astype(np.int32)
        described = {"boundaries": torch.from_numpy(boundaries), "longest": int(np.diff(boundaries).max())}
    return Batch(
        input_ids=torch.from_numpy(ids),
        labels=torch.from_numpy(labels),
        position_ids=torch.from_numpy(positions),
        segments=torch.from_numpy(segments),
        num_segments=tuple(len(row.lengths) for row in rows),
        keys=tuple(row.keys for row in rows),
        columns={name: torch.from_numpy(values) for name, values in _columns(rows).items()},
        **described,
    )


def join(rows: Sequence[PackedRow]) -> PackedRow:
    """The documents of several rows in one."""
    return PackedRow(
        np.concatenate([row.input_ids for row in rows]),
        np.concatenate([row.supervised for row in rows]),
        np.concatenate([row.lengths for row in rows]),
        tuple(key for row in rows for key in row.keys),
        _columns(rows),
    )


def _columns(rows: Sequence[PackedRow]) -> dict[str, NDArray[np.generic]]:
    names = rows[0].columns if rows else ()
    return {name: np.concatenate([row.columns[name] for row in rows]) for name in names}


def model_inputs(batch: Batch, masking: Masking, dtype: torch.dtype) -> dict[str, object]:
    """Keyword arguments of `model.forward` for a batch, its attention isolation included.

    Args:
        dtype: Compute dtype of the mask; one in fp32 would pull bf16 attention scores up to fp32.
    """
    inputs: dict[str, object] = {
        "input_ids": batch.input_ids,
        "position_ids": batch.position_ids,
        "use_cache": False,
    }
    if masking == "varlen":
        inputs |= _varlen(batch)
    elif masking == "mask_4d" or (masking == "mask_4d_if_packed" and batch.is_packed):
        inputs["attention_mask"] = block_causal_mask(batch, dtype)
    return inputs


def block_causal_mask(batch: Batch, dtype: torch.dtype) -> Tensor:
    """Additive mask [B, 1, T, T] (or [1, 1, T, T] when no row is packed): 0 where query i may see key j, that is
    j <= i in the same segment, and the dtype's lowest value elsewhere."""
    width = batch.input_ids.shape[1]
    allowed = torch.ones(width, width, dtype=torch.bool, device=batch.input_ids.device).tril()[None]
    if batch.is_packed:
        allowed = allowed & (batch.segments[:, :, None] == batch.segments[:, None, :])
    mask = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return mask.masked_fill_(~allowed, torch.finfo(dtype).min)[:, None]


def _varlen(batch: Batch) -> dict[str, object]:
    """FlashAttention's description of a flat row: cumulative document lengths and the longest."""
    ends, longest = batch.boundaries, batch.longest
    assert ends is not None
    return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}
