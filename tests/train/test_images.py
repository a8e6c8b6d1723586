"""Image-text models in the one loop: the loss of plain transformers, the stages of LLaVA, an exact resume."""

import base64
import io
from dataclasses import replace
from pathlib import Path

import architectures
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from PIL import Image
from pydantic import ValidationError
from ranks import STRATEGIES, run_ranks
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForImageTextToText, AutoProcessor

from itune_ray.config.shared import FileSource
from itune_ray.data.chat import ChatRenderer
from itune_ray.data.order import Order
from itune_ray.data.sources import read_source
from itune_ray.errors import ModelError, TrainError
from itune_ray.train.loop import train_local, train_rank
from itune_ray.train.metrics import read_metrics
from itune_ray.train.prepare import prepare_locally

BATCH = 6


@pytest.fixture(scope="module")
def seeing(tmp_path_factory):
    return architectures.llava(tmp_path_factory.mktemp("llava"))


def png(seed: int) -> bytes:
    """A picture of noise."""
    pixels = np.random.default_rng(seed).integers(0, 255, (40, 30, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def write_rows(folder, count=12):
    """A parquet file in which images are bytes, structs of bytes, or paths; every third row has two."""
    (folder / "red.png").write_bytes(png(99))
    rows = []
    for i, record in enumerate(tiny.chats(count)):
        kinds = [{"bytes": png(i), "path": None}, {"bytes": None, "path": str(folder / "red.png")}]
        rows.append(
            {"messages": [dict(m) for m in record.messages], "images": kinds if i % 3 == 0 else kinds[i % 2 :][:1]}
        )
    pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")
    return read_source(FileSource(path=str(folder / "rows.parquet"), name="seen")).records


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("rows"))


def job_of(folder, **overrides):
    settings = {"steps": 2, "batch": BATCH, "micro_batch": BATCH, "images": {"trained": "joint"}}
    return tiny.job(folder, **{**settings, **overrides})


def figures(stage):
    return [(row["loss"], row["grad_norm"]) for row in read_metrics(str(stage))]


def pictures(record):
    """The row's images, decoded by the test itself."""
    found = []
    for entry in record.meta["images"]:
        raw = Path(entry["path"]).read_bytes() if entry["path"] else base64.b64decode(entry["bytes"]["bytes"])
        found.append(Image.open(io.BytesIO(raw)).convert("RGB"))
    return found


def plain_loss(model, folder, records):
    """Mean cross entropy over the answers' tokens, each row alone through the processor and plain transformers."""
    processor = AutoProcessor.from_pretrained(folder)
    total, count = torch.zeros(()), 0
    for record in records:
        shown = pictures(record)
        parts = [{"type": "image"}] * len(shown)
        chat = [
            {"role": m["role"], "content": [*(parts if i == 0 else []), {"type": "text", "text": m["content"]}]}
            for i, m in enumerate(record.messages)
        ]
        text = processor.apply_chat_template(chat, tokenize=False)
        asked = processor.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
        inputs = processor(text=text, images=shown, return_tensors="pt", add_special_tokens=False)
        start = processor(text=asked, images=shown, return_tensors="pt", add_special_tokens=False)["input_ids"].shape[1]
        labels = inputs["input_ids"][0].clone()
        labels[:start] = -100
        labels[-1] = -100  # the line break after the end-of-turn token
        logits = model(**inputs).logits[0]
        total = total + cross_entropy(logits[:-1], labels[1:], ignore_index=-100, reduction="sum")
        count += int((labels[1:] != -100).sum())
    return total / count


def first_step(job, records):
    _, indices = next(Order([r.key for r in records], [1.0] * len(records), job.seed, BATCH).steps(None, 1))
    return [records[i] for i in indices]


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


def test_a_model_that_sees_nothing_is_refused(folder, records, tmp_path):
    with pytest.raises(ModelError, match="processor"):
        train_local(job_of(folder), records, str(tmp_path))


def test_images_of_a_job_are_part_of_what_it_is_where_there_are_any(seeing):
    assert "images" not in job_of(seeing, images=None).identity()
    assert job_of(seeing).identity()["images"] == {"trained": "joint"}


def test_a_placeholder_in_the_words_is_no_image(seeing, records):
    from itune_ray.data.chat import ControlTokens
    from itune_ray.model.load import load_tokenizer

    renderer = ChatRenderer(load_tokenizer(str(seeing)), sees=True)
    sly = replace(records[0], messages=({"role": "user", "content": "see <image>"}, records[0].messages[1]))
    with pytest.raises(ControlTokens):
        renderer.record_ids(sly)
