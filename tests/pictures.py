"""Rows with images, and their loss by plain transformers."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tiny
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoProcessor

from itune_ray.config.shared import FileSource
from itune_ray.config.train import TrainJob
from itune_ray.data.order import Order
from itune_ray.data.records import Record
from itune_ray.data.sources import read_source


def png(seed: int, size: tuple[int, int] = (40, 30)) -> bytes:
    """A picture of noise, rows × columns."""
    pixels = np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def write_rows(folder: Path, count: int = 12, sizes: Sequence[tuple[int, int]] = ((40, 30),)) -> list[Record]:
    """A parquet file in which images are bytes, structs of bytes, or paths; every third row has two.

    Args:
        sizes: Of the pictures, by turns.
    """
    (folder / "red.png").write_bytes(png(99))
    rows: list[dict[str, Any]] = []
    for i, record in enumerate(tiny.chats(count)):
        own = {"bytes": png(i, sizes[i % len(sizes)]), "path": None}
        kinds = [own, {"bytes": None, "path": str(folder / "red.png")}]
        rows.append(
            {"messages": [dict(m) for m in record.messages], "images": kinds if i % 3 == 0 else kinds[i % 2 :][:1]}
        )
    pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")
    return read_source(FileSource(path=str(folder / "rows.parquet"), name="seen")).records


def encoded(record: Record) -> list[bytes]:
    """The row's images as they lie on disk."""
    return [
        Path(entry["path"]).read_bytes() if entry["path"] else base64.b64decode(entry["bytes"]["bytes"])
        for entry in record.meta["images"]
    ]


def inputs_of(processor: Any, record: Record, images: Sequence[bytes]) -> tuple[Any, Tensor]:
    """What the processor makes of a row with these images, and labels [T]: the answer and its end-of-turn token."""
    shown = [Image.open(io.BytesIO(image)).convert("RGB") for image in images]
    parts = [{"type": "image"}] * len(shown)
    chat = [
        {"role": m["role"], "content": [*(parts if i == 0 else []), {"type": "text", "text": m["content"]}]}
        for i, m in enumerate(record.messages)
    ]
    text = processor.apply_chat_template(chat, tokenize=False)
    asked = processor.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
    inputs = processor(text=text, images=shown, return_tensors="pt", add_special_tokens=False)
    start = processor(text=asked, images=shown, return_tensors="pt", add_special_tokens=False)["input_ids"].shape[1]
    labels = inputs["input_ids"][0].clone()
    labels[:start] = -100
    labels[-1] = -100  # the line break after the end-of-turn token
    return inputs, labels


def answer_loss(model: Any, processor: Any, record: Record, images: Sequence[bytes]) -> tuple[Tensor, int]:
    """-log p of the answer given these images, and its tokens."""
    inputs, labels = inputs_of(processor, record, images)
    logits = model(**inputs).logits[0]
    total = cross_entropy(logits[:-1], labels[1:], ignore_index=-100, reduction="sum")
    return total, int((labels[1:] != -100).sum())


def plain_loss(model: Any, folder: Path, records: Sequence[Record]) -> Tensor:
    """Mean cross entropy over the answers' tokens, each row alone through the processor and plain transformers."""
    processor = AutoProcessor.from_pretrained(folder)
    parts = [answer_loss(model, processor, record, encoded(record)) for record in records]
    return torch.stack([total for total, _ in parts]).sum() / sum(count for _, count in parts)


BATCH = 6


def job_of(folder: Path, **overrides: Any) -> TrainJob:
    """A joint training of an image-text model."""
    settings = {"steps": 2, "batch": BATCH, "micro_batch": BATCH, "images": {"trained": "joint"}}
    return tiny.job(folder, **{**settings, **overrides})


def first_step(job: TrainJob, records: Sequence[Record]) -> list[Record]:
    """The rows of a job's first step, in order."""
    _, indices = next(Order([r.key for r in records], [1.0] * len(records), job.seed, job.batch).steps(None, 1))
    return [records[i] for i in indices]
