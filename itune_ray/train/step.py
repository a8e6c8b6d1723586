"""One optimizer step, whose loss no micro-batch, accumulation, packing, padding, rank or strategy can move.

Units are summed over the micro-batches and all ranks before the first forward; each micro-batch then hands
Σ_k c_k · S_k / N_k to backward. Strategies average gradients over ranks, which the factor W undoes.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from itune_ray.data.batches import Batch, Masking, model_inputs
from itune_ray.model.logprobs import TokenScores
from itune_ray.train.objectives.base import Loss, Objective
from itune_ray.train.optimizer import Optimizers
from itune_ray.train.router import ROUTER_LOSS, router_share
from itune_ray.train.strategies.base import Strategy
from itune_ray.train.world import World

Leaving = Callable[[], bool]
"""Whether this rank's machine is about to be taken away; asked on every rank in each step, must be quick."""


@dataclass(frozen=True)
class StepResult:
    """The optimised loss of the global batch and its gradient norm before clipping."""

    loss: float
    grad_norm: float
    units: dict[str, float]
    """N_k over all ranks."""
    metrics: dict[str, float]
    """What the objective reports, divided by global units; nothing where there are none."""
    leaving: bool = False
    """Whether any rank's machine is about to be taken away."""


@dataclass(frozen=True)
class Stepper:
    """Everything an optimizer step needs; calling it takes the step."""

    model: nn.Module
    objective: Objective
    strategy: Strategy
    optimizers: Optimizers
    world: World
    masking: Masking
    dtype: torch.dtype
    clip_norm: float | None
    penalty: Callable[[], torch.Tensor] | None = None
    """A term of the trained parameters alone, in the loss once per step; the reported loss leaves it out."""
    images: Callable[[Batch], tuple[Batch, Any]] | None = None
    """The batch to run for a micro-batch with images, and further arguments of the model (`train.pictured`)."""
    router_weight: float = 0.0
    """Of the load-balancing loss of a mixture of experts (`itune_ray.train.router`); the reported loss has it in."""

    def __call__(self, micro_batches: Sequence[Batch], leaving: Leaving = lambda: False) -> StepResult:
        """Every rank passes the same number of micro-batches, dummies included, or collectives would not match.

        What `leaving` says travels with the step's sums: a collective of its own cost 7 % of the time of small steps.
        """
        counts = self._global_units(micro_batches)
        units = {term: max(count, 1.0) for term, count in counts.items()}
        parts: dict[str, list[torch.Tensor]] = defaultdict(list)
        metric_units: dict[str, str] = {}
        penalty: torch.Tensor | None = None
        for index, batch in enumerate(micro_batches):
            last = index == len(micro_batches) - 1
            if batch.seed is not None:
                torch.manual_seed(batch.seed)
            with self.strategy.forward_context(last=last):
                moved = batch.to(self.world.device)
                scores = self.scores(moved)
                loss = self.objective(scores, moved)
                total = self._scaled(loss, units)
                if self.router_weight:
                    router = router_share(scores, moved)
                    total = total + self.router_weight * router * self.strategy.gradient_divisor
                    parts[ROUTER_LOSS].append(router.detach())
                if last and self.penalty is not None:  # every rank adds the same, so their mean needs no factor
                    penalty = self.penalty()
                    total = total + penalty
                self.strategy.backward(total)
            for term, total in loss.terms.items():
                parts[f"loss/{term}"].append(total.detach())
            for name, metric in loss.metrics.items():
                parts[name].append(metric.total)
                metric_units[name] = metric.unit
        grad_norm = self.strategy.step(self.optimizers, self.clip_norm)
        *summed, leaving_ranks = self.world.sum([*_sums(list(parts.values())), float(leaving())])
        totals = dict(zip(parts, summed, strict=True))
        coefficients = self.objective.coefficients
        value = sum(c * totals[f"loss/{term}"] / units[term] for term, c in coefficients.items())
        metrics = {name: totals[name] / units[unit] for name, unit in metric_units.items() if counts[unit]}
        if self.router_weight:
            metrics[ROUTER_LOSS] = totals[ROUTER_LOSS]
            value += self.router_weight * totals[ROUTER_LOSS]
        if penalty is not None:
            metrics["penalty"] = float(penalty.detach())
        return StepResult(value, grad_norm, counts, metrics, leaving_ranks > 0)

    def _global_units(self, micro_batches: Sequence[Batch]) -> dict[str, float]:
        counts: dict[str, float] = defaultdict(float)
        for batch in micro_batches:
            for term, count in self.objective.units(batch).items():
                counts[term] += count
        names = sorted(counts)
        totals = self.world.sum([counts[name] for name in names])
        return dict(zip(names, totals, strict=True))

    def scores(self, batch: Batch) -> TokenScores:
        """One forward pass of a micro-batch on this rank's device."""
        shown: dict[str, object] = {}
        if self.images is not None:
            batch, shown = self.images(batch)
        inputs = model_inputs(batch, self.masking, self.dtype)
        inputs |= shown
        if self.router_weight:
            inputs["router_tokens"] = batch.segments >= 0
        return self.model(**inputs, labels=batch.labels, token_scores=True, **self.objective.head_inputs(batch))

    def rehearse(self, batch: Batch) -> None:
        """Forward and backward of a micro-batch without a step. Collective."""
        with self.strategy.forward_context(last=True):
            moved = batch.to(self.world.device)
            loss = self.objective(self.scores(moved), moved)
            self.strategy.backward(self._scaled(loss, dict.fromkeys(self.objective.coefficients, 1.0)))
        for parameter in self.optimizers.parameters():
            parameter.grad = None

    def _scaled(self, loss: Loss, units: dict[str, float]) -> torch.Tensor:
        terms = [c * loss.terms[term] / units[term] for term, c in self.objective.coefficients.items()]
        return torch.stack(terms).sum() * self.strategy.gradient_divisor


def _sums(parts: Sequence[Sequence[torch.Tensor]]) -> list[float]:
    """The sum of each list of scalars in fp64, fetched from the device all at once: asking after every micro-batch
    would have it wait for the host."""
    values = iter(torch.stack([value.double() for part in parts for value in part]).tolist())
    return [sum(next(values) for _ in part) for part in parts]
