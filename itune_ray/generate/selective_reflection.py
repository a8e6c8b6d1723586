"""Selective Reflection-Tuning: which of a row's four versions the student takes (Li et al. 2024, arXiv 2402.10110;
methods D12)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Version = Literal["ori", "Q", "A", "QA"]
"""The row (x, y); with the new instruction (x*, y_x*); with the better answer (x, y*); with both (x*, y**)."""


@dataclass(frozen=True)
class Difficulty:
    """How much an instruction helps with its answer, and the answer with its instruction, to the student."""

    ifd: float
    """PPL(y | x) / PPL(y); higher: the instruction is harder. NaN where not scored."""
    reversed_ifd: float
    """PPL(x | guess prompt of y) / PPL(x); lower: the answer tells more of its instruction. NaN where not scored."""


def select_version(
    scores: Mapping[Version, Difficulty], mode: Literal["released", "full"] = "released"
) -> Version | None:
    """The version to train on, or None.

    The new instruction is taken when IFD(Q) > IFD(ori), then the better answer when it lowers the reversed IFD of what
    it would replace. The version taken must have both ratios below 1. A NaN among the four excludes the row.

    Args:
        scores: Of all four versions.
        mode: `released` takes only versions with a better answer, as the published data did; `full` takes all four.
    """
    if any(math.isnan(score.ifd) or math.isnan(score.reversed_ifd) for score in scores.values()):
        return None
    is_harder = scores["Q"].ifd > scores["ori"].ifd
    kept, better = ("Q", "QA") if is_harder else ("ori", "A")
    version: Version = better if scores[better].reversed_ifd < scores[kept].reversed_ifd else kept
    chosen = scores[version]
    if not (chosen.ifd < 1 and chosen.reversed_ifd < 1):
        return None
    return version if mode == "full" or version == better else None
