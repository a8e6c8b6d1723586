"""Mixtures of experts: the load-balancing loss is the undivided batch's, and LoRA says what it does with experts."""

import architectures
import pytest
import tiny
import torch
from ranks import STRATEGIES, run_ranks
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from itune_ray.data.chat import ChatRenderer
from itune_ray.errors import ModelError
from itune_ray.train import router, statistic
from itune_ray.train.loop import train_local, train_rank
from itune_ray.train.metrics import read_metrics
from itune_ray.train.prepare import prepare_locally

BATCH = 12
WEIGHT = 0.1
"""The tiny model's own router_aux_loss_coef."""
PLAIN = ("ddp", 1, BATCH, False)
"""Strategy, ranks, rows of a micro-batch, packing."""
LAYOUTS = [PLAIN, ("ddp", 1, 2, False), ("ddp", 1, 2, True), ("ddp", 2, 3, True), ("fsdp2", 2, 2, True)]
LAYOUTS += [("zero2", 2, 2, False), ("zero3", 2, 2, True)]


@pytest.fixture(scope="module")
def moe(tmp_path_factory):
    return architectures.family("qwen3_moe", tmp_path_factory.mktemp("moe"))


def job_of(folder, layout=PLAIN, **overrides):
    strategy, _, rows, packing = layout
    settings = {"steps": 2, "batch": BATCH, "packing": packing, "pack_length": 160, "micro_batch": rows}
    return tiny.job(folder, **{**settings, "strategy": STRATEGIES[strategy], **overrides})


def figures(stage):
    return [(row["loss"], row["grad_norm"], row["router_loss"]) for row in read_metrics(str(stage))]


def train_layouts(jobs):
    found = []
    for job, stage in jobs:
        train_rank(job, prepare_locally(job, [], stage), stage)
        found.append(figures(stage))
    return found


@pytest.fixture(scope="module")
def by_layout(moe, tmp_path_factory):
    """Layout -> (loss, gradient norm, router loss) of each step."""
    found = {}
    for world in (1, 2):
        layouts = [layout for layout in LAYOUTS if layout[1] == world]
        jobs = [(job_of(moe, layout), str(tmp_path_factory.mktemp("stage"))) for layout in layouts]
        for job, stage in jobs:
            prepare_locally(job, tiny.chats(BATCH), stage)
        found |= dict(zip(layouts, run_ranks(world, train_layouts, jobs)[0], strict=True))
    return found


@pytest.mark.real
@pytest.mark.parametrize("layout", LAYOUTS[1:], ids=str)
def test_layouts_agree(by_layout, layout):
    torch.testing.assert_close(by_layout[layout], by_layout[PLAIN], rtol=1e-5, atol=0)


@pytest.mark.real
def test_loss_and_gradient_are_those_of_transformers(by_layout, moe):
    """Cross entropy over all answers plus the coefficient times transformers' own load-balancing loss of all tokens."""
    model = AutoModelForCausalLM.from_pretrained(moe, attn_implementation="eager")
    renderer = ChatRenderer(tiny.tokenizer())
    total, count, layers = torch.zeros(()), 0, []
    for record in tiny.chats(BATCH):
        ids, supervised = renderer.training_ids(record.messages)
        labels = torch.tensor([i if on else -100 for i, on in zip(ids, supervised, strict=True)])
        out = model(torch.tensor([ids]), use_cache=False, output_router_logits=True)
        total = total + cross_entropy(out.logits[0, :-1], labels[1:], ignore_index=-100, reduction="sum")
        count += int((labels[1:] != -100).sum())
        layers.append(out.router_logits)
    balance = load_balancing_loss_func(tuple(torch.cat(parts) for parts in zip(*layers, strict=True)), 4, 2)
    mean = total / count + WEIGHT * balance
    mean.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    loss, grad_norm, router_loss = by_layout[PLAIN][0]
    assert loss == pytest.approx(mean.item(), rel=1e-5)
    assert grad_norm == pytest.approx(float(norm), rel=1e-5)
    assert router_loss == pytest.approx(balance.item(), rel=1e-5)
    assert balance.item() > 2.0  # k where experts are used alike


@pytest.mark.real
def test_counts_of_a_micro_batch_alone_are_caught(by_layout, moe, tmp_path, monkeypatch):
    def own_counts(batches, stepper):
        return [b for batch in batches for b in router.with_router_factors([batch], stepper)]

    monkeypatch.setattr(statistic, "with_router_factors", own_counts)
    train_local(job_of(moe, LAYOUTS[1]), tiny.chats(BATCH), str(tmp_path))
    assert figures(tmp_path)[0][1] != pytest.approx(by_layout[PLAIN][0][1], rel=1e-4)


def test_the_weight_is_the_jobs_where_it_gives_one(moe, tmp_path):
    for weight in (0.0, 0.7):
        train_local(job_of(moe, router_loss=weight, steps=1), tiny.chats(BATCH), str(tmp_path / str(weight)))
    (none,), (some,) = (read_metrics(str(tmp_path / str(weight))) for weight in (0.0, 0.7))
    assert "router_loss" not in none
    assert some["loss"] == pytest.approx(none["loss"] + 0.7 * some["router_loss"], rel=1e-6)


def test_a_dense_model_has_no_router_loss(folder, tmp_path):
    with pytest.raises(ModelError, match="needs a mixture of experts") as caught:
        train_local(job_of(folder, router_loss=0.1), tiny.chats(4), str(tmp_path))
    assert caught.value.knob == "router_loss"


def test_lora_leaves_fused_experts_alone_and_refuses_their_names(moe, tmp_path):
    job = job_of(moe, **{"model.peft": {"type": "lora", "rank": 4}})
    report = train_local(job, tiny.chats(BATCH), str(tmp_path / "all")).parameters
    assert {matrix.name.rpartition(".")[2] for matrix in report.matrices} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    named = job_of(moe, **{"model.peft": {"type": "lora", "rank": 4, "target": ["q_proj", "gate_proj"]}})
    with pytest.raises(ModelError, match="experts are one tensor per layer") as caught:
        train_local(named, tiny.chats(BATCH), str(tmp_path / "named"))
    assert "all-linear or some of k_proj, lm_head, o_proj, q_proj, v_proj" in str(caught.value)


def test_a_target_without_a_layer_is_refused_beside_ones_that_have_some(folder, tmp_path):
    job = job_of(folder, **{"model.peft": {"type": "lora", "rank": 4, "target": ["q_proj", "g_proj"]}})
    with pytest.raises(ModelError, match="no layer of this name; got 'g_proj'") as caught:
        train_local(job, tiny.chats(BATCH), str(tmp_path))
    assert caught.value.knob == "model.peft.target"


def test_an_unset_weight_is_no_part_of_what_a_training_is(moe):
    assert "router_loss" not in job_of(moe).identity()
    assert job_of(moe, router_loss=0.1).identity()["router_loss"] == 0.1


@pytest.mark.parametrize("method", ["prompt_tuning", "prefix_tuning"])
def test_virtual_tokens_do_not_count(moe, tmp_path, method):
    """A trained prompt changes the routing, but not how many places are counted: the loss stays near k."""
    job = job_of(moe, steps=1, **{"model.peft": {"type": method, "tokens": 5}})
    train_local(job, tiny.chats(BATCH), str(tmp_path))
    assert 2.0 < read_metrics(str(tmp_path))[0]["router_loss"] < 4.0
