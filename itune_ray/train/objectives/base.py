"""The contract of an objective: sums and counts, never means.

The loop computes L = Σ_k c_k · S_k / N_k, where S_k is the sum of term k and N_k its unit count over the whole global
batch (survey eq. 6 and 14). Dividing once, by a global count, is what makes the loss independent of micro-batches,
accumulation, packing, padding, ranks and strategy; a mean of micro-batch means is none of that.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from torch import Tensor

from itune_ray.data.batches import Batch
from itune_ray.model.logprobs import TokenScores


class Metric(NamedTuple):
    """A number to report beside the loss: `total / N[unit]` over the global batch."""

    total: Tensor
    unit: str
    proportion: bool = False
    """Whether it counts units, so that held-out rows give it an interval; one metric of an objective at most."""


@dataclass(frozen=True)
class Loss:
    """Differentiable sums by term, and detached sums to report."""

    terms: dict[str, Tensor]
    metrics: dict[str, Metric] = field(default_factory=dict[str, Metric])


class Objective(Protocol):
    """What the loop knows of an objective: it sees no model, device, schedule or file."""

    needs: tuple[str, ...]
    """Columns beyond token ids that rows must carry, e.g. reference log-probs."""
    coefficients: Mapping[str, float]
    """c_k of every term."""

    def units(self, batch: Batch) -> dict[str, int]:
        """N_k of one micro-batch by term, without a forward pass."""
        ...

    def head_inputs(self, batch: Batch) -> Mapping[str, Tensor | int]:
        """What the fused head is asked beside the labels; see `install_fused_head`."""
        ...

    def __call__(self, scores: TokenScores, batch: Batch) -> Loss:
        """Sums of one micro-batch."""
        ...
