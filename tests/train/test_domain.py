"""Objective domain against closed forms of plain transformers: its terms, where it starts, what beta holds, and that
the division of the work does not move it."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from oracle import assert_same, gradients
from ranks import run_ranks
from torch.nn.functional import kl_div
from transformers import AutoModelForCausalLM

from itune_ray.data.batches import Batch, collate, model_inputs
from itune_ray.data.order import PackedTable
from itune_ray.data.records import REPLAYED, Record
from itune_ray.errors import ModelError
from itune_ray.model.logprobs import TokenScores, install_fused_head
from itune_ray.train.documents import GENERAL, SEGMENTS
from itune_ray.train.loop import train_local, train_rank
from itune_ray.train.metrics import read_metrics
from itune_ray.train.objectives import build_objective
from itune_ray.train.objectives.domain import BASE_IDS, BASE_LOG_PROBS
from itune_ray.train.prepare import prepare_locally

V = len(tiny.tokenizer())
"""Words of the tiny model."""
PART = {"source": {"type": "playground", "split": "chat", "rows": 1}}
HELD_OUT = {"validation": {"data": [PART], "every_steps": 2}}


def domain_job(folder: Path, **overrides: Any) -> Any:
    """`alpha`, `beta` and `k` are the objective's."""
    objective = {"type": "domain", "beta": 0.5, "k": 8}
    objective |= {name: overrides.pop(name) for name in ("alpha", "beta", "k", "supervise") if name in overrides}
    return tiny.job(folder, objective=objective, replay={"data": [PART]}, **{"batch": 8, "steps": 4, **overrides})


def rows(count: int, every: int = 3) -> list[Record]:
    """Chats, every so manieth of which is a general one."""
    made = tiny.chats(count)
    return [replace(row, meta={"replayed": "tiny"}) if row.position % every == 0 else row for row in made]


def loaded(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    install_fused_head(model)
    return model


def scored(model: Any, batch: Batch, asked: Any) -> TokenScores:
    inputs = model_inputs(batch, "mask_4d", model.dtype)
    return model(**inputs, labels=batch.labels, token_scores=True, **asked)


def batch_of(job: Any, records: list[Record], stage: Path) -> Batch:
    """The first step's rows as one micro-batch."""
    return collate(PackedTable(prepare_locally(job, records, str(stage)).folder).rows(0), pad_id=0)


def general_of(batch: Batch) -> torch.Tensor:
    """Whether each supervised token is of a general row, row by row and token by token."""
    starts = torch.tensor([0, *batch.num_segments]).cumsum(0)
    found = [
        bool(batch.columns[GENERAL][starts[row] + batch.segments[row, place]])
        for row in range(len(batch.labels))
        for place in range(1, batch.labels.shape[1])
        if batch.labels[row, place] != -100
    ]
    return torch.tensor(found)


def with_base(objective: Any, model: Any, batch: Batch) -> Batch:
    """The batch with what a model says of it."""
    with torch.no_grad():
        scores = scored(model, batch, objective.head_inputs(batch))
    general = general_of(batch)
    columns = {BASE_IDS: scores.ids[general].flatten().int(), BASE_LOG_PROBS: scores.at[general].flatten()}
    return replace(batch, columns={**batch.columns, **columns})


def ours(objective: Any, model: Any, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """(loss, its terms, each divided by its units)."""
    loss, units = objective(scored(model, batch, objective.head_inputs(batch)), batch), objective.units(batch)
    terms = {name: total / max(units[name], 1) for name, total in loss.terms.items()}
    return sum((c * terms[name] for name, c in objective.coefficients.items()), torch.zeros(())), terms


def dense(model: Any, batch: Batch) -> torch.Tensor:
    """Log-probabilities [N, V] at the supervised tokens, from the model's own logits."""
    logits = model(**model_inputs(batch, "mask_4d", model.dtype)).logits[:, :-1]
    return logits[batch.labels[:, 1:] != -100].log_softmax(-1)


def moved(folder: Path, epsilon: float, dtype: torch.dtype = torch.float32) -> Any:
    """The model, each weight by epsilon times a fixed direction."""
    model = loaded(folder, dtype)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter += epsilon * direction.to(dtype)
    return model


# --- the formula ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", [False, True])
def test_with_the_whole_vocabulary_it_is_the_closed_form_with_its_gradient(folder, tmp_path, packing):
    """fp64, every term from the logits of two models."""
    job = domain_job(folder, alpha=0.7, beta=0.5, k=V, packing=packing)
    objective, batch = build_objective(job.objective), batch_of(job, rows(8), tmp_path)
    base, model = loaded(folder, torch.float64), moved(folder, 0.03, torch.float64)
    total, terms = ours(objective, model, with_base(objective, base, batch))
    total.backward()
    mine = float(total.detach()), gradients(model)

    model.zero_grad()
    general, log_q = general_of(batch), dense(model, batch)
    nll = -log_q.gather(-1, batch.labels[:, 1:][batch.labels[:, 1:] != -100][:, None])[:, 0]
    kl = kl_div(log_q, dense(base, batch).detach(), log_target=True, reduction="none").sum(-1)
    expected = {"general": nll[general].mean(), "domain": nll[~general].mean(), "kl": kl[general].mean()}
    for name, value in expected.items():
        assert float(terms[name].detach()) == pytest.approx(float(value.detach()), rel=1e-5), name
    whole = expected["general"] + 0.7 * expected["domain"] + 0.5 * expected["kl"]
    whole.backward()
    assert_same(mine, (float(whole.detach()), gradients(model)), rtol=1e-5)


def test_a_smaller_k_bounds_the_divergence_from_below(folder, tmp_path):
    found = []
    for k in (1, 8, 64, V):
        job = domain_job(folder, k=k)
        objective, batch = build_objective(job.objective), batch_of(job, rows(8), tmp_path / str(k))
        _, terms = ours(objective, moved(folder, 0.03), with_base(objective, loaded(folder), batch))
        found.append(float(terms["kl"].detach()))
    assert 0 < found[0] < found[1] < found[2] < found[3]


@pytest.mark.parametrize("k", [8, V])
def test_at_the_base_the_divergence_and_its_gradient_are_0(folder, tmp_path, k):
    job = domain_job(folder, k=k)
    objective, model = build_objective(job.objective), loaded(folder)
    batch = with_base(objective, model, batch_of(job, rows(8), tmp_path))
    _, terms = ours(objective, model, batch)
    assert float(terms["kl"].detach()) == pytest.approx(0, abs=1e-6)
    terms["kl"].backward()
    assert max(float(g.abs().max()) for g in gradients(model).values()) <= 1e-6


def test_near_the_base_the_divergence_grows_as_the_square(folder, tmp_path):
    job = domain_job(folder, k=20)
    objective = build_objective(job.objective)
    batch = with_base(objective, loaded(folder, torch.float64), batch_of(job, rows(8), tmp_path))
    ratios = []
    for epsilon in (4e-3, 2e-3, 1e-3):
        _, terms = ours(objective, moved(folder, epsilon, torch.float64), batch)
        ratios.append(float(terms["kl"].detach()) / epsilon**2)
    assert ratios == pytest.approx([ratios[-1]] * 3, rel=0.05)


def test_without_beta_it_is_sft_on_each_part(folder, tmp_path):
    records = rows(12)
    job = domain_job(folder, alpha=0.7, beta=0, batch=12)
    objective, model = build_objective(job.objective), loaded(folder)
    assert objective.needs == ()
    total, _ = ours(objective, model, batch_of(job, records, tmp_path / "both"))
    total.backward()
    mine = float(total.detach()), gradients(model)

    model.zero_grad()
    whole = torch.zeros(())
    for name, weight in (("general", 1.0), ("domain", 0.7)):
        part = [row for row in records if ("replayed" in row.meta) == (name == "general")]
        sft = tiny.job(folder, batch=len(part), steps=1)
        loss, _ = ours(build_objective(sft.objective), model, batch_of(sft, part, tmp_path / name))
        whole = whole + weight * loss
    whole.backward()
    assert_same(mine, (float(whole.detach()), gradients(model)))


@pytest.mark.parametrize("every", [1, 100], ids=["only general", "next to none general"])
def test_a_batch_of_one_kind_has_no_term_of_the_other(folder, tmp_path, every):
    job = domain_job(folder)
    objective, model = build_objective(job.objective), loaded(folder)
    records = [row for row in rows(9, every) if every == 1 or "replayed" not in row.meta]
    batch = with_base(objective, model, batch_of(job, records, tmp_path))
    missing = {"domain"} if every == 1 else {"general", "kl"}
    units = objective.units(batch)
    assert {name for name, count in units.items() if not count} == missing
    total, terms = ours(objective, moved(folder, 0.03), batch)
    total.backward()
    assert math.isfinite(float(total.detach()))
    assert all(float(terms[name].detach()) == 0 for name in missing)


def test_of_domain_tokens_no_gradient_comes_from_the_divergence(folder, tmp_path):
    """Not even from what fills their places: exactly 0."""
    job = domain_job(folder, k=V)
    objective, model = build_objective(job.objective), moved(folder, 0.03)
    batch = with_base(objective, loaded(folder), batch_of(job, rows(8), tmp_path))
    scores = scored(model, batch, objective.head_inputs(batch))
    grad_at, grad_tail = torch.autograd.grad(objective(scores, batch).terms["kl"], [scores.at, scores.tail])
    general = general_of(batch)
    assert bool((grad_at[~general] == 0).all())
    assert bool((grad_tail[~general] == 0).all())
    assert bool(torch.isfinite(grad_at).all())
    assert bool((grad_at[general] != 0).any())


def test_the_dummy_of_a_rank_without_rows_is_0_and_connected(folder):
    objective, model = build_objective(domain_job(folder).objective), loaded(folder)
    dummy = collate([], pad_id=0)
    total, _ = ours(objective, model, dummy)
    assert set(objective.units(dummy).values()) == {0}
    total.backward()
    assert all(not gradient.any() for gradient in gradients(model).values())
    assert gradients(model)


@pytest.mark.parametrize("bias", [False, True], ids=["matrix", "module"])
def test_the_head_names_the_likeliest_tokens(bias):
    from itune_ray.model.logprobs import LogitTransform, score_tokens

    torch.manual_seed(0)
    head, hidden, targets = torch.nn.Linear(12, 30, bias=bias), torch.randn(7, 12, requires_grad=True), torch.arange(7)
    transform = LogitTransform(0.5, 4.0)
    scores = score_tokens(hidden, targets, head, transform, top_k=5)
    top = transform(head(hidden)).log_softmax(-1).topk(5)
    assert torch.equal(scores.ids, top.indices)
    torch.testing.assert_close(scores.at, top.values)
    given = score_tokens(hidden, targets, head, transform, ids=top.indices)
    assert given.ids is None
    wanted = torch.autograd.grad(given.at.sum() + given.tail.sum(), hidden)[0]
    torch.testing.assert_close(torch.autograd.grad(scores.at.sum() + scores.tail.sum(), hidden)[0], wanted)
    with pytest.raises(ModelError, match=r"got 31; allowed: at most 30.*objective\.k"):
        score_tokens(hidden, targets, head, transform, top_k=31)


# --- in the loop ---------------------------------------------------------------------------------------------------


def test_rows_become_documents_that_say_what_is_general(folder, tmp_path):
    job = domain_job(folder, packing=True, batch=9)
    batch = batch_of(job, rows(9), tmp_path)
    keys = [key for row in batch.keys for key in row]
    assert batch.columns[SEGMENTS].tolist() == [1] * 9
    assert batch.columns[GENERAL].tolist() == [int(int(key.split(":")[1]) % 3 == 0) for key in keys]


DIVISIONS = {
    "plain": {},
    "packed": {"packing": True},
    "micro-batches": {"micro_batch": 2},
    "fsdp2": {"strategy": {"type": "fsdp2"}, "packing": True, "micro_batch": 1},
    "two ranks": {"strategy": {"type": "ddp"}},
    "two ranks, fsdp2": {"strategy": {"type": "fsdp2"}, "packing": True, "micro_batch": 1},
    "two ranks, zero3": {"strategy": {"type": "deepspeed", "stage": 3, "persist_below": 0}},
}


def finish(cases: list[tuple[Any, str]]) -> None:
    for job, stage in cases:
        train_rank(job, prepare_locally(job, [], stage), stage)


def figures(stage: Path) -> list[list[float]]:
    names = ("loss", "grad_norm", "domain_loss", "kl")
    return [[row[name] for name in names if name in row] for row in read_metrics(str(stage))]


@pytest.mark.real
def test_how_the_work_is_divided_does_not_move_it(folder, tmp_path):
    """Two ranks have a step of one row too, and so a rank without any."""
    records, apart, found = rows(16, every=2), [], {}
    for name, settings in DIVISIONS.items():
        job = domain_job(folder, steps=2, **settings)
        if name.startswith("two"):
            prepare_locally(job, records, str(tmp_path / name))
            apart.append((job, str(tmp_path / name)))
        else:
            train_local(job, records, str(tmp_path / name))
    alone = domain_job(folder, steps=2, batch=1)
    lone = domain_job(folder, steps=2, batch=1, strategy={"type": "fsdp2"})
    train_local(alone, rows(1), str(tmp_path / "alone"))
    prepare_locally(lone, rows(1), str(tmp_path / "lone"))
    run_ranks(2, finish, [*apart, (lone, str(tmp_path / "lone"))], timeout=120)
    for name in DIVISIONS:
        found[name] = figures(tmp_path / name)
        torch.testing.assert_close(found[name], found["plain"], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    one, other = ([(r["loss"], r["grad_norm"]) for r in read_metrics(str(tmp_path / n))] for n in ("alone", "lone"))
    torch.testing.assert_close(other, one, rtol=1e-5, atol=0)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_an_interrupted_run_is_the_uninterrupted_one_bit_for_bit(folder, tmp_path, strategy):
    settings = {"packing": True, "micro_batch": 1, "checkpoint": {"every_steps": 2}, "optimizer.lr": 3e-3}
    job, records = domain_job(folder, strategy={"type": strategy}, **settings, **HELD_OUT), rows(30)

    def stop(done: int, total: int, row: dict[str, Any]) -> None:
        if done == 3:
            raise Killed

    train_local(job, records, str(tmp_path / "whole"), held_out=rows(12))
    with pytest.raises(Killed):
        train_local(job, records, str(tmp_path / "parts"), stop, held_out=rows(12))
    written = (tmp_path / "parts/reference/part-00000.parquet").stat().st_mtime_ns
    train_local(job, records, str(tmp_path / "parts"), held_out=rows(12))
    assert (tmp_path / "parts/reference/part-00000.parquet").stat().st_mtime_ns == written
    assert figures(tmp_path / "parts") == figures(tmp_path / "whole")
    one, other = ((tmp_path / name / "validation.jsonl").read_text() for name in ("whole", "parts"))
    assert one == other


def test_rows_that_change_from_general_to_the_domains_are_another_reference(folder, tmp_path):
    """The same documents in the same order."""
    shared = str(tmp_path / "references")

    def first_kl(name, records):
        job, stage = domain_job(folder, steps=1, batch=20), str(tmp_path / name)
        train_rank(job, prepare_locally(job, records, stage), stage, references=shared)
        return abs(read_metrics(stage)[0]["kl"])

    def swapped(record):
        meta = {k: v for k, v in record.meta.items() if k != REPLAYED}
        return replace(record, meta=meta if REPLAYED in record.meta else {**meta, REPLAYED: "general"})

    assert first_kl("one", rows(20)) < 1e-6
    assert first_kl("other", [swapped(record) for record in rows(20)]) < 1e-6
    assert len(list((tmp_path / "references").iterdir())) == 2


def test_a_reference_of_another_identity_is_made_anew(folder, tmp_path):
    job = domain_job(folder, steps=2)
    train_local(job, rows(20), str(tmp_path), stop_at=1)
    marker = tmp_path / "reference/complete.json"
    kept = json.loads(marker.read_text())
    marker.write_text(json.dumps({**kept, "identity": "another"}))
    train_local(job, rows(20), str(tmp_path))
    assert json.loads(marker.read_text()) == kept


def test_a_large_beta_freezes_general_predictions(folder, tmp_path):
    """Divergence from the base on the general rows after training."""
    found = {}
    for beta in (1e-9, 100.0):
        settings = {"optimizer.lr": 1e-3, "schedule": {"type": "linear", "warmup": 0.0}}
        job = domain_job(folder, beta=beta, steps=30, batch=20, **settings, **HELD_OUT)
        train_local(job, rows(20), str(tmp_path / str(beta)), held_out=rows(20))
        found[beta] = read_metrics(str(tmp_path / str(beta)), "validation.jsonl")[-1]
    assert found[100.0]["kl"] < 0.1 * found[1e-9]["kl"]
    assert found[100.0]["general_loss"] > found[1e-9]["general_loss"]


def test_held_out_rows_report_both_losses(folder, tmp_path):
    for name, held_out in {"both": rows(12), "domain": [row for row in rows(12) if not row.meta]}.items():
        job = domain_job(folder, steps=2, batch=30, **{"optimizer.lr": 3e-3}, **HELD_OUT)
        train_local(job, rows(30), str(tmp_path / name), held_out=held_out)
        first, *_, last = read_metrics(str(tmp_path / name), "validation.jsonl")
        assert last["domain_loss"] < first["domain_loss"]
        if name == "both":
            assert first["kl"] == pytest.approx(0, abs=1e-6)
            assert last["kl"] > 0
            assert last["general_loss"] < first["general_loss"]
            loss = last["domain_loss"] + last["general_loss"] + 0.5 * last["kl"]
            assert last["loss"] == pytest.approx(loss)
        else:
            assert not {"general_loss", "kl"} & last.keys()
            assert last["loss"] == pytest.approx(last["domain_loss"])


def test_steps_of_one_kind_go_on(folder, tmp_path):
    job = domain_job(folder, steps=12, batch=1)
    train_local(job, rows(12), str(tmp_path))
    taken = read_metrics(str(tmp_path))
    assert {"general_loss" in row for row in taken} == {"domain_loss" in row for row in taken} == {False, True}
    assert all(("general_loss" in row) == (row["units"]["general"] > 0) for row in taken)


# --- what is refused -----------------------------------------------------------------------------------------------


def test_it_needs_general_rows(folder):
    with pytest.raises(ValueError, match="name these in `replay`"):
        tiny.job(folder, objective={"type": "domain"})


def test_reptile_and_images_do_not_go_with_it(folder):
    with pytest.raises(ValueError, match="reptile takes one task at a time"):
        domain_job(folder, reptile={})
    with pytest.raises(ValueError, match="images go with"):
        domain_job(folder, images={})


def test_more_tokens_than_the_vocabulary_has_are_one_line(folder, tmp_path):
    with pytest.raises(ModelError) as told:
        train_local(domain_job(folder, k=V + 1), rows(8), str(tmp_path))
    assert "\n" not in str(told.value)
    assert f"got {V + 1}; allowed: at most {V}" in str(told.value)
    assert "`objective.k`" in str(told.value)
