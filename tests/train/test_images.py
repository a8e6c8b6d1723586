"""Image-text models in the one loop: the loss of plain transformers, the stages of LLaVA, an exact resume."""

import json
import re
from dataclasses import replace

import pytest
import tiny
import torch
from pictures import first_step, job_of, plain_loss
from pydantic import ValidationError
from ranks import STRATEGIES, run_ranks
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from itune_ray.config.gate import GateConfig
from itune_ray.data.chat import ChatRenderer
from itune_ray.data.order import PackedTable
from itune_ray.errors import ModelError, TrainError
from itune_ray.model.export import export_trained
from itune_ray.model.gate import ExportRefusedError, gap, scores_of
from itune_ray.model.images import ImageReader
from itune_ray.train.gate import gate_documents, read_report
from itune_ray.train.loop import train_local, train_rank
from itune_ray.train.metrics import read_metrics
from itune_ray.train.pictured import images_of_row
from itune_ray.train.prepare import prepare_locally
from itune_ray.train.preview import preview


def figures(stage):
    return [(row["loss"], row["grad_norm"]) for row in read_metrics(str(stage))]


def test_loss_and_gradient_are_those_of_transformers(seeing, records, tmp_path):
    job = job_of(seeing, micro_batch=2)
    train_local(job, records, str(tmp_path))
    model = AutoModelForImageTextToText.from_pretrained(seeing, attn_implementation="eager")
    model.model.vision_tower.requires_grad_(False)
    loss = plain_loss(model, seeing, first_step(job, records))
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    assert figures(tmp_path)[0] == (pytest.approx(loss.item(), rel=1e-5), pytest.approx(float(norm), rel=1e-4))


def test_the_images_matter(seeing, records, tmp_path):
    other = [
        replace(r, meta={"images": [{"bytes": None, "path": records[1].meta["images"][0]["path"]}] * 2})
        for r in records
    ]
    assert records[0].content_hash != other[0].content_hash
    for name, rows in (("own", records[::3]), ("other", other[::3])):
        train_local(job_of(seeing, steps=1), rows, str(tmp_path / name))
    assert figures(tmp_path / "own")[0][0] != pytest.approx(figures(tmp_path / "other")[0][0], rel=1e-4)


def changed(before, after):
    """Modules below the model whose tensors differ between two folders."""
    one, two = (load_file(folder / "model.safetensors") for folder in (before, after))
    assert one.keys() == two.keys()
    return {name.removeprefix("model.").partition(".")[0] for name in one if not torch.equal(one[name], two[name])}


def test_the_projector_stage_trains_four_tensors_and_nothing_else(seeing, records, tmp_path):
    done = train_local(job_of(seeing, images={"trained": "projector"}), records, str(tmp_path))
    assert changed(seeing, tmp_path / "model") == {"multi_modal_projector"}
    sizes = {n: t.numel() for n, t in load_file(seeing / "model.safetensors").items() if "multi_modal" in n}
    assert len(sizes) == 4
    assert done.parameters.trainable == sum(sizes.values())


def test_the_joint_stage_leaves_the_vision_tower_and_opens_again(seeing, records, tmp_path):
    job = job_of(seeing, optimizer={"type": "adamw", "lr": 0.01})
    train_local(job, records, str(tmp_path))
    assert changed(seeing, tmp_path / "model") == {"multi_modal_projector", "language_model"}
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    train_local(job_of(tmp_path / "model", steps=1), records, str(tmp_path / "more"))
    loss = plain_loss(again, tmp_path / "model", first_step(job, records))
    assert figures(tmp_path / "more")[0][0] == pytest.approx(loss.item(), rel=1e-5)


def test_lora_adapts_the_language_model_alone(seeing, records, tmp_path):
    peft = {"type": "lora", "rank": 4}
    done = train_local(job_of(seeing, **{"model.peft": peft, "optimizer.lr": 0.01}), records, str(tmp_path))
    assert {m.name.partition(".layers.")[0] for m in done.parameters.matrices} == {"model.language_model"}
    assert changed(seeing, tmp_path / "model") == {"language_model"}


GATED = {"gate": {"prompts": 4, "longest": 8}, "optimizer": {"type": "adamw", "lr": 0.01}}
"""A longest that would cut through an image's tokens."""


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("settings", "routes"),
    [
        ({"images": {"trained": "projector"}}, {"merged"}),
        ({"model.peft": {"type": "lora", "rank": 4}}, {"adapter", "merged"}),
    ],
    ids=["projector", "lora"],
)
def test_what_is_written_says_of_images_what_was_trained(seeing, records, tmp_path, settings, routes, precision):
    train_local(job_of(seeing, **settings, **GATED, precision=precision), records, str(tmp_path))
    report = read_report(str(tmp_path))
    assert report.gaps.keys() == routes
    assert max(report.gaps.values()) < (1e-5 if precision == "fp32" else 0.02)
    base = AutoModelForImageTextToText.from_pretrained(seeing, attn_implementation="eager")
    reader = ImageReader(str(seeing))
    rows = gate_documents(PackedTable(str(tmp_path / "order")), GateConfig(**GATED["gate"]))
    assert [row.input_ids.tolist() for row in rows] == report.documents
    shown = [reader.inputs(images_of_row(row)) for row in rows]
    assert gap(scores_of(base, report.documents, shown), report.trained) > 0.001, "training moved nothing"


def test_an_export_that_forgot_the_projector_is_refused(seeing, records, tmp_path, monkeypatch):
    def forgetful(model, *args, **kwargs):
        for name, tensor in model.named_parameters():
            if "multi_modal_projector" in name:
                tensor.data.add_(0.05)
        return export_trained(model, *args, **kwargs)

    monkeypatch.setattr("itune_ray.train.loop.export_trained", forgetful)
    with pytest.raises(ExportRefusedError, match=r"\(merged\) does not say what was trained"):
        train_local(job_of(seeing, images={"trained": "projector"}, **GATED), records, str(tmp_path))
    assert not (tmp_path / "model").exists()


def test_a_resumed_run_is_the_uninterrupted_one(seeing, records, tmp_path):
    job = job_of(seeing, steps=4)
    train_local(job, records, str(tmp_path / "whole"))
    train_local(job, records, str(tmp_path / "halves"), stop_at=2)
    train_local(job, [], str(tmp_path / "halves"))
    assert figures(tmp_path / "halves") == figures(tmp_path / "whole")
    one, two = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "halves"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def train_all(jobs):
    found = []
    for job, stage in jobs:
        train_rank(job, prepare_locally(job, [], stage), stage)
        found.append(figures(stage))
    return found


@pytest.mark.real
def test_strategies_and_ranks_agree_one_of_them_without_rows(seeing, records, tmp_path):
    """Three rows a step for two ranks, in micro-batches of one: the second rank runs a blank image at the end."""
    one = job_of(seeing, batch=3)
    train_local(one, records, str(tmp_path / "one"))
    jobs = []
    for name in STRATEGIES:
        job = job_of(seeing, batch=3, micro_batch=1, strategy=STRATEGIES[name])
        prepare_locally(job, records, str(tmp_path / name))
        jobs.append((job, str(tmp_path / name)))
    for name, found in zip(STRATEGIES, run_ranks(2, train_all, jobs)[0], strict=True):
        torch.testing.assert_close(
            found, figures(tmp_path / "one"), rtol=2e-5, atol=0, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_rows_that_show_nothing_are_rejected_with_their_reason(seeing, records, tmp_path):
    rows = [
        *records[:3],
        replace(records[3], meta={}),
        replace(records[4], meta={"images": [{"bytes": "bm8gcGljdHVyZQ=="}]}),
        replace(records[5], meta={"images": ["/nowhere/a.png"]}),
    ]
    job = job_of(seeing, steps=1)
    assert prepare_locally(job, rows, str(tmp_path / "some")).rejected == {"bad_image": 2, "no_image": 1}
    with pytest.raises(TrainError, match="every one is rejected as no_image"):
        prepare_locally(job, tiny.chats(3), str(tmp_path / "none"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"packing": True}, "images go without packing"),
        ({"objective": {"type": "dpo"}}, "objective.type=sft alone"),
        ({"model.peft": {"type": "prompt_tuning"}}, "model.peft.type full or lora"),
        ({"model.peft": {"type": "lora"}, "images": {"trained": "projector"}}, "set model.peft.type=full"),
    ],
)
def test_what_does_not_go_with_images_is_refused(seeing, overrides, message):
    with pytest.raises(ValidationError, match=message):
        job_of(seeing, **overrides)


def test_the_sample_of_a_dry_run_shows_an_images_tokens_as_one(seeing, records, tmp_path):
    rows = [
        {"messages": list(r.messages), "images": [i["path"] for i in r.meta["images"] if i["path"]] * 2}
        for r in records[:1]
    ]
    rows.append({"messages": list(records[1].messages)})
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    job = job_of(seeing, data=[{"source": {"type": "file", "path": str(tmp_path / "rows.jsonl")}}])
    shown, refused = "\n".join(preview(job, colour=False)).split("\n--- ")[1:]
    assert len(re.findall(r"<image> × \d+ ", shown)) == len(rows[0]["images"])
    assert shown.count("<image>") == len(rows[0]["images"])
    assert "rejected as no_image" in refused


def test_a_model_that_sees_nothing_is_refused(folder, records, tmp_path):
    with pytest.raises(ModelError, match="processor"):
        train_local(job_of(folder), records, str(tmp_path))


def test_images_of_a_job_are_part_of_what_it_is_where_there_are_any(seeing):
    assert "images" not in job_of(seeing, images=None).identity()
    assert job_of(seeing).identity()["images"] == {"trained": "joint"}


def test_a_placeholder_in_the_words_is_no_image(seeing, records):
    from itune_ray.data.chat import ControlTokens
    from itune_ray.model.tokenizer import load_tokenizer

    renderer = ChatRenderer(load_tokenizer(str(seeing)), sees=True)
    sly = replace(records[0], messages=({"role": "user", "content": "see <image>"}, records[0].messages[1]))
    with pytest.raises(ControlTokens):
        renderer.record_ids(sly)
