"""A row's answer against its rejected one, by a judge that sees them in both orders (methods D16)."""

from itune_ray.config.recipes import CompareConfig
from itune_ray.data.ledger import Outcome
from itune_ray.data.records import Record
from itune_ray.engine.judge import prompt_text
from itune_ray.engine.llm import sampling_of
from itune_ray.engine.pairwise import RULES, PairJudge, Result, Verdict, parse_verdict
from itune_ray.generate.recipes.base import last_user_turn, refused
from itune_ray.generate.recipes.chain import Calls, Chain

SCORES: dict[Result, float] = {"win": 1.0, "tie": 0.5, "lose": 0.0}
"""A row's share of the adjusted win rate, whose mean over the rows it is."""


class Compare(Chain):
    """The row as it is, with `compare` in its meta: the result for its answer, and the verdict of each order.

    A judge that likes one place better contradicts itself when the answers change places, and the row is a tie. A
    reply without a verdict is asked for once more, then ends the row as `no_verdict`.
    """

    name = "compare"
    provides = ("messages", "rejected")

    def __init__(self, config: CompareConfig):
        self._config = config
        self._judge = PairJudge(config.template)
        self.prompts = {"judge": self._judge.template}

    async def make(self, row: Record, calls: Calls) -> list[Outcome]:
        """One outcome."""
        if last_user_turn(row.prompt) is None:
            return refused(calls.draft, row, "no_prompt")
        if row.response is None or row.rejected is None:
            return refused(calls.draft, row, "no_answer" if row.response is None else "no_rejected")
        reference = None if self._config.reference is None else row.meta.get(self._config.reference)
        if self._config.reference is not None and not isinstance(reference, str):
            return refused(calls.draft, row, "no_reference")
        orders = {"first": (row.response, row.rejected), "swapped": (row.rejected, row.response)}
        verdicts: list[Verdict] = [
            await calls.parsed(
                name,
                self._judge.messages(prompt_text(row), *answers, reference),
                parse_verdict,
                of="judge",
                sampling=sampling_of(self._config.judging),
                reason="no_verdict",
            )
            for name, answers in orders.items()
        ]
        result = RULES[self._config.rule](*verdicts)
        fields = {name: getattr(row, name) for name in ("model", "sampling", "seed", "finish_reason")}
        fields["meta"] = {**row.meta, "compare": {"result": result, "verdicts": verdicts}}
        if result not in self._config.keep:
            return [calls.rejected(result, score=SCORES[result], **fields)]
        return [calls.accepted(score=SCORES[result], **fields)]
