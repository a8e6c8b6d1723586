"""Survey eq. 9's vision and fusion terms: their closed forms, by plain transformers, in value and gradient; and that no
division of the work moves them."""

import math
from dataclasses import replace

import architectures
import numpy as np
import pictures
import pytest
import tiny
import torch
from pictures import BATCH, answer_loss, encoded, first_step, inputs_of, png, write_rows
from pydantic import ValidationError
from ranks import STRATEGIES, run_ranks
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

from itune_ray.config.objectives import SftConfig
from itune_ray.data.batches import collate
from itune_ray.data.order import PackedRow
from itune_ray.errors import ModelError
from itune_ray.model.images import exchanged
from itune_ray.model.logprobs import TokenScores, install_fused_head
from itune_ray.model.pooling import install_pooling
from itune_ray.train.image_terms import other_images
from itune_ray.train.loop import train_local, train_rank
from itune_ray.train.metrics import read_metrics
from itune_ray.train.objectives.image_text import ImageText, contrast
from itune_ray.train.prepare import prepare_locally

BOTH = {"type": "sft", "vision": 0.3, "fusion": 0.5}


def job_of(folder, **overrides):
    return pictures.job_of(folder, **{"objective": BOTH, **overrides})


def figures(stage):
    names = ("loss", "grad_norm", "text_loss", "vision_loss", "fusion_loss", "match_accuracy")
    return [[row[name] for name in names if name in row] for row in read_metrics(str(stage))]


def plain_terms(model, folder, records):
    """(L_text, L_vision, L_fusion) row by row and pair by pair, by the processor and plain transformers."""
    processor = AutoProcessor.from_pretrained(folder)
    words = model.get_input_embeddings()
    images, answers, own, others, count = [], [], [], [], 0
    for index, record in enumerate(records):
        shown = encoded(record)
        inputs, labels = inputs_of(processor, record, shown)
        features = model.model.get_image_features(pixel_values=inputs["pixel_values"]).pooler_output
        images.append(torch.cat([f.reshape(-1, f.shape[-1]) for f in features]).mean(0))
        answers.append(words(labels[labels != -100]).mean(0))
        nll, tokens = answer_loss(model, processor, record, shown)
        own.append(nll)
        count += tokens
        for step in range(1, len(records)):
            other = encoded(records[(index + step) % len(records)])
            other = (other * len(shown))[: len(shown)]
            if not set(other) & set(shown):
                break
        else:
            other = shown
        others.append(answer_loss(model, processor, record, other)[0])
    vision, fusion = torch.zeros(()), torch.zeros(())
    for i, x in enumerate(images):
        for j, y in enumerate(answers):
            z = 1.0 if i == j else -1.0
            vision = vision - torch.sigmoid(z * (10 * torch.cosine_similarity(x, y, dim=0) - 10)).log()
        fusion = fusion - torch.sigmoid(others[i] - own[i]).log()
    return sum(own) / count, vision / len(records), fusion / len(records)


@pytest.mark.parametrize(
    ("weights", "trained", "micro_batch"),
    [((0.3, 0.0), "joint", 2), ((0.0, 0.5), "joint", 6), ((0.3, 0.5), "joint", 1), ((0.3, 0.5), "projector", 4)],
)
def test_loss_and_gradient_are_the_closed_form(seeing, records, tmp_path, weights, trained, micro_batch):
    objective = {"type": "sft", "vision": weights[0], "fusion": weights[1]}
    job = job_of(seeing, steps=1, micro_batch=micro_batch, images={"trained": trained}, objective=objective)
    train_local(job, records, str(tmp_path))
    model = AutoModelForImageTextToText.from_pretrained(seeing, attn_implementation="eager")
    model.requires_grad_(False)
    for name, parameter in model.named_parameters():
        frozen = "multi_modal_projector" not in name if trained == "projector" else "vision_tower" in name
        parameter.requires_grad_(not frozen)
    text, vision, fusion = plain_terms(model, seeing, first_step(job, records))
    loss = text + weights[0] * vision + weights[1] * fusion
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    (row,) = read_metrics(str(tmp_path))
    assert row["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert row["grad_norm"] == pytest.approx(float(norm), rel=1e-4)
    assert row["text_loss"] == pytest.approx(text.item(), rel=1e-5)
    if weights[0]:
        assert row["vision_loss"] == pytest.approx(vision.item(), rel=1e-5)
    if weights[1]:
        assert row["fusion_loss"] == pytest.approx(fusion.item(), rel=1e-5)


def test_rows_laid_end_to_end_agree(seeing, records, tmp_path):
    """sdpa on CPU runs a micro-batch as one row: means are of documents, not of rows."""
    for attention in ("eager", "sdpa"):
        job = job_of(seeing, micro_batch=4, **{"model.attention": attention})
        train_local(job, records, str(tmp_path / attention))
    torch.testing.assert_close(figures(tmp_path / "sdpa"), figures(tmp_path / "eager"), rtol=2e-5, atol=0)


def test_contrast_of_orthogonal_pairs_and_its_gradient():
    """x_i = y_i = e_i: a pair's own logit is 10 - 10, any other's -10. The gradient is that of finite differences."""
    parts, _, _ = contrast(torch.eye(3), 2 * torch.eye(3))
    torch.testing.assert_close(
        parts, torch.full((3,), math.log(2) + 2 * math.log1p(math.exp(-10)), dtype=torch.float64)
    )
    torch.manual_seed(0)
    given = torch.randn(2, 5, 4, dtype=torch.float64)
    gradient = torch.stack(contrast(*given)[1:])
    along, eps = torch.randn_like(given), 1e-6
    ahead, behind = (contrast(*(given + sign * eps * along))[0].sum() for sign in (1, -1))
    torch.testing.assert_close((gradient * along).sum(), (ahead - behind) / (2 * eps), rtol=1e-7, atol=0)


def test_other_images_are_as_many_and_not_ones_own():
    rest = [[b"a"], [b"b", b"c"]]
    assert other_images([b"a"], rest) == [b"b"]
    assert other_images([b"d", b"e"], rest) == [b"a", b"a"]
    assert other_images([b"a"], [[b"a"], [b"a", b"c"]]) == [b"a"]
    assert other_images([b"a", b"b"], [[b"a"], [b"b", b"a"], [b"c", b"b"], [b"c"]]) == [b"c", b"c"]


def test_tokens_of_an_image_give_way_to_those_of_another():
    ids, flags = exchanged([1, 7, 7, 2, 7, 3], [False, False, False, True, False, True], [[7, 7], [7]], [[8], [9, 9]])
    assert ids == [1, 8, 2, 9, 9, 3]
    assert flags == [False, False, True, False, False, True]
    with pytest.raises(ModelError, match="not among those of its row"):
        exchanged([1, 7], [False, False], [[7, 7]], [[8]])


def test_answers_as_likely_with_either_image_count_log_2_and_pull_both_ways():
    row = PackedRow(np.array([5, 6, 7], np.int32), np.array([False, True, True]), np.array([3], np.int32), ("a",))
    batch = collate([row, row], 0)
    log_probs = torch.tensor([-1.5, -0.25, -1.5, -0.25], requires_grad=True)
    loss = ImageText(SftConfig(fusion=0.5))(TokenScores(log_probs, torch.zeros(4)), batch)
    assert loss.terms["fusion"].item() == pytest.approx(math.log(2), rel=1e-12)
    assert float(loss.metrics["match_accuracy"].total) == 0.5
    loss.terms["fusion"].backward()
    assert log_probs.grad is not None
    assert log_probs.grad.tolist() == [-0.5, -0.5, 0.5, 0.5]


def test_rows_that_all_show_one_image_have_no_fusion_gradient(seeing, tmp_path):
    (tmp_path / "one.png").write_bytes(png(5))
    same = [replace(r, meta={"images": [str(tmp_path / "one.png")]}) for r in tiny.chats(BATCH)]
    for name, objective in (("with", {"type": "sft", "fusion": 0.5}), ("without", {"type": "sft"})):
        train_local(job_of(seeing, steps=1, objective=objective), same, str(tmp_path / name))
    one, other = read_metrics(str(tmp_path / "with"))[0], read_metrics(str(tmp_path / "without"))[0]
    assert one["fusion_loss"] == pytest.approx(math.log(2), rel=1e-6)  # a row and its twin can be rounded otherwise
    assert one["loss"] == pytest.approx(other["loss"] + 0.5 * math.log(2), rel=1e-6)
    assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5)


def test_pictures_of_other_lengths_can_stand_in(tmp_path):
    """Idefics3 cuts pictures into tiles: a row with another's images has another length."""
    folder = architectures.idefics3(tmp_path / "idefics3")
    (tmp_path / "rows").mkdir()
    records = write_rows(tmp_path / "rows", sizes=((40, 30), (20, 60)))
    job = job_of(folder, steps=1, micro_batch=2, max_length=160, objective={"type": "sft", "fusion": 0.5})
    train_local(job, records, str(tmp_path / "stage"))
    model = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="eager")
    processor = AutoProcessor.from_pretrained(folder)
    rows = first_step(job, records)
    total = 0.0
    for i, record in enumerate(rows):
        shown = encoded(record)
        following = [encoded(rows[(i + k) % len(rows)]) for k in range(1, len(rows))]
        other = next(cut for o in following if (cut := (o * len(shown))[: len(shown)]) != shown)
        gap = answer_loss(model, processor, record, other)[0] - answer_loss(model, processor, record, shown)[0]
        total += math.log1p(math.exp(-gap.item()))
    assert read_metrics(str(tmp_path / "stage"))[0]["fusion_loss"] == pytest.approx(total / len(rows), rel=1e-4)


def test_held_out_rows_are_scored_by_the_whole_loss(seeing, records, tmp_path):
    """Held-out rows that are the training's own, before a step: the line is the first step's."""
    held_out = {"data": [{"source": {"type": "playground", "split": "chat", "rows": 1}}]}
    job = job_of(seeing, steps=1, batch=12, validation=held_out)
    train_local(job, records, str(tmp_path), held_out=records)
    first, _ = read_metrics(str(tmp_path), "validation.jsonl")
    row = read_metrics(str(tmp_path))[0]
    for name in ("loss", "text_loss", "vision_loss", "fusion_loss", "match_accuracy"):
        assert first[name] == pytest.approx(row[name], rel=1e-5)


def train_all(jobs):
    found = []
    for job, stage in jobs:
        train_rank(job, prepare_locally(job, [], stage), stage)
        found.append(figures(stage))
    return found


@pytest.mark.real
def test_strategies_and_ranks_agree_one_of_them_without_rows(seeing, records, tmp_path):
    """Three rows a step for two ranks, in micro-batches of one: the second rank runs a blank image at the end."""
    train_local(job_of(seeing, batch=3), records, str(tmp_path / "one"))
    jobs = []
    for name in STRATEGIES:
        job = job_of(seeing, batch=3, micro_batch=1, strategy=STRATEGIES[name])
        prepare_locally(job, records, str(tmp_path / name))
        jobs.append((job, str(tmp_path / name)))
    for name, found in zip(STRATEGIES, run_ranks(2, train_all, jobs)[0], strict=True):
        torch.testing.assert_close(
            found, figures(tmp_path / "one"), rtol=2e-5, atol=0, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"images": None}, "compare images: set images"),
        ({"batch": 1}, "set batch to 2 or more"),
        ({"model.peft": {"type": "lora"}}, "LoRA trains neither"),
    ],
)
def test_what_the_terms_need_is_told(seeing, overrides, message):
    with pytest.raises(ValidationError, match=message):
        job_of(seeing, **overrides)


def test_a_model_without_image_features_among_its_embeddings_is_refused(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    install_fused_head(model)
    install_pooling(model)
    ids = torch.tensor([[1, 5, 6]])
    with pytest.raises(ModelError, match="does not put image features among its word embeddings"):
        model(input_ids=ids, labels=ids, token_scores=True, pool_at=torch.zeros_like(ids))


def test_terms_are_part_of_what_a_job_is_where_there_are_any():
    assert SftConfig().identity() == {"type": "sft", "supervise": "assistant"}
    assert SftConfig(vision=0.1).identity() == {"type": "sft", "supervise": "assistant", "vision": 0.1}
