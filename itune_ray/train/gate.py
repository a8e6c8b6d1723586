"""The export gate of a training: scores of the trained model before it leaves memory, held against what was written.

gate.json of the stage keeps documents, scores and gaps, so that an engine can be held against the same scores later.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from itune_ray.config.gate import TOLERANCES, GateConfig
from itune_ray.config.strategies import DdpConfig
from itune_ray.config.train import TrainJob
from itune_ray.data.batches import IGNORED, Masking, collate, model_inputs
from itune_ray.data.hub import local_model_folder
from itune_ray.data.order import PackedRow, PackedTable
from itune_ray.data.storage import Folder
from itune_ray.model.gate import ExportRefusedError, LogProbs, check_routes, written_scores
from itune_ray.model.load import pad_id
from itune_ray.model.sharding import reshard, whole
from itune_ray.train.build import build_model
from itune_ray.train.pictured import IMAGE_COLUMNS, Shown, images_of_row, shown_for
from itune_ray.train.strategies.ddp import Ddp
from itune_ray.train.world import World

NAME = "gate.json"


@dataclass(frozen=True)
class GateReport:
    """What the gate compared."""

    tolerance: float
    documents: list[list[int]]
    """Token ids."""
    trained: LogProbs
    """By the trained weights, in fp32 arithmetic."""
    gaps: dict[str, float]
    """Route -> mean |Δ log p| per token of its worst document."""


def read_report(stage_dir: str) -> GateReport:
    """The report of a stage whose gate was passed."""
    return GateReport(**Folder.at(stage_dir).read_json(NAME))


def write_report(report: GateReport, stage_dir: str) -> None:
    """Write gate.json."""
    Folder.at(stage_dir).write_json(NAME, asdict(report))


def tolerance_of(job: TrainJob) -> float:
    """Nats per token that routes may differ by."""
    assert job.gate is not None
    return job.gate.tolerance or TOLERANCES[job.precision]


def gate_documents(table: PackedTable, gate: GateConfig) -> list[PackedRow]:
    """The first documents of the order, each a row of its own with its images; of a pair both answers count.

    They are cut to `gate.longest`, but not those with images, whose tokens and images belong together.
    """
    found: list[PackedRow] = []
    for rows in table.first_rows():
        for row in rows:
            start = 0
            for length in row.lengths.tolist():
                images = {name: row.columns[name] for name in IMAGE_COLUMNS if name in row.columns}
                if length > 1:
                    taken = length if images else min(length, gate.longest)
                    found.append(_row(row.input_ids[start : start + taken], images))
                start += length
                if len(found) == gate.prompts:
                    return found
    return found


@dataclass(frozen=True)
class Twin:
    """The trained model once more, on rank 0's CPU, in fp32."""

    model: nn.Module
    masking: Masking
    pad: int
    shown: Shown | None
    """How images come to the forward pass."""

    def scores(self, documents: Sequence[PackedRow]) -> LogProbs:
        """Log-probabilities of every token but a document's first. Not collective."""
        return [_token_scores(self, row) for row in documents]


def trained_twin(job: TrainJob, model: nn.Module, tokenizer: PreTrainedTokenizerBase, world: World) -> Twin | None:
    """The job's model built anew with the trained weights, gathered one tensor at a time; None on ranks but the first.
    Collective.

    It is scored by fp32 arithmetic, since two bf16 kernels can differ by nats at one token, and by plain attention, as
    what was written is: a gap is what the export has changed.
    """
    reshard(model)
    twin = _twin(job, tokenizer) if world.is_main else None
    with torch.no_grad():
        for name, tensor in _tensors(model):
            value = whole(tensor)
            if twin is not None:
                _tensor(twin.model, name).copy_(value)
    return twin


def _twin(job: TrainJob, tokenizer: PreTrainedTokenizerBase) -> Twin:
    model = job.model.model_copy(update={"attention": "eager"})
    plain = {"gradient_checkpointing": False, "compile": False}
    alone = job.model_copy(update={"model": model, "precision": "fp32", **plain})
    built = build_model(alone, tokenizer, Ddp(DdpConfig(), World(), "fp32"), World())
    shown = shown_for(job, torch.device("cpu"), torch.float32)
    return Twin(built.model.eval(), built.masking, pad_id(tokenizer), shown)


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers by the names they have without the strategy's wrapper. Rotary frequencies are left out:
    they follow from the config, and those of a dynamic kind from the longest row seen last."""
    inner: Any = getattr(model, "module", model)
    yield from inner.named_parameters()
    yield from ((name, buffer) for name, buffer in inner.named_buffers() if not name.endswith("inv_freq"))


def _tensor(model: nn.Module, name: str) -> Tensor:
    owner, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(owner), leaf)


def _token_scores(twin: Twin, row: PackedRow) -> list[float]:
    batch = collate([row], twin.pad, twin.masking == "varlen")
    assert int((batch.labels != IGNORED).sum()) == len(row.input_ids) - 1
    batch, images = (batch, {}) if twin.shown is None else twin.shown(batch)
    inputs: dict[str, Any] = model_inputs(batch, twin.masking, torch.float32)
    with torch.no_grad():
        scores = twin.model(**inputs, **images, labels=batch.labels, token_scores=True)
    return scores.log_probs.tolist()


def _row(ids: NDArray[np.int32], images: Mapping[str, NDArray[np.generic]]) -> PackedRow:
    return PackedRow(ids, np.ones(len(ids), np.bool_), np.array([len(ids)], np.int32), ("gate",), images)


def check_written(
    job: TrainJob,
    rows: Sequence[PackedRow],
    trained: LogProbs,
    paths: tuple[str | None, str | None],
    stage_dir: str,
) -> None:
    """Hold model/ and adapter/ against the trained model, by the documents `rows`, on one rank; writes gate.json.

    Raises:
        ExportRefusedError: They differ by more than the tolerance; both folders are gone then.
    """
    merged, adapter = (
        None if path is None else _local(path, kind) for path, kind in zip(paths, ("model", "adapter"), strict=True)
    )
    # A QLoRA adapter belongs to the rounded base, and one with added tokens to a base that has rows for them: both are
    # nowhere but in model/.
    alone = job.model.path is not None and job.model.peft.type != "qlora" and not job.model.added_tokens
    base = local_model_folder(job.model.reference()).path if alone and adapter is not None else None
    documents = [row.input_ids.tolist() for row in rows]
    shown = shown_for(job, torch.device("cpu"), torch.float32)
    routes = written_scores(
        documents,
        base=base,
        adapter=adapter,
        merged=merged,
        images=None if shown is None else [shown.inputs(images_of_row(row)) for row in rows],
        trust_remote_code=job.model.trust_remote_code,
    )
    try:
        gaps = check_routes(trained, routes, tolerance_of(job))
    except ExportRefusedError:
        refuse(paths)
        raise
    write_report(GateReport(tolerance_of(job), documents, trained, gaps), stage_dir)


def refuse(paths: Sequence[str | None]) -> None:
    """Delete what was written."""
    for path in paths:
        if path is not None:
            Folder.at(path).delete()


def _local(path: str, kind: Literal["model", "adapter"]) -> str:
    from itune_ray.data.hub import resolve

    folder = Folder.at(path)
    return folder.path if folder.is_local else resolve(path, kind=kind).path
