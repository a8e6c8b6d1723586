"""Filters that choose among all rows: semantic deduplication, selection, deita, diverse sampling, curriculum."""

import itertools
import json
import math
import random
from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from itune_ray.config.base import validate
from itune_ray.config.curate import CurateJob
from itune_ray.curate import run as stage
from itune_ray.curate.filters.deita import evol_score, expected_score
from itune_ray.curate.filters.select import subset_size
from itune_ray.curate.tags import complexity_first, normalise_tag, parse_tags, tag_sets
from itune_ray.data.artifact import Artifact, RunStore
from itune_ray.data.pacing import admitted, competence, percentile_ranks, stage_of
from itune_ray.data.records import Record, records_table
from itune_ray.engine.base import Completion, Sample
from itune_ray.engine.host import EngineHost
from itune_ray.errors import ConfigError, DataError
from itune_ray.observe.progress import Progress
from tests.curate.sets import circle, made, reached, reasons, row, stays

# --- semantic deduplication ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "kept"), [("paper", [0]), ("greedy", [0, 2, 4])])
def test_semantic_dedup_of_a_chain(mode, kept):
    rows = [row(i) for i in range(5)]
    choice = made(type="semantic_dedup", epsilon=0.1, mode=mode, order="best").choose(
        reached(rows, circle(0, 20, 40, 60, 80))
    )
    assert stays(choice, 5) == kept
    assert set(reasons(choice).values()) == {"semantic_duplicate"}
    assert choice.dropped[1].of == 0
    assert choice.dropped[1].score == pytest.approx(math.cos(math.radians(20)))


def test_hard_keeps_the_row_farthest_from_its_centroid():
    vectors = circle(0, 10, 13, 30)
    rows = [row(i) for i in range(4)]
    kept = {
        order: stays(made(type="semantic_dedup", epsilon=0.002, order=order).choose(reached(rows, vectors)), 4)
        for order in ("hard", "easy")
    }
    assert kept == {"hard": [0, 1, 3], "easy": [0, 2, 3]}


def test_planted_duplicates_are_found_and_nothing_else():
    rng = np.random.default_rng(3)
    base = rng.normal(size=(60, 16))
    near = base[:20] + 0.01 * rng.normal(size=(20, 16))
    vectors = np.concatenate([base, near])
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    rows = sorted((row(i) for i in range(80)), key=lambda r: r.key)
    order = [r.position for r in rows]
    choice = made(type="semantic_dedup", clusters=8, epsilon=0.01).choose(reached(rows, vectors[order]))
    pairs = {tuple(sorted((order[loser], order[d.of]))) for loser, d in choice.dropped.items()}  # type: ignore[index]
    assert pairs == {(i, 60 + i) for i in range(20)}
    assert choice.facts == {"compared": 80, "clusters": 8}


def test_rows_that_cannot_be_embedded_stay():
    rows = [row(0), row(1), row(2), row(3)]
    vectors = np.array([[1.0, 0], [1.0, 0], [0.0, 0], [math.nan] * 2])
    choice = made(type="semantic_dedup").choose(reached(rows, vectors))
    assert (stays(choice, 4), choice.facts["compared"]) == ([0, 2, 3], 2)
    assert made(type="semantic_dedup").choose(reached([], np.empty((0, 2)))).dropped == {}


# --- select --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("total", "rows", "share", "size"),
    [
        (0, None, 0.5, 0),
        (10, None, 0.01, 1),
        (1000, None, 0.005, 5),
        (100, None, 0.29, 29),  # 0.29 * 100 is 28.999999999999996
        (7, None, 1.0, 7),
        (7, 3, None, 3),
        (2, 3, None, 2),
    ],
)
def test_subset_size(total, rows, share, size):
    assert subset_size(total, rows, share) == size


def numbered(count: int, **meta: Any) -> list[Record]:
    """Rows whose keys are in the order of their numbers."""
    return [row(1000 + i, **{name: values[i] for name, values in meta.items()}) for i in range(count)]


def test_hash_selection_is_nested_exact_and_by_seed():
    rows = numbered(300)
    kept = [set(stays(made(type="select", rows=m).choose(reached(rows)), 300)) for m in (10, 50, 299)]
    assert [len(some) for some in kept] == [10, 50, 299]
    assert kept[0] < kept[1] < kept[2]
    other = set(stays(made(type="select", rows=50).choose(reached(rows, seed=1)), 300))
    assert len(other & kept[1]) < 25
    part = set(stays(made(type="select", rows=50).choose(reached(rows[:150])), 150))
    assert {i for i in kept[1] if i < 150} <= part, "the smallest hashes of a shard hold its part of the whole's"


def test_strata_keep_their_proportions():
    rows = numbered(100, task=["a"] * 60 + ["b"] * 33 + ["c"] * 6 + [None])
    choice = made(type="select", strategy="stratified", rows=10, by="meta.task").choose(reached(rows))
    kept = Counter(rows[i].meta["task"] for i in stays(choice, 100))
    assert kept == {"a": 6, "b": 3, "c": 1}
    assert choice.facts["vanished"] == ["(none)"], "a stratum that the quota leaves out is told"
    assert choice.facts["strata"]["a"] == {"in": 60, "kept": 6}


def test_longest_and_score():
    rows = [row(i, "x" * size) for i, size in enumerate([3, 9, 9, 1])]
    assert stays(made(type="select", strategy="longest", rows=2).choose(reached(rows)), 4) == [1, 2]
    assert stays(made(type="select", strategy="longest", rows=1).choose(reached(rows)), 4) == [1]
    rows = numbered(5, s=[0.5, 0.9, None, "0.99", True])
    high = made(type="select", strategy="score", by="meta.s", rows=1).choose(reached(rows))
    assert reasons(high) == {0: "not_selected", 2: "no_score", 3: "no_score", 4: "no_score"}
    low = made(type="select", strategy="score", by="meta.s", rows=1, lowest=True).choose(reached(rows))
    assert stays(low, 5) == [0]


def test_k_center_covers_each_cluster_by_its_size():
    angles = [0, 1, 2, 3, 4, 5, 6, 7, 100, 104, 106, 109]
    rows = numbered(12)
    choice = made(type="select", strategy="k_center", rows=6, clusters=2).choose(reached(rows, circle(*angles)))
    kept = stays(choice, 12)
    assert sum(i < 8 for i in kept) == 4
    assert {0, 7} <= set(kept), "the far ends"
    assert set(kept) >= {9, 11}, "first the row nearest the centroid, then the one farthest from it"
    report = sorted(choice.facts["clusters"], key=lambda c: c["in"])
    assert [(c["in"], c["kept"]) for c in report] == [(4, 2), (8, 4)]
    assert report[1]["radius"] <= 2 * math.sin(math.radians(1))


def test_k_center_leaves_outliers_aside():
    angles = [*range(19), 60]
    rows = numbered(20)
    chosen = {
        trim: stays(
            made(type="select", strategy="k_center", rows=4, trim=trim).choose(reached(rows, circle(*angles))), 20
        )
        for trim in (0.0, 0.05)
    }
    assert 19 in chosen[0.0]
    assert 19 not in chosen[0.05]
    everything = made(type="select", strategy="k_center", rows=20, trim=0.5).choose(reached(rows, circle(*angles)))
    assert not everything.dropped


def test_k_center_says_what_it_could_not_embed():
    vectors = np.array([[1.0, 0], [0, 0], [0, 1.0], [math.nan] * 2])
    choice = made(type="select", strategy="k_center", rows=3).choose(reached(numbered(4), vectors))
    assert reasons(choice) == {1: "not_embedded", 3: "not_embedded"}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "rows or share"),
        ({"rows": 3, "share": 0.5}, "rows or share"),
        ({"rows": 3, "strategy": "score"}, "needs by"),
        ({"rows": 3, "strategy": "stratified", "by": "length"}, "meta field"),
        ({"rows": 3, "strategy": "score", "by": "votes"}, "by"),
    ],
)
def test_a_selection_that_is_no_selection_is_refused(config, message):
    with pytest.raises(ConfigError, match=message):
        made(type="select", **config)


# --- tags ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "tags"),
    [
        ('["Data Analysis", "python "]', ["Data Analysis", "python"]),
        ('Here:\n```json\n[{"tag": "sums", "explanation": "adds [two]"}]\n```', ["sums"]),
        ('a [note] first: ["x"]', ["x"]),
        ("[]", []),
        ("no list", None),
        ('["x", 3]', None),
        ('[{"name": "x"}]', None),
        ('["x", " "]', None),
        ('["x"', None),
    ],
)
def test_tags_are_read_or_not(reply, tags):
    assert parse_tags(reply) == tags


def test_tags_are_normalised_before_they_are_counted():
    assert {normalise_tag(t) for t in ("Data-Analysis", "data  analysis", "DATA_ANALYSIS!")} == {"data analysis"}
    assert normalise_tag("code reviews") == normalise_tag("Code Review")
    assert [normalise_tag(t) for t in ("class", "status", "analysis", "gas", "ＡＢＣ", "?")] == [
        "class",
        "status",
        "analysis",
        "gas",
        "abc",
        "",
    ]
    rows = [["Sums", "sum", 3], ["sum", "rare"], ["addition"]]
    assert tag_sets(rows) == [{"sum"}, {"sum", "rare"}, {"addition"}]
    assert tag_sets(rows, 2) == [{"sum"}, {"sum"}, set()]
    assert tag_sets(rows, 3, {"addition": "sum"}) == [{"sum"}, {"sum"}, {"sum"}]


def test_complexity_first_walks_in_passes():
    tags = [frozenset(t) for t in ("ab", "abc", "a", "d", "bc", "")]
    assert complexity_first(tags, 2) == [1, 3]
    assert complexity_first(tags, 4) == [1, 3, 0, 4]
    assert complexity_first(tags, 10) == [1, 3, 0, 4, 2]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.frozensets(st.sampled_from("abcdef")), max_size=20), st.integers(0, 25))
def test_every_row_of_a_pass_adds_a_tag(tags, limit):
    taken = complexity_first(tags, limit)
    assert len(set(taken)) == len(taken) == min(limit, sum(bool(t) for t in tags))
    covered: set[str] = set()
    for place, index in enumerate(taken):
        if tags[index] <= covered:
            untaken = set(range(len(tags))) - set(taken[:place])
            assert all(tags[i] <= covered for i in untaken), "a new pass begins only when nothing adds a tag"
            covered = set()
        covered |= tags[index]


def test_select_by_tags():
    rows = numbered(4, tags=[["a"], ["a", "B"], ["b"], None])
    choice = made(type="select", strategy="tags", rows=1, by="meta.tags").choose(reached(rows))
    assert reasons(choice) == {0: "not_selected", 2: "not_selected", 3: "no_tags"}
    assert (choice.facts["tags"], choice.facts["tags_kept"]) == (2, 2)


# --- deita ---------------------------------------------------------------------------------------------------------

DEITA_C = [3, 2.5, 2.2, 2.9, 1, 1.5, 2, 2.1, 3, 1.0]
DEITA_Q = [4, 4, 4, 3, 5, 5, 2, 2, 1, 6.0]
DEITA_ANGLES = circle(0, 10, 20, 30, 90, 100, 180, 185, 270, 45)


def deita(rows: int = 10, **more: Any) -> Any:
    return made(type="deita", complexity="meta.c", quality="meta.q", rows=rows, **more)


def test_deita_selects_as_the_specification_does():
    choice = deita().choose(reached(numbered(10, c=DEITA_C, q=DEITA_Q), DEITA_ANGLES))
    assert stays(choice, 10) == [0, 3, 5, 7, 8]
    assert {choice.dropped[i].reason for i in choice.dropped} == {"similar"}
    assert (choice.dropped[1].of, choice.dropped[9].of) == (0, 3)
    assert choice.scores[0] == 12
    fewer = deita(3).choose(reached(numbered(10, c=DEITA_C, q=DEITA_Q), DEITA_ANGLES))
    assert stays(fewer, 10) == [0, 3, 5]
    assert fewer.dropped[8].reason == "not_selected"


def test_deita_has_no_score_where_one_is_missing():
    rows = numbered(4, c=[1, None, 2, 3], q=[1, 2, "3", 4])
    choice = deita().choose(reached(rows, np.concatenate([circle(0, 90, 180), [[math.nan] * 2]])))
    assert reasons(choice) == {1: "no_score", 2: "no_score", 3: "not_embedded"}
    assert choice.scores == {0: 1.0, 3: 12.0}


def test_evol_score_over_turns():
    assert evol_score(3, 4) == 12
    assert evol_score([3, 1], [4, 2]) == 14
    assert evol_score([3, 1], [4, 2], "mean") == 7
    for c, q in (([3, 1], [4]), ([], []), ([3, None], [1, 2]), (True, 2), (3, math.nan)):
        assert math.isnan(evol_score(c, q))


def test_expected_score():
    probs = {k + 1: p for k, p in enumerate((0.05, 0.05, 0.1, 0.2, 0.4, 0.2))}
    logs = {k: math.log(p) for k, p in probs.items()}
    assert expected_score(logs) == pytest.approx(4.45)
    assert expected_score({k: v - 700 for k, v in logs.items()}) == pytest.approx(4.45), "softmax of what is listed"
    assert math.isnan(expected_score({k: v for k, v in logs.items() if k != 3})), "never a default"
    assert math.isnan(expected_score({**logs, 3: -math.inf}))


# --- diverse -------------------------------------------------------------------------------------------------------


def diverse(**more: Any) -> Any:
    return made(type="diverse", by="meta.site", **{"rows": 6, "min_chars": 1, **more})


@pytest.mark.parametrize(
    ("size", "reason"), [(1199, "short_answer"), (1200, None), (4096, None), (4097, "long_answer")]
)
def test_the_bounds_of_an_answer(size, reason):
    choice = diverse(min_chars=1200).choose(reached([row(0, "x" * size, site="a")]))
    assert reasons(choice).get(0) == reason


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("I think so.", "first_person"),
        ("That is my view.", "first_person"),
        ("My view.", "first_person"),
        ("In it, `I = 3` and\n```\nI = my\n```\nare set.", None),
        ('He said "I do" and left.', None),
        ("> I wrote this\nNo.", None),
        ("<code>my $x</code> is Perl.", None),
        ("I/O is slow; mystery.", None),
        ("As mentioned before, no.", "refers_elsewhere"),
        ("The accepted answer is wrong.", "refers_elsewhere"),
        ("The answer is four.", None),
    ],
)
def test_the_rules_of_style(answer, reason):
    choice = diverse().choose(reached([row(0, answer, site="a")]))
    assert reasons(choice).get(0) == reason
    assert not diverse(first_person=True, references=True).choose(reached([row(0, answer, site="a")])).dropped


def test_groups_are_flattened_and_give_no_more_than_they_have():
    rows = numbered(111, site=["a"] * 100 + ["b"] * 10 + ["c"])
    choice = diverse(rows=20).choose(reached(rows))
    kept = Counter(rows[i].meta["site"] for i in stays(choice, 111))
    assert kept == {"a": 13, "b": 6, "c": 1}
    assert choice.facts["groups"]["a"] == {"fit": 100, "kept": 13}
    assert sum(kept.values()) == 20
    assert not diverse(rows=500).choose(reached(rows)).dropped


def test_votes_decide_within_a_group():
    rows = numbered(6, site=["a"] * 5 + [None], votes=[12, 30, 9, 10, None, 50])
    choice = diverse(rows=2, score="meta.votes").choose(reached(rows))
    assert reasons(choice) == {2: "low_score", 3: "not_sampled", 4: "no_score", 5: "no_group"}


# --- curriculum ----------------------------------------------------------------------------------------------------


def test_competence():
    found = [competence(t / 1000) for t in (0, 100, 250, 500, 1000, 2000)]
    assert found == pytest.approx([0.01, 0.31637, 0.500075, 0.707142, 1, 1], abs=1e-5)


@pytest.mark.parametrize(
    ("pacing", "shares"),
    [
        ("linear", [0.2, 0.4, 0.6, 1, 1]),
        ("root", [0.2, 0.6, 0.765685, 1, 1]),
        ("quadratic", [0.2, 0.25, 0.4, 1, 1]),
        ("exponential", [0.2, 0.200406, 0.205354, 1, 1]),
        ("logarithmic", [0.2, 0.889111, 0.944555, 1, 1]),
        ("step", [0.2, 0.2, 0.2, 1, 1]),
    ],
)
def test_pacing_functions(pacing, shares):
    found = [admitted(pacing, t / 1000, 0.2, 0.8) for t in (0, 200, 400, 800, 1000)]
    assert found == pytest.approx(shares, abs=1e-5)


@given(
    st.sampled_from(["competence", "linear", "root", "quadratic", "exponential", "logarithmic", "step"]),
    st.floats(0.01, 1),
    st.floats(0.05, 1),
)
def test_pacing_grows_to_one(pacing, start, full):
    shares = [admitted(pacing, t / 50, start, full) for t in range(51)]
    assert shares == sorted(shares)
    assert shares[0] == pytest.approx(start)
    assert shares[-1] == 1.0


def test_ranks_and_stages():
    assert percentile_ranks([5, 1, 5, 9]) == [0.75, 0.25, 0.75, 1.0]
    assert percentile_ranks([]) == []
    assert [stage_of(u, [0.5, 0.7, 1.0]) for u in (0.1, 0.5, 0.51, 0.7, 1.0)] == [0, 0, 1, 1, 2]


def curriculum_of(rows: list[Record], seed: int = 0, **more: Any) -> tuple[list[dict[str, Any]], Any]:
    choice = made(type="curriculum", **more).choose(reached(rows, seed=seed))
    assert not choice.dropped
    return [choice.meta[i]["curriculum"] for i in range(len(rows))], choice.facts


def test_stages_are_in_the_order_of_difficulty_and_every_row_is_seen():
    values = random.Random(0).sample(range(1000), 100)
    rows = numbered(100, d=values)
    found, facts = curriculum_of(rows, difficulty="meta.d", stages=5)
    ordered = sorted(found, key=lambda c: c["order"])
    assert [c["order"] for c in ordered] == list(range(100))
    for earlier, later in itertools.pairwise(ordered):
        assert earlier["stage"] <= later["stage"]
        assert earlier["stage"] == later["stage"] or earlier["rank"] < later["rank"]
    by_stage = [[c["difficulty"] for c in found if c["stage"] == s] for s in range(5)]
    assert all(max(a) < min(b) for a, b in itertools.pairwise(by_stage))
    assert any(ordered[i]["difficulty"] > ordered[i + 1]["difficulty"] for i in range(10)), "no order inside a stage"
    assert facts["stages"] == [len(s) for s in by_stage]
    assert sum(facts["stages"]) == 100
    assert facts["admitted"] == pytest.approx([competence(s / 5) for s in range(1, 6)], abs=1e-6)
    for s in range(5):
        assert sum(facts["stages"][: s + 1]) == math.floor(100 * competence((s + 1) / 5) + 1e-9)


def test_the_controls():
    rows = numbered(100, d=list(range(100)))
    anti, _ = curriculum_of(rows, difficulty="meta.d", mode="anti", stages=4)
    assert min(c["difficulty"] for c in anti if c["stage"] == 0) > max(c["difficulty"] for c in anti if c["stage"] == 3)
    mixed, _ = curriculum_of(rows, difficulty="meta.d", mode="random", stages=4)
    first = [c["difficulty"] for c in mixed if c["stage"] == 0]
    assert 30 < sum(first) / len(first) < 70
    assert {c["difficulty"] for c in mixed} == set(range(100))


def test_rows_without_a_difficulty_come_last_and_are_told():
    found, facts = curriculum_of(numbered(4, d=[3, None, 1, "x"]), difficulty="meta.d", stages=3, pacing="linear")
    assert [(c["stage"], c["difficulty"], c["rank"]) for c in found] == [
        (2, 3.0, 1.0),
        (2, None, None),
        (1, 1.0, 0.5),
        (2, None, None),
    ]
    assert facts["unranked"] == 2


# --- in the stage --------------------------------------------------------------------------------------------------


def curate(root: Any, filters: list[dict[str, Any]], rows: list[dict[str, Any]], **more: Any) -> Artifact:
    file = root / "in.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    inputs = [{"source": {"type": "file", "path": str(file)}}]
    job = validate(CurateJob, {"name": "run", "inputs": inputs, "filters": filters, **more}, "x")
    return stage.run(job, RunStore(str(root), "run"), "curate", EngineHost(), Progress(quiet=True))


ROWS = [
    {"instruction": "name a colour of the sky", "output": "blue is the colour", "stars": 3},
    {"instruction": "name a colour of the sky!", "output": "Blue is the colour.", "stars": 5},
    {"instruction": "count the legs of a spider", "output": "eight", "stars": 4},
    {"instruction": "translate bonjour", "output": "good day to you", "stars": 1},
]


def test_set_filters_run_in_a_job_without_ray(tmp_path, monkeypatch):
    monkeypatch.setattr(stage.cluster, "connect", lambda *_: pytest.fail("Ray was touched"))
    filters = [
        {"type": "semantic_dedup", "order": "best"},
        {"type": "select", "strategy": "score", "by": "meta.stars", "rows": 2},
        {"type": "curriculum", "stages": 2},
    ]
    artifact = curate(tmp_path, filters, ROWS)
    assert artifact.manifest["funnel"]["rejected"] == {"not_selected": 1, "semantic_duplicate": 1}
    kept = {r["key"]: json.loads(r["meta"]) for r in artifact.folder.read_table("kept").to_pylist()}
    assert set(kept) == {"in:0:0", "in:2:0"}
    assert kept["in:2:0"]["curriculum"]["difficulty"] == 5
    assert kept["in:2:0"]["stars"] == 4
    rejected = {r["key"]: r for r in artifact.folder.read_table("rejected").to_pylist()}
    assert rejected["in:1:0"]["duplicate_of"] == "in:0:0"
    facts = {f["filter"]: f for f in artifact.manifest["filters"]}
    assert facts["semantic_dedup"] == {
        "filter": "semantic_dedup",
        "ended": 1,
        "reached": 4,
        "compared": 4,
        "clusters": 1,
    }
    assert (facts["select"]["reached"], facts["curriculum"]["stages"]) == (3, [1, 1])


def test_the_order_of_the_rows_decides_nothing(tmp_path):
    rows = [row(i, f"w{i % 7} w{i % 5} w{i % 3}", f"ask {i % 11} of {i % 4}", d=i % 9) for i in range(80)]
    filters = [
        {"type": "semantic_dedup", "clusters": 3, "epsilon": 0.2},
        {"type": "select", "strategy": "k_center", "share": 0.7, "clusters": 2},
        {"type": "curriculum", "difficulty": "meta.d"},
    ]
    published = []
    for seed in (1, 2):
        random.Random(seed).shuffle(rows)
        folder = tmp_path / str(seed)
        folder.mkdir()
        pq.write_table(records_table(rows), folder / "in.parquet")
        inputs = [{"source": {"type": "file", "path": str(folder / "in.parquet")}}]
        job = validate(CurateJob, {"name": "run", "inputs": inputs, "filters": filters}, "x")
        artifact = stage.run(job, RunStore(str(folder), "run"), "curate", EngineHost(), Progress(quiet=True))
        published.append([artifact.folder.read_table(n).to_pylist() for n in ("kept", "rejected")])
    assert len(published[0][0]) > 5
    assert len(published[0][1]) > 5
    assert json.dumps(published[0], default=str) == json.dumps(published[1], default=str)


@pytest.mark.parametrize(
    ("filters", "error", "message"),
    [
        ([{"type": "select", "strategy": "score", "by": "score.judge", "rows": 1}], ConfigError, "no filter before it"),
        ([{"type": "curriculum", "difficulty": "meta.starz"}], DataError, r"needs meta.starz"),
        (
            [
                {"type": "human_rating"},
                {"type": "select", "strategy": "score", "by": "score.human_ratin", "rows": 1},
            ],
            ConfigError,
            "did you mean 'human_rating'",
        ),
    ],
)
def test_a_reference_to_nothing_is_told_before_anything_runs(tmp_path, filters, error, message):
    with pytest.raises(error, match=message):
        curate(tmp_path, filters, [{**r, "ratings": [3]} for r in ROWS])


def test_deita_takes_its_scores_from_judges(tmp_path, monkeypatch):
    """Two judges that keep every row, then their product; a reply without a score is none, not a 3."""
    monkeypatch.setattr(stage.cluster, "connect", lambda *_: None)

    class Rater:
        async def generate(self, messages: Any, *, key: str, sampling: Any = None, n: int = 1) -> Completion:
            asked = messages[-1]["content"]
            complexity = "[Answer" not in asked
            hard = next(str(6 - i) for i, r in enumerate(ROWS) if r["instruction"] in asked)
            said = hard if complexity else "no idea" if "eight" in asked else "2"
            return Completion(id=key, samples=(Sample(text=said, token_ids=(1,), finish_reason="stop"),))

    host: Any = SimpleNamespace(
        pool=lambda _: SimpleNamespace(client=SimpleNamespace(llm=lambda *_: Rater())), leave=lambda *_: None
    )
    judge = {"type": "judge", "judge": {"model": {"path": "m"}}, "scale": [1, 6], "threshold": 1, "planted": 0}
    filters = [
        {**judge, "template": "complexity", "dimension": "complexity"},
        {**judge, "dimension": "quality", "max_parse_fail": 0.5},
        {"type": "deita", "complexity": "score.judge_1", "quality": "score.judge_2", "rows": 2},
    ]
    file = tmp_path / "in.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in ROWS))
    inputs = [{"source": {"type": "file", "path": str(file)}}]
    job = validate(CurateJob, {"name": "run", "inputs": inputs, "filters": filters}, "x")
    artifact = stage.run(job, RunStore(str(tmp_path), "run"), "curate", host, Progress(quiet=True))
    kept = {r["key"]: r["score_deita"] for r in artifact.folder.read_table("kept").to_pylist()}
    assert kept == {"in:0:0": 12.0, "in:3:0": 6.0}
    assert artifact.manifest["funnel"]["rejected"] == {"no_score": 1, "similar": 1}
