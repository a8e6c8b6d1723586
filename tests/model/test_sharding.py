import math

import pytest
import torch
from torch.distributed.checkpoint.metadata import MetadataIndex

from itune_ray.model.sharding import Run, boxes, full_shape, held, whole


@pytest.mark.parametrize("shape", [(), (7,), (3, 5), (1, 4), (4, 1), (2, 3, 4)], ids=str)
def test_boxes_are_the_run_in_order_and_few(shape):
    count = math.prod(shape)
    tensor = torch.arange(count).view(shape)
    for start in range(count + 1):
        for stop in range(start, count + 1):
            cut = list(boxes(shape, start, stop))
            slices = [tuple(slice(o, o + n) for o, n in zip(*box, strict=True)) for box in cut]
            assert [int(v) for s in slices for v in tensor[s].flatten()] == list(range(start, stop))
            assert len(cut) <= max(1, 2 * len(shape) - 1)


def test_a_run_is_read_and_written_box_by_box():
    elements = torch.zeros(7)
    run = Run(torch.Size([3, 4]), 3, elements)
    assert full_shape(run) == (3, 4)
    for chunk in run.__create_chunk_list__():
        run.__get_tensor_shard__(MetadataIndex("w", chunk.offsets)).fill_(float(chunk.offsets[0]))
    assert elements.tolist() == [0, 1, 1, 1, 1, 2, 2]
    with pytest.raises(NotImplementedError, match="not computed with"):
        run + 1


def test_a_plain_tensor_is_held_whole():
    tensor = torch.zeros(2, 3)
    ((offsets, local),) = held(tensor)
    local.fill_(1.0)
    assert offsets == (0, 0)
    assert torch.equal(whole(tensor), torch.ones(2, 3))
