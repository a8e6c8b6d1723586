"""A reward model from preferences (Bradley and Terry 1952; Stiennon et al. 2020; InstructGPT, Ouyang et al. 2022).

    L = 1/P Σ -log σ(r_w - r_l - m) + c/P Σ (r_w + r_l)²

over the P pairs of the global batch, r the scalar head's value at an answer's last token, as the chat template ends it,
w the chosen and l the rejected answer. m is a pair's own margin, by how much the better answer is better (Llama 2,
Touvron et al. 2023), 0 without one. Pairs fix only differences of rewards; c holds their mean near 0. Two answers of
equal rewards give log 2.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, pad

from itune_ray.config.objectives import RewardConfig
from itune_ray.data.batches import Batch
from itune_ray.model.logprobs import TokenScores
from itune_ray.train.documents import MARGIN
from itune_ray.train.objectives.base import Loss
from itune_ray.train.objectives.pairs import reward_metrics


class Reward:
    """Terms `reward` and, where its weight is not 0, `center`, both over pairs; reports what `Pairwise` does."""

    needs: tuple[str, ...] = (MARGIN,)

    def __init__(self, config: RewardConfig):
        self.coefficients: Mapping[str, float] = {
            "reward": 1.0,
            **({"center": config.center} if config.center else {}),
        }

    def units(self, batch: Batch) -> dict[str, int]:
        """Pairs, for both terms."""
        return dict.fromkeys(self.coefficients, sum(map(len, batch.keys)))

    def head_inputs(self, batch: Batch) -> dict[str, Tensor]:
        """Places of the segments' last tokens."""
        return {"value_at": last_tokens(batch)}

    def __call__(self, scores: TokenScores, batch: Batch) -> Loss:
        """Sums over the pairs of a micro-batch."""
        assert scores.values is not None
        values = scores.values.double()
        chosen, rejected = values[0::2], values[1::2]
        margin = batch.columns.get(MARGIN, values.new_zeros(0))
        terms = {"reward": -logsigmoid(chosen - rejected - margin).sum(), "center": (chosen + rejected).square().sum()}
        wanted = {name: terms[name] for name in self.coefficients}
        return Loss(wanted, reward_metrics(chosen.detach(), rejected.detach(), "reward"))


def last_tokens(batch: Batch) -> Tensor:
    """Place [S] of each segment's last token, over the rows of [B, T] laid end to end."""
    following = pad(batch.segments[:, 1:], (0, 1), value=-1)
    return torch.nonzero(((batch.segments >= 0) & (batch.segments != following)).flatten())[:, 0]
