"""Answers to prompts under prompt techniques, stored with the enhanced prompt or the basic one (methods D42)."""

import json
import re
import typing
from collections.abc import Mapping
from typing import Any

import jinja2
from pydantic import TypeAdapter

from itune_ray.config.base import Schema
from itune_ray.config.recipes import TechniqueConfig
from itune_ray.config.techniques import Technique as Params
from itune_ray.config.techniques import TechniqueName
from itune_ray.data.ledger import Outcome
from itune_ray.data.records import Record
from itune_ray.engine.templates import render
from itune_ray.generate.recipes.base import builtin_prompt, last_user_turn, refused
from itune_ray.generate.recipes.chain import Calls, Chain, together
from itune_ray.generate.techniques import TechniqueError, broken_format, enhanced

KINDS: Mapping[str, type[Schema]] = {
    kind.model_fields["type"].default: kind for kind in typing.get_args(typing.get_args(Params)[0])
}
"""Type -> parameters of a technique."""
_PARAMS: TypeAdapter[Params] = TypeAdapter(Params)


class Technique(Chain):
    """y ~ M_teacher(. | t(x)); the row is (t(x), y), or (x, y) where `store` is `basic`: context distillation.

    An answer that does not follow the skeleton of `output_format` (`off_format`), or that is no label after `few_shot`
    (`no_label`), is rejected.
    """

    name = "technique"

    def __init__(self, config: TechniqueConfig):
        self._config = config
        self.prompts = {"fill": builtin_prompt(self.name, "fill.jinja")} if config.filled else {}

    async def make(self, row: Record, calls: Calls) -> list[Outcome]:
        """One outcome."""
        basic = last_user_turn(row.prompt)
        if basic is None:
            return refused(calls.draft, row, "no_prompt")
        try:
            techniques = [filled(technique, basic, row.meta) for technique in self._config.techniques]
            techniques += await together([self._asked_for(name, basic, calls) for name in self._config.filled])
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
            "recipe": "+".join(["technique", *(technique.type for technique in techniques)]),
            "meta": {**row.meta, "techniques": [technique.model_dump(mode="json") for technique in techniques]},
            "round": row.round + 1,
            "finish_reason": "stop",
        }
        reason = broken_format(answer, techniques)
        return [calls.accepted(**fields) if reason is None else calls.rejected(reason, raw=answer, **fields)]

    async def _asked_for(self, name: TechniqueName, basic: str, calls: Calls) -> Params:
        """A technique with the parameters that the teacher gives for a prompt; no template is rendered in them."""
        kind = KINDS[name]
        schema = kind.model_json_schema()
        schema["properties"].pop("type")
        purpose = (kind.__doc__ or "").strip()
        asked = render(self.prompts["fill"], task=basic, purpose=purpose, schema=json.dumps(schema, indent=1))
        return await calls.parsed(
            f"fill/{name}", asked, lambda reply: parse_parameters(reply, name), reason="unparsable_parameters"
        )


def parse_parameters(reply: str, name: TechniqueName) -> Params | None:
    """The technique with the parameters of a JSON object, in a code fence or not; None for any that do not fit or
    hold an open slot."""
    text = re.sub(r"\A```(?:json)?\s*\n(.*)\n```\Z", r"\1", reply.strip(), flags=re.DOTALL)
    if "{{" in text:  # no JSON has that outside of a string
        return None
    try:
        given = json.loads(text)
        return _PARAMS.validate_python({**given, "type": name}) if isinstance(given, dict) else None
    except ValueError:  # no JSON, or other parameters than the technique has
        return None


def filled(technique: Params, prompt: str, meta: Mapping[str, Any]) -> Params:
    """The technique with every text of its parameters rendered for a row; raises `jinja2.UndefinedError`."""

    def fill(value: Any) -> Any:
        if isinstance(value, str):
            return render(value, prompt=prompt, meta=meta)
        if isinstance(value, Mapping):
            return {name: fill(item) for name, item in value.items()}
        return [fill(item) for item in value] if isinstance(value, (list, tuple)) else value

    return _PARAMS.validate_python(fill(technique.model_dump()))
