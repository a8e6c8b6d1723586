import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from itune_ray.config.optimizer import AdamwConfig, MuonConfig, ScheduleConfig
from itune_ray.errors import TrainError
from itune_ray.train.loop import train_local
from itune_ray.train.metrics import read_metrics
from itune_ray.train.optimizer import build_optimizers
from itune_ray.train.schedule import lr_factor


def test_muon_takes_hidden_matrices_and_adamw_the_rest(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    muon, adamw = build_optimizers(model, MuonConfig(lr=0.02)).optimizers
    names = {id(p): n for n, p in model.named_parameters()}
    by_muon = {names[id(p)] for g in muon.param_groups for p in g["params"]}
    by_adamw = {names[id(p)] for g in adamw.param_groups for p in g["params"]}
    assert by_muon | by_adamw == set(names.values())
    assert not by_muon & by_adamw
    assert all("proj" in name for name in by_muon)
    assert "model.embed_tokens.weight" in by_adamw
    assert adamw.param_groups[0]["lr"] == 3e-3


def test_weight_decay_spares_vectors(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    (adamw,) = build_optimizers(model, AdamwConfig(weight_decay=0.1)).optimizers
    for group in adamw.param_groups:
        assert {p.ndim >= 2 for p in group["params"]} == {group["weight_decay"] == 0.1}


def test_nothing_to_train_is_refused(folder):
    model = AutoModelForCausalLM.from_pretrained(folder).requires_grad_(False)
    with pytest.raises(TrainError, match="no trainable parameter"):
        build_optimizers(model, AdamwConfig())


def test_schedules():
    def factors(total=10, **settings):
        return [lr_factor(ScheduleConfig(**settings), step, total) for step in range(total)]

    linear = factors(type="linear", warmup=0.2)
    assert linear[:2] == [0.5, 1.0]
    assert linear[2:] == pytest.approx([1 - (i + 1) / 8 for i in range(8)])
    cosine = factors(type="cosine", warmup=0.0, final=0.1)
    assert cosine[-1] == pytest.approx(0.1)
    assert cosine == sorted(cosine, reverse=True)
    assert cosine[4] == pytest.approx(0.55)
    assert factors(type="constant", warmup=0.2) == [0.5, 1.0, *[1.0] * 8]
    assert min(factors(type="cosine", warmup=1.0)) > 0


def test_muon_learns_a_tiny_task(folder, tmp_path):
    records = [tiny.chat(word, word.upper(), position=i) for i, word in enumerate(tiny.WORDS)]
    job = tiny.job(
        folder,
        steps=30,
        batch=12,
        optimizer={"type": "muon"},
        precision="bf16",
        schedule={"type": "linear", "warmup": 0.0},
    )
    train_local(job, records, str(tmp_path))
    losses = [row["loss"] for row in read_metrics(str(tmp_path))]
    assert losses[-1] < 0.2 * losses[0]


def test_a_loss_that_is_not_finite_stops_the_run(folder, tmp_path):
    job = tiny.job(folder, steps=5, optimizer={"type": "adamw", "lr": 1e30}, clip_norm=None)
    with pytest.raises(TrainError, match=r"not finite at step 2.*optimizer\.lr"):
        train_local(job, tiny.chats(20), str(tmp_path))
    assert not torch.is_autocast_enabled("cpu")
