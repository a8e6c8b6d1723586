"""Direct preference optimisation (survey eq. 12; Rafailov et al. 2023).

    ℓ = -log σ(r_w - r_l),   r = β Δ,   Δ = log π_θ(answer | prompt) - log π_ref(answer | prompt)

per pair, w the chosen and l the rejected answer, log-probabilities summed over an answer's tokens. The reference is the
policy before its first step, so the loss starts at log 2. Two variants need no objective of their own:

- cDPO (Mitchell 2023): with label smoothing ε a pair counts (1-ε) as it stands and ε the wrong way round. The loss is
  least where σ(r_w - r_l) = 1-ε, no longer at infinity.
- RPO (Pang et al. 2024): `nll` adds the chosen answers' negative log-likelihood. It is per token of the global batch,
  as in TRL; the paper divides by each answer's own length first, which weighs short answers' tokens more.
"""

from torch import Tensor
from torch.nn.functional import logsigmoid

from itune_ray.config.objectives import DpoConfig
from itune_ray.data.batches import Batch
from itune_ray.train.objectives.pairs import REFERENCE, Pairwise, log_ratios


class Dpo(Pairwise):
    """Terms `dpo` over pairs and, where its weight is not 0, `nll`; rewards are what the policy implies, β Δ."""

    needs: tuple[str, ...] = (REFERENCE,)

    def __init__(self, config: DpoConfig):
        super().__init__("dpo", nll=config.nll)
        self.config = config

    def rewards(self, log_probs: Tensor, batch: Batch) -> Tensor:
        """β Δ."""
        return self.config.beta * log_ratios(log_probs, batch)

    def losses(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """-(1-ε) log σ(r_w - r_l) - ε log σ(r_l - r_w)."""
        margin, epsilon = chosen - rejected, self.config.label_smoothing
        return -(1 - epsilon) * logsigmoid(margin) - epsilon * logsigmoid(-margin)
