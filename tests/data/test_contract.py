"""Contracts: a chain that cannot work is refused before anything starts."""

import pytest

from itune_ray.data.contract import Contract, check, facets
from itune_ray.data.records import Record
from itune_ray.errors import DataError

ANSWERED = Record(
    source="a",
    position=0,
    messages=({"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}),
    meta={"ratings": [5]},
    finish_reason="stop",
)
PROMPT = Record(source="b", position=0, messages=({"role": "user", "content": "q"},))


def test_facets_are_what_at_least_one_row_has():
    assert facets([PROMPT]) == {"messages", "prompt"}
    assert facets([PROMPT, ANSWERED]) == {"messages", "prompt", "response", "finish_reason", "meta.ratings"}
    assert facets([Record(source="c", position=0, text="x")]) == {"text"}


def test_what_a_step_adds_the_next_may_need():
    steps = [Contract("0 (respond)", provides=frozenset({"response"})), Contract("1 (grader)", frozenset({"response"}))]
    check(steps, {"b": facets([PROMPT])})
    with pytest.raises(DataError, match=r"1 \(grader\) needs response, and no row of b has it"):
        check(steps[1:], {"b": facets([PROMPT])})


def test_a_step_for_some_sources_asks_only_them():
    rating = Contract("filters.0 (human_rating)", frozenset({"meta.ratings"}), only=("a",))
    check([rating], {"a": facets([ANSWERED]), "b": facets([PROMPT])})
    with pytest.raises(DataError, match=r"no row of b.*filters\.0"):
        check([Contract("filters.0 (human_rating)", frozenset({"meta.ratings"}), only=("b",))], {"b": facets([PROMPT])})


def test_no_rows_break_no_contract():
    check([Contract("x", frozenset({"response"}))], {})
