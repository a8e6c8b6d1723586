"""The export gate's arithmetic: log-probabilities of token sequences by every way to a written model, compared.

For a document of T tokens the gap between two routes is (1 / (T - 1)) Σ_t |log p_t - log p'_t|, in nats per token; the
gap of a route is that of its worst document. An undefined log-probability is an infinite gap.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from itune_ray.errors import ModelError
from itune_ray.model.load import load_model
from itune_ray.model.peft.saved import load_adapted

Ids = Sequence[Sequence[int]]
Images = Sequence[Mapping[str, Tensor]]
"""Per document what the forward pass takes beside the ids, see `itune_ray.model.images.ImageReader.inputs`."""


class ExportRefusedError(ModelError):
    """What was written does not say what was trained."""


LogProbs = list[list[float]]
"""Per document the log-probability of each token but the first, given those before it."""


def scores_of(model: nn.Module, documents: Ids, images: Images | None = None) -> LogProbs:
    """Log-probabilities by a model as transformers or PEFT opened it: one document at a time, no fused head."""
    found: LogProbs = []
    with torch.no_grad():
        for ids, shown in zip(documents, images or [{}] * len(documents), strict=True):
            given = torch.tensor([list(ids)])
            logits: Any = model(input_ids=given, use_cache=False, **shown).logits[0]
            log_p = logits[-len(ids) : -1].float().log_softmax(-1)  # a trained prompt's own places come first
            found.append(log_p.gather(-1, given[0, 1:, None])[:, 0].tolist())
    return found


def written_scores(
    documents: Ids,
    *,
    base: str | None,
    adapter: str | None,
    merged: str | None,
    images: Images | None = None,
    trust_remote_code: bool = False,
) -> dict[str, LogProbs]:
    """Route -> log-probabilities, by fp32 arithmetic: `adapter` over its base and the `merged` model, those that there
    are.

    Args:
        base: Folder of the model that the adapter was trained on; None leaves the adapter out.
        images: Those of the documents, for an image-text model.
    """
    found: dict[str, LogProbs] = {}
    options: dict[str, Any] = {"dtype": torch.float32, "attention": "eager", "sees": images is not None}
    options["trust_remote_code"] = trust_remote_code
    if adapter is not None and base is not None:
        found["adapter"] = scores_of(load_adapted(load_model(base, **options), adapter), documents, images)
    if merged is not None:
        found["merged"] = scores_of(load_model(merged, **options).eval(), documents, images)
    return found


def gap(one: LogProbs, other: LogProbs) -> float:
    """Mean |Δ log p| per token of the worst document."""
    gaps = [
        sum(abs(a - b) for a, b in zip(x, y, strict=True)) / max(len(x), 1) for x, y in zip(one, other, strict=True)
    ]
    return max((g if math.isfinite(g) else math.inf for g in gaps), default=0.0)


def check_routes(trained: LogProbs, routes: dict[str, LogProbs], tolerance: float) -> dict[str, float]:
    """Route -> its gap to the trained model.

    Raises:
        ExportRefusedError: One is above the tolerance.
    """
    gaps = {route: gap(trained, scores) for route, scores in routes.items()}
    for route, found in gaps.items():
        if not found <= tolerance:
            raise ExportRefusedError(
                f"the export is refused: the written model ({route}) does not say what was trained",
                got=f"{found:.3g} nats per token",
                allowed=f"at most {tolerance:g}",
                knob="gate.tolerance",
            )
    return gaps
