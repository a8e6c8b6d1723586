"""The loss and its gradient do not depend on how the work is divided."""

import itertools
import time

import pytest
import tiny
import torch
from ranks import STRATEGIES, run_ranks
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from itune_ray.data.chat import ChatRenderer
from itune_ray.data.order import Order
from itune_ray.train.loop import train_local, train_rank
from itune_ray.train.metrics import read_metrics
from itune_ray.train.prepare import prepare_locally
from itune_ray.train.step import Stepper

pytestmark = pytest.mark.real
BATCH = 16
PLAIN = ("ddp", 1, 1, False)
"""One process, one micro-batch, nothing packed: what every other division must equal."""
OBJECTIVES = {
    "sft": ({"type": "sft"}, tiny.chats),
    "dpo": ({"type": "dpo", "beta": 0.3, "nll": 0.5}, tiny.pairs),
    "kd": ({"type": "kd", "k": 4, "alpha": 0.7}, tiny.distributions),
}
"""Name -> `objective` of a job, and its rows."""
MORE = {
    "robust": ({"type": "robust", "beta": 0.3}, tiny.pairs),
    "ipo": ({"type": "ipo"}, tiny.pairs),
    "simpo": ({"type": "simpo"}, tiny.pairs),
    "rrhf": ({"type": "rrhf"}, tiny.ranked),
    "kd jsd": ({"type": "kd", "k": 4, "divergence": "jsd"}, tiny.distributions),
    "kd reverse": ({"type": "kd", "k": 4, "divergence": "reverse"}, tiny.distributions),
    "orpo": ({"type": "orpo", "weight": 0.5}, tiny.pairs),
}
"""Objectives that share their machinery with those above: fewer divisions each."""
ALL = OBJECTIVES | MORE | {"reward": ({"type": "reward", "center": 0.1}, tiny.pairs)}
"""`test_reward` divides the work of the last in fewer ways too."""
DIVISIONS = list(itertools.product(STRATEGIES, (1, 2), (1, 4), (False, True)))
CASES = [
    (objective, strategy, world, accumulation, packing)
    for objective, strategy, world, accumulation in itertools.product(OBJECTIVES, STRATEGIES, (1, 2), (1, 4))
    for packing in ((False, True) if objective == "sft" else (accumulation == 4,))
    if objective == "sft" or strategy != "zero1"
]
CASES += [(name, *PLAIN) for name in MORE]
CASES += [(name, *division) for name, division in itertools.product(MORE, (("ddp", 1, 4, True), ("fsdp2", 2, 1, True)))]
CASES.append(("kd reverse", "fsdp2", 2, 4, False))
STEADY = {"type": "adamw", "lr": 1e-3, "eps": 1e-5}
"""Adam's first step divides a gradient by its own size, also one that is mere rounding: a reward's second loss shows
it."""


def job_of(folder, objective, strategy, world, accumulation, packing, **overrides):
    rows = 8 if packing else BATCH  # packing roughly halves the rows of these documents
    config = ALL[objective][0]
    if config["type"] == "reward":
        overrides = {"optimizer": STEADY, **overrides}
    longest = tiny.job(folder, objective=config).longest_document
    return tiny.job(
        folder,
        steps=2,
        batch=BATCH,
        packing=packing,
        pack_length=max(160, longest),
        micro_batch=max(1, rows // (world * accumulation)),
        **{"strategy": STRATEGIES[strategy], "objective": config, **overrides},
    )


def train_cases(cases):
    """On this rank: (loss, grad norm) of every step of every prepared case."""
    figures = []
    for job, stage in cases:
        train_rank(job, prepare_locally(job, [], stage), stage)
        figures.append([(row["loss"], row["grad_norm"]) for row in read_metrics(stage)])
    return figures


def figures_of(cases, folder, tmp_path_factory):
    """Case -> (loss, grad norm) per step; documents are very unequal."""
    prepared = {}
    for case in cases:
        stage = str(tmp_path_factory.mktemp("stage"))
        job, rows = job_of(folder, *case), ALL[case[0]][1]
        prepare_locally(job, rows(2 * BATCH), stage)
        prepared[case] = (job, stage)
    result = {}
    for world in (1, 2):
        chosen = [case for case in cases if case[2] == world]
        trained = run_ranks(world, train_cases, [prepared[case] for case in chosen])[0]
        result |= dict(zip(chosen, trained, strict=True))
    return result


@pytest.fixture(scope="module")
def figures(folder, tmp_path_factory):
    return figures_of(CASES, folder, tmp_path_factory)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_loss_and_gradient_norm_are_the_same_however_the_work_is_divided(figures, case):
    torch.testing.assert_close(figures[case], figures[case[0], *PLAIN], rtol=1e-5, atol=0)


@pytest.mark.soak
@pytest.mark.parametrize("objective", [name for name in ALL if name != "sft"])
def test_and_in_all_other_ways(folder, tmp_path_factory, objective):
    rest = [(objective, *d) for d in DIVISIONS if d == PLAIN or (objective, *d) not in CASES]
    found = figures_of(rest, folder, tmp_path_factory)
    for case in rest:
        torch.testing.assert_close(
            found[case], found[objective, *PLAIN], rtol=1e-5, atol=0, msg=lambda text, case=case: f"{case}: {text}"
        )


def test_the_loss_is_the_closed_form(figures, folder):
    """-(1/N) Σ log p over all supervised tokens of the batch, and the norm of its gradient, from plain transformers."""
    job = job_of(folder, "sft", *PLAIN)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    renderer = ChatRenderer(tiny.tokenizer())
    records = tiny.chats(2 * BATCH)
    _, first = next(Order([r.key for r in records], [1.0] * len(records), job.seed, BATCH).steps(None, 2))
    total, count = torch.zeros(()), 0
    for index in first:
        ids, supervised = renderer.training_ids(records[index].messages)
        labels = torch.tensor([i if on else -100 for i, on in zip(ids, supervised, strict=True)])
        logits = model(torch.tensor([ids]), use_cache=False).logits[0, :-1]
        total = total + cross_entropy(logits, labels[1:], ignore_index=-100, reduction="sum")
        count += int((labels[1:] != -100).sum())
    mean = total / count
    mean.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    loss, grad_norm = figures["sft", *PLAIN][0]
    assert loss == pytest.approx(mean.item(), rel=1e-5)
    assert grad_norm == pytest.approx(float(norm), rel=1e-5)


def test_a_mean_of_means_is_caught(figures, folder, tmp_path, monkeypatch):
    """Replace the global normaliser by each micro-batch's own: the figures above must not agree any more."""

    def mean_of_means(self, loss, units):
        own = {term: max(1.0, float(count)) for term, count in self.objective.units(self.last).items()}
        return sum(c * loss.terms[term] / own[term] for term, c in self.objective.coefficients.items()) / 4

    scores = Stepper.scores

    def remember(self, batch):
        object.__setattr__(self, "last", batch)
        return scores(self, batch)

    monkeypatch.setattr(Stepper, "_scaled", mean_of_means)
    monkeypatch.setattr(Stepper, "scores", remember)
    job = job_of(folder, "sft", "ddp", 1, 4, False)
    train_local(job, tiny.chats(2 * BATCH), str(tmp_path))
    wrong = [(row["loss"], row["grad_norm"]) for row in read_metrics(str(tmp_path))]
    assert wrong[0][0] == pytest.approx(figures["sft", *PLAIN][0][0], rel=1e-5)  # before any update
    assert wrong[0][1] != pytest.approx(figures["sft", *PLAIN][0][1], rel=1e-2)
    assert wrong[1][0] != pytest.approx(figures["sft", *PLAIN][1][0], rel=1e-5)


ALONE = [*itertools.product(OBJECTIVES, ("ddp", "fsdp2", "zero3")), *itertools.product(MORE, ("ddp", "fsdp2"))]


def test_a_rank_without_rows_neither_hangs_nor_counts(folder, tmp_path):
    """One document a step for two ranks, against one process by ddp."""
    jobs, one = [], []
    for objective, strategy in ALONE:
        config, rows = ALL[objective]
        settings = {"steps": 2, "batch": 1, "objective": config}
        stage = tmp_path / objective / strategy
        if strategy == "ddp":
            train_local(tiny.job(folder, **settings), rows(1), str(stage / "one"))
        one.append([(row["loss"], row["grad_norm"]) for row in read_metrics(str(tmp_path / objective / "ddp" / "one"))])
        jobs.append((tiny.job(folder, **settings, strategy=STRATEGIES[strategy]), str(stage / "two")))
        prepare_locally(jobs[-1][0], rows(1), jobs[-1][1])
    started = time.monotonic()
    (two, _) = run_ranks(2, train_cases, jobs, timeout=120)
    assert time.monotonic() - started < 120
    for case, found, expected in zip(ALONE, two, one, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0, msg=lambda text, case=case: f"{case}: {text}")


@pytest.mark.parametrize(
    "settings",
    [
        {"model.attention": "sdpa"},
        {"gradient_checkpointing": True},
        {"model.attention": "sdpa", "packing": True},
        {"strategy": {"type": "fsdp2", "reshard_after_forward": False}, "gradient_checkpointing": True},
    ],
    ids=str,
)
def test_kernels_and_recomputation_move_nothing_but_rounding(figures, folder, tmp_path, settings):
    job = tiny.job(folder, **{"steps": 2, "batch": BATCH, **settings})
    train_local(job, tiny.chats(2 * BATCH), str(tmp_path))
    got = [(row["loss"], row["grad_norm"]) for row in read_metrics(str(tmp_path))]
    torch.testing.assert_close(got, figures["sft", *PLAIN], rtol=1e-5, atol=0)
