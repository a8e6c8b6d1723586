"""Multi-task templates: labelled rows and tasks with definitions become instruction rows, without a model (D40)."""

import dataclasses
import random
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from itune_ray.config.recipes import TemplatesConfig
from itune_ray.config.recipes.transforms import TemplateTask
from itune_ray.data.ledger import Outcome
from itune_ray.data.records import Record
from itune_ray.engine.base import Llm
from itune_ray.engine.templates import read_template, render
from itune_ray.generate.recipes.base import builtin_prompt, last_user_turn, numbered, refused

TASKS: tuple[TemplateTask, ...] = ("task", "pair", "choice", "classify", "question", "inverted")
USUAL: Mapping[str, tuple[str, ...]] = {
    "definition": ("definition",),
    "input": ("input",),
    "first": ("premise", "sentence1", "text1", "first"),
    "second": ("hypothesis", "sentence2", "text2", "second"),
    "question": ("question", "query", "problem", "ctx", "goal"),
    "context": ("context", "passage", "article", "contexts"),
    "text": ("text", "sentence", "content", "review"),
    "options": ("options", "choices", "endings"),
    "label": ("label", "answer", "target"),
    "answer": ("answer", "target", "output"),
}
"""Slot -> the columns that are usual for it, the likeliest first; upper and lower case are one."""
SLOTS: Mapping[TemplateTask, tuple[str, ...]] = {
    "task": ("definition", "input"),
    "pair": ("first", "second", "label"),
    "choice": ("question", "options", "label"),
    "classify": ("text", "label"),
    "question": ("question", "answer"),
    "inverted": ("question", "answer"),
}
"""Task -> the slots that a row must fill."""
SHOWS: Mapping[TemplateTask, frozenset[str]] = {
    "task": frozenset({"definition", "input", "positive", "negative"}),
    "pair": frozenset({"first", "second", "options"}),
    "choice": frozenset({"question", "context", "options"}),
    "classify": frozenset({"text", "options"}),
    "question": frozenset({"question", "context"}),
    "inverted": frozenset({"answer", "context"}),
}
"""Task -> what a template of it may show: never what it asks for."""
_HEAD = re.compile(r"^\{# (?P<name>\w+) #\}\n", re.MULTILINE)
_TAG = re.compile(r"^(\{%[^%\n]*%\})\n", re.MULTILINE)
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class _UnfitError(Exception):
    """A row that no template can be filled from; its text is the reason."""


class Templates:
    """Each row through `samples` templates of its task, drawn without repetition by the row's own randomness.

    Options are shuffled per row and shown as a list, with letters or not at all (FLAN); the answer is the option's
    text, with its letter where letters are shown. `meta` gets `task_type`, `template`, and
    `shown_options` in their order.
    """

    version = 1
    requires: tuple[str, ...] = ()
    provides: tuple[str, ...] = ("messages", "seed")

    def __init__(self, config: TemplatesConfig):
        self._config = config
        own = config.templates
        texts = {task: read_template(own[task], f"recipe.templates.{task}") for task in own}
        self._texts = {task: texts.get(task) or builtin_prompt("templates", f"{task}.jinja") for task in TASKS}
        self._templates = {task: split_templates(text) for task, text in self._texts.items()}

    @property
    def rows_per_input(self) -> int:
        """One row per template drawn."""
        return self._config.samples

    @property
    def prompts(self) -> Mapping[str, str]:
        """The templates of each task, as one text."""
        return dict(self._texts)

    async def __call__(self, row: Record, llm: Llm) -> list[Outcome]:
        """Rows of one input; `llm` gives the seed and is not asked."""
        count, seed = self._config.samples, llm.seed(f"{row.key}/templates")
        draft = dataclasses.replace(
            row,
            messages=row.prompt,
            text=None,
            rejected=None,
            parents=(row.key,),
            recipe="templates",
            model=None,
            sampling=None,
            seed=seed,
            finish_reason=None,
            num_prompt_tokens=None,
            num_tokens=None,
        )
        rng = random.Random(seed)
        try:
            fields = _fields(row)
            task = self._task(fields)
            values = self._values(task, fields)
            names = sorted(self._templates[task])
            drawn = rng.sample(names, count) if count <= len(names) else rng.choices(names, k=count)
            made = [self._made(task, name, values, rng) for name in drawn]
        except _UnfitError as unfit:
            return refused(draft, row, str(unfit), count)
        except jinja2.UndefinedError as error:
            return refused(draft, row, "template_undefined", count, raw=str(error))
        return [
            Outcome(
                record=dataclasses.replace(
                    numbered(draft, row, index, count), messages=messages, meta={**row.meta, **facts}
                ),
                input_key=row.key,
                status="accepted",
            )
            for index, (messages, facts) in enumerate(made)
        ]

    def _task(self, fields: Mapping[str, Any]) -> TemplateTask:
        """The task asked for; by default the first whose slots the row fills."""
        if self._config.task != "auto":
            return self._config.task
        for task in TASKS:
            if task == "inverted" or (task in ("classify", "pair") and not self._options(fields)):
                continue
            if all(self._value(slot, fields) is not None for slot in SLOTS[task]):
                return task
        raise _UnfitError("no_task")

    def _value(self, slot: str, fields: Mapping[str, Any]) -> Any:
        """What the row has for a slot: the named columns (several as a list), else the first usual one."""
        named = self._config.columns.get(slot)
        if named is not None:
            values = [fields.get(name) for name in named]
            return values[0] if len(named) == 1 else None if None in values else values
        folded = {name.casefold(): name for name in reversed(list(fields))}
        return next((fields[folded[name]] for name in USUAL.get(slot, (slot,)) if name in folded), None)

    def _options(self, fields: Mapping[str, Any]) -> list[str]:
        given = self._value("options", fields) or list(self._config.options)
        if not isinstance(given, list) or not all(isinstance(option, (str, int, float)) for option in given):
            raise _UnfitError("bad_options")
        return [str(option).strip() for option in given]

    def _values(self, task: TemplateTask, fields: Mapping[str, Any]) -> dict[str, Any]:
        """What the templates of the task may show, and the answer under `target`."""
        values: dict[str, Any] = {}
        for slot in (*SLOTS[task], "context"):
            value = self._value(slot, fields)
            if slot not in ("options", "label"):
                values[slot] = self._text(value)
            if slot in SLOTS[task] and slot != "input" and (value is None or values.get(slot) == ""):
                raise _UnfitError(f"no_{slot}")
        if task in ("classify", "pair", "choice"):
            options = self._options(fields)
            values["all_options"] = options
            values["target"] = label_text(self._value("label", fields), options, self._config.label)
        elif task == "task":
            values["targets"] = [text for text in _listed(fields.get("references")) if text.strip()]
            if not values["targets"]:
                raise _UnfitError("no_answer")
            values.update({name: _examples(fields.get(name)) for name in ("positive", "negative")})
        else:
            values["target"] = values["question" if task == "inverted" else "answer"]
        return values

    def _text(self, value: Any) -> str:
        text = "\n".join(_listed(value)) if isinstance(value, list) else "" if value is None else str(value)
        return text.strip()[: self._config.max_chars]

    def _made(
        self, task: TemplateTask, name: str, values: Mapping[str, Any], rng: random.Random
    ) -> tuple[tuple[dict[str, str], ...], dict[str, Any]]:
        facts: dict[str, Any] = {"task_type": task, "template": f"{task}/{name}"}
        shown = {slot: values.get(slot, "") for slot in SHOWS[task]}
        target = values.get("target") or rng.choice(values["targets"])
        if "all_options" in values:
            options = rng.sample(values["all_options"], len(values["all_options"]))
            style = rng.choice(self._config.option_styles)
            shown["options"] = shown_options(options, style)
            target = f"{_LETTERS[options.index(target)]}) {target}" if style == "letters" else target
            facts |= {"shown_options": options, "option_style": style}
        if task == "task":
            shown |= {"definition": closed(shown["definition"]), "input": closed(shown["input"])}
            shown |= self._within_budget(shown)
        text = render(self._templates[task][name], **shown).strip()
        return ({"role": "user", "content": text}, {"role": "assistant", "content": target}), facts

    def _within_budget(self, shown: Mapping[str, Any]) -> dict[str, Any]:
        """Examples, the positive ones first, as long as definition, input and examples have `max_chars` at most."""
        left = self._config.max_chars - len(shown["definition"]) - len(shown["input"])
        kept: dict[str, list[Any]] = {"positive": [], "negative": []}
        for name, most in (("positive", self._config.positive), ("negative", self._config.negative)):
            for example in shown[name][:most]:
                left -= sum(len(str(part)) for part in example.values())
                if left < 0:
                    return kept
                kept[name].append(example)
        return kept


def split_templates(text: str) -> dict[str, str]:
    """Name -> template of a file in which each begins with a line `{# name #}`; a file without such lines is one.

    A line that holds only a `{% tag %}` leaves no line behind.
    """
    heads = list(_HEAD.finditer(text))
    if not heads:
        return {"own": _TAG.sub(r"\1", text)}
    ends = [*(head.start() for head in heads[1:]), len(text)]
    return {head["name"]: _TAG.sub(r"\1", text[head.end() : end]) for head, end in zip(heads, ends, strict=True)}


def shown_options(options: Sequence[str], style: str) -> str:
    """Options as a list, with letters, or not at all."""
    if style == "none":
        return ""
    marks = [f"{letter})" for letter in _LETTERS] if style == "letters" else ["-"] * len(options)
    return "\n".join(f"{mark} {option}" for mark, option in zip(marks, options, strict=False))


def label_text(label: Any, options: Sequence[str], kind: str) -> str:
    """The option that a label means: its text, its index from 0, or its letter.

    Raises:
        _UnfitError: There is none (-1 in test sets), or a text is one option and the index of another.
    """
    if not options:
        raise _UnfitError("no_options")
    if len(options) != len(set(options)) or len(options) > len(_LETTERS):
        raise _UnfitError("bad_options")
    if isinstance(label, bool) or label is None:
        raise _UnfitError("no_label")
    text = str(label).strip()
    index = int(text) if re.fullmatch(r"-?\d+", text) else None
    if index is None and len(text) == 1 and text.upper() in _LETTERS:
        index = _LETTERS.index(text.upper())
    by_index = options[index] if index is not None and 0 <= index < len(options) else None
    by_text = text if text in options else None
    if kind == "index" or isinstance(label, int):
        by_text = None
    if kind == "text":
        by_index = None
    found = {option for option in (by_index, by_text) if option is not None}
    if len(found) != 1:
        raise _UnfitError("ambiguous_label" if found else "no_label")
    return found.pop()


def closed(text: str) -> str:
    """A text that ends in punctuation (as Tk-Instruct has it)."""
    return text if not text or not text[-1].isalnum() else f"{text}."


def _fields(row: Record) -> dict[str, Any]:
    """The columns of a row: its `meta`; its prompt and answer as `question` and `answer` where it has both."""
    asked, answer = last_user_turn(row.prompt), row.response
    chat = {"question": asked, "answer": answer} if asked is not None and answer and len(row.messages) == 2 else {}
    return {**chat, **row.meta}


def _listed(value: Any) -> list[str]:
    return [item for item in (value if isinstance(value, list) else [value]) if isinstance(item, str)]


def _examples(value: Any) -> list[dict[str, str]]:
    """Examples with both input and output, as texts; the explanation may be empty."""
    given = [one for one in (value if isinstance(value, list) else []) if isinstance(one, Mapping)]
    made = [
        {
            "input": closed("\n".join(_listed(one.get("input"))).strip()),
            "output": "\n".join(_listed(one.get("output"))[:1]).strip(),
            "explanation": "\n".join(_listed(one.get("explanation"))).strip(),
        }
        for one in given
    ]
    return [one for one in made if one["input"] and one["output"]]
