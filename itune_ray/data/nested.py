"""Layouts of which one row holds many: message trees (OASST) and task files (Super-NaturalInstructions), as flat rows.

A flat row is in a layout of `itune_ray.data.formats` (`messages` or `alpaca`); a key of it that is no column of that
layout travels in `meta`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal

from itune_ray.data.files import RawRow

Row = Mapping[str, Any]
ROLES = {"prompter": "user", "assistant": "assistant"}
"""Role in a message tree -> role."""
EXAMPLES = 2
"""Positive and negative examples of a task that each of its rows keeps, as Tk-Instruct shows at most."""
UNRANKED = 10**9


class MalformedError(Exception):
    """A row that is not what its layout says; its text is the reason it is quarantined under."""


# --- message trees -------------------------------------------------------------------------------------------------


def trees(rows: Iterable[RawRow]) -> Iterator[RawRow]:
    """Rows of one tree each; messages that come one a row (as on the Hub) are put together, at their root's position.

    A message without its parent is `no_parent`; what could not be read is passed on.
    """
    messages: dict[str, tuple[RawRow, dict[str, Any]]] = {}
    whole: list[RawRow] = []
    for row in rows:
        if row.fields is None or "parent_id" not in row.fields or "prompt" in row.fields:
            whole.append(row)
        elif not isinstance(row.fields.get("message_id"), str):
            whole.append(RawRow(row.position, None, "bad_row", str(row.fields)))
        else:
            messages[row.fields["message_id"]] = row, {**row.fields, "replies": []}
    for row, message in messages.values():
        parent = message["parent_id"]
        if parent is None:
            tree = {"message_tree_id": message.get("message_tree_id"), "prompt": message}
            whole.append(RawRow(row.position, tree))
        elif parent in messages:
            messages[parent][1]["replies"].append(message)
        else:
            whole.append(RawRow(row.position, None, "no_parent", str(message["message_id"])))
    yield from sorted(whole, key=lambda row: row.position)


def tree_paths(row: Row) -> list[Row]:
    """A chat per path from the root to a leaf, cut after its last answer; a path that another one goes on from is left
    out."""
    paths = [_answered(path) for path in _paths(_root(row))]
    kept: list[list[Row]] = []
    for path in sorted((path for path in paths if path), key=len, reverse=True):
        if not any(_begins(longer, path) for longer in kept):
            kept.append(path)
    order = {id(path): index for index, path in enumerate(paths)}
    return [_chat(row, path) for path in sorted(kept, key=lambda path: order[id(path)])]


def best_path(row: Row) -> list[Row]:
    """One chat: from the root always to the reply of the best rank (0 first, the earlier of equal ones)."""
    path = [_root(row)]
    while replies := _replies(path[-1]):
        path.append(min(replies, key=_rank))
    return [_chat(row, answered)] if (answered := _answered(path)) else []


def _root(row: Row) -> Row:
    root = row.get("prompt")
    if not isinstance(root, Mapping):
        raise MalformedError("bad_row")
    if not _stands(root):
        raise MalformedError("empty_prompt")
    return root


def _paths(message: Row) -> Iterator[list[Row]]:
    replies = _replies(message)
    if not replies:
        yield [message]
    for reply in replies:
        yield from ([message, *rest] for rest in _paths(reply))


def _replies(message: Row) -> list[Row]:
    replies = message.get("replies") or []
    if not isinstance(replies, list) or not all(isinstance(reply, Mapping) for reply in replies):
        raise MalformedError("bad_row")
    return [reply for reply in replies if _stands(reply)]


def _stands(message: Row) -> bool:
    """Whether a message counts: not deleted, not refused in review, not empty."""
    text = message.get("text")
    said = isinstance(text, str) and bool(text.strip())
    return said and not message.get("deleted") and message.get("review_result") is not False


def _rank(message: Row) -> int:
    rank = message.get("rank")
    return UNRANKED if rank is None else int(rank)


def _answered(path: list[Row]) -> list[Row]:
    last = max((index for index, message in enumerate(path) if message.get("role") == "assistant"), default=-1)
    return path[: last + 1]


def _begins(longer: list[Row], path: list[Row]) -> bool:
    return len(path) <= len(longer) and all(a is b for a, b in zip(path, longer, strict=False))


def _chat(row: Row, path: list[Row]) -> Row:
    turns = [{"role": ROLES.get(m.get("role", ""), m.get("role")), "content": m["text"]} for m in path]
    facts = {"tree": row.get("message_tree_id"), "message": path[-1].get("message_id"), "lang": path[0].get("lang")}
    ranks = [message.get("rank") for message in path if message.get("role") == "assistant"]
    return {"messages": turns, "ranks": ranks, **{name: value for name, value in facts.items() if value is not None}}


# --- task files ----------------------------------------------------------------------------------------------------


def task_instances(row: Row) -> list[Row]:
    """A row per instance: the task's definition and the input ask, the first output answers.

    `meta` has the parts that templates need: `task`, `categories`, `definition`, `input`, `references` (all outputs),
    two `positive` and two `negative` examples, `instance` and `license`.
    """
    definition, instances = _text(row.get("Definition")), row.get("Instances")
    if not isinstance(instances, list) or not all(isinstance(one, Mapping) for one in instances):
        raise MalformedError("bad_row")
    if not definition.strip():
        raise MalformedError("empty_prompt")
    facts = {
        "task": row.get("task"),
        "categories": row.get("Categories"),
        "definition": definition,
        "positive": _examples(row.get("Positive Examples")),
        "negative": _examples(row.get("Negative Examples")),
        "license": _text(row.get("Instance License")) or None,
    }
    return [{**facts, **_instance(definition, one)} for one in instances]


def _instance(definition: str, instance: Row) -> Row:
    outputs = instance.get("output")
    outputs = outputs if isinstance(outputs, list) else [outputs]
    given = instance.get("input")
    return {
        "instruction": f"{definition}\n\n{given}" if isinstance(given, str) and given.strip() else definition,
        "output": outputs[0] if outputs else None,
        "meta": {"input": given, "references": outputs, "instance": instance.get("id")},
    }


def _examples(given: Any) -> list[Row] | None:
    if not isinstance(given, list):
        return None
    return [example for example in given if isinstance(example, Mapping)][:EXAMPLES]


def _text(value: Any) -> str:
    """A text, or a list of them as paragraphs."""
    parts = value if isinstance(value, list) else [value]
    return "\n".join(part for part in parts if isinstance(part, str))


EXPANDERS: dict[str, tuple[Literal["messages", "alpaca"], Callable[[Row], list[Row]]]] = {
    "oasst": ("messages", tree_paths),
    "oasst_best": ("messages", best_path),
    "superni": ("alpaca", task_instances),
}
"""Nested layout -> the layout of its flat rows, and what makes them."""
