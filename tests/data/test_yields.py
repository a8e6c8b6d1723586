"""What an accepted row has cost, rejected ones paid for."""

import pyarrow as pa

from itune_ray.data.ledger import LEDGER_SCHEMA, Outcome
from itune_ray.data.records import Record
from itune_ray.data.yields import by_recipe, per_accepted


def outcome(position: int, recipe: str | None, status: str, tokens: int | None) -> dict:
    record = Record(source="s", position=position, recipe=recipe, num_tokens=tokens)
    return Outcome(record=record, input_key=record.key, status=status).to_row()


def test_rejected_rows_are_paid_for_by_accepted_ones():
    rows = [
        outcome(0, "respond", "accepted", 10),
        outcome(1, "respond", "rejected", 30),
        outcome(2, "evol.deepen", "rejected", 7),
        outcome(3, None, "accepted", None),
        outcome(4, "respond", "accepted", None),
    ]
    assert by_recipe(pa.Table.from_pylist(rows, schema=LEDGER_SCHEMA)) == {
        "evol.deepen": {"rows": 1, "accepted": 0, "generated_tokens": 7, "tokens_per_accepted": None},
        "respond": {"rows": 3, "accepted": 2, "generated_tokens": 40, "tokens_per_accepted": 20.0},
    }


def test_what_is_not_known_or_made_has_no_price():
    assert per_accepted(4, 10.0, 100, None) == {"seconds": 2.5, "tokens": 25.0, "cost": None}
    assert per_accepted(0, 10.0, 100, 1.0) == {"seconds": None, "tokens": None, "cost": None}
