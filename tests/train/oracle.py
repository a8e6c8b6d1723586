"""Oracles of objectives on the tiny model: plain transformers, which see each segment alone, and TRL's trainers."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, TrainerCallback

from itune_ray.data.batches import Batch, collate, model_inputs
from itune_ray.data.chat import ChatRenderer
from itune_ray.data.order import PackedTable
from itune_ray.data.records import Record
from itune_ray.model.logprobs import install_fused_head
from itune_ray.train.loop import train_local
from itune_ray.train.metrics import read_metrics
from itune_ray.train.objectives import build_objective
from itune_ray.train.objectives.pairs import REFERENCE
from itune_ray.train.prepare import prepare_locally
from itune_ray.train.strategies.ddp import Ddp

Segments = list[Tensor]
"""Log-probabilities of each segment's supervised tokens, segments in the order of the batch."""


def batch_of(job: Any, rows: list[Record], stage: Path) -> Batch:
    """The first step's rows as one micro-batch, with a made-up reference where the objective needs one."""
    prepared = prepare_locally(job, rows, str(stage))
    batch = collate(PackedTable(prepared.folder).rows(0), pad_id=0)
    if REFERENCE not in build_objective(job.objective).needs:
        return batch
    torch.manual_seed(3)
    reference = -30 * torch.rand(sum(batch.num_segments), dtype=torch.float64)
    return replace(batch, columns={**batch.columns, REFERENCE: reference})


def ours(job: Any, folder: Path, batch: Batch) -> tuple[float, dict[str, Tensor], dict[str, float]]:
    """(loss, gradient by parameter, metrics by their units) of the job's objective through the fused head."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    install_fused_head(model)
    objective = build_objective(job.objective)
    scores = model(
        **model_inputs(batch, "mask_4d", torch.float32),
        labels=batch.labels,
        token_scores=True,
        **objective.head_inputs(batch),
    )
    loss, units = objective(scores, batch), objective.units(batch)
    total = sum((c * loss.terms[name] / units[name] for name, c in objective.coefficients.items()), torch.zeros(()))
    total.backward()
    metrics = {name: float(metric.total) / units[metric.unit] for name, metric in loss.metrics.items()}
    return float(total.detach()), gradients(model), metrics


def oracle(folder: Path, batch: Batch, formula: Callable[[Segments], Tensor]) -> tuple[float, dict[str, Tensor]]:
    """(loss, gradient by parameter) of a formula over the segments' log-probabilities."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    total = formula(segments(model, batch))
    total.backward()
    return float(total.detach()), gradients(model)


def segments(model: Any, batch: Batch) -> Segments:
    """Each segment's supervised tokens, from a forward pass of the segment alone."""
    found: Segments = []
    for row, count in enumerate(batch.num_segments):
        for segment in range(count):
            inside = batch.segments[row] == segment
            ids, labels = batch.input_ids[row][inside], batch.labels[row][inside]
            log_p = model(ids[None], use_cache=False).logits[0, :-1].log_softmax(-1)
            taken = log_p.gather(-1, ids[1:, None])[:, 0]
            found.append(taken[labels[1:] != -100])
    return found


def gradients(model: Any) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(mine: tuple[Any, ...], theirs: tuple[Any, ...], rtol: float = 1e-4) -> None:
    """Loss to 1e-5, every gradient to `rtol` of its largest entry."""
    assert mine[0] == pytest.approx(theirs[0], rel=1e-5, abs=1e-7)
    assert_same_gradients(mine[1], theirs[1], rtol)


def assert_same_gradients(mine: dict[str, Tensor], theirs: dict[str, Tensor], rtol: float = 1e-4) -> None:
    assert mine.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert float((mine[name] - expected).abs().max()) <= rtol * float(expected.abs().max()), name
        assert float(expected.abs().max()) > 0, name


def pair_job(folder: Path, objective: dict[str, Any], packing: bool) -> Any:
    return tiny.job(folder, objective=objective, packing=packing, batch=6, steps=1)


def trl_steps(trainer: Any, config: Any, folder: Path, out: Path, data: list[dict[str, Any]], **settings: Any) -> Any:
    """What one of TRL's trainers logs per step on the tiny model, in fp32 on CPU by AdamW at a constant rate, and the
    step's `gradients` by parameter.

    Args:
        trainer, config: TRL's classes.
        data: Rows in the trainer's own format.
        settings: Arguments of the config beside the ones that all share, or instead of them; `model` and
            `processing_class` go to the trainer.
    """
    from datasets import Dataset

    model = settings.pop("model", None) or AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    words = settings.pop("processing_class", None) or tiny.tokenizer()
    shared = {
        "per_device_train_batch_size": len(data),
        "max_steps": 3,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "max_grad_norm": 1e9,
        "adam_beta2": 0.95,
        "weight_decay": 0.0,
        "logging_steps": 1,
        "gradient_checkpointing": False,
        "bf16": False,
        "report_to": [],
        "use_cpu": True,
        "seed": 0,
    }
    arguments = config(output_dir=str(out), **{**shared, **settings})
    made = trainer(model=model, args=arguments, train_dataset=Dataset.from_list(data), processing_class=words)
    seen: list[dict[str, Tensor]] = []

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append(gradients(kwargs["model"]))

    made.add_callback(Watch())
    made.train()
    logged = [row for row in made.state.log_history if "loss" in row]
    return [{**row, "gradients": found} for row, found in zip(logged, seen, strict=True)]


def our_steps(job: Any, rows: list[Record], out: Path) -> list[dict[str, Any]]:
    """What a run of ours logs per step, and the step's `gradients` by parameter; for one process by ddp."""
    seen: list[dict[str, Tensor]] = []
    step = Ddp.step

    def watched(self: Any, *args: Any) -> float:
        seen.append(gradients(self._model))
        return step(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Ddp, "step", watched)
        train_local(job, rows, str(out))
    return [{**row, "gradients": found} for row, found in zip(read_metrics(str(out)), seen, strict=True)]


def trl_pairs(rows: list[Record]) -> list[dict[str, str]]:
    """Preference rows as TRL's text: rendered prompts, and answers with their end-of-turn token; for a tokenizer
    without a template."""
    template = ChatRenderer(tiny.tokenizer())
    return [
        {
            "prompt": template.prompt_text(row.prompt),
            "chosen": f"{row.response}<|im_end|>",
            "rejected": f"{row.rejected}<|im_end|>",
        }
        for row in rows
    ]
