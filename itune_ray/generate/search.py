"""Monte Carlo tree search over rewrites: the tree, what is selected and how rewards go up (Kocsis and Szepesvári 2006).

A visit of a node is one evaluation in its subtree, its own included, so N(s) = 1 + sum of N over its children and Q(s)
is the sum of the rewards in its subtree.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field


@dataclass
class Node:
    """A task in the tree."""

    text: str
    action: str
    """What made it of its parent; empty at the root."""
    parent: "Node | None"
    reward: float
    parts: Mapping[str, float]
    is_terminal: bool = False
    is_expanded: bool = False
    """Whether its children were made; one that a simulation passed through has a child without."""
    children: list["Node"] = field(default_factory=list["Node"])
    total: float = 0.0
    """Q."""
    visits: int = 0
    """N."""

    @property
    def depth(self) -> int:
        """0 at the root."""
        return 0 if self.parent is None else self.parent.depth + 1

    @property
    def path(self) -> list[str]:
        """Actions from the root."""
        return [] if self.parent is None else [*self.parent.path, self.action]

    def walk(self) -> Iterator["Node"]:
        """The subtree, each node before its children."""
        yield self
        for child in self.children:
            yield from child.walk()

    @property
    def is_done(self) -> bool:
        """Whether nothing below can be expanded any more."""
        return self.is_terminal or (self.is_expanded and all(child.is_done for child in self.children))

    @property
    def reaches_terminal(self) -> bool:
        """Whether it stands on a path from the root to a terminal node."""
        return any(node.is_terminal for node in self.walk())


def added(node: Node) -> Node:
    """The node as a child of its parent, its reward in Q and one visit in N of all above it and of itself."""
    if node.parent is not None:
        node.parent.children.append(node)
    at: Node | None = node
    while at is not None:
        at.total += node.reward
        at.visits += 1
        at = at.parent
    return node


def uct(total: float, visits: int, parent_visits: int, exploration: float, factor: float = 1.0) -> float:
    """Q/N + C sqrt(factor ln N(parent) / N); infinite where nothing was visited."""
    if visits == 0:
        return math.inf
    return total / visits + exploration * math.sqrt(factor * math.log(parent_visits) / visits)


def best_child(children: Sequence[Node], parent_visits: int, exploration: float, factor: float = 1.0) -> Node:
    """The child of the largest UCT, the first of equal ones; 0 exploration takes the largest mean."""
    return max(children, key=lambda child: uct(child.total, child.visits, parent_visits, exploration, factor))


def selected(root: Node, exploration: float, factor: float = 1.0) -> Node | None:
    """The first node not expanded on the way down by UCT, past subtrees that are done; None where all is done."""
    node = root
    if node.is_done:
        return None
    while node.is_expanded:
        open_children = [child for child in node.children if not child.is_done]
        node = best_child(open_children, node.visits, exploration, factor)
    return node
