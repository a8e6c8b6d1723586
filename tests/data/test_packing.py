import random

import pytest

from itune_ray.data.packing import pack
from itune_ray.errors import DataError


def test_every_document_once_and_no_row_too_long():
    rng = random.Random(0)
    lengths = [rng.randint(1, 100) for _ in range(500)]
    rows = pack(lengths, 100)
    assert sorted(i for row in rows for i in row) == list(range(500))
    assert all(sum(lengths[i] for i in row) <= 100 for row in rows)
    lower_bound = -(-sum(lengths) // 100)
    assert len(rows) <= lower_bound * 1.05


def test_best_fit_takes_the_fullest_row_that_holds():
    assert pack([6, 5, 3, 4], 10) == [[0, 3], [1, 2]]


def test_a_document_longer_than_a_row_is_an_error():
    with pytest.raises(DataError, match="longer than a packed row"):
        pack([3, 11], 10)
