"""Instructions found by Monte Carlo tree search over rewrites, one search per seed (IDEA-MCTS, 2024, methods D22)."""

import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from itune_ray.config.recipes import MctsConfig
from itune_ray.data.ledger import Outcome
from itune_ray.data.records import Record
from itune_ray.engine.base import Sampling
from itune_ray.engine.llm import sampling_of
from itune_ray.engine.templates import render
from itune_ray.generate.recipes.base import builtin_prompt, last_user_turn, refused
from itune_ray.generate.recipes.chain import Calls, Chain, EndedError, together
from itune_ray.generate.recipes.evol_instruct import broken_answer, broken_rule
from itune_ray.generate.recipes.propose import parse
from itune_ray.generate.search import Node, added, selected

ACTIONS: Mapping[str, str] = {
    "goals": "Say what the answer is for as a whole, and what each part of it must reach.",
    "constraints": "Add a key constraint that the answer has to keep.",
    "requirements": "Add a requirement on what has to be done.",
    "skills": "Let it take a further skill of problem solving.",
    "reasoning": "Let it take more steps of reasoning.",
    "domain": "Let it take knowledge of a special field.",
    "life": "Tie it to a topic of everyday life.",
    "application": "Tie it to a use in the real world.",
    "emotion": "Let the one who asks express a feeling that the answer has to heed.",
    "input_style": "Give what it works on in another form, such as a table, a list or code.",
    "output_style": "Ask for the answer in a certain form.",
    "create": "Write another task of the same field instead, about something that is asked less often.",
}
LINES: Mapping[str, tuple[str, str]] = {
    "quality": ("Quality", "a number from 0 to 5 for how clear and useful it is"),
    "complexity": ("Complexity", "a number from 0 to 5 for how much it takes to answer it"),
    "executability": ("Answerable", "a number from 0 to 5 for how well it can be answered from its text alone"),
    "diversity": ("Intents", "what it asks for, each intent in a word or two, separated by commas"),
}
"""Part of the reward -> the line that the judge writes; diversity is the number of different intents."""
GREEDY = Sampling(temperature=0.0, max_tokens=128)


@dataclass
class Search:
    """One seed's search so far."""

    root: Node
    actions: Mapping[str, str]
    rng: random.Random
    known: set[str]
    """Texts of the tree, normalised: no text is in it twice."""
    dropped: Counter[str] = field(default_factory=Counter[str])
    """Rewrites that were no nodes, by reason."""


class Mcts(Chain):
    """Iterations of: select by UCT, expand by `children` different actions, simulate random actions from one of the
    children to a terminal node, each evaluation going up at once.

    The reward is sum of w_k r_k over `reward`; a node is terminal where its depth is above `max_depth` or its reward
    above `max_reward`. The rows are `rows` nodes drawn evenly from those on paths to terminal nodes, answered. A
    rewrite that breaks a rule of Evol-Instruct, repeats a text of the tree or cannot be rated is no node.
    """

    name = "mcts"
    rows_per_input = None

    def __init__(self, config: MctsConfig):
        self._config = config
        self.most_rows = config.rows
        self.prompts = {name: builtin_prompt(self.name, f"{name}.jinja") for name in ("rewrite", "rate", "actions")}

    async def make(self, row: Record, calls: Calls) -> list[Outcome]:
        """One outcome per node drawn."""
        task = last_user_turn(row.prompt)
        if task is None:
            return refused(calls.draft, row, "no_prompt")
        search = await self._searched(task, calls)
        nodes = [node for node in search.root.walk() if node.parent is not None and node.reaches_terminal]
        if not nodes:
            return refused(calls.draft, row, "no_terminal_path", raw=str(dict(search.dropped)))
        picked = sorted(search.rng.sample(range(len(nodes)), min(self._config.rows, len(nodes))))
        return await together([self._answered(row, nodes[i], search, index, calls) for index, i in enumerate(picked)])

    async def _searched(self, task: str, calls: Calls) -> Search:
        config = self._config
        parts = await self._rated(task, calls, "rate/root")
        root = added(Node(task, "", None, self._reward(parts), parts))
        actions = {name: ACTIONS[name] for name in config.actions} | await self._own_actions(task, calls)
        search = Search(root, actions, calls.rng("search"), {_plain(task)})
        for number in range(1, config.iterations + 1):
            leaf = selected(root, config.exploration, config.uct_factor)
            if leaf is None:
                break
            await self._expand(leaf, search, calls, number)
            if leaf.children:
                await self._simulate(search.rng.choice(leaf.children), search, calls, number)
        return search

    async def _own_actions(self, task: str, calls: Calls) -> dict[str, str]:
        """Further actions that the teacher proposes for this task."""
        count = self._config.task_actions
        if not count:
            return {}
        found = await calls.parsed(
            "actions", render(self.prompts["actions"], task=task, count=count), lambda reply: parse(reply, "list")
        )
        return {f"own_{number}": change for number, change in enumerate(found[:count], start=1)}

    async def _expand(self, leaf: Node, search: Search, calls: Calls, number: int) -> None:
        """Children by different actions, none of which a child of it has already; made and rated at once."""
        leaf.is_expanded = True
        taken = {child.action for child in leaf.children}
        free = [name for name in search.actions if name not in taken]
        drawn = search.rng.sample(free, min(self._config.children, len(free)))
        made = await together([self._child(leaf, action, search, calls, f"{number}/{action}") for action in drawn])
        for child in made:
            self._take(child, search)

    async def _simulate(self, node: Node, search: Search, calls: Calls, number: int) -> None:
        """Random actions down to a terminal node, or to the first rewrite that is none."""
        while not node.is_terminal:
            action = search.rng.choice(list(search.actions))
            child = self._take(await self._child(node, action, search, calls, f"{number}/roll/{node.depth}"), search)
            if child is None:
                return
            node = child

    def _take(self, child: Node | str, search: Search) -> Node | None:
        """The child in the tree, unless it repeats a text or is a reason."""
        if isinstance(child, Node) and _plain(child.text) in search.known:
            child = "repeated"
        if isinstance(child, str):
            search.dropped[child] += 1
            return None
        search.known.add(_plain(child.text))
        return added(child)

    async def _child(self, parent: Node, action: str, search: Search, calls: Calls, name: str) -> Node | str:
        """A rewrite with its reward, not yet in the tree; or the reason why there is none."""
        asked = render(self.prompts["rewrite"], task=parent.text, change=search.actions[action])
        try:
            text = await calls.ask(f"rewrite/{name}", asked)
            reason = broken_rule(parent.text, text)
            if reason is not None:
                return reason
            parts = await self._rated(text, calls, f"rate/{name}")
        except EndedError as end:
            if end.failed is not None:
                raise
            return end.reason
        reward, config = self._reward(parts), self._config
        is_terminal = parent.depth + 1 > config.max_depth or reward > config.max_reward
        return Node(text, action, parent, reward, parts, is_terminal)

    async def _rated(self, task: str, calls: Calls, name: str) -> dict[str, float]:
        wanted = tuple(self._config.reward)
        lines = [{"label": LINES[part][0], "demand": LINES[part][1]} for part in wanted]
        asked = render(self.prompts["rate"], task=task, lines=lines)
        return await calls.parsed(
            name, asked, lambda reply: parse_rating(reply, wanted), of="judge", sampling=GREEDY, cut=True
        )

    def _reward(self, parts: Mapping[str, float]) -> float:
        return sum(weight * parts[part] for part, weight in self._config.reward.items())

    async def _answered(self, row: Record, node: Node, search: Search, index: int, calls: Calls) -> Outcome:
        chat = (*row.prompt[:-1], {"role": "user", "content": node.text})
        facts: dict[str, Any] = {**_told(node), "dropped": dict(sorted(search.dropped.items()))}
        if self._config.keep_tree and index == 0:
            facts["tree"] = [{**_told(other), "text": other.text} for other in search.root.walk()]
        fields: dict[str, Any] = {
            "recipe": f"{self.name}.{node.action}",
            "round": row.round + node.depth,
            "meta": {**row.meta, "mcts": facts},
        }
        try:
            answer = await calls.ask(f"answer/{index}", chat, sampling=sampling_of(self._config.answer))
        except EndedError as end:
            if end.failed is not None:
                raise
            return calls.rejected(end.reason, index, raw=end.raw, score=node.reward, messages=chat, **fields)
        messages = (*chat, {"role": "assistant", "content": answer})
        reason = broken_answer(node.text, answer)
        if reason is not None:
            return calls.rejected(reason, index, score=node.reward, messages=messages, **fields)
        return calls.accepted(index, score=node.reward, messages=messages, finish_reason="stop", **fields)


def parse_rating(reply: str, wanted: Sequence[str]) -> dict[str, float] | None:
    """The value of each part, once each; None where one is missing, given twice or out of range."""
    found: dict[str, float] = {}
    for part in wanted:
        label = LINES[part][0]
        values = re.findall(rf"^\W*{label}\W*?:[*_ \t]*(.*?)[*_ \t]*$", reply, re.MULTILINE | re.IGNORECASE)
        value = _value(part, values[0]) if len(values) == 1 else None
        if value is None:
            return None
        found[part] = value
    return found


def _value(part: str, text: str) -> float | None:
    if part == "diversity":
        intents = {_plain(intent) for intent in text.split(",")} - {""}
        return float(len(intents)) or None
    number = re.fullmatch(r"([0-5](?:\.\d+)?)(?:\s*/\s*5)?\.?", text)
    value = float(number[1]) if number else -1.0
    return value if 0 <= value <= 5 else None


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def _told(node: Node) -> dict[str, Any]:
    return {
        "actions": node.path,
        "depth": node.depth,
        "reward": node.reward,
        "parts": dict(node.parts),
        "total": node.total,
        "visits": node.visits,
        "is_terminal": node.is_terminal,
    }
