"""The next step's rows are read while this one's are used."""

import threading

import pytest

from itune_ray.data.ahead import Ahead


def test_the_next_is_read_without_being_asked_for_and_nothing_beyond_the_end():
    read = [threading.Event() for _ in range(3)]

    def reading(index):
        read[index].set()
        return index * 10

    ahead = Ahead(reading, 2)
    assert ahead(0) == 0
    assert read[1].wait(30)
    assert ahead(1) == 10
    assert not read[2].wait(0.05)


def test_any_order_gives_what_was_asked_for():
    ahead = Ahead(lambda index: index, 9)
    assert [ahead(index) for index in (3, 4, 4, 0, 8, 1)] == [3, 4, 4, 0, 8, 1]


def test_an_error_is_raised_by_the_call_that_asks_for_it():
    def reading(index):
        if index == 1:
            raise OSError("gone")
        return index

    ahead = Ahead(reading, 5)
    assert ahead(0) == 0
    with pytest.raises(OSError, match="gone"):
        ahead(1)
    assert ahead(2) == 2
