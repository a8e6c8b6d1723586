"""Rows with images, from the row to the forward pass: encoded images travel as columns of the training order.

What a resume needs is on disk: the order holds the image files' own bytes, and they are decoded for each step anew.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from itune_ray.config.objectives import SftConfig
from itune_ray.config.train import TrainedModel, TrainJob
from itune_ray.data.batches import IGNORED, Batch, collate
from itune_ray.data.chat import ChatRenderer
from itune_ray.data.hub import local_model_folder
from itune_ray.data.images import BadImageError, images_of
from itune_ray.data.order import DOCUMENT_SCHEMA, PackedRow
from itune_ray.data.records import Record
from itune_ray.model.images import ImageReader, expanded, to_compute
from itune_ray.train.documents import Document, DocumentError, check_length, rendered

BYTES, SIZES = "image_bytes", "image_sizes"
"""Columns: the encoded images of a document end to end, and how many bytes each has."""
IMAGE_COLUMNS = (BYTES, SIZES)


@lru_cache(maxsize=4)
def reader_for(model_json: str) -> ImageReader:
    """One image reader per process and model section (as JSON)."""
    model = TrainedModel.model_validate_json(model_json)
    return ImageReader(local_model_folder(model.reference()).path, model.trust_remote_code)


class Pictured:
    """A chat with its images as one segment: an image's placeholder becomes as many tokens as it has features.

    Reasons: `no_image`, `bad_image` (unreadable), and those of answers.
    """

    schema = pa.schema([*DOCUMENT_SCHEMA, (BYTES, pa.list_(pa.uint8())), (SIZES, pa.list_(pa.int32()))])
    wanted = "at least one row with an answer and images (column `images`) within max_length"

    def document(self, record: Record, job: TrainJob, renderer: ChatRenderer) -> Document:
        """See `Documents.document`."""
        assert isinstance(job.objective, SftConfig)
        reader = reader_for(job.model.model_dump_json())
        try:
            images = images_of(record.meta)
            expansions = [reader.expansion(image) for image in images]
        except BadImageError as error:
            raise DocumentError("bad_image", str(error)) from None
        if not images:
            raise DocumentError("no_image")
        ids, supervised = rendered(record, renderer, job.objective.supervise)
        ids, supervised = expanded(ids, supervised, reader.token_id, expansions)
        check_length(len(ids), job)
        joined, sizes = image_columns(images)
        return {"input_ids": ids, "supervised": supervised, "lengths": [len(ids)], BYTES: joined, SIZES: sizes}


def image_columns(images: Sequence[bytes]) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
    """The columns `BYTES` and `SIZES` of encoded images."""
    return np.frombuffer(b"".join(images), np.uint8), np.array([len(image) for image in images], np.int32)


def images_of_row(row: PackedRow) -> list[bytes]:
    """The encoded images of a packed row, in order."""
    return _split(row.columns[BYTES].tobytes(), row.columns[SIZES].tolist())


@dataclass(frozen=True)
class Shown:
    """What a forward pass needs beside the ids."""

    reader: ImageReader
    device: torch.device
    dtype: torch.dtype
    """Compute dtype of the pixels."""

    def __call__(self, batch: Batch) -> tuple[Batch, dict[str, Tensor]]:
        """The batch to run and its image inputs. A dummy becomes a row of one blank image's tokens, without a target:
        every rank runs the vision tower as often as the others, since collectives wait for it."""
        images = _images(batch)
        if not images:
            images = [self.reader.blank()]
            batch = _only_images(self.reader.expansion(images[0])).to(self.device)
        return batch, self.inputs(images)

    def inputs(self, images: Sequence[bytes]) -> dict[str, Tensor]:
        """Encoded images as the forward pass takes them."""
        return to_compute(self.reader.inputs(images), self.device, self.dtype)


def _images(batch: Batch) -> list[bytes]:
    if BYTES not in batch.columns:
        return []
    return _split(batch.columns[BYTES].cpu().numpy().tobytes(), batch.columns[SIZES].tolist())


def _split(joined: bytes, sizes: Sequence[int]) -> list[bytes]:
    ends = list(accumulate(sizes))
    return [joined[end - size : end] for end, size in zip(ends, sizes, strict=True)]


def _only_images(ids: list[int]) -> Batch:
    given = np.array(ids, np.int32)
    row = PackedRow(given, np.zeros(len(ids), np.bool_), np.array([len(ids)], np.int32), ("blank",))
    batch = collate([row], pad_id=0)
    assert bool((batch.labels == IGNORED).all())
    return batch


def shown_for(job: TrainJob, device: torch.device, dtype: torch.dtype) -> Shown | None:
    """The images' part of a job's forward passes; None for a job without."""
    return None if job.images is None else Shown(reader_for(job.model.model_dump_json()), device, dtype)


def write_processor(job: TrainJob, out: str) -> None:
    """Put the processor's files beside a written model, so that the folder opens by AutoProcessor."""
    import tempfile
    from pathlib import Path

    from itune_ray.data.storage import Folder

    processor: Any = reader_for(job.model.model_dump_json()).processor
    folder = Folder.at(out)
    with tempfile.TemporaryDirectory() as scratch:
        processor.save_pretrained(scratch)
        for file in sorted(Path(scratch).iterdir()):
            if not folder.exists(file.name):  # the tokenizer's files are the training's own
                folder.write_bytes(file.name, file.read_bytes())
