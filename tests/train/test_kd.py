"""Objective kd against closed forms, torch and known answers; the rows it takes and refuses."""

import functools
import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch.nn.functional import kl_div

from itune_ray.config.objectives import KdConfig
from itune_ray.data.batches import Batch
from itune_ray.data.chat import ChatRenderer
from itune_ray.data.records import Record, TopK
from itune_ray.errors import TrainError
from itune_ray.model.logprobs import LogitTransform, TokenScores, score_tokens
from itune_ray.train.documents import TEACHER_IDS, TEACHER_LOG_PROBS, DocumentError, documents_for
from itune_ray.train.objectives.kd import Kd, tail_bucket_jsd, tail_bucket_kl, tail_bucket_reverse_kl

N, H, V = 7, 12, 30


def pieces(k: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(seed)
    hidden, weight = torch.randn(N, H, dtype=dtype), torch.randn(V, H, dtype=dtype)
    teacher = torch.randn(N, V, dtype=dtype).mul(2).log_softmax(-1)
    top = teacher.topk(k)
    return hidden.requires_grad_(), weight.requires_grad_(), teacher, top.values, top.indices


def head(weight: torch.Tensor) -> torch.nn.Linear:
    made = torch.nn.Linear(H, V, bias=False, dtype=weight.dtype)
    made.weight = torch.nn.Parameter(weight.detach().clone())
    return made


class Wrapped(torch.nn.Module):
    """A head that is more than a matrix."""

    def __init__(self, inner: torch.nn.Linear):
        super().__init__()
        self.inner, self.weight = inner, inner.weight

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.inner(hidden)


@pytest.mark.parametrize("k", [1, 5, V - 1])
@pytest.mark.parametrize("wrapped", [False, True], ids=["matrix", "module"])
@pytest.mark.parametrize("transform", [LogitTransform(), LogitTransform(0.5, 4.0)], ids=["plain", "scaled and capped"])
def test_scores_at_given_tokens_equal_the_dense_ones_with_their_gradients(k, wrapped, transform):
    hidden, weight, _, _, ids = pieces(k, dtype=torch.float32)
    targets, linear = torch.arange(N), head(weight)
    scores = score_tokens(hidden, targets, Wrapped(linear) if wrapped else linear, transform, ids)
    dense = transform(hidden.detach().requires_grad_() @ linear.weight.T)
    log_p = dense.log_softmax(-1)
    at, tail = log_p.gather(-1, ids), log_p.scatter(-1, ids, -math.inf).logsumexp(-1)
    torch.testing.assert_close(scores.at, at, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scores.tail, tail, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scores.log_probs, log_p.gather(-1, targets[:, None])[:, 0], rtol=1e-5, atol=1e-5)

    def total(at: torch.Tensor, tail: torch.Tensor) -> torch.Tensor:
        return (at * torch.arange(1.0, k + 1)).sum() + (tail * torch.linspace(-1, 2, N)).sum()

    got = torch.autograd.grad(total(scores.at, scores.tail), [hidden, linear.weight])
    fresh = hidden.detach().requires_grad_()
    log_p = transform(fresh @ linear.weight.T).log_softmax(-1)
    wanted = torch.autograd.grad(
        total(log_p.gather(-1, ids), log_p.scatter(-1, ids, -math.inf).logsumexp(-1)), [fresh, linear.weight]
    )
    for mine, theirs in zip(got, wanted, strict=True):
        assert float((mine - theirs).abs().max()) < 1e-5 * float(theirs.abs().max())


@pytest.mark.parametrize(
    ("k", "kl"), [(3, 0.0851229), (2, 0.0851229), (1, 0.7 * math.log(0.7 / 0.5) + 0.3 * math.log(0.3 / 0.5))]
)
def test_known_answers(k, kl):
    p, q = torch.tensor([[0.7, 0.2, 0.1]]).double(), torch.tensor([[0.5, 0.3, 0.2]]).double()
    tail = (1 - q[:, :k].sum(-1)).clamp(min=0).log()
    assert float(tail_bucket_kl(p[:, :k].log(), q[:, :k].log(), tail)) == pytest.approx(kl, abs=1e-7)


def student_scores(k: int) -> tuple[torch.Tensor, torch.Tensor, TokenScores, torch.Tensor]:
    hidden, weight, teacher, top, ids = pieces(k)
    logits = (hidden @ weight.T).requires_grad_()
    log_q = logits.log_softmax(-1)
    tail = log_q.scatter(-1, ids, -math.inf).logsumexp(-1)
    tail = tail.detach() if k == V else tail  # the gradient of a sum over nothing
    scores = TokenScores(log_q[:, 0], log_q[:, 0], log_q.gather(-1, ids), tail)
    return logits, teacher, scores, top


def test_with_the_whole_vocabulary_it_is_torchs_divergence_and_gradient():
    logits, teacher, scores, top = student_scores(V)
    mine = tail_bucket_kl(top, scores.at, scores.tail).sum()
    theirs = kl_div(logits.log_softmax(-1), teacher, log_target=True, reduction="sum")
    assert float(mine.detach()) == pytest.approx(float(theirs.detach()), rel=1e-9)
    (a,), (b,) = torch.autograd.grad(mine, [logits], retain_graph=True), torch.autograd.grad(theirs, [logits])
    torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(b, logits.softmax(-1) - teacher.exp())


def test_it_bounds_the_divergence_from_below_and_grows_with_k():
    values = []
    for k in range(1, V + 1):
        _, _, scores, top = student_scores(k)
        values.append(float(tail_bucket_kl(top, scores.at, scores.tail).sum()))
    assert all(a <= b + 1e-9 for a, b in itertools.pairwise(values))
    assert values[0] < values[-1]


def test_teacher_and_student_alike_give_zero_and_no_gradient():
    hidden, weight, *_ = pieces(5)
    logits = (hidden @ weight.T).detach().requires_grad_()
    log_q = logits.log_softmax(-1)
    top = log_q.detach().topk(5)
    tail = log_q.scatter(-1, top.indices, -math.inf).logsumexp(-1)
    loss = tail_bucket_kl(top.values, log_q.gather(-1, top.indices), tail).sum()
    assert float(loss.detach()) == pytest.approx(0, abs=1e-12)
    (gradient,) = torch.autograd.grad(loss, [logits])
    assert float(gradient.abs().max()) < 1e-12


def test_equal_to_trls_divergence_at_its_forward_limit():
    """TRL's generalised Jensen-Shannon loss at beta 0 is KL(teacher || student)."""
    trl = pytest.importorskip("trl.experimental.gkd")
    logits, teacher, scores, top = student_scores(V)
    theirs = trl.GKDTrainer.generalized_jsd_loss(logits[None], teacher[None], beta=0.0, reduction="sum")
    mine = tail_bucket_kl(top, scores.at, scores.tail).sum()
    assert float(mine.detach()) == pytest.approx(float(theirs.detach()), rel=1e-6)


DIVERGENCES: dict[str, Any] = {
    "forward": tail_bucket_kl,
    "reverse": tail_bucket_reverse_kl,
    **{f"jsd {b}": functools.partial(tail_bucket_jsd, beta=b) for b in (0.1, 0.5, 0.9)},
}
MIXTURES = {"forward": 0.0, "reverse": 1.0, "jsd 0.1": 0.1, "jsd 0.5": 0.5, "jsd 0.9": 0.9}
"""Divergence -> TRL's beta."""


@pytest.mark.parametrize("name", DIVERGENCES)
def test_with_the_whole_vocabulary_it_is_trls_with_its_gradient(name):
    trl = pytest.importorskip("trl.experimental.gkd")
    logits, teacher, scores, top = student_scores(V)
    mine = DIVERGENCES[name](top, scores.at, scores.tail).sum()
    beta = MIXTURES[name]
    theirs = trl.GKDTrainer.generalized_jsd_loss(logits[None], teacher[None], beta=beta, reduction="sum")
    assert float(mine.detach()) == pytest.approx(float(theirs.detach()), rel=1e-10)
    (a,), (b,) = torch.autograd.grad(mine, [logits], retain_graph=True), torch.autograd.grad(theirs, [logits])
    torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_every_divergence_is_a_bound_that_grows_with_k(name):
    values = []
    for k in range(1, V + 1):
        _, _, scores, top = student_scores(k)
        values.append(float(DIVERGENCES[name](top, scores.at, scores.tail).sum()))
    assert all(a <= b + 1e-9 for a, b in itertools.pairwise(values))
    assert 0 < values[0] < values[-1]


@pytest.mark.parametrize("name", DIVERGENCES)
def test_alike_is_zero_and_without_gradient(name):
    hidden, weight, *_ = pieces(5)
    logits = (hidden @ weight.T).detach().requires_grad_()
    log_q = logits.log_softmax(-1)
    top = log_q.detach().topk(5)
    tail = log_q.scatter(-1, top.indices, -math.inf).logsumexp(-1)
    loss = DIVERGENCES[name](top.values, log_q.gather(-1, top.indices), tail).sum()
    assert float(loss.detach()) == pytest.approx(0, abs=1e-12)
    (gradient,) = torch.autograd.grad(loss, [logits])
    assert float(gradient.abs().max()) < 1e-12


def test_known_answers_of_the_other_divergences():
    """p = (0.7, 0.3) and q = (0.5, 0.5), one token stored."""
    p, q = (torch.tensor([[mass]], dtype=torch.float64) for mass in (0.7, 0.5))
    arguments = p.log(), q.log(), q[:, 0].log()
    reverse = 0.5 * math.log(0.5 / 0.7) + 0.5 * math.log(0.5 / 0.3)
    assert float(tail_bucket_reverse_kl(*arguments)) == pytest.approx(reverse, abs=1e-12)
    jsd = 0.5 * (
        0.7 * math.log(0.7 / 0.6) + 0.3 * math.log(0.3 / 0.4) + 0.5 * math.log(0.5 / 0.6) + 0.5 * math.log(5 / 4)
    )
    assert float(tail_bucket_jsd(*arguments, beta=0.5)) == pytest.approx(jsd, abs=1e-12)


def test_jsd_tends_to_either_side():
    _, _, scores, top = student_scores(5)
    arguments: Any = top, scores.at, scores.tail
    for beta, scale, limit in ((1e-8, 1e-8, tail_bucket_kl), (1 - 1e-8, 1e-8, tail_bucket_reverse_kl)):
        torch.testing.assert_close(tail_bucket_jsd(*arguments, beta=beta) / scale, limit(*arguments), rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_teacher_whose_rounded_masses_leave_no_tail_stays_finite(name):
    """fp16 log-probs may sum to more than 1."""
    log_p = torch.tensor([[0.75, 0.2501]]).double().log()
    logits = torch.zeros(1, 4, dtype=torch.float64, requires_grad=True)
    log_q = logits.log_softmax(-1)
    value = DIVERGENCES[name](log_p, log_q[:, :2], log_q[:, 2:].logsumexp(-1)).sum()
    (gradient,) = torch.autograd.grad(value, [logits])
    assert 0 < float(value.detach()) < 14
    assert bool(torch.isfinite(gradient).all())


def test_the_objective_takes_the_divergence_it_is_told():
    _, _, scores, top = student_scores(4)
    flat = torch.zeros(1, N + 1, dtype=torch.int64)
    columns = {TEACHER_IDS: pieces(4)[4].flatten().int(), TEACHER_LOG_PROBS: top.flatten()}
    batch = Batch(flat, flat, flat, flat, (1,), (("a:0:0",),), columns)
    for settings, name in (({}, "forward"), ({"divergence": "reverse"}, "reverse"), ({"divergence": "jsd"}, "jsd 0.5")):
        found = Kd(KdConfig.model_validate({"k": 4, **settings}))(scores, batch).terms["kl"]
        assert float(found.detach()) == pytest.approx(float(DIVERGENCES[name](top, scores.at, scores.tail).sum()))


def test_terms_and_units():
    _, _, scores, top = student_scores(4)
    labels = torch.zeros(1, N + 1, dtype=torch.int64)
    flat = torch.zeros(1, N + 1, dtype=torch.int64)
    columns = {TEACHER_IDS: pieces(4)[4].flatten().int(), TEACHER_LOG_PROBS: top.flatten().float()}
    batch = Batch(flat, labels, flat, flat, (1,), (("a:0:0",),), columns)
    kd = Kd(KdConfig(k=4, alpha=0.25))
    assert kd.units(batch) == {"kl": N, "nll": N}
    assert kd.head_inputs(batch)["score_ids"].shape == (N, 4)
    loss = kd(scores, batch)
    assert kd.coefficients == {"kl": 0.25, "nll": 0.75}
    assert float(loss.metrics["teacher_mass"].total) == pytest.approx(float(top.exp().sum()), rel=1e-6)
    assert float(loss.terms["nll"].detach()) == pytest.approx(float(-scores.log_probs.sum().detach()))


# --- rows ----------------------------------------------------------------------------------------------------------

WORDS = tiny.tokenizer()
RENDERER = ChatRenderer(WORDS)


def captured(record: Record, k: int = 3, **changes: Any) -> Record:
    """A row with made-up distributions."""
    ids, supervised = RENDERER.record_ids(record)
    positions = tuple(i for i, flag in enumerate(supervised) if flag and i > 0)
    shape = (len(positions), k)
    teacher = TopK(
        input_ids=tuple(ids),
        positions=positions,
        k=k,
        ids=np.arange(math.prod(shape)).astype("<i4").tobytes(),
        log_probs=np.full(shape, math.log(0.9 / k)).astype("<f2").tobytes(),
        tokenizer=RENDERER.vocabulary_hash,
    )
    return replace(record, teacher=replace(teacher, **changes))


def document(record: Record, **settings: Any) -> dict[str, Any]:
    job = tiny.job("any", objective={"type": "kd", "k": 2, **settings})
    return documents_for(job).document(record, job, RENDERER)


ROW = tiny.chat("apple river?", "stone cloud")


def test_a_row_survives_the_table_and_becomes_a_document():
    row = captured(ROW)
    assert Record.from_row(row.to_row()) == row
    made = document(row)
    count = len(row.teacher.positions)
    assert made[TEACHER_IDS].tolist() == [i for n in range(count) for i in (3 * n, 3 * n + 1)], "the likeliest 2 of 3"
    assert made[TEACHER_LOG_PROBS] == pytest.approx([math.log(0.3)] * 2 * count, rel=1e-3)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (ROW, "no_teacher"),
        (captured(ROW, k=1), "teacher_k"),
        (captured(ROW, input_ids=(1, 2, 3)), "template_mismatch"),
    ],
)
def test_rows_that_cannot_be_used_are_quarantined(row, reason):
    with pytest.raises(DocumentError) as error:
        document(row)
    assert error.value.reason == reason


def test_a_teacher_with_another_tokenizer_is_one_line():
    with pytest.raises(TrainError, match=r"the teacher has another tokenizer than the student; got 'vocabulary abc in"):
        document(captured(ROW, tokenizer="abc"))
