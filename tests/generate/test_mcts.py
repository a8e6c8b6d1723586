"""Tree search: UCT by known answers, counts that add up, and a known best path that is found."""

import asyncio
import json
import math
import re

import pytest
from scripted import Scripted, llm, prompt, run
from testdata import public_data

from itune_ray.config.recipes import MctsConfig
from itune_ray.generate.recipes.chain import Calls
from itune_ray.generate.recipes.mcts import ACTIONS, Mcts, parse_rating
from itune_ray.generate.search import Node, added, best_child, selected, uct

SEED = "Name a river."


def test_uct_by_known_answers():
    children = [(3.0, 1), (5.5, 2), (9.0, 4)]
    assert [uct(q, n, 7, 1.0) for q, n in children] == pytest.approx([4.394959, 3.736385, 2.947479], abs=1e-6)
    fixture = json.loads(public_data("methods/data_fixtures.json").read_text())["D22"]
    found = [uct(q, n, fixture["N_parent"], fixture["C"]) for q, n in fixture["children_QN"]]
    assert found == pytest.approx(fixture["uct"], abs=1e-6)
    assert uct(1.0, 1, 7, 1.0, factor=2.0) == pytest.approx(1 + math.sqrt(2 * math.log(7)))
    assert uct(0.0, 0, 7, 0.0) == math.inf, "unvisited first"


def node(text, parent, reward, **fields):
    return added(Node(text, text, parent, reward, {}, **fields))


def test_selection_is_greedy_without_exploration_and_curious_with():
    root = node("root", None, 0.0, is_expanded=True)
    good, poor = node("good", root, 5.0), node("poor", root, 1.0)
    for i in range(30):
        good.is_expanded = True
        node(f"{i}", good, 5.0)
    assert best_child(root.children, root.visits, 0.0) is good
    assert best_child(root.children, root.visits, 10.0) is poor
    assert selected(root, 0.0).parent is good
    assert selected(root, 10.0) is poor


def test_subtrees_that_are_done_are_passed_by():
    root = node("root", None, 0.0, is_expanded=True)
    node("best", root, 9.0, is_terminal=True)
    barren = node("barren", root, 8.0, is_expanded=True)
    assert barren.is_done, "expanded without a child"
    left = node("left", root, 1.0)
    assert selected(root, 0.0) is left
    left.is_expanded = True
    assert selected(root, 0.0) is None


# --- the recipe ------------------------------------------------------------------------------------------------------


def action_of(turn):
    return next(name for name, change in ACTIONS.items() if change in turn)


def task_of(turn):
    return turn.split("<task>\n")[1].split("\n</task>")[0]


def rating(quality):
    return f"Quality: {quality}\nComplexity: 1\nIntents: rivers, names"


def script(quality=lambda task: 2.5, rewrite=None, answer="The Rhine."):
    """A rewrite is its parent with the action's name at its end; the quality is a function of the text."""

    def reply(turn, index):
        if "Rate the task" in turn:
            found = quality(task_of(turn))
            return found if isinstance(found, (str, Exception)) else rating(found)
        if "with one change" in turn:
            return rewrite(turn) if rewrite else f"{task_of(turn)} {action_of(turn)}"
        return answer

    return reply


def recipe(**config):
    return Mcts(MctsConfig(**config))


def searched(config, script_, position=0):
    made = recipe(**config)
    calls = Calls(prompt(SEED, position), llm(Scripted(script_)), "mcts", 4)
    return asyncio.run(made._searched(SEED, calls))


@pytest.mark.parametrize("position", range(8))
def test_visits_and_rewards_add_up(position):
    def quality(task):
        return len(task) % 6 if len(task) % 6 < 5 else 4.5

    search = searched({"iterations": 5, "children": 4}, script(quality), position)
    nodes = list(search.root.walk())
    for at in nodes:
        assert at.visits == 1 + sum(child.visits for child in at.children)
        assert at.total == pytest.approx(sum(below.reward for below in at.walk()))
    assert search.root.visits == len(nodes)
    assert sum(at.is_expanded for at in nodes) == 5, "one expansion per iteration"
    assert len({at.text for at in nodes}) == len(nodes)
    for at in nodes:
        actions = [child.action for child in at.children]
        assert len(set(actions)) == len(actions)
        assert at.is_terminal == (at.depth > 4 or at.reward > 10)
        assert at.depth <= 5


def test_the_reward_is_the_weighted_sum_and_ends_a_path():
    search = searched({"iterations": 1, "reward": {"quality": 2.0, "diversity": 0.5}}, script(lambda task: 5))
    assert search.root.reward == 2.0 * 5 + 0.5 * 2
    assert all(at.is_terminal for at in search.root.children)
    assert search.root.children[0].parts == {"quality": 5.0, "diversity": 2.0}
    assert search.root.visits == 1 + 5, "nothing to simulate"


def test_a_known_best_path_is_found():
    best = ["reasoning", "domain", "emotion"]
    actions = ("reasoning", "domain", "emotion", "life")

    def quality(task):
        done = task.removeprefix(SEED).split()
        right = next((i for i, (a, b) in enumerate(zip(done, best, strict=False)) if a != b), min(len(done), 3))
        return 5 * right / 3 if len(done) <= 3 else 0

    bound = 1 + 4 + 16  # every inner node of the tree of depth 3 expanded
    config = {"iterations": bound, "children": 4, "actions": actions, "max_depth": 2, "max_reward": 100.0}
    search = searched(config, script(quality))
    assert max(search.root.walk(), key=lambda at: at.reward).path == best
    few = searched({**config, "iterations": 3, "exploration": 0.0}, script(quality))
    assert max(few.root.walk(), key=lambda at: at.reward).path == best, "greedy goes straight there"


def test_rows_are_nodes_on_terminal_paths_with_their_answers():
    outcomes = run(recipe(rows=6, keep_tree=True), prompt(SEED, meta={"k": 1}), script())
    assert len(outcomes) == len({o.record.key for o in outcomes}) == 6
    tree = outcomes[0].record.meta["mcts"]["tree"]
    assert tree[0]["text"] == SEED
    terminal = [at["actions"] for at in tree if at["is_terminal"]]
    assert terminal
    for outcome in outcomes:
        facts = outcome.record.meta["mcts"]
        assert outcome.status == "accepted"
        assert outcome.record.messages[0]["content"] == " ".join([SEED, *facts["actions"]])
        assert outcome.record.response == "The Rhine."
        assert any(path[: facts["depth"]] == facts["actions"] for path in terminal)
        assert outcome.record.parents == ("s:0:0",)
        assert outcome.record.round == facts["depth"] >= 1
        assert outcome.score == facts["reward"] == 2.5 + 1 + 2
        assert outcome.record.meta["k"] == 1
    assert "tree" not in outcomes[1].record.meta["mcts"]


def test_the_same_seed_gives_the_same_search():
    first, second = (run(recipe(), prompt(SEED, 3), script()) for _ in range(2))
    assert [o.record for o in first] == [o.record for o in second]
    assert [o.record.messages for o in run(recipe(), prompt(SEED, 4), script())] != [o.record.messages for o in first]


def test_copies_and_broken_rewrites_are_no_nodes():
    search = searched({"iterations": 2}, script(rewrite=lambda turn: "Name two rivers."))
    assert len(list(search.root.walk())) == 2
    assert search.dropped["repeated"] >= 4
    (outcome,) = run(recipe(), prompt(SEED), script(rewrite=lambda turn: SEED.upper()))
    assert (outcome.status, outcome.reason) == ("rejected", "no_terminal_path")
    assert "'unchanged': 5" in outcome.raw
    search = searched({"iterations": 1}, script(rewrite=lambda turn: "The new task: name it."))
    assert search.dropped == {"scaffold": 5}
    search = searched({"iterations": 1}, script(quality=lambda task: 2 if task == SEED else "Good."))
    assert search.dropped == {"unparsable": 5}


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ({"answer": "Sorry."}, "apology"),
        ({"answer": ("The", "length")}, "truncated"),
        ({"answer": " "}, "empty"),
        ({"quality": lambda task: "Good."}, "unparsable"),
    ],
)
def test_what_cannot_be_a_row_is_rejected(words, reason):
    outcomes = run(recipe(), prompt(SEED), script(**words))
    assert {(o.status, o.reason) for o in outcomes} == {("rejected", reason)}


def test_an_engine_error_fails_the_seed():
    broken = script(quality=lambda task: 2 if task == SEED else OSError("gone"))
    outcomes = run(recipe(), prompt(SEED), broken)
    assert {(o.status, o.cause) for o in outcomes} == {("failed", "gone")}


@pytest.mark.parametrize(
    ("reply", "found"),
    [
        ("Quality: 4\nIntents: a, b, A", {"quality": 4.0, "diversity": 2.0}),
        ("**Quality:** 4.5/5\nIntents: one", {"quality": 4.5, "diversity": 1.0}),
        ("Quality: 0\nIntents: x, , y", {"quality": 0.0, "diversity": 2.0}),
        ("Quality: 6\nIntents: a", None),
        ("Quality: 5.5\nIntents: a", None),
        ("Quality: 4 or 5\nIntents: a", None),
        ("Quality: 4\nQuality: 5\nIntents: a", None),
        ("Quality: 4", None),
        ("Quality: 4\nIntents:", None),
    ],
)
def test_ratings_are_parsed_or_refused(reply, found):
    assert parse_rating(reply, ("quality", "diversity")) == found


def test_the_teacher_may_propose_actions_of_its_own():
    def reply(turn, index):
        if "Name 2 ways" in turn:
            return "1. Ask for its length.\n2. Ask for its source.\n3. Ask for more."
        if "Ask for its" in turn:
            return task_of(turn) + " " + re.search(r"Ask for its (\w+)", turn)[1]
        return script()(turn, index)

    search = searched({"task_actions": 2, "actions": ("life",), "children": 3, "iterations": 1}, reply)
    assert {child.action for child in search.root.children} == {"life", "own_1", "own_2"}


def test_the_judge_alone_rates():
    judge, asked = Scripted(script()), []

    def teacher(turn, index):
        asked.append(turn)
        return script()(turn, index)

    run(recipe(iterations=1).bind({"judge": llm(judge)}), prompt(SEED), teacher)
    assert all("Rate the task" in turn for turn in judge.turns)
    assert not any("Rate the task" in turn for turn in asked)
