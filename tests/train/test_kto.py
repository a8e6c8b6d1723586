"""KTO: against TRL's trainer and the closed form, its batch-wide z₀, and the rows it takes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from oracle import trl_steps
from ranks import STRATEGIES, run_ranks

from itune_ray.config.objectives import KtoConfig
from itune_ray.data.batches import Batch, collate
from itune_ray.data.order import PackedRow, PackedTable
from itune_ray.data.records import Record, row_seed
from itune_ray.model.logprobs import TokenScores
from itune_ray.train.documents import DESIRABLE, MISMATCHED, ROLE, SEGMENTS, UNDESIRABLE
from itune_ray.train.loop import train_local, train_rank
from itune_ray.train.metrics import read_metrics
from itune_ray.train.objectives.kto import Z0, Kto
from itune_ray.train.objectives.pairs import REFERENCE
from itune_ray.train.prepare import prepare_locally

KTO = {"type": "kto", "beta": 0.3, "desirable": 1.5, "undesirable": 0.7}


def rows(count: int) -> list[Record]:
    """Labelled chats and pairs in turn."""
    made = []
    for record in tiny.pairs(count):
        label = {"label": bool(record.position % 4)}
        made.append(record if record.position % 2 else replace(record, rejected=None, meta=label))
    return made


def kto_job(folder: Path, **overrides: Any) -> Any:
    settings = {"objective": KTO, "batch": 8, "steps": 3, "micro_batch": 3, "packing": True, "clip_norm": None}
    return tiny.job(folder, **{**settings, **overrides})


def segments_of(row: PackedRow) -> list[tuple[list[int], list[bool]]]:
    cuts = np.cumsum(row.lengths)[:-1]
    parts = zip(np.split(row.input_ids, cuts), np.split(row.supervised, cuts), strict=True)
    return [(ids.tolist(), flags.tolist()) for ids, flags in parts]


def by_key(folder: Path, stage: Path, records: list[Record], **overrides: Any) -> dict[str, PackedRow]:
    job = kto_job(folder, packing=False, batch=len(records), steps=1, **overrides)
    table = PackedTable(prepare_locally(job, records, str(stage)).folder)
    return {row.keys[0]: row for row in table.rows(0)}


def prompt_and_answer(ids: list[int], flags: list[bool]) -> tuple[list[int], list[int]]:
    return ids[: flags.index(True)], [i for i, flag in zip(ids, flags, strict=True) if flag]


def figures(stage: Path) -> list[tuple[float, float]]:
    return [(row["loss"], row["grad_norm"]) for row in read_metrics(str(stage))]


# --- documents -----------------------------------------------------------------------------------------------------


def test_pairs_are_split_and_every_prompt_meets_the_answers_of_the_next_row(folder, tmp_path):
    found = by_key(folder, tmp_path, rows(9))
    answers, mixed = {}, {}
    for key, row in found.items():
        parts = [prompt_and_answer(*segment) for segment in segments_of(row)]
        count = len(parts) // 2
        labels = [DESIRABLE, UNDESIRABLE] if count == 2 else [int(bool(int(key.split(":")[1]) % 4))]
        assert row.columns[ROLE].tolist() == [*labels, *[MISMATCHED] * count]
        assert row.columns[SEGMENTS].tolist() == [2 * count]
        assert [prompt for prompt, _ in parts[:count]] == [prompt for prompt, _ in parts[count:]]
        answers[key], mixed[key] = [a for _, a in parts[:count]], [a for _, a in parts[count:]]
    circle = sorted(found, key=lambda key: row_seed(0, "train.mismatch", key))
    for key, giver in zip(circle, [*circle[1:], circle[0]], strict=True):
        assert key != giver
        assert mixed[key] == [answers[giver][i % len(answers[giver])] for i in range(len(mixed[key]))]
    again = by_key(folder, tmp_path / "other order", rows(9)[::-1])
    assert all(again[key].input_ids.tolist() == row.input_ids.tolist() for key, row in found.items())


def test_a_foreign_answer_is_cut_to_max_length(folder, tmp_path):
    chats = [tiny.chat("apple", "river", position=0), tiny.chat("stone " * 60, "cloud", position=1)]
    long = replace(chats[0], messages=(chats[0].messages[0], {"role": "assistant", "content": "river " * 60}))
    found = by_key(folder, tmp_path, [replace(r, meta={"label": 1}) for r in (long, chats[1])])
    assert max(length for row in found.values() for length in row.lengths) == 128
    assert all(any(flags) for row in found.values() for _, flags in segments_of(row))


def test_rows_without_a_label_are_quarantined(folder, tmp_path):
    given = ({"label": True}, {"label": 0}, {}, {"label": "good"}, {"label": 2}, {"label": None})
    records = [replace(row, meta=meta) for row, meta in zip(tiny.chats(6), given, strict=True)]
    records.append(Record(source="tiny", position=9, text="apple river", meta={"label": True}))
    prepared = prepare_locally(kto_job(folder), records, str(tmp_path))
    assert (prepared.accepted, prepared.rejected) == (2, {"no_label": 5})


def test_another_field_may_hold_the_label(folder, tmp_path):
    records = [replace(row, meta={"thumbs": True}) for row in tiny.chats(2)]
    assert prepare_locally(kto_job(folder, objective={**KTO, "label": "thumbs"}), records, str(tmp_path)).accepted == 2


# --- loss ----------------------------------------------------------------------------------------------------------


def test_the_closed_form_with_its_gradient():
    """Four answers of two tokens each."""
    torch.manual_seed(0)
    log_probs = (-torch.rand(8)).requires_grad_()
    reference = -2 * torch.rand(4, dtype=torch.float64)
    segments = torch.arange(4).repeat_interleave(3)[None]
    labels = torch.ones(1, 12, dtype=torch.int64)
    labels[0, ::3] = -100
    roles = torch.tensor([1, 0, 0, 1])
    columns = {REFERENCE: reference, ROLE: roles, Z0: torch.tensor([0.4], dtype=torch.float64)}
    batch = Batch(labels, labels, labels, segments, (4,), (("a:0:0", "a:1:0"),), columns)
    kto = Kto(KtoConfig.model_validate(KTO))
    loss = kto(TokenScores(log_probs, log_probs), batch)
    delta = log_probs.double().view(4, 2).sum(-1) - reference
    good, bad = 1 - torch.sigmoid(0.3 * (delta - 0.4)), 1 - torch.sigmoid(0.3 * (0.4 - delta))
    expected = 1.5 * (good[0] + good[3]) + 0.7 * (bad[1] + bad[2])
    torch.testing.assert_close(loss.terms["kto"], expected)
    got, wanted = (torch.autograd.grad(total, log_probs)[0] for total in (loss.terms["kto"], expected))
    torch.testing.assert_close(got, wanted)
    assert kto.units(batch) == {"kto": 4, "desirable": 2, "undesirable": 2}
    assert float(loss.metrics["kl"].total) == pytest.approx(1.6)
    assert float(loss.metrics["reward_desirable"].total) == pytest.approx(0.3 * float((delta[0] + delta[3]).detach()))
    assert kto.from_mean(-0.2) == 0.0


def test_it_starts_at_half_the_weights_with_no_divergence(folder, tmp_path):
    records = rows(8)
    train_local(kto_job(folder, optimizer={"type": "adamw", "lr": 3e-3}, steps=8), records, str(tmp_path))
    first, *_, last = read_metrics(str(tmp_path))
    units = first["units"]
    assert units == {"kto": 12.0, "desirable": 6.0, "undesirable": 6.0}
    assert first["loss"] == pytest.approx(0.5 * (1.5 * 6 + 0.7 * 6) / 12, rel=1e-6)
    assert first["kl"] == pytest.approx(0, abs=1e-5)
    assert first["reward_accuracy"] == pytest.approx(0.5, abs=0.5)
    assert last["loss"] < first["loss"]
    assert last["reward_desirable"] > last["reward_undesirable"]


def test_four_steps_equal_trls_trainer(folder, tmp_path):
    """On the same answers and the same mismatched ones; z₀ is above 0 from some step on."""
    trl = pytest.importorskip("trl")

    class Prepared(trl.KTOTrainer):
        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

    records, data = rows(8), []
    for row in by_key(folder, tmp_path / "rows", records).values():
        parts = [prompt_and_answer(*segment) for segment in segments_of(row)]
        count = len(parts) // 2
        for index in range(count):
            data.append(
                {
                    "prompt_ids": parts[index][0],
                    "completion_ids": parts[index][1],
                    "KL_completion_ids": parts[count + index][1],
                    "label": bool(row.columns[ROLE][index]),
                }
            )
    settings = {"beta": 0.3, "desirable_weight": 1.5, "undesirable_weight": 0.7, "max_steps": 4, "learning_rate": 3e-3}
    theirs = trl_steps(Prepared, trl.KTOConfig, folder, tmp_path / "trl", data, **settings)
    job = kto_job(folder, steps=4, optimizer={"type": "adamw", "lr": 3e-3})
    train_local(job, records, str(tmp_path / "ours"))
    ours = read_metrics(str(tmp_path / "ours"))
    assert max(row["kl"] for row in ours) > 0.01
    assert [row["kl"] for row in ours] == pytest.approx([row["kl"] for row in theirs], rel=2e-3, abs=1e-4)
    for key in ("loss", "grad_norm"):
        assert [row[key] for row in ours] == pytest.approx([row[key] for row in theirs], rel=5e-4)


def train(job: Any, stage: str) -> list[tuple[float, float]]:
    train_rank(job, prepare_locally(job, [], stage), stage)
    return figures(Path(stage))


@pytest.mark.parametrize("overrides", [{}, {"micro_batch": 1}, {"packing": False, "micro_batch": 2}], ids=str)
def test_packing_and_micro_batches_move_neither_z0_nor_loss(folder, tmp_path, overrides):
    lr = {"optimizer": {"type": "adamw", "lr": 3e-3}, "steps": 4}
    train_local(kto_job(folder, packing=False, micro_batch=8, **lr), rows(16), str(tmp_path / "plain"))
    train_local(kto_job(folder, **lr, **overrides), rows(16), str(tmp_path / "other"))
    assert max(row["kl"] for row in read_metrics(str(tmp_path / "plain"))) > 0.01
    torch.testing.assert_close(figures(tmp_path / "other"), figures(tmp_path / "plain"), rtol=2e-5, atol=0)


@pytest.mark.real
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero3"])
def test_divided_work_gives_the_same_figures(folder, tmp_path, strategy):
    """One process and nothing packed, against two ranks, packed rows and one row a micro-batch; and one rank idle."""
    lr = {"optimizer": {"type": "adamw", "lr": 3e-3}, "steps": 4}
    for batch, count in ((8, 16), (1, 1)):
        one, two = tmp_path / f"one-{batch}", tmp_path / f"two-{batch}"
        train_local(kto_job(folder, batch=batch, packing=False, micro_batch=8, **lr), rows(count), str(one))
        job = kto_job(folder, batch=batch, micro_batch=1, strategy=STRATEGIES[strategy], **lr)
        prepare_locally(job, rows(count), str(two))
        (found, _) = run_ranks(2, train, job, str(two))
        torch.testing.assert_close(found, figures(one), rtol=2e-5, atol=1e-7)


def test_held_out_answers_of_one_kind_are_scored(folder, tmp_path):
    held_out = [replace(row, meta={"label": True}) for row in tiny.chats(20)[16:]]
    data = {"data": [{"source": {"type": "playground", "split": "chat", "rows": 1}}]}
    train_local(kto_job(folder, validation=data), rows(16), str(tmp_path), held_out=held_out)
    first, last = read_metrics(str(tmp_path), "validation.jsonl")
    assert first["loss"] == pytest.approx(0.75, rel=1e-6)
    assert first["n"] == 4
    assert "reward_desirable" in last
    assert "reward_undesirable" not in last
    assert last["low"] <= last["reward_accuracy"] <= last["high"]


def test_the_dummy_of_an_idle_rank_counts_nothing():
    batch = collate([], 0)
    kto = Kto(KtoConfig())
    scores = TokenScores(torch.zeros(0, requires_grad=True), torch.zeros(0))
    batch = replace(batch, columns={Z0: torch.zeros(1, dtype=torch.float64)})
    assert float(kto(scores, batch).terms["kto"].detach()) == 0
    assert set(kto.units(batch).values()) == {0}
    assert kto.measure(scores, batch)[1] == 0
