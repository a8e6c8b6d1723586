"""One model pruned in one process: measure batch by batch, then cut and write. `run` makes it a Ray actor."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from itune_ray.compress.blocks import blocks_of, shape_of
from itune_ray.compress.calibration import calibrate_on
from itune_ray.compress.importance import Scores
from itune_ray.compress.methods.structured import choose, kept_counts, smaller_model
from itune_ray.config.compress import CompressJob
from itune_ray.data.chat import ChatRenderer
from itune_ray.data.hub import local_model_folder, read_config, resolve
from itune_ray.data.records import Record
from itune_ray.model.export import write_model
from itune_ray.model.load import load_model, pad_id
from itune_ray.model.tokenizer import load_tokenizer


class Pruner:
    """Prunes the model of a job.

    Args:
        job: What to prune, how, and on what.
        records: Candidate calibration rows.
    """

    def __init__(self, job: CompressJob, records: Sequence[Record]):
        self._job, self._records = job, records

    def prepare(self) -> int:
        """Load the model and the calibration rows, refuse what cannot work; returns the number of batches."""
        job, ref = self._job, self._job.model
        self._folder = local_model_folder(ref).path
        tokenizer_folder = resolve(ref.tokenizer, kind="tokenizer").path if ref.tokenizer else self._folder
        self._tokenizer = load_tokenizer(tokenizer_folder, ref.trust_remote_code)
        self._device = torch.device("cuda" if torch.cuda.is_available() and job.workers.gpus_each else "cpu")
        self._model = self._load().to(self._device).eval()  # type: ignore[arg-type]
        self._blocks, self._shape = blocks_of(self._model), shape_of(self._model)
        kept_counts(job.method, self._shape)
        renderer = ChatRenderer(self._tokenizer, ref.chat_template, ref.thinking)
        calibration = calibrate_on(self._records, job.calibration, renderer, pad_id(self._tokenizer), job.seed)
        self._calibration = calibration
        self._scores = Scores(self._model, self._blocks, self._shape, job.method.importance)
        return len(calibration.batches)

    def _load(self) -> Any:
        ref = self._job.model
        model = load_model(self._folder, dtype=torch.float32, attention="sdpa", trust_remote_code=ref.trust_remote_code)
        if ref.adapter is None:
            return model
        from peft import PeftModel

        return PeftModel.from_pretrained(model, resolve(ref.adapter, kind="adapter").path).merge_and_unload()

    def prompts(self, count: int) -> list[Record]:
        """Calibration rows that can be asked, for the speed measurement."""
        return [record for record in self._calibration.records if record.prompt][:count]

    def measure(self, index: int) -> int:
        """Take one batch into account; returns its tokens."""
        batch = self._calibration.batches[index]
        self._scores.add(batch.to(self._device))
        return int((batch.segments >= 0).sum())

    def cut(self, out: str) -> dict[str, Any]:
        """Write the smaller model to `out` and return the facts of compression.json."""
        model: Any = self._model
        kept = choose(self._scores.heads, self._scores.channels, self._shape, self._job.method)
        model.zero_grad(set_to_none=True)
        small = smaller_model(model.cpu(), self._blocks, self._shape, kept)
        dtype = stored_dtype(self._folder)
        write_model(small, self._tokenizer, out, dtype=dtype)
        before, after = parameters_by_part(model), parameters_by_part(small)
        return {
            "method": self._job.method.model_dump(mode="json"),
            "calibration": {"rows": len(self._calibration.records), "unusable": self._calibration.unusable},
            "shape": {"before": asdict(self._shape), "after": asdict(shape_of(small))},
            "architecture": {"before": type(model).__name__, "after": type(small).__name__},
            "parameters": {
                "before": before,
                "after": after,
                "removed_share": 1 - after["total"] / before["total"],
            },
            "bytes": {name: part["total"] * dtype.itemsize for name, part in (("before", before), ("after", after))},
            "kept": asdict(kept),
        }


def stored_dtype(folder: str) -> torch.dtype:
    """The dtype a model folder says its weights have; fp32 where it says nothing."""
    config: Mapping[str, Any] = read_config(folder)
    return getattr(torch, str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch."))


PARTS = {
    "embed_tokens": "embedding",
    "lm_head": "head",
    "q_proj": "attention",
    "k_proj": "attention",
    "v_proj": "attention",
    "o_proj": "attention",
    "gate_proj": "mlp",
    "up_proj": "mlp",
    "down_proj": "mlp",
}


def parameters_by_part(model: nn.Module) -> dict[str, int]:
    """Parameters of the embedding, attention, mlp, norms and head, and in total; a tied head counts as embedding."""
    counts: dict[str, int] = dict.fromkeys(("total", "embedding", "attention", "mlp", "norm", "head"), 0)
    for name, parameter in model.named_parameters():
        part = next((PARTS[segment] for segment in name.split(".") if segment in PARTS), "norm")
        counts[part] += parameter.numel()
        counts["total"] += parameter.numel()
    return counts
