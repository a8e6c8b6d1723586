"""Row layouts: what the columns of a file mean, as chats or texts.

| layout | columns |
|---|---|
| records | those of `itune_ray.data.records`, as every stage writes them |
| messages | `messages`: [{role, content}, ...] (OpenAI) |
| sharegpt | `conversations`: [{from, value}, ...] |
| alpaca | `instruction` or `prompt`, `output` or `response` or `completion`; optional `input` or `context`, `system` |
| preference | `chosen`, `rejected`; optional `prompt`, `system`: texts, "Human:/Assistant:" transcripts or messages |
| qa | `question`, `answer`, and nothing beside but an `id` (GSM8K) |
| oasst | message trees (`prompt` with nested `replies`) or their messages one a row: every path from root to leaf |
| oasst_best | the same, of each tree the path of the best ranks |
| superni | Super-NaturalInstructions tasks (`Definition`, `Instances`): every instance |
| prompt | `prompt` or `instruction` alone; optional `input` or `context`, `system` |
| text | `text`, to be modelled whole |
| documents | `documents`: [text, ...] that belong together; kept in `meta`, and joined as a text |
| fields | any; a row of a labelled data set or of a benchmark, all of it in `meta`; never taken by `auto` |

All other columns travel in `meta`. A row that holds many (oasst, superni) gives rows of equal position, numbered by
`sample`. A row that cannot be used is quarantined with a reason and its raw form; it never
ends the reading. In a source where some rows have an answer, a row without one is a fault (`no_answer`); where none
has, they are prompts.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from itune_ray.config.shared import Layout
from itune_ray.data.files import RawRow
from itune_ray.data.images import plain
from itune_ray.data.ledger import Outcome
from itune_ray.data.nested import EXPANDERS, MalformedError, trees
from itune_ray.data.records import Message, Record
from itune_ray.data.transcripts import transcript_turns
from itune_ray.errors import DataError

Turn = tuple[Any, Any]
"""(role, content) before either was checked."""

PROMPT = ("instruction", "prompt")
CONTEXT = ("input", "context")
ANSWER = ("output", "response", "completion")
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
"""`from` in ShareGPT files -> role."""
FOLLOWERS = {
    None: {"system", "user"},
    "system": {"user"},
    "user": {"assistant"},
    "assistant": {"user", "tool"},
    "tool": {"tool", "assistant"},
}
"""Which roles may follow a role; None is the start."""


RAW_KEPT = 100_000
"""Characters of a quarantined row that are kept."""


class BadRowError(Exception):
    """A row that cannot be used; its text is the reason it is quarantined under."""


def detect(columns: Iterable[str]) -> Layout:
    """The layout that columns speak of; raises `DataError` when none fits."""
    found = set(columns)
    if {"source", "position"} <= found and found & {"messages", "text"}:
        return "records"
    if {"message_tree_id", "prompt"} <= found or {"message_id", "parent_id", "text", "role"} <= found:
        return "oasst"
    if {"Definition", "Instances"} <= found:
        return "superni"
    if found - {"id", "idx", "meta"} == {"question", "answer"}:
        return "qa"
    if {"chosen", "rejected"} <= found:
        return "preference"
    if "messages" in found:
        return "messages"
    if "conversations" in found:
        return "sharegpt"
    if found & set(PROMPT):
        return "alpaca" if found & set(ANSWER) else "prompt"
    if "text" in found:
        return "text"
    if "documents" in found:
        return "documents"
    raise DataError(
        "no row layout fits these columns",
        got=", ".join(sorted(found)) or "no columns",
        allowed="records, alpaca (instruction, input, output), messages, sharegpt (conversations), "
        "preference (chosen, rejected), qa (question, answer), oasst (message trees), superni, prompt, text, "
        "documents; or format: fields to take the columns as they are",
        knob="format",
    )


def parse(
    rows: Iterable[RawRow], source: str, layout: Layout, max_bytes: int | None = None
) -> tuple[list[Record], list[Outcome]]:
    """Records of the rows that can be used, and a rejected outcome for each that cannot, in their order.

    Args:
        source: First part of the row keys; rows of layout `records` keep the keys they have.
        layout: What the columns mean.
        max_bytes: Rows that are larger as JSON are `oversized`.
    """
    records: list[Record] = []
    quarantined: list[Outcome] = []
    for raw, sample, flat in _flat(rows, layout):
        try:
            record = _record(raw, source, flat, max_bytes)
            records.append(replace(record, sample=sample) if sample else record)
        except BadRowError as bad:
            at = Record(source=source, position=raw.position, sample=sample)
            quarantined.append(quarantine(at, str(bad), _raw_text(raw)))
    if layout not in ("records", "prompt", "text", "fields") and any(r.response is not None for r in records):
        quarantined += [quarantine(r, "no_answer", None) for r in records if r.response is None]
        records = [r for r in records if r.response is not None]
    return records, sorted(quarantined, key=lambda outcome: (outcome.record.position, outcome.record.sample))


def _flat(rows: Iterable[RawRow], layout: Layout) -> Iterator[tuple[RawRow, int, Layout]]:
    """Each row with its number within the row that held it, and its own layout."""
    if layout not in EXPANDERS:
        for raw in rows:
            yield raw, 0, layout
        return
    flat, expand = EXPANDERS[layout]
    for raw in trees(rows) if layout.startswith("oasst") else rows:
        if raw.fields is None:
            yield raw, 0, layout
            continue
        try:
            parts = expand(raw.fields)
        except MalformedError as bad:
            yield RawRow(raw.position, None, str(bad), _raw_text(raw)), 0, layout
            continue
        for sample, fields in enumerate(parts):
            yield RawRow(raw.position, dict(fields)), sample, flat
        if not parts:
            yield RawRow(raw.position, None, "no_answer", _raw_text(raw)), 0, layout


def quarantine(record: Record, reason: str, raw: str | None) -> Outcome:
    """The outcome of a row that was rejected where it was read."""
    return Outcome(record=record, input_key=record.key, status="rejected", reason=reason, raw=raw)


def _record(raw: RawRow, source: str, layout: Layout, max_bytes: int | None) -> Record:
    if raw.fields is None:
        raise BadRowError(raw.reason or "bad_row")
    try:
        fields = {name: value for name, value in raw.fields.items() if value is not None}
        size = len(json.dumps(fields, ensure_ascii=False, default=str).encode())
        if max_bytes is not None and size > max_bytes:
            raise BadRowError("oversized")
        record = _LAYOUTS[layout](fields)
    except UnicodeEncodeError:
        raise BadRowError("bad_unicode") from None
    return record if layout == "records" else replace(record, source=source, position=raw.position)


def _raw_text(raw: RawRow) -> str:
    text = raw.raw if raw.fields is None else json.dumps(raw.fields, default=str)
    return (text or "")[:RAW_KEPT].encode("utf-8", "backslashreplace").decode()


# --- layouts -------------------------------------------------------------------------------------------------------


def _from_records(row: Mapping[str, Any]) -> Record:
    try:
        record = Record.from_row(row)
        turns = [(m["role"], m["content"]) for m in record.messages]
    except (KeyError, TypeError, ValueError):
        raise BadRowError("bad_row") from None
    if record.text is None and not (turns and all(isinstance(part, str) for turn in turns for part in turn)):
        raise BadRowError("bad_row")
    return record


def _from_messages(row: Mapping[str, Any]) -> Record:
    return _chat(_listed(row, "messages", "role", "content"), row, {"messages"})


def _from_sharegpt(row: Mapping[str, Any]) -> Record:
    turns = [(SHAREGPT_ROLES.get(who, who), said) for who, said in _listed(row, "conversations", "from", "value")]
    if row.get("system") and turns[:1] and turns[0][0] != "system":
        turns.insert(0, ("system", row["system"]))
    return _chat(turns, row, {"conversations", "system"})


def _from_alpaca(row: Mapping[str, Any]) -> Record:
    answer = _first(row, ANSWER)
    turns = _prompt_turns(row) + ([] if answer is None else [("assistant", answer)])
    return _chat(turns, row, {*PROMPT, *CONTEXT, *ANSWER, "system"})


def _from_preference(row: Mapping[str, Any]) -> Record:
    """The chosen conversation as messages, the last turn of the other as `rejected`; both must share what comes before.

    A conversation is `prompt` plus an answer, or whole in `chosen` and `rejected` themselves.
    """
    prompt = _conversation(row.get("prompt"), "user")
    chosen, rejected = (_conversation(row.get(name), "assistant") for name in ("chosen", "rejected"))
    if any(role == "user" for role, _ in chosen):
        prompt = []
    system = [("system", row["system"])] if row.get("system") else []
    record = _chat(system + prompt + chosen, row, {"prompt", "chosen", "rejected", "system"})
    if record.response is None:
        return record
    if not rejected or rejected[-1][0] != "assistant" or not str(rejected[-1][1]).strip():
        raise BadRowError("no_pair")
    if rejected[:-1] != chosen[:-1]:
        raise BadRowError("no_common_prompt")
    if not isinstance(rejected[-1][1], str):
        raise BadRowError("bad_row")
    return replace(record, rejected=rejected[-1][1])


def _conversation(value: Any, role: str) -> list[Turn]:
    """Turns of messages or of a transcript; any other text is one turn of the given role."""
    if isinstance(value, str):
        return transcript_turns(value) or [(role, value)]
    return [] if value is None else _listed({"turns": value}, "turns", "role", "content")


def _from_prompt(row: Mapping[str, Any]) -> Record:
    return _chat(_prompt_turns(row), row, {*PROMPT, *CONTEXT, "system"})


def _from_qa(row: Mapping[str, Any]) -> Record:
    turns = [("user", row.get("question", ""))] + ([("assistant", row["answer"])] if "answer" in row else [])
    return _chat(turns, row, {"question", "answer"})


def _from_text(row: Mapping[str, Any]) -> Record:
    text = row.get("text", "")
    if not isinstance(text, str):
        raise BadRowError("bad_row")
    if not text.strip():
        raise BadRowError("empty_text")
    return Record(source="", position=0, text=text, meta=_meta(row, {"text"}))


def _from_documents(row: Mapping[str, Any]) -> Record:
    documents = row.get("documents")
    if not isinstance(documents, list) or not all(isinstance(document, str) for document in documents):
        raise BadRowError("bad_row")
    kept = [document for document in documents if document.strip()]
    if not kept:
        raise BadRowError("empty_text")
    return Record(source="", position=0, text="\n\n".join(kept), meta={**_meta(row, set()), "documents": kept})


def _from_fields(row: Mapping[str, Any]) -> Record:
    if not row:
        raise BadRowError("bad_row")
    return Record(source="", position=0, meta=_meta(row, set()))


_LAYOUTS: dict[Layout, Callable[[Mapping[str, Any]], Record]] = {
    "records": _from_records,
    "messages": _from_messages,
    "sharegpt": _from_sharegpt,
    "alpaca": _from_alpaca,
    "preference": _from_preference,
    "prompt": _from_prompt,
    "qa": _from_qa,
    "text": _from_text,
    "documents": _from_documents,
    "fields": _from_fields,
}


def _prompt_turns(row: Mapping[str, Any]) -> list[Turn]:
    prompt, context, system = _first(row, PROMPT), _first(row, CONTEXT), row.get("system")
    if isinstance(prompt, str) and isinstance(context, str) and context.strip():
        prompt = f"{prompt}\n\n{context}"
    elif context is not None and not isinstance(context, str):
        raise BadRowError("bad_row")
    return ([("system", system)] if system else []) + [("user", "" if prompt is None else prompt)]


def _first(row: Mapping[str, Any], names: Iterable[str]) -> Any:
    return next((row[name] for name in names if name in row), None)


def _listed(row: Mapping[str, Any], column: str, role: str, content: str) -> list[Turn]:
    turns = row.get(column)
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        raise BadRowError("bad_row")
    return [(turn.get(role), turn.get(content)) for turn in turns]


def _chat(turns: list[Turn], row: Mapping[str, Any], used: set[str]) -> Record:
    """A chat of checked turns; an empty answer at the end counts as none."""
    if not all(isinstance(part, str) for turn in turns for part in turn):
        raise BadRowError("bad_row")
    if turns and turns[-1][0] == "assistant" and not turns[-1][1].strip():
        turns = turns[:-1]
    _check_roles([role for role, _ in turns])
    for role, content in turns:
        if role in ("user", "assistant") and not content.strip():
            raise BadRowError("empty_prompt" if role == "user" else "no_answer")
    messages: tuple[Message, ...] = tuple({"role": role, "content": content} for role, content in turns)
    return Record(source="", position=0, messages=messages, meta=_meta(row, used))


def _check_roles(roles: list[str]) -> None:
    if "user" not in roles:
        raise BadRowError("bad_roles" if roles else "empty_prompt")
    for before, role in zip([None, *roles], roles, strict=False):
        if role not in FOLLOWERS.get(before, ()):
            raise BadRowError("bad_roles")
    if roles[-1] not in ("user", "assistant", "tool"):
        raise BadRowError("bad_roles")


def _meta(row: Mapping[str, Any], used: set[str]) -> dict[str, Any]:
    rest = {name: value for name, value in row.items() if name not in used and name != "meta"}
    nested = row.get("meta")
    if nested is not None:
        rest = {**rest, **nested} if isinstance(nested, Mapping) else {**rest, "meta": nested}
    return json.loads(json.dumps(rest, default=plain)) if rest else {}
