"""AdaLoRA's budget against PEFT's own allocator and its own formulas."""

import peft
import pytest
import tiny
import torch
from peft.tuners.adalora.layer import RankAllocator
from test_peft_methods import adapted, folder, scores  # noqa: F401

from itune_ray.model.peft.adalora import RankBudget

TOTAL = 20
SETTINGS = {"rank": 6, "target_rank": 2, "warmup": 0.1, "final": 0.3, "every_steps": 2}


def budgeted(folder):  # noqa: F811
    model = adapted(folder, "adalora", **SETTINGS).train()
    from methods import config

    return model, RankBudget(model, config("adalora", **SETTINGS))


def singular(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if ".lora_E." in n}


def test_every_step_is_that_of_pefts_allocator(folder):  # noqa: F811
    model, budget = budgeted(folder)
    oracle_model = adapted(folder, "adalora", **SETTINGS).train()
    settings = oracle_model.peft_config["default"]
    settings.total_step, settings.tinit, settings.tfinal, settings.deltaT = TOTAL, 2, 6, 2
    settings.beta1 = settings.beta2 = 0.85
    oracle_model.base_model.rankallocator = RankAllocator(oracle_model.base_model.model, settings, "default")
    optimizers = [
        torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=0.02) for m in (model, oracle_model)
    ]
    masked = []
    for step in range(1, TOTAL + 1):
        for m, optimizer in zip((model, oracle_model), optimizers, strict=True):
            (-scores(m).mean()).backward()
            optimizer.step()
        budget.allocate(step, TOTAL)
        if step != TOTAL - 6:
            oracle_model.base_model.update_and_allocate(step)
        else:  # PEFT cuts its tensors to size here, which changes the optimizer's parameters: only mask
            _, pattern = oracle_model.base_model.rankallocator.update_and_allocate(
                oracle_model.base_model.model, step, force_mask=True
            )
            settings.rank_pattern = pattern
        mine, theirs = singular(model), singular(oracle_model)
        assert all(torch.equal(mine[name], theirs[name]) for name in mine), step
        masked.append(sum(int((e == 0).sum()) for e in mine.values()))
        for optimizer in optimizers:
            optimizer.zero_grad()
    assert masked[-1] == len(mine) * (6 - 2)
    assert masked[-1] == masked[TOTAL - 7]
    assert 0 < masked[3] < masked[-1]


def test_the_budget_is_a_cubic_between_its_ends(folder):  # noqa: F811
    _, budget = budgeted(folder)
    count = 14
    assert [budget.budget(step, TOTAL) for step in (0, 2)] == [6 * count] * 2
    assert [budget.budget(step, TOTAL) for step in (14, 20)] == [2 * count] * 2
    assert budget.budget(8, TOTAL) == int(4 * count * 0.5**3 + 2 * count)


def test_the_penalty_is_what_peft_adds_to_a_loss(folder):  # noqa: F811
    """A loop that takes its loss from scores never sees PEFT's `outputs.loss`, and would drop the term."""
    model, budget = budgeted(folder)
    ids = torch.arange(4, 40)[None]
    with_term = model(ids, labels=ids, use_cache=False).loss
    without = model.base_model.model(ids, labels=ids, use_cache=False).loss
    assert budget.penalty().item() == pytest.approx((with_term - without).item(), rel=1e-5)
    assert budget.penalty().item() > 0.5


def test_a_run_of_one_step_has_a_phase_to_choose_in(folder):  # noqa: F811
    model, budget = budgeted(folder)
    (-scores(model).mean() + budget.penalty()).backward()
    budget.allocate(1, 1)
    assert (
        sum(int((~m.adalora_kept).sum()) for m in model.modules() if isinstance(m, peft.tuners.adalora.SVDLinear)) > 0
    )


def test_ranks_only_shrink_and_phases_leave_room():
    for bad, told in (({"target_rank": 9}, "ranks only shrink"), ({"warmup": 0.5, "final": 0.5}, "below 1 in sum")):
        with pytest.raises(ValueError, match=told):
            tiny.job("m", **{"model.peft": {"type": "adalora", "rank": 8, **bad}})
