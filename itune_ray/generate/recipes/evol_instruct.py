"""Evol-Instruct with its eliminator: instructions made harder or rarer in rounds (Xu et al. 2023, methods D10).

A row goes its own way through the rounds: what fails is undone and may be evolved again in the next, so no round waits
for another row.
"""

import re
from collections.abc import Mapping

from itune_ray.config.recipes import EvolInstructConfig
from itune_ray.data.ledger import Outcome
from itune_ray.data.records import Message, Record
from itune_ray.engine.base import Sampling
from itune_ray.engine.llm import sampling_of
from itune_ray.engine.templates import render
from itune_ray.generate.recipes.base import builtin_prompt, last_user_turn, refused
from itune_ray.generate.recipes.chain import Calls, Chain, EndedError
from itune_ray.generate.stop_words import STOP_WORDS

METHODS: Mapping[str, str] = {
    "constraint": "Add one condition or requirement that the answer has to meet.",
    "deepen": "Where the task asks about something, let it ask deeper and wider about that.",
    "concretise": "Replace general notions in the task by particular ones.",
    "reasoning": "Where the task takes a step or two of thought, let it take several that build on each other.",
}
"""Operators that share one template, and what each adds."""
FORMATS = ("XML", "a SQL schema with rows", "Python code", "HTML", "a shell session", "JSON")
SCAFFOLD = re.compile(r"</?(?:task|first|second)>|\b(?:new|given|original|rewritten|edited) task\b", re.IGNORECASE)
"""Words of the templates that a rewrite must not repeat."""
TALK = re.compile(r"\b(?:as an ai|ai assistant|how can i (?:assist|help))\b", re.IGNORECASE)
APOLOGY, APOLOGY_WORDS = re.compile(r"\bsorry\b", re.IGNORECASE), 80
_WORD = re.compile(r"[^\W_]+")


class EvolInstruct(Chain):
    """x_r = evolve(x_{r-1}) by an operator drawn per row and round; with its answer it is a row, and x_r goes on.

    The eliminator rejects a rewrite that says the same (`not_richer`, asked of the judge), copies the template
    (`scaffold`), talks as an assistant (`talk`) or is unchanged (`unchanged`), and an answer that apologises in under
    80 words (`apology`, unless the task is about apologies) or has nothing but stop words (`no_content`). Then
    x_r = x_{r-1}.
    """

    name = "evol_instruct"
    version = 2

    def __init__(self, config: EvolInstructConfig):
        self._config = config
        self.rows_per_input = self.most_rows = config.rounds
        names = ("depth", "complicate", "breadth", "equal")
        self.prompts = {name: builtin_prompt(self.name, f"{name}.jinja") for name in names}

    async def make(self, row: Record, calls: Calls) -> list[Outcome]:
        """One outcome per round."""
        task = last_user_turn(row.prompt)
        if task is None:
            return refused(calls.draft, row, "no_prompt", self.most_rows)
        outcomes: list[Outcome] = []
        parent = row.key
        for number in range(1, self._config.rounds + 1):
            rng = calls.rng(f"operator/{number}")
            operator = rng.choice(self._config.operators)
            facts = {"recipe": f"{self.name}.{operator}", "round": row.round + number, "parents": (parent,)}
            evolved = task
            try:
                evolved = await self._evolve(task, operator, rng.choice(FORMATS), calls, number)
                messages = await self._answered(row, evolved, calls, number)
            except EndedError as end:
                if end.failed is not None:
                    raise
                chat = self._chat(row, evolved)
                outcomes.append(calls.rejected(end.reason, number - 1, raw=end.raw, messages=chat, **facts))
                continue
            outcomes.append(calls.accepted(number - 1, messages=messages, finish_reason="stop", **facts))
            task, parent = evolved, outcomes[-1].record.key
        return outcomes

    async def _evolve(self, task: str, operator: str, form: str, calls: Calls, number: int) -> str:
        """The rewritten task; raises `EndedError` with the rule that it breaks."""
        template = self.prompts["depth" if operator in METHODS else operator]
        asked = render(template, task=task, method=METHODS.get(operator, ""), format=form)
        evolved = await calls.ask(f"evolve/{number}", asked)
        reason = broken_rule(task, evolved)
        if reason is not None:
            raise EndedError(reason, raw=evolved)
        question = render(self.prompts["equal"], parent=task, task=evolved)
        greedy = Sampling(temperature=0.0, max_tokens=16)
        is_equal = await calls.parsed(f"equal/{number}", question, parse_equal, of="judge", sampling=greedy, cut=True)
        if is_equal:
            raise EndedError("not_richer", raw=evolved)
        return evolved

    async def _answered(self, row: Record, task: str, calls: Calls, number: int) -> tuple[Message, ...]:
        chat = self._chat(row, task)
        answer = await calls.ask(f"answer/{number}", chat, sampling=sampling_of(self._config.answer))
        reason = broken_answer(task, answer)
        if reason is not None:
            raise EndedError(reason, raw=answer)
        return (*chat, {"role": "assistant", "content": answer})

    def _chat(self, row: Record, task: str) -> tuple[Message, ...]:
        return (*row.prompt[:-1], {"role": "user", "content": task})


def broken_rule(parent: str, evolved: str) -> str | None:
    """Which rule on rewrites this one breaks, if any."""
    if " ".join(evolved.split()).lower() == " ".join(parent.split()).lower():
        return "unchanged"
    if SCAFFOLD.search(evolved) and not SCAFFOLD.search(parent):
        return "scaffold"
    if TALK.search(evolved) and not TALK.search(parent):
        return "talk"
    return None


def broken_answer(task: str, answer: str) -> str | None:
    """Which rule on answers this one breaks, if any."""
    if APOLOGY.search(answer) and len(answer.split()) < APOLOGY_WORDS and not APOLOGY.search(task):
        return "apology"
    words = _WORD.findall(answer.lower())
    return "no_content" if all(word in STOP_WORDS for word in words) else None


def parse_equal(reply: str) -> bool | None:
    """Whether the judge calls two tasks equal; None for any other reply ("not equal" holds the word equal)."""
    verdict = " ".join(_WORD.findall(reply.lower()))
    return {"equal": True, "not equal": False}.get(verdict)
