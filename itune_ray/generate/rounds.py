"""Self-improvement in rounds (survey eq. 4, methods D06): propose in parallel against a frozen pool, commit in order.

A round's calls stream through the workers like any inputs and settle in a ledger of their own. What is new among their
candidates is then decided here, one after another in the order of (call, item): a pure function of the settled rows, so
neither workers nor a kill change it, and equal to the sequential algorithm, since the pool only grows. The next round
shows what this one accepted. Accepted instructions are answered at the end.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from itune_ray.config.generate import GenerateJob
from itune_ray.config.recipes import RespondConfig, SelfInstructConfig
from itune_ray.config.shared import SamplingConfig
from itune_ray.data.ledger import Ledger, Outcome
from itune_ray.data.records import Record, row_rng
from itune_ray.data.storage import Folder
from itune_ray.errors import DataError
from itune_ray.generate.drive import Stream, Tally, check_conserved, drive
from itune_ray.generate.novelty import Tokens, nearest, tokens_of
from itune_ray.generate.recipes.base import Recipe, last_user_turn
from itune_ray.generate.recipes.propose import Propose
from itune_ray.generate.recipes.respond import Respond
from itune_ray.observe.progress import Progress

SOURCE = "self-instruct"
"""First part of the keys of made instructions; the second is the call, the third the item of its reply."""

StreamOf = Callable[[Recipe, SamplingConfig], Stream]
"""How a recipe runs over inputs."""


@dataclass(frozen=True)
class Round:
    """What one round did."""

    round: int
    calls: int
    proposed: int
    """Candidates parsed out of the replies."""
    accepted: int
    rejected: dict[str, int]
    mean_similarity: float | None
    """Mean ROUGE-L F of the accepted ones with the likest instruction before them."""


class SelfInstruct:
    """Runs the rounds of a job.

    Args:
        job: Its recipe is a `SelfInstructConfig`.
        seeds: Rows whose last user turn is a seed instruction.
        folder: Where the ledgers of the rounds are.
        stream_of: Runs a recipe over inputs.
        progress: Gets one bar per round and one for the answers.
    """

    def __init__(
        self, job: GenerateJob, seeds: Sequence[Record], folder: Folder, stream_of: StreamOf, progress: Progress
    ):
        assert isinstance(job.recipe, SelfInstructConfig)
        self._job, self._config, self._folder = job, job.recipe, folder
        self._stream_of, self._progress, self._recipe = stream_of, progress, Propose(job.recipe)
        self._seeds = [(seed.key, text) for seed in seeds if (text := last_user_turn(seed.prompt)) is not None]
        if not self._seeds:
            raise DataError("self_instruct has no seed instruction", allowed="rows with a user turn", knob="prompts")
        self._pool: list[Tokens] = [tokens_of(text) for _, text in self._seeds]
        self.made: list[Record] = []
        """Accepted instructions so far."""
        self._scores: dict[str, float] = {}
        self.rounds: list[Round] = []
        self.tally = Tally()

    def run(self) -> list[Outcome]:
        """All rounds, then the answers; every candidate ends in one outcome, as does a call without any."""
        ended: list[Outcome] = []
        for number in range(1, self._config.rounds + 1):
            ended += self._round(number)
            if self._enough():
                break
        return sorted(ended + self._answers(), key=lambda outcome: outcome.record.key)

    def _round(self, number: int) -> list[Outcome]:
        """Propose and commit; returns the outcomes of what was not accepted."""
        calls, ledger = self._calls(number), Ledger(self._folder / f"round-{number:03d}")
        self._drive(calls, ledger, self._recipe.against(self._pool), self._job.sampling, f"propose {number}")
        outcomes = settled(ledger)
        fresh, ended = self._committed(outcomes, number)
        self.made += [outcome.record for outcome in fresh]
        self._scores |= {outcome.record.key: outcome.score for outcome in fresh}
        self._pool += [tokens_of(_text(outcome.record)) for outcome in fresh]
        scores = [outcome.score for outcome in fresh]
        self.rounds.append(
            Round(
                round=number,
                calls=len(calls),
                proposed=sum(o.raw is None for o in outcomes),
                accepted=len(fresh),
                rejected=dict(sorted(Counter(o.reason or o.cause or "unknown" for o in ended).items())),
                mean_similarity=sum(scores) / len(scores) if scores else None,
            )
        )
        return ended

    def _committed(self, outcomes: Sequence[Outcome], number: int) -> tuple[list[Outcome], list[Outcome]]:
        """Candidates in order: those new against what this round accepted before them, and the rest."""
        fresh: list[Outcome] = []
        ended: list[Outcome] = []
        added: list[Tokens] = []
        for outcome in outcomes:
            record = dataclasses.replace(outcome.record, round=number)
            outcome = dataclasses.replace(outcome, record=record)
            if outcome.status != "accepted":
                ended.append(outcome)
                continue
            tokens = tokens_of(_text(record))
            found = nearest(tokens, added, self._config.novelty)
            outcome = dataclasses.replace(outcome, score=max(outcome.score, found.score))
            if found.is_near:
                ended.append(dataclasses.replace(outcome, status="rejected", reason="not_novel"))
            else:
                fresh.append(outcome)
                added.append(tokens)
        return fresh, ended

    def _calls(self, number: int) -> list[Record]:
        """Inputs of a round: each shows examples drawn by its own generator, the machine's among them once there are
        enough."""
        config, first = self._config, (number - 1) * self._config.calls
        machine = [(record.key, _text(record)) for record in self.made]
        calls: list[Record] = []
        for position in range(first, first + config.calls):
            rng = row_rng(self._job.seed, "generate.self_instruct", str(position), number)
            own = config.machine_examples if len(machine) >= config.machine_examples else 0
            shown = rng.sample(machine, min(own, config.examples))
            shown += rng.sample(self._seeds, min(config.examples - len(shown), len(self._seeds)))
            rng.shuffle(shown)
            turn = {"role": "user", "content": self._recipe.asked([text for _, text in shown])}
            parents = tuple(key for key, _ in shown)
            calls.append(Record(source=SOURCE, position=position, messages=(turn,), parents=parents, round=number))
        return calls

    def _enough(self) -> bool:
        last, target = self.rounds[-1], self._config.target
        reached = target is not None and len(self.made) >= target
        return reached or last.accepted < self._config.min_acceptance * last.proposed

    def _answers(self) -> list[Outcome]:
        """Outcomes of the accepted instructions, answered; their parents are the instructions that inspired them."""
        if not self.made:
            return []
        ledger, made = Ledger(self._folder / "answers"), {record.key: record for record in self.made}
        inputs = [dataclasses.replace(r, num_prompt_tokens=None, num_tokens=None) for r in self.made]
        self._drive(inputs, ledger, Respond(RespondConfig()), self._config.answer, "answer")
        check_conserved(ledger, len(inputs), 0, 1)
        return [
            dataclasses.replace(_inspired(outcome, made[outcome.input_key]), score=self._scores[outcome.input_key])
            for outcome in settled(ledger)
        ]

    def _drive(
        self, inputs: Sequence[Record], ledger: Ledger, recipe: Recipe, sampling: SamplingConfig, name: str
    ) -> None:
        job = self._job
        with self._progress.task(name, len(inputs)) as task:
            tally = drive(
                inputs,
                ledger,
                self._stream_of(recipe, sampling),
                commit=job.commit,
                max_attempts=job.max_attempts,
                on_progress=lambda done, so_far: task.update(done, so_far.prompt_tokens + so_far.generated_tokens),
            )
        self.tally.inputs += tally.inputs

    def facts(self) -> list[dict[str, Any]]:
        """The rounds, for the manifest."""
        return [asdict(done) for done in self.rounds]


def settled(ledger: Ledger) -> list[Outcome]:
    """The outcomes of a ledger in the order of (input, item)."""
    outcomes = [Outcome.from_row(row) for row in ledger.table().to_pylist()]
    return sorted(outcomes, key=lambda o: (o.record.position, o.record.sample))


def _text(record: Record) -> str:
    return record.messages[-1]["content"]


def _inspired(outcome: Outcome, instruction: Record) -> Outcome:
    record = dataclasses.replace(
        outcome.record, parents=instruction.parents, recipe="self_instruct", round=instruction.round
    )
    return dataclasses.replace(outcome, record=record)
