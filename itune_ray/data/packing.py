"""Best-fit-decreasing bin packing of documents into rows, within one optimizer step.

Longest first, each document goes into the fullest row that still holds it. The result depends on nothing but the
lengths, and packing never crosses a step, so it moves neither the data order nor the loss.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence

from itune_ray.errors import DataError


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows of document indices whose lengths sum to at most `capacity` tokens each.

    Within a row and over the rows, documents keep their order (rows by their first document). O(n log n).
    """
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (tokens left, row), sorted: the first that fits is the fullest
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        if length > capacity:
            raise DataError("a document is longer than a packed row", got=length, allowed=f"at most {capacity} tokens")
        slot = bisect_left(free, (length, -1))
        left, row = free.pop(slot) if slot < len(free) else (capacity, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(index)
        insort(free, (left - length, row))
    return sorted(sorted(row) for row in rows)
