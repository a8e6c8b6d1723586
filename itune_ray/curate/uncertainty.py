"""Uncertainty of a model about rows and tasks, for choosing what to label or train next (Active-IT, methods D34)."""

import math
from collections.abc import Mapping, Sequence
from random import Random
from statistics import fmean


def sequence_probability(log_probs: Sequence[float]) -> float:
    """P = exp(mean log-probability of the tokens), the geometric mean of their probabilities; NaN without tokens."""
    return math.exp(fmean(log_probs)) if log_probs else math.nan


def least_confidence(log_probs: Sequence[float]) -> float:
    """1 - the mean probability of the tokens written; NaN without tokens."""
    return 1 - fmean(math.exp(value) for value in log_probs) if log_probs else math.nan


def margin_uncertainty(positions: Sequence[Mapping[int, float]]) -> float:
    """1 - the mean over positions of P(likeliest) - P(second).

    NaN without positions, and where a position lists fewer than two tokens: its margin is not known.
    """
    ranked = [sorted(entry.values(), reverse=True)[:2] for entry in positions]
    if not ranked or any(len(pair) < 2 for pair in ranked):
        return math.nan
    return 1 - fmean(math.exp(first) - math.exp(second) for first, second in ranked)


def mean_entropy(positions: Sequence[Mapping[int, float]]) -> float:
    """The mean over positions of -Σ p ln p in nats; NaN without positions.

    Over listed tokens alone: what the engine does not list is left out, so of top-k lists it is a lower bound.
    """
    if not positions:
        return math.nan
    return fmean(-math.fsum(math.exp(value) * value for value in entry.values()) for entry in positions)


def disagreement(answers: Sequence[str]) -> float:
    """The share of pairs of answers that differ; NaN of fewer than two."""
    pairs = [a != b for i, a in enumerate(answers) for b in answers[i + 1 :]]
    return fmean(pairs) if pairs else math.nan


def prompt_uncertainty(original: float, perturbed: Sequence[float]) -> float:
    """U = mean over k of |P(y0 | x, prompt_k) - P(y0 | x, prompt_0)|, y0 the answer under the prompt as it is.

    Kung et al. 2311.00288; a task's is the mean over its instances. NaN without perturbed prompts.
    """
    return fmean(abs(probability - original) for probability in perturbed) if perturbed else math.nan


def drop_words(text: str, rate: float, rng: Random) -> str:
    """The text with each word dropped with probability `rate`; at least one word stays. White space becomes single."""
    words = text.split()
    kept = [word for word in words if rng.random() >= rate]
    return " ".join(kept or words[:1])


def most_uncertain(scores: Mapping[str, float], share: float) -> list[str]:
    """The ⌈share · N⌉ keys of highest score, of equals the smaller key first; NaN is never chosen."""
    known = sorted((-score, key) for key, score in scores.items() if not math.isnan(score))
    return [key for _, key in known[: math.ceil(share * len(scores))]]
