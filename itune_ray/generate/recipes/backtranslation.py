"""Instruction backtranslation: the instruction that a given text answers, and how good the pair is (Li et al. 2023)."""

from itune_ray.config.base import digest
from itune_ray.config.recipes import BacktranslationConfig
from itune_ray.data.ledger import Outcome
from itune_ray.data.records import Record
from itune_ray.engine.llm import sampling_of
from itune_ray.engine.pairwise import parse_rating
from itune_ray.engine.templates import render
from itune_ray.generate.recipes.base import builtin_prompt, refused
from itune_ray.generate.recipes.chain import Calls, Chain


class Backtranslation(Chain):
    """y -> (x, y), x ~ M(. | y), kept where the judge rates the pair at `min_score` or more of 5 (arXiv 2308.06259).

    The first call augments, the second curates. y is the row's text, else its answer, and is never changed but for the
    space around it; `model` stays that of its writer, and the meta names the one that wrote x. A pair that is rated
    lower is rejected as `low_score`, one whose rating cannot be read as `unscored`; an instruction that holds its whole
    answer as `leak`.
    """

    name = "backtranslation"
    requires = ()
    provides = ("messages", "sampling", "seed", "num_prompt_tokens", "num_tokens")

    def __init__(self, config: BacktranslationConfig):
        self._config = config
        self.prompts = {name: builtin_prompt(self.name, f"{name}.jinja") for name in ("instruction", "curate")}

    async def make(self, row: Record, calls: Calls) -> list[Outcome]:
        """One pair."""
        config = self._config
        text = document_of(row)
        if text is None:
            return refused(calls.draft, row, "no_answer")
        if len(text.split()) > config.max_words:
            return refused(calls.draft, row, "too_long")
        asked = render(self.prompts["instruction"], text=text, fence=digest(text, length=12))
        instruction = await calls.ask("instruct", asked)
        system = () if config.system is None else ({"role": "system", "content": config.system},)
        messages = (*system, {"role": "user", "content": instruction}, {"role": "assistant", "content": text})
        fields = {
            "messages": messages,
            "text": None,
            "rejected": None,
            "teacher": None,
            "model": row.model,
            "finish_reason": row.finish_reason,
            "meta": {**row.meta, "backtranslation": {"model": calls.llm.model}},
        }
        if " ".join(text.split()).lower() in " ".join(instruction.split()).lower():
            return [calls.rejected("leak", **fields)]
        asked = render(
            self.prompts["curate"], instruction=instruction, answer=text, fence=digest([instruction, text], length=12)
        )
        score = await calls.parsed(
            "curate",
            asked,
            lambda reply: parse_rating(reply, 1, 5),
            of="judge",
            sampling=sampling_of(config.curation),
            reason="unscored",
        )
        if score < config.min_score:
            return [calls.rejected("low_score", score=score, **fields)]
        return [calls.accepted(score=score, **fields)]


def document_of(row: Record) -> str | None:
    """What a person wrote: the row's text, else its answer; None where it says nothing."""
    text = row.text if row.text is not None else row.response
    return text.strip() or None if text else None
