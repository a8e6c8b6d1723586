"""Self-improvement in rounds (survey eq. 4, methods D06): propose in parallel against a frozen pool, commit in order.

A round's calls stream through the workers like any inputs and settle in a ledger of their own. What is new among their
candidates is then decided here, one after another in the order of (call, item): a pure function of the settled rows, so
neither workers nor a kill change it, and equal to the sequential algorithm, since the pool only grows. The next round
shows what this one accepted. Accepted instructions that brought no answer are answered at the end.
"""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from itune_ray.config.generate import GenerateJob
from itune_ray.config.recipes import RespondConfig, SelfInstructConfig
from itune_ray.config.shared import SamplingConfig
from itune_ray.data.ledger import Ledger, Outcome
from itune_ray.data.records import Record, row_rng
from itune_ray.data.storage import Folder
from itune_ray.errors import DataError
from itune_ray.generate.drive import Tally, check_conserved, drive
from itune_ray.generate.novelty import Tokens, nearest, tokens_of
from itune_ray.generate.recipes import load_recipe
from itune_ray.generate.recipes.base import Recipe
from itune_ray.generate.recipes.propose import Proposer
from itune_ray.generate.recipes.respond import Respond
from itune_ray.generate.whole import StreamOf
from itune_ray.observe.progress import Progress


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
        job: Its recipe is one that proposes: self_instruct or alpaca.
        seeds: Rows that the recipe can show.
        folder: Where the ledgers of the rounds are.
        stream_of: Runs a recipe over inputs.
        progress: Gets one bar per round and one for the answers.
    """

    def __init__(
        self, job: GenerateJob, seeds: Sequence[Record], folder: Folder, stream_of: StreamOf, progress: Progress
    ):
        recipe = load_recipe(job.recipe)
        assert isinstance(recipe, Proposer)
        self._job, self._config, self._folder = job, recipe.config, folder
        self._stream_of, self._progress, self._recipe = stream_of, progress, recipe
        self._seeds = [seed for seed in seeds if recipe.instruction(seed)]
        if not self._seeds:
            raise DataError(f"{recipe.name} has no seed instruction", allowed=recipe.seeds, knob="prompts")
        self._pool: list[Tokens] = [self._tokens(seed) for seed in self._seeds]
        self._accepted: dict[str, Outcome] = {}
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
        self._accepted |= {outcome.record.key: outcome for outcome in fresh}
        self._pool += [self._tokens(outcome.record) for outcome in fresh]
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
            tokens = self._tokens(record)
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
        machine = [outcome.record for outcome in self._accepted.values()]
        calls: list[Record] = []
        for position in range(first, first + config.calls):
            rng = row_rng(self._job.seed, f"generate.{config.type}", str(position), number)
            own = config.machine_examples if len(machine) >= config.machine_examples else 0
            shown = rng.sample(machine, min(own, config.examples))
            shown += rng.sample(self._seeds, min(config.examples - len(shown), len(self._seeds)))
            rng.shuffle(shown)
            turn = {"role": "user", "content": self._recipe.asked(shown)}
            call = Record(source=self._recipe.source, position=position, messages=(turn,), round=number)
            calls.append(dataclasses.replace(call, parents=tuple(row.key for row in shown)))
        return calls

    def _enough(self) -> bool:
        last, target = self.rounds[-1], self._config.target
        reached = target is not None and len(self._accepted) >= target
        return reached or last.accepted < self._config.min_acceptance * last.proposed

    def _answers(self) -> list[Outcome]:
        """Outcomes of the accepted instructions, answered; their parents are the instructions that inspired them."""
        brought = [outcome for outcome in self._accepted.values() if outcome.record.response is not None]
        asked = [outcome.record for outcome in self._accepted.values() if outcome.record.response is None]
        rows = [_inspired(outcome, outcome, self._recipe.name) for outcome in brought]
        if not asked:
            return rows
        assert isinstance(self._config, SelfInstructConfig)
        ledger = Ledger(self._folder / "answers")
        inputs = [dataclasses.replace(r, num_prompt_tokens=None, num_tokens=None) for r in asked]
        self._drive(inputs, ledger, Respond(RespondConfig()), self._config.answer, "answer")
        check_conserved(ledger, len(inputs), 0, 1)
        return rows + [_inspired(o, self._accepted[o.input_key], self._recipe.name) for o in settled(ledger)]

    def _drive(
        self, inputs: Sequence[Record], ledger: Ledger, recipe: Recipe, sampling: SamplingConfig, name: str
    ) -> None:
        job = self._job
        with self._progress.task(name, len(inputs)) as task:
            tally = drive(
                inputs,
                ledger,
                self._stream_of(recipe, sampling, ledger),
                commit=job.commit,
                max_attempts=job.max_attempts,
                on_progress=lambda done, so_far: task.update(done, so_far.prompt_tokens + so_far.generated_tokens),
            )
        self.tally.inputs += tally.inputs

    def _tokens(self, record: Record) -> Tokens:
        return tokens_of(self._recipe.instruction(record) or "")

    def facts(self) -> list[dict[str, Any]]:
        """The rounds, for the manifest."""
        return [asdict(done) for done in self.rounds]


def settled(ledger: Ledger) -> list[Outcome]:
    """The outcomes of a ledger in the order of (input, item)."""
    outcomes = [Outcome.from_row(row) for row in ledger.table().to_pylist()]
    return sorted(outcomes, key=lambda o: (o.record.position, o.record.sample))


def _inspired(outcome: Outcome, instruction: Outcome, recipe: str) -> Outcome:
    """An answered row with the score, parents and round of its instruction."""
    made = instruction.record
    record = dataclasses.replace(outcome.record, parents=made.parents, recipe=recipe, round=made.round)
    return dataclasses.replace(outcome, record=record, score=instruction.score)
