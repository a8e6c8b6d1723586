"""Filters: one file each, named in the job by `type`."""

import importlib

from itune_ray.config.curate import AnyFilter
from itune_ray.curate.filters.base import Filter

FILTERS = {
    "length": "itune_ray.curate.filters.length:Length",
    "finish_reason": "itune_ray.curate.filters.finish_reason:FinishReason",
    "refusal": "itune_ray.curate.filters.refusal:Refusal",
    "hygiene": "itune_ray.curate.filters.hygiene:Hygiene",
    "pii": "itune_ray.curate.filters.pii:Pii",
    "safety": "itune_ray.curate.filters.safety:Safety",
    "language": "itune_ray.curate.filters.language:Language",
    "exact_dedup": "itune_ray.curate.filters.exact_dedup:ExactDedup",
    "minhash_dedup": "itune_ray.curate.filters.minhash_dedup:MinhashDedup",
    "decontaminate": "itune_ray.curate.filters.decontaminate:Decontaminate",
    "grader": "itune_ray.curate.filters.grader:Grader",
    "judge": "itune_ray.curate.filters.judge:JudgeFilter",
    "ifd": "itune_ray.curate.filters.ifd:Ifd",
    "tags": "itune_ray.curate.filters.tags:Tags",
    "uncertainty": "itune_ray.curate.filters.uncertainty:Uncertainty",
    "human_rating": "itune_ray.curate.filters.human_rating:HumanRating",
    "semantic_dedup": "itune_ray.curate.filters.semantic_dedup:SemanticDedup",
    "select": "itune_ray.curate.filters.select:Select",
    "deita": "itune_ray.curate.filters.deita:Deita",
    "diverse": "itune_ray.curate.filters.diverse:Diverse",
    "curriculum": "itune_ray.curate.filters.curriculum:Curriculum",
    "custom": "itune_ray.curate.filters.custom:Custom",
}
"""Config type -> class, made from its config."""


def load_filter(config: AnyFilter) -> Filter:
    """The filter that a config describes."""
    module, _, name = FILTERS[config.type].partition(":")
    return getattr(importlib.import_module(module), name)(config)
