"""Micro-batches of a step whose objective compares its rows with each other: survey eq. 9's vision and fusion terms.

Neither is a sum over rows that each know only themselves. The vision term's means are measured first, in a pass without
gradients over all micro-batches and ranks; each row then gets its part of the loss and the gradient at its own means,
with which backward is exact (Gao et al. 2021). The fusion term's rows each get a second document: the same chat with
the images of the next row of the step that shows none of its own. Rows are ordered by their place in the step, so
neither term depends on how the work is divided. What can still differ: with dropout the means are those of the pass
without it.
"""

from collections.abc import Sequence
from itertools import cycle, islice
from typing import Any

import numpy as np
import torch

from itune_ray.data.batches import Batch
from itune_ray.data.order import PackedRow
from itune_ray.model.images import ImageReader, exchanged
from itune_ray.train.forward import forward_only, micro_batches
from itune_ray.train.objectives.image_text import FUSION, TO_ANSWERS, TO_IMAGES, VALUE, VISION, contrast
from itune_ray.train.pictured import BYTES, SIZES, Shown, image_columns, images_of_row
from itune_ray.train.step import Stepper
from itune_ray.train.world import World


def image_text_batches(rows: Sequence[PackedRow], most: int, size: int, pad: int, stepper: Stepper) -> list[Batch]:
    """`micro_batches` of one global batch for `ImageText`; under the fusion term twice as wide. Collective."""
    coefficients = stepper.objective.coefficients
    if VISION in coefficients:
        rows = _contrasted(rows, most, size, pad, stepper)
    if FUSION in coefficients:
        assert isinstance(stepper.images, Shown)
        rows, most, size = _with_negatives(rows, stepper.images.reader, stepper.world), 2 * most, 2 * size
    return micro_batches(rows, most, size, pad, stepper)


def _contrasted(rows: Sequence[PackedRow], most: int, size: int, pad: int, stepper: Stepper) -> list[PackedRow]:
    """The rows with the columns of the vision term."""
    means: list[torch.Tensor] = []
    for batch, scores in forward_only(stepper, micro_batches(rows, most, size, pad, stepper)):
        if batch.keys:
            assert scores.pooled is not None
            means.append(torch.stack(scores.pooled, dim=1).cpu())
    own = torch.cat(means) if means else None
    parts = stepper.world.gather(([row.position for row in rows], own))
    positions = torch.tensor([position for placed, _ in parts for position in placed])
    images, answers = torch.cat([values for _, values in parts if values is not None])[positions.argsort()].unbind(1)
    columns = dict(zip((VALUE, TO_IMAGES, TO_ANSWERS), contrast(images, answers), strict=True))
    place = {int(position): index for index, position in enumerate(positions.sort().values)}
    return [
        row._replace(columns={**row.columns, **{n: v[place[row.position], None].numpy() for n, v in columns.items()}})
        for row in rows
    ]


def _with_negatives(rows: Sequence[PackedRow], reader: ImageReader, world: World) -> list[PackedRow]:
    """Each row followed by the same chat with other images."""
    gathered: list[Any] = world.gather([(row.position, images_of_row(row)) for row in rows])
    shown = sorted(pair for part in gathered for pair in part)
    places = [position for position, _ in shown]
    found: list[PackedRow] = []
    for row in rows:
        at = places.index(row.position)
        own = shown[at][1]
        others = other_images(own, [images for _, images in (*shown[at + 1 :], *shown[:at])])
        found += [row, _shown_otherwise(row, own, others, reader)]
    return found


def other_images(own: Sequence[bytes], rest: Sequence[Sequence[bytes]]) -> list[bytes]:
    """As many images as a row's own, from the first of the other rows that gives none of them; its own where none does.
    A row with fewer gives them again, one with more its first."""
    for images in rest:
        found = list(islice(cycle(images), len(own)))
        if set(own).isdisjoint(found):
            return found
    return list(own)


def _shown_otherwise(row: PackedRow, own: list[bytes], others: list[bytes], reader: ImageReader) -> PackedRow:
    was, becomes = ([reader.expansion(image) for image in images] for images in (own, others))
    ids, flags = exchanged(row.input_ids.tolist(), row.supervised.tolist(), was, becomes)
    measured = {VALUE, TO_IMAGES, TO_ANSWERS} & row.columns.keys()
    return row._replace(
        input_ids=np.array(ids, np.int32),
        supervised=np.array(flags, np.bool_),
        lengths=np.array([len(ids)], np.int32),
        columns={
            **row.columns,
            **{name: np.zeros_like(row.columns[name]) for name in measured},
            **dict(zip((BYTES, SIZES), image_columns(others), strict=True)),
        },
    )
