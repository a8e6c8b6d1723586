"""Parameters of the prompt techniques, one schema per technique (survey Table V, methods D42).

Every text is a Jinja template over {{ prompt }} and {{ meta }} of the row.
"""

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field, model_validator

from itune_ray.config.base import Schema
from itune_ray.config.shared import Positive

Texts = Annotated[tuple[str, ...], Field(min_length=1)]


class ClearInstruction(Schema):
    """A topic becomes an order with a deliverable, a least number of points per aspect, and evidence."""

    type: Literal["clear_instruction"] = "clear_instruction"
    verb: str = "Explain"
    aspects: Texts
    min_items: Positive = 2
    need_examples: bool = True


class RolePlay(Schema):
    """A persona, an audience, and limits of style."""

    type: Literal["role"] = "role"
    role: str
    audience: str
    style_rules: tuple[str, ...] = ()


class ChainOfThought(Schema):
    """Reasoning step by step towards a named quantity."""

    type: Literal["chain_of_thought"] = "chain_of_thought"
    trigger: str = "Reason step by step"
    target: str = "the answer"
    answer_tag: str | None = None
    """Opens a last line that holds the answer alone."""


class Demo(Schema):
    """A worked example."""

    input: str
    label: str


class FewShot(Schema):
    """Worked examples, then the prompt as the next input with an empty label."""

    type: Literal["few_shot"] = "few_shot"
    header: str
    demos: Annotated[tuple[Demo, ...], Field(min_length=1)]
    """Run decontamination over what comes of them: a demo may be a test item."""
    input_name: str = "Input"
    label_name: str = "Label"
    closed: bool = False
    """Only the labels of the demos are answers."""


class MultiDocument(Schema):
    """Numbered operations over documents in delimiters."""

    type: Literal["multi_document"] = "multi_document"
    docs: Annotated[tuple[str, ...], Field(min_length=2)]
    kind: str = "documents"
    ops: Texts = (
        "Name the findings that they share.",
        "Name where they contradict each other.",
        "Join them into one account.",
        "Compare the methods they use.",
    )


class DomainSpecific(Schema):
    """A specialised assistant, someone who asks, a case, and required sections."""

    type: Literal["domain_specific"] = "domain_specific"
    domain: str
    asker: str
    case: str
    sections: Texts


class HallucinationGuard(Schema):
    """Answer only what is documented, else say so and fall back."""

    type: Literal["hallucination_guard"] = "hallucination_guard"
    entity: str
    fallback: str = "the nearest alternative that is well established"


class PeftInspired(Schema):
    """A narrow specialist who attends to a list and nothing else."""

    type: Literal["peft_inspired"] = "peft_inspired"
    speciality: str
    expertise: str
    focus: Texts


class Multilingual(Schema):
    """The same answer in several languages."""

    type: Literal["multilingual"] = "multilingual"
    langs: Annotated[tuple[str, ...], Field(min_length=2)]
    count: Positive = 1
    """Answers per language."""


class SelfEvaluation(Schema):
    """A solution by steps, then a fixed review of it."""

    type: Literal["self_evaluation"] = "self_evaluation"
    checks: Texts = (
        "Check each step.",
        "Verify the result by another way.",
        "Rate how clear the solution is, from 1 to 5.",
        "List mistakes that people often make here.",
    )


class ValueAligned(Schema):
    """An adviser who weighs ethical dimensions evenly."""

    type: Literal["value_aligned"] = "value_aligned"
    system: str
    dimensions: Annotated[tuple[str, ...], Field(min_length=2)]


class ChainStep(Schema):
    """One step of a chain."""

    text: str
    uses: Positive | None = None
    """Number of the earlier step whose result it takes."""
    each: bool = False
    """Done for every item of that result."""

    @model_validator(mode="after")
    def _each_has_items(self) -> "ChainStep":
        if self.each and self.uses is None:
            raise ValueError("a step with `each` needs `uses`: the number of the step whose items it takes")
        return self


class Compositional(Schema):
    """Steps of which later ones consume what earlier ones gave."""

    type: Literal["compositional"] = "compositional"
    steps: Annotated[tuple[ChainStep, ...], Field(min_length=2)]

    @model_validator(mode="after")
    def _uses_earlier_steps(self) -> "Compositional":
        for number, step in enumerate(self.steps, start=1):
            if step.uses is not None and step.uses >= number:
                raise ValueError(f"step {number} uses step {step.uses}, which does not come before it")
        return self


class SubTask(Schema):
    """A part of a goal, with how much of it is asked."""

    text: str
    quantity: str


class TaskDecomposition(Schema):
    """A goal and numbered parts that do not depend on each other."""

    type: Literal["task_decomposition"] = "task_decomposition"
    goal: str
    subtasks: Annotated[tuple[SubTask, ...], Field(min_length=2)]


class BiasMitigation(Schema):
    """Several subjects in place of one, spread over axes of representation."""

    type: Literal["bias_mitigation"] = "bias_mitigation"
    n: Annotated[int, Field(ge=2)] = 3
    axes: Texts
    highlights: Texts


class ContextualGrounding(Schema):
    """A context before the instruction."""

    type: Literal["contextual_grounding"] = "contextual_grounding"
    context: str
    variation: str | None = None
    """What varies within the context and must be heeded."""


class SkeletonPart(Schema):
    """A heading with how many points stand under it."""

    heading: str
    items: Positive = 1


class OutputFormat(Schema):
    """A skeleton that the answer fills."""

    type: Literal["output_format"] = "output_format"
    skeleton: Annotated[tuple[SkeletonPart, ...], Field(min_length=1)]


Technique = Annotated[
    ClearInstruction
    | RolePlay
    | ChainOfThought
    | FewShot
    | MultiDocument
    | DomainSpecific
    | HallucinationGuard
    | PeftInspired
    | Multilingual
    | SelfEvaluation
    | ValueAligned
    | Compositional
    | TaskDecomposition
    | BiasMitigation
    | ContextualGrounding
    | OutputFormat,
    Field(discriminator="type"),
]
TechniqueName = Literal[
    "clear_instruction",
    "role",
    "chain_of_thought",
    "few_shot",
    "multi_document",
    "domain_specific",
    "hallucination_guard",
    "peft_inspired",
    "multilingual",
    "self_evaluation",
    "value_aligned",
    "compositional",
    "task_decomposition",
    "bias_mitigation",
    "contextual_grounding",
    "output_format",
]
FRAMES = frozenset({"role", "domain_specific", "peft_inspired", "value_aligned"})
"""Techniques that say who answers: at most one holds."""


def check_composition(techniques: Sequence[Technique], filled: Sequence[TechniqueName] = ()) -> None:
    """Raise `ValueError` for techniques that cannot be applied together.

    Args:
        techniques: Those whose parameters are given.
        filled: Those whose parameters the model gives.
    """
    names = [*(technique.type for technique in techniques), *filled]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{twice[0]} is named twice: a technique applies once")
    frames = [name for name in names if name in FRAMES]
    if len(frames) > 1:
        raise ValueError(f"{' and '.join(frames)} both say who answers: name one of them")
    closed = any(isinstance(technique, FewShot) and technique.closed for technique in techniques)
    reasoning = [name for name in names if name in ("chain_of_thought", "self_evaluation")]
    if closed and reasoning:
        raise ValueError(f"few_shot.closed makes a label the whole answer, {reasoning[0]} puts reasoning before it")
