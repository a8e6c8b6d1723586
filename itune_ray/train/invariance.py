"""The check behind `itune doctor`: on this model, on this machine, does the loss stay put when the work is cut up?

Three comparisons in fp32 on documents of very unequal lengths, with random tokens of the model's own vocabulary: the
fused head against full logits, packed rows against single documents, and four micro-batches against one. Each holds to
rounding on a model the loop understands; a family whose attention or head works in a way we do not know shows here,
before a day of training.
"""

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from itune_ray.config.objectives import SftConfig
from itune_ray.config.shared import ModelRef
from itune_ray.config.strategies import DdpConfig
from itune_ray.data.batches import Batch, collate, join, model_inputs
from itune_ray.data.hub import local_model_folder
from itune_ray.data.order import PackedRow
from itune_ray.data.packing import pack
from itune_ray.model.load import can_pack, load_model, masking_for
from itune_ray.model.logprobs import install_fused_head
from itune_ray.train.objectives.sft import Sft
from itune_ray.train.optimizer import Optimizers
from itune_ray.train.step import Stepper
from itune_ray.train.strategies.ddp import Ddp
from itune_ray.train.world import World

TOLERANCE = 1e-4
"""Relative. fp32 rounding gives 1e-7 to 1e-5; a leak between documents or a wrong normaliser gives 1e-2 and more."""
LENGTHS = (61, 3, 17, 2, 40, 5, 29, 9)


@dataclass(frozen=True)
class InvarianceReport:
    """Largest relative difference of each comparison; NaN where the model cannot be packed."""

    head: float
    """Loss by the fused head against full logits."""
    packing: float
    """Loss and gradient norm, packed against one document per row."""
    accumulation: float
    """Loss and gradient norm, four micro-batches against one."""

    @property
    def ok(self) -> bool:
        """Whether every comparison that applies holds."""
        return all(not value > TOLERANCE for value in (self.head, self.packing, self.accumulation))

    def summary(self) -> str:
        """One line for a person."""
        packing = "not possible (recurrent layers)" if np.isnan(self.packing) else f"{self.packing:.1e}"
        verdict = "holds" if self.ok else f"BROKEN (tolerance {TOLERANCE:.0e})"
        return (
            f"{verdict}: fused head {self.head:.1e}, packed against single {packing}, "
            f"4 micro-batches against 1 {self.accumulation:.1e}"
        )


def check_invariance(ref: ModelRef, seed: int = 0) -> InvarianceReport:
    """Run the three comparisons on a model; raises `ModelError` when it cannot be loaded."""
    world = World()
    model = load_model(
        local_model_folder(ref).path,
        dtype=torch.float32,
        attention="sdpa",  # FlashAttention has no fp32
        trust_remote_code=ref.trust_remote_code,
    )
    rows = _documents(model.config.get_text_config().vocab_size, seed)
    whole = _full_logits_loss(model, collate(rows, pad_id=0))
    install_fused_head(model)
    model.train()
    for module in model.modules():  # dropout would draw anew in every comparison
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    once = _loss_and_norm(model, [collate(rows, 0)], world)
    four = _loss_and_norm(model, [collate(rows[i::4], 0) for i in range(4)], world)
    packed = _loss_and_norm(model, [collate(_packed(rows), 0)], world) if can_pack(model) else (float("nan"),) * 2
    return InvarianceReport(
        head=_difference((once[0],), (whole,)), packing=_difference(packed, once), accumulation=_difference(four, once)
    )


def _documents(num_words: int, seed: int) -> list[PackedRow]:
    rng = random.Random(seed)
    rows: list[PackedRow] = []
    for index, length in enumerate(LENGTHS):
        ids = np.array([rng.randrange(num_words) for _ in range(length)], dtype=np.int32)
        supervised = np.arange(length) >= length // 2
        rows.append(PackedRow(ids, supervised, np.array([length], dtype=np.int32), (f"random:{index}:0",)))
    return rows


def _packed(rows: list[PackedRow]) -> list[PackedRow]:
    bins = pack([len(row.input_ids) for row in rows], capacity=90)
    return [join([rows[i] for i in chosen]) for chosen in bins]


@torch.no_grad()
def _full_logits_loss(model: Any, batch: Batch) -> float:
    inputs = model_inputs(batch, masking_for(model), torch.float32)
    logits: Tensor = model(**inputs).logits[:, :-1].float()
    total = nn.functional.cross_entropy(
        logits.flatten(0, 1), batch.labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
    )
    return float(total) / batch.num_supervised


class _NoUpdate(Optimizers):
    """Looks at gradients and leaves the weights alone."""

    def __init__(self, model: nn.Module):
        super().__init__([torch.optim.SGD(model.parameters(), lr=0.0)])

    def step(self) -> None:
        self.optimizers[0].zero_grad(set_to_none=True)


def _loss_and_norm(model: nn.Module, batches: list[Batch], world: World) -> tuple[float, float]:
    strategy = Ddp(DdpConfig(), world, "fp32")
    stepper = Stepper(
        strategy.prepare(model),
        Sft(SftConfig()),
        strategy,
        _NoUpdate(model),
        world,
        masking_for(model),
        torch.float32,
        clip_norm=None,
    )
    result = stepper(batches)
    return result.loss, result.grad_norm


def _difference(got: tuple[float, ...], wanted: tuple[float, ...]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(got, wanted, strict=True))
