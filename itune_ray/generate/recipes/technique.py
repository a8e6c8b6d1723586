"""Answers to prompts under prompt techniques, stored with the enhanced prompt or the basic one (methods D42)."""

from collections.abc import Mapping
from typing import Any

import jinja2
from pydantic import TypeAdapter

from itune_ray.config.recipes import TechniqueConfig
from itune_ray.config.techniques import Technique as Params
from itune_ray.data.ledger import Outcome
from itune_ray.data.records import Record
from itune_ray.generate.recipes.base import last_user_turn, refused, render
from itune_ray.generate.recipes.chain import Calls, Chain
from itune_ray.generate.techniques import TechniqueError, broken_format, enhanced

_PARAMS: TypeAdapter[Params] = TypeAdapter(Params)


class Technique(Chain):
    """y ~ M_teacher(. | t(x)); the row is (t(x), y), or (x, y) where `store` is `basic`: context distillation.

    An answer that does not follow the skeleton of `output_format` (`off_format`), or that is no label after `few_shot`
    (`no_label`), is rejected.
    """

    name = "technique"
    prompts: Mapping[str, str] = {}

    def __init__(self, config: TechniqueConfig):
        self._config = config

    async def make(self, row: Record, calls: Calls) -> list[Outcome]:
        """One outcome."""
        basic = last_user_turn(row.prompt)
        if basic is None:
            return refused(calls.draft, row, "no_prompt")
        try:
            techniques = [filled(technique, basic, row.meta) for technique in self._config.techniques]
            turn = {"role": "user", "content": enhanced(basic, techniques)}
        except jinja2.UndefinedError as error:
            return refused(calls.draft, row, "template_undefined", raw=str(error))
        except TechniqueError as error:
            return refused(calls.draft, row, error.reason, raw=str(error))
        asked = (*row.prompt[:-1], turn)
        answer = await calls.ask("answer", asked)
        kept = asked if self._config.store == "enhanced" else row.prompt
        fields: dict[str, Any] = {
            "messages": (*kept, {"role": "assistant", "content": answer}),
            "recipe": "+".join(["technique", *(technique.name for technique in techniques)]),
            "meta": {**row.meta, "techniques": [technique.model_dump(mode="json") for technique in techniques]},
            "round": row.round + 1,
            "finish_reason": "stop",
        }
        reason = broken_format(answer, techniques)
        return [calls.accepted(**fields) if reason is None else calls.rejected(reason, raw=answer, **fields)]


def filled(technique: Params, prompt: str, meta: Mapping[str, Any]) -> Params:
    """The technique with every text of its parameters rendered for a row; raises `jinja2.UndefinedError`."""

    def fill(value: Any) -> Any:
        if isinstance(value, str):
            return render(value, prompt=prompt, meta=meta)
        if isinstance(value, Mapping):
            return {name: fill(item) for name, item in value.items()}
        return [fill(item) for item in value] if isinstance(value, (list, tuple)) else value

    return _PARAMS.validate_python(fill(technique.model_dump()))
