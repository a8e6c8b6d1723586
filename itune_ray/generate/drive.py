"""Driving inputs to their end: whatever the stream loses or repeats, the ledger decides what is still to do."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from itune_ray.config.generate import CommitConfig
from itune_ray.data.ledger import Committer, Ledger, Outcome
from itune_ray.data.records import Record
from itune_ray.errors import DataError, GenerationError
from itune_ray.observe import metrics

Stream = Callable[[Sequence[Record]], Iterator[list[Outcome]]]
"""Runs the recipe over inputs; yields outcomes of whole inputs, in any order."""


@dataclass
class Tally:
    """What this attempt of the stage did."""

    inputs: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0

    def add(self, outcomes: Sequence[Outcome]) -> None:
        """Count finished inputs; the prompt of n samples is counted once."""
        first = {outcome.input_key: outcome for outcome in reversed(outcomes)}
        self.inputs += len(first)
        self.prompt_tokens += sum(outcome.record.num_prompt_tokens or 0 for outcome in first.values())
        self.generated_tokens += sum(outcome.record.num_tokens or 0 for outcome in outcomes)


def check_keys(records: Iterable[Record]) -> None:
    """Refuse inputs whose keys collide: the ledger would take the one for the other."""
    seen: set[str] = set()
    for record in records:
        if record.key in seen:
            raise DataError(
                "two inputs have the same key",
                got=record.key,
                allowed="sources of different names",
                knob="prompts[].name",
            )
        seen.add(record.key)


def quarantine(ledger: Ledger, outcomes: Sequence[Outcome], max_attempts: int) -> None:
    """Commit rows that the sources could not read, once."""
    known = ledger.settled(max_attempts)
    ledger.commit([outcome for outcome in outcomes if outcome.input_key not in known])


def drive(
    records: Sequence[Record],
    ledger: Ledger,
    stream: Stream,
    *,
    commit: CommitConfig,
    max_attempts: int,
    on_progress: Callable[[int, Tally], None] = lambda settled, tally: None,
) -> Tally:
    """Stream what is not settled, pass by pass, until every input is accepted, rejected, or failed for good.

    A pass commits as it goes. Inputs that failed are driven again in the next pass, as are inputs that the stream lost
    (a crashed worker); repeated ones are dropped.

    Raises:
        GenerationError: A pass gave back nothing at all.
    """
    tally, keys = Tally(), {record.key for record in records}
    while pending := pending_of(records, ledger, max_attempts):
        attempts, seen = ledger.attempts(), set[str]()
        done = len(keys) - len(pending)
        with Committer(ledger, commit.rows, commit.seconds) as committer:
            for outcomes in stream(pending):
                fresh = [_attempted(o, attempts) for o in outcomes if o.input_key not in seen and o.input_key in keys]
                seen.update(outcome.input_key for outcome in fresh)
                committer.add(fresh)
                tally.add(fresh)
                _record(fresh)
                on_progress(done + len(seen), tally)
        if not seen:
            raise GenerationError(f"the recipe workers gave back none of {len(pending)} rows", got=pending[0].key)
    return tally


def _record(outcomes: Sequence[Outcome]) -> None:
    for (status, reason), rows in Counter((o.status, o.reason or o.cause or "") for o in outcomes).items():
        metrics.count("itune_rows_total", rows, status=status, reason=reason[:80])


def check_conserved(ledger: Ledger, num_inputs: int, num_quarantined: int, rows_per_input: int | None) -> None:
    """Every input has its outcomes, and no two outcomes share a key; raises `DataError` otherwise."""
    table = ledger.table()
    keys = table["key"].to_pylist()
    if len(set(keys)) != len(keys):
        raise DataError("the recipe gave two rows the same key", got=next(k for k in keys if keys.count(k) > 1))
    if rows_per_input is None:
        have, expected = len(set(table["input_key"].to_pylist())), num_inputs + num_quarantined
    else:
        have, expected = len(keys), num_inputs * rows_per_input + num_quarantined
    if have != expected:
        raise DataError(f"rows were lost: the ledger holds {have}, the inputs make {expected}")


def pending_of(records: Sequence[Record], ledger: Ledger, max_attempts: int) -> list[Record]:
    """The inputs that are not settled."""
    settled = ledger.settled(max_attempts)
    return [record for record in records if record.key not in settled]


def _attempted(outcome: Outcome, attempts: dict[str, int]) -> Outcome:
    return dataclasses.replace(outcome, attempts=attempts.get(outcome.input_key, 0) + 1)
