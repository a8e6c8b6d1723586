"""The 16 prompt techniques of the survey's Table V as pure functions of (prompt, parameters) (methods D42).

A prompt under techniques has sections, each filled by the techniques of its kind, so the order in which techniques are
named does not matter: frame, context, task, demos, reasoning, format. Demos wrap the whole task, which is their next
input.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from itune_ray.config import techniques as config
from itune_ray.config.techniques import Technique


class TechniqueError(ValueError):
    """A technique cannot be applied to this prompt; `reason` can be counted."""

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason = reason


@dataclass(frozen=True)
class Sections:
    """A prompt in the making."""

    task: str
    frame: str = ""
    context: str = ""
    demos: str = ""
    reasoning: tuple[str, ...] = ()
    form: str = ""
    slot: str = ""
    """An empty label, which ends the prompt whatever comes before it."""

    def text(self) -> str:
        """The sections in their order, a blank line between them."""
        parts = (self.frame, self.context, self.task, self.demos, *self.reasoning, self.form, self.slot)
        return "\n\n".join(part for part in parts if part)


def clear_instruction(prompt: Sections, params: config.ClearInstruction) -> Sections:
    """Order, deliverable, least number of points per aspect, evidence."""
    lines = [
        f"{params.verb}: {prompt.task}",
        f"Deliver one section per aspect, with at least {params.min_items} points in each:",
        *_bullets(params.aspects),
    ]
    if params.need_examples:
        lines.append("Back every point with an example or other evidence.")
    return _with_task(prompt, *lines)


def role(prompt: Sections, params: config.RolePlay) -> Sections:
    """Persona, audience, style."""
    lines = [f"You are {params.role}.", f"Write so that {params.audience} can follow."]
    if params.style_rules:
        lines.append(f"Keep to these rules of style: {'; '.join(params.style_rules)}.")
    return dataclasses.replace(prompt, frame=" ".join(lines))


def chain_of_thought(prompt: Sections, params: config.ChainOfThought) -> Sections:
    """Reasoning towards a target, and a last line for the answer where a tag is named."""
    lines = [f"{params.trigger} until you have {params.target}, and write every step down."]
    if params.answer_tag is not None:
        lines.append(f'Put the answer alone on the last line, after "{params.answer_tag}:".')
    return dataclasses.replace(prompt, reasoning=("\n".join(lines), *prompt.reasoning))


def few_shot(prompt: Sections, params: config.FewShot) -> Sections:
    """Header, demos, and the task as the input that has no label yet."""
    blocks = [f"{params.input_name}: {d.input}\n{params.label_name}: {d.label}" for d in params.demos]
    header = f"{params.header} ({len(blocks)} worked examples)"
    demos = "\n\n".join([header, *blocks, f"{params.input_name}: {prompt.task}"])
    return dataclasses.replace(prompt, task="", demos=demos, slot=f"{params.label_name}:")


def multi_document(prompt: Sections, params: config.MultiDocument) -> Sections:
    """Documents in delimiters, and numbered operations on them."""
    for text in params.docs:
        if re.search(r"</?document\b", text):
            raise TechniqueError("delimiter_in_document", "a document holds the delimiter of documents")
    lines = [f"You are given {len(params.docs)} {params.kind}. Do the following with them:", *_numbered(params.ops)]
    docs = [f'<document id="{i}">\n{text}\n</document>' for i, text in enumerate(params.docs, start=1)]
    return _with_context(prompt, "\n".join(lines + docs))


def domain_specific(prompt: Sections, params: config.DomainSpecific) -> Sections:
    """Specialised assistant, asker, case, sections."""
    lines = [
        f"You assist people in the field of {params.domain}. {params.asker} turns to you with this case: {params.case}",
        "Your answer has these sections, in this order:",
        *_numbered(params.sections),
    ]
    return dataclasses.replace(prompt, frame="\n".join(lines))


def hallucination_guard(prompt: Sections, params: config.HallucinationGuard) -> Sections:
    """What to do where nothing is known."""
    return _with_task(
        prompt,
        prompt.task,
        f"Answer as asked only if {params.entity} is well documented. If it is not, say that you know nothing reliable "
        f"about it, make nothing up, and describe {params.fallback} in its place.",
    )


def peft_inspired(prompt: Sections, params: config.PeftInspired) -> Sections:
    """Specialist with an exclusive list."""
    lines = [
        f"Act as a specialised {params.speciality}, expert in {params.expertise}. Attend to nothing but:",
        *_numbered(params.focus),
    ]
    return dataclasses.replace(prompt, frame="\n".join(lines))


def multilingual(prompt: Sections, params: config.Multilingual) -> Sections:
    """One content in several languages."""
    times = "once" if params.count == 1 else f"{params.count} times"
    return _with_task(
        prompt,
        prompt.task,
        f"Answer {times} in each of these languages: {', '.join(params.langs)}. "
        "Content and style must be equal in all of them.",
    )


def self_evaluation(prompt: Sections, params: config.SelfEvaluation) -> Sections:
    """Solution, then review."""
    lines = ["First solve it in steps. Then review your own solution:", *_numbered(params.checks)]
    return dataclasses.replace(prompt, reasoning=(*prompt.reasoning, "\n".join(lines)))


def value_aligned(prompt: Sections, params: config.ValueAligned) -> Sections:
    """Adviser, dimensions, perspectives."""
    lines = [
        f"You advise on {params.system}. Give each of these dimensions its due weight:",
        *_numbered(params.dimensions),
        "Hear the views of different groups of people.",
    ]
    return dataclasses.replace(prompt, frame="\n".join(lines))


def compositional(prompt: Sections, params: config.Compositional) -> Sections:
    """First, then, finally; a step names the one whose result it takes."""
    last = len(params.steps)
    lines = [prompt.task, "Go through these stages, one after the other:"]
    for number, step in enumerate(params.steps, start=1):
        opening = "First" if number == 1 else "Finally" if number == last else "Then"
        source = ""
        if step.uses is not None:
            source = f", for each item of stage {step.uses}" if step.each else f", from what stage {step.uses} gave"
        lines.append(f"{number}. {opening}{source}: {step.text}")
    return _with_task(prompt, *lines)


def task_decomposition(prompt: Sections, params: config.TaskDecomposition) -> Sections:
    """Goal and independent parts."""
    parts = _numbered([f"{part.text} ({part.quantity})" for part in params.subtasks])
    return _with_task(
        prompt, prompt.task, f"Goal: {params.goal}", "Sub-tasks, none of which depends on another:", *parts
    )


def bias_mitigation(prompt: Sections, params: config.BiasMitigation) -> Sections:
    """n subjects over axes."""
    return _with_task(
        prompt,
        prompt.task,
        f"Cover {params.n} subjects in place of one. Together they must differ in: {', '.join(params.axes)}.",
        "For every subject give:",
        *_bullets(params.highlights),
    )


def contextual_grounding(prompt: Sections, params: config.ContextualGrounding) -> Sections:
    """Context, then the instruction, which heeds what varies in it."""
    heed = "" if params.variation is None else f"\nHeed how {params.variation} varies within the context."
    grounded = _with_context(prompt, f"Context:\n{params.context}")
    return dataclasses.replace(grounded, task=f"Instruction:\n{prompt.task}{heed}")


def output_format(prompt: Sections, params: config.OutputFormat) -> Sections:
    """The skeleton, an empty point for each that is asked."""
    lines = ["Fill in this skeleton. Change no heading and no number of points:"]
    for part in params.skeleton:
        lines += [f"## {part.heading}", *["- ..."] * part.items]
    return dataclasses.replace(prompt, form="\n".join(lines))


class Entry(NamedTuple):
    """A technique and what gives it away in a prompt."""

    apply: Callable[[Sections, Any], Sections]
    marker: str
    """A sentence that every application prints."""


TECHNIQUES: Mapping[str, Entry] = {
    "role": Entry(role, "Write so that "),
    "domain_specific": Entry(domain_specific, "Your answer has these sections, in this order:"),
    "peft_inspired": Entry(peft_inspired, "Attend to nothing but:"),
    "value_aligned": Entry(value_aligned, "Hear the views of different groups of people."),
    "contextual_grounding": Entry(contextual_grounding, "Context:\n"),
    "multi_document": Entry(multi_document, "Do the following with them:"),
    "clear_instruction": Entry(clear_instruction, "Deliver one section per aspect, with at least"),
    "task_decomposition": Entry(task_decomposition, "Sub-tasks, none of which depends on another:"),
    "compositional": Entry(compositional, "Go through these stages, one after the other:"),
    "bias_mitigation": Entry(bias_mitigation, "subjects in place of one. Together they must differ in:"),
    "multilingual": Entry(multilingual, "Content and style must be equal in all of them."),
    "hallucination_guard": Entry(hallucination_guard, "Answer as asked only if "),
    "few_shot": Entry(few_shot, " worked examples)"),
    "chain_of_thought": Entry(chain_of_thought, ", and write every step down."),
    "self_evaluation": Entry(self_evaluation, "Then review your own solution:"),
    "output_format": Entry(output_format, "Change no heading and no number of points:"),
}
"""In the order in which they are applied: frames, context, task, demos, reasoning, format."""
_RANK = {name: rank for rank, name in enumerate(TECHNIQUES)}


def enhanced(basic: str, techniques: Sequence[Technique]) -> str:
    """The prompt under all of the techniques, in the order of `TECHNIQUES` whatever order they are named in.

    Raises:
        TechniqueError: One of them is in the prompt already (`already_applied`), or cannot be applied to it.
    """
    prompt = Sections(basic.strip())
    for technique in sorted(techniques, key=lambda t: _RANK[t.type]):
        entry = TECHNIQUES[technique.type]
        if entry.marker in basic:
            raise TechniqueError("already_applied", f"{technique.type} is in the prompt already")
        prompt = entry.apply(prompt, technique)
    return prompt.text()


def broken_format(answer: str, techniques: Sequence[Technique]) -> str | None:
    """Why an answer does not have the form that `output_format` or `few_shot` asks for; None where it has."""
    for technique in techniques:
        if isinstance(technique, config.OutputFormat) and not follows_skeleton(answer, technique):
            return "off_format"
        if isinstance(technique, config.FewShot) and not is_label(answer, technique):
            return "no_label"
    return None


def follows_skeleton(answer: str, params: config.OutputFormat) -> bool:
    """Whether an answer has exactly the headings, in order, each with its number of filled points."""
    found: list[list[Any]] = []
    for line in answer.strip().splitlines():
        if line.startswith("## "):
            found.append([line[3:].strip(), 0])
        elif not found:
            return False  # words before the first heading
        elif line.startswith("- "):
            if line[2:].strip() in ("", "..."):
                return False
            found[-1][1] += 1
    return found == [[part.heading, part.items] for part in params.skeleton]


def is_label(answer: str, params: config.FewShot) -> bool:
    """Whether an answer is a label and goes on with no further example; where `closed`, one that a demo has."""
    text = answer.strip()
    if not text or re.search(rf"^{re.escape(params.input_name)}:", text, re.MULTILINE):
        return False
    return not params.closed or text in {demo.label for demo in params.demos}


def _numbered(items: Sequence[str]) -> list[str]:
    return [f"{number}. {item}" for number, item in enumerate(items, start=1)]


def _bullets(items: Sequence[str]) -> list[str]:
    return [f"- {item}" for item in items]


def _with_task(prompt: Sections, *lines: str) -> Sections:
    return dataclasses.replace(prompt, task="\n".join(lines))


def _with_context(prompt: Sections, context: str) -> Sections:
    return dataclasses.replace(prompt, context="\n\n".join(part for part in (prompt.context, context) if part))
