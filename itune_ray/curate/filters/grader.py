"""Grader: answers that an exact check calls right."""

import math
from collections.abc import Callable
from functools import cached_property
from typing import Any

from itune_ray.config.curate import GraderConfig
from itune_ray.curate.filters.base import RowFilter, Verdict
from itune_ray.curate.filters.custom import load, without_cache
from itune_ray.data.fingerprint import source_identity
from itune_ray.data.records import Record
from itune_ray.errors import ConfigError, did_you_mean

GRADERS = {"playground": "itune_ray.playground.parser:grade"}
"""Name -> `module:function` of (prompt, reply) that returns whether the reply is `correct` and what was `expected`."""


class Grader(RowFilter):
    """Keeps answers whose score reaches the threshold.

    A task that a built-in grader does not know is rejected as `ungradable` with score NaN, not as wrong. A grader of
    the user's is called with (prompt, reply, meta) and returns a score in [0, 1]; when it raises, the row has failed.
    """

    needs = frozenset({"response"})

    def __init__(self, config: GraderConfig):
        self._location, self._threshold = config.grader, config.threshold
        if config.grader not in GRADERS and ":" not in config.grader:
            raise ConfigError(
                f"unknown grader{did_you_mean(config.grader, GRADERS)}",
                got=config.grader,
                allowed=", ".join(GRADERS) + " or package.module:function",
                knob="filters.N.grader",
            )

    def identity(self) -> dict[str, Any]:
        source = {} if self._location in GRADERS else {"source": source_identity(self._location)}
        return {**super().identity(), **source}

    def __getstate__(self) -> dict[str, Any]:
        return without_cache(self, "_grade")

    @cached_property
    def _grade(self) -> Callable[..., Any]:
        return load(GRADERS.get(self._location, self._location), "filters.N.grader")

    def keep(self, record: Record) -> Verdict:
        if record.response is None:
            return Verdict(False, "no_answer")
        prompt = next((m["content"] for m in reversed(record.prompt) if m["role"] == "user"), "")
        grader = self._grade
        if self._location in GRADERS:
            grade = grader(prompt, record.response)
            if grade.expected is None:
                return Verdict(False, "ungradable")
            return self._verdict(float(grade.correct))
        try:
            return self._verdict(float(grader(prompt, record.response, record.meta)))
        except Exception as error:  # noqa: BLE001  a grader is the user's code; one odd row must not end the job
            return Verdict(False, failure=f"{type(error).__name__}: {' '.join(str(error).split())}"[:200])

    def _verdict(self, score: float) -> Verdict:
        if math.isnan(score):
            return Verdict(False, "ungradable")
        return Verdict(True, score=score) if score >= self._threshold else Verdict(False, "wrong_answer", score)
