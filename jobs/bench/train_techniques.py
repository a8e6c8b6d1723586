"""What each technique of the training loop is worth on a CPU: `python jobs/bench/train_techniques.py [--threads 2]`.

One technique is added at a time to a plain loop over padded chats with all logits; the model and documents are those of
`jobs/bench/train.yaml`. Steps of all variants take turns, and the best of each counts. One JSON line per variant.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from itune_ray.bench.head import forget_peak, peak
from itune_ray.bench.inputs import tokenizer, write_inputs
from itune_ray.config.base import load_job
from itune_ray.config.bench import BenchJob, TrainBench
from itune_ray.data.batches import IGNORED, Batch, collate, join, model_inputs
from itune_ray.data.chat import ChatRenderer
from itune_ray.data.order import PackedRow
from itune_ray.data.packing import pack
from itune_ray.data.records import Record
from itune_ray.model import cpu
from itune_ray.model.compiled import compile_layers
from itune_ray.model.cpu import install_wide_products
from itune_ray.model.documents import install_document_attention
from itune_ray.model.load import masking_for
from itune_ray.model.logprobs import install_fused_head
from itune_ray.model.wide_blocks import install_wide_blocks

JOB = Path(__file__).with_name("train.yaml")
PADDED = 16
"""Chats of one padded batch."""


@dataclass
class Variant:
    """A model with some of the techniques, and its steps so far."""

    name: str
    packed: bool = True
    fused: bool = True
    by_document: bool = True
    wide: bool = True
    blocks: bool = True
    compiled: bool = False
    seconds: list[float] = field(default_factory=list[float])
    cpu_seconds: list[float] = field(default_factory=list[float])
    peak_mib: float = 0.0
    loss: float = 0.0


def variants() -> list[Variant]:
    """Each with one technique more than the one before."""
    return [
        Variant("padded chats, all logits", packed=False, fused=False, by_document=False, wide=False, blocks=False),
        Variant("+ packing, block-diagonal mask", fused=False, by_document=False, wide=False, blocks=False),
        Variant("+ scores at supervised positions, in chunks", by_document=False, wide=False, blocks=False),
        Variant("+ attention by document", wide=False, blocks=False),
        Variant("+ products by fp32 units where there are no bf16 ones", blocks=False),
        Variant("+ norms and gates as one function, nothing rounded between a layer's products"),
        Variant("+ layers compiled where there are bf16 units, instead of both", compiled=True),
    ]


@contextmanager
def units(wide: bool) -> Iterator[None]:
    """As if the CPU had bf16 units, or as it is."""
    kept = cpu.has_bf16_units
    cpu.has_bf16_units = kept if wide else lambda: True
    try:
        yield
    finally:
        cpu.has_bf16_units = kept


def stepper(variant: Variant, folder: str, rows: list[PackedRow], bench: TrainBench) -> Callable[[], float]:
    """A function that takes one optimizer step over the rows and returns its loss."""
    model: Any = AutoModelForCausalLM.from_pretrained(
        f"{folder}/model", dtype=torch.float32, attn_implementation="sdpa"
    ).train()
    install_fused_head(model)
    if variant.by_document:
        install_document_attention(model)
    if variant.compiled and not cpu.wide(torch.device("cpu"), torch.bfloat16):
        compile_layers(model, bench.pack_length)
    else:
        if variant.wide:
            install_wide_products(model)
        if variant.blocks:
            install_wide_blocks(model)
    masking = masking_for(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    batches = _batches(variant, rows, bench.pack_length, flat=masking == "varlen")
    total = sum(int((batch.labels[:, 1:] != IGNORED).sum()) for batch in batches)

    def step() -> float:
        summed = 0.0
        for batch in batches:
            with torch.autocast("cpu", torch.bfloat16):
                inputs = model_inputs(batch, masking, torch.bfloat16)
                loss = _nll(model, inputs, batch.labels, variant.fused) / total
            loss.backward()
            summed += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return summed

    return step


def _nll(model: Any, inputs: dict[str, object], labels: Tensor, fused: bool) -> Tensor:
    if fused:
        return -model(**inputs, labels=labels, token_scores=True).log_probs.sum()
    logits: Tensor = model(**inputs).logits[:, :-1].float()
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
    )


def _batches(variant: Variant, documents: list[PackedRow], capacity: int, flat: bool) -> list[Batch]:
    if not variant.packed:
        ordered = sorted(documents, key=lambda row: -len(row.input_ids))
        return [collate(ordered[i : i + PADDED], 0) for i in range(0, len(ordered), PADDED)]
    return [
        collate([documents[i] for i in chosen], 0, flat=True) if flat else collate([_joined(documents, chosen)], 0)
        for chosen in pack([len(row.input_ids) for row in documents], capacity)
    ]


def _joined(documents: list[PackedRow], chosen: list[int]) -> PackedRow:
    return join([documents[i] for i in chosen])


def measure(variant: Variant, step: Callable[[], float]) -> None:
    """One step, timed, with the memory it takes beyond what is held between steps."""
    held = forget_peak()
    began, cpu_began = time.perf_counter(), time.process_time()
    with units(variant.wide):
        variant.loss = step()
    variant.seconds.append(time.perf_counter() - began)
    variant.cpu_seconds.append(time.process_time() - cpu_began)
    variant.peak_mib = max(variant.peak_mib, (peak() - held) / 2**20)


def documents_of(folder: str, bench: TrainBench, count: int) -> list[PackedRow]:
    """The first documents of the bench, tokenised."""
    renderer = ChatRenderer(tokenizer(int(bench.config["vocab_size"])))
    rows: list[PackedRow] = []
    for position, line in enumerate((Path(folder) / "records.jsonl").read_text().splitlines()[:count]):
        made = renderer.record_ids(Record.from_row({"source": "bench", "position": position, **json.loads(line)}))
        ids, flags = torch.tensor(made.input_ids, dtype=torch.int32), torch.tensor(made.supervised)
        lengths = torch.tensor([len(made.input_ids)], dtype=torch.int32)
        rows.append(PackedRow(ids.numpy(), flags.numpy(), lengths.numpy(), (str(position),)))
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    job = load_job(BenchJob, JOB)
    assert job.train is not None
    with tempfile.TemporaryDirectory() as scratch:
        inputs = write_inputs(job.train, Path(scratch) / "inputs", pairs=False, seed=job.seed)
        rows = documents_of(inputs.folder, job.train, inputs.documents_per_step)
        steps = [(variant, stepper(variant, inputs.folder, rows, job.train)) for variant in variants()]
        for variant, step in steps:
            with units(variant.wide):
                step()
        for _ in range(arguments.rounds):
            for variant, step in steps:
                measure(variant, step)
    tokens = sum(len(row.input_ids) for row in rows)
    for variant, _ in steps:
        rate, cpu_rate = tokens / min(variant.seconds), tokens / min(variant.cpu_seconds)
        figures = {
            "tokens_per_s": round(rate),
            "tokens_per_cpu_s": round(cpu_rate),
            "peak_mib": round(variant.peak_mib),
        }
        print(json.dumps({"technique": variant.name, **figures, "loss": round(variant.loss, 4)}), flush=True)


if __name__ == "__main__":
    main()
