"""Instances for instructions: inputs with outputs, by label first for classification (Self-Instruct steps 2 to 5)."""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from itune_ray.config.recipes import SelfInstructInstancesConfig
from itune_ray.data.ledger import Outcome
from itune_ray.data.records import Record
from itune_ray.engine.base import Sampling
from itune_ray.engine.templates import render
from itune_ray.generate.recipes.base import builtin_prompt, last_user_turn, refused, task_turn
from itune_ray.generate.recipes.chain import Calls, Chain
from itune_ray.generate.surface import encode

MOST_READ = 100
"""Instances of a reply that are read."""
_EXAMPLE = re.compile(r"(?mi)^[ \t]*Example[ \t]*\d+[ \t]*[.:]?")
_OUTPUT = re.compile(r"(?m)^[ \t]*Output[ \t]*\d*[ \t]*:")
_INPUT = re.compile(r"(?m)^[ \t]*Input[ \t]*\d*[ \t]*:")
_LABEL = re.compile(r"(?m)^[ \t]*Class label[ \t]*:")


class Instance(NamedTuple):
    """One example of a task."""

    input: str
    """Empty where the instruction says it all."""
    output: str


class SelfInstructInstances(Chain):
    """(x) -> up to k rows (x + input_i, output_i) (Wang et al. 2023, methods D08).

    The model says whether the task is a classification, then writes instances: label first there, so that it does not
    write inputs of one label only; input first elsewhere. An instance is rejected as `truncated` (the last of a cut
    reply), `empty_output`, `input_is_output`, `colon_final` (a field ends with a colon), `duplicate`, `surplus` (not
    drawn), or `contradictory`: equal inputs with different outputs drop all instances of the task.
    """

    name = "self_instruct_instances"
    rows_per_input = None
    most_rows = MOST_READ

    def __init__(self, config: SelfInstructInstancesConfig):
        self._config = config
        self.prompts = {
            name: builtin_prompt(self.name, f"{name}.jinja") for name in ("classify", "output_first", "input_first")
        }

    async def make(self, row: Record, calls: Calls) -> list[Outcome]:
        """One outcome per instance."""
        task = last_user_turn(row.prompt)
        if task is None:
            return refused(calls.draft, row, "no_prompt")
        greedy = Sampling(temperature=0.0, max_tokens=8)
        question = render(self.prompts["classify"], task=task)
        is_classification = await calls.parsed("classify", question, parse_yes_no, sampling=greedy, cut=True)
        order = "output_first" if is_classification else "input_first"
        turn = {"role": "user", "content": render(self.prompts[order], task=task)}
        (sample,) = await calls.samples("instances", (turn,))
        is_cut = sample.finish_reason == "length"
        read = parse_labelled(sample.text) if is_classification else parse_examples(sample.text)
        if not read:
            return [calls.rejected("truncated" if is_cut else "unparsable", raw=sample.text)]
        reasons = self._reasons(read[:MOST_READ], is_cut, calls)
        fields: dict[str, Any] = {"recipe": f"{self.name}.{order}", "finish_reason": sample.finish_reason}
        outcomes: list[Outcome] = []
        made: set[tuple[str, str]] = set()
        for index, (instance, reason) in enumerate(zip(read, reasons, strict=False)):
            shown, facts = self._turn(task, instance, index, calls)
            asked = (*row.prompt[:-1], {"role": "user", "content": shown})
            messages = (*asked, {"role": "assistant", "content": instance.output})
            fields = {**fields, "meta": {**calls.draft.meta, **facts}}
            if reason is None and (shown, instance.output) in made:
                reason = "duplicate"  # but for a label that is gone
            if reason is None:
                made.add((shown, instance.output))
                outcomes.append(calls.accepted(index, messages=messages, **fields))
            else:
                outcomes.append(calls.rejected(reason, index, messages=messages, **fields))
        return outcomes

    def _turn(self, task: str, instance: Instance, index: int, calls: Calls) -> tuple[str, dict[str, Any]]:
        """The user turn of an instance, and what was drawn for it."""
        if self._config.encoding == "plain":
            return task_turn(task, instance.input), {}
        drawn = encode(task, instance.input, calls.rng(f"surface/{index}"))
        return drawn.prompt, {"surface": {"form": drawn.form, "unlabelled": drawn.is_unlabelled}}

    def _reasons(self, read: Sequence[Instance], is_cut: bool, calls: Calls) -> list[str | None]:
        """Why each instance is no row; None for the rows."""
        reasons = broken_instances(read, is_cut)
        kept = [index for index, reason in enumerate(reasons) if reason is None]
        if len(kept) > self._config.instances:
            drawn = set(calls.rng("instances").sample(kept, self._config.instances))
            reasons = ["surplus" if i in kept and i not in drawn else reason for i, reason in enumerate(reasons)]
        return reasons


def parse_yes_no(reply: str) -> bool | None:
    """Whether a reply is a yes or a no and nothing else."""
    return {"yes": True, "no": False}.get(reply.strip().strip("*.`\"'").lower())


def parse_examples(reply: str) -> list[Instance]:
    """Instances of an input-first reply: what stands between `Example n`, or the whole where it has an output."""
    if _EXAMPLE.search(reply):
        return [_pair(text) for part in _EXAMPLE.split(reply) if (text := part.strip())]
    return [_pair(reply)] if _OUTPUT.search(reply) else []


def parse_labelled(reply: str) -> list[Instance]:
    """Instances of an output-first reply: the first line after `Class label:` is the output, the rest the input."""
    pieces = (piece.strip().partition("\n") for piece in _LABEL.split(reply)[1:])
    return [Instance(input.strip(), label.strip()) for label, _, input in pieces]


def broken_instances(instances: Sequence[Instance], is_cut: bool) -> list[str | None]:
    """Which rule each instance breaks, if any; the last of a cut reply counts for nothing."""
    whole = instances[:-1] if is_cut else instances
    reasons = [_broken(instance) for instance in whole]
    good = [instance for instance, reason in zip(whole, reasons, strict=True) if reason is None]
    outputs: dict[str, str] = {}
    contradictory = any(outputs.setdefault(i.input, i.output) != i.output for i in good if i.input)
    seen: set[Instance] = set()
    for index, instance in enumerate(whole):
        if reasons[index] is None:
            reasons[index] = "contradictory" if contradictory else "duplicate" if instance in seen else None
            seen.add(instance)
    return [*reasons, *["truncated"] * (len(instances) - len(whole))]


def _broken(instance: Instance) -> str | None:
    if not instance.output:
        return "empty_output"
    if instance.input == instance.output:
        return "input_is_output"
    return "colon_final" if instance.input.endswith(":") or instance.output.endswith(":") else None


def _pair(text: str) -> Instance:
    """The text before `Output:` without its own `Input:`, and the text after it up to another `Input:`."""
    before, *after = _OUTPUT.split(text)
    input, output = (before, after[0]) if after else ("", text)
    opening = _INPUT.match(input.strip())
    input = input.strip()[opening.end() :] if opening else input
    return Instance(input.strip(), _INPUT.split(output)[0].strip())
