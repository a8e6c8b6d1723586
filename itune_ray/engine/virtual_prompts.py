"""Prompts that are no tokens (prompt tuning, P-tuning), which vLLM takes as embeddings before those of the text."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from itune_ray.data.hub import read_config
from itune_ray.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor

PEFT_TYPES = ("PROMPT_TUNING", "P_TUNING")
"""Adapters of the `peft` library whose file holds nothing but the embeddings of virtual tokens."""


def read_virtual_prompt(adapter: Path, base: Path) -> "Tensor | None":
    """Embeddings (virtual tokens, hidden size) of an adapter folder, or None when it is another kind of adapter.

    Raises:
        ModelError: There are none in the folder, or they are not of the base's size, which vLLM would die of.
    """
    file = adapter / "adapter_config.json"
    if not file.exists() or json.loads(file.read_text(encoding="utf-8")).get("peft_type") not in PEFT_TYPES:
        return None
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        prompt = load_file(adapter / "adapter_model.safetensors")["prompt_embeddings"]
    except (OSError, KeyError, SafetensorError) as error:
        raise ModelError(
            f"the adapter has no embeddings of virtual tokens: {error}", got=adapter, knob="model.adapter"
        ) from error
    found = read_config(base)
    width = (found.get("text_config") or found).get("hidden_size")
    if prompt.dim() != 2 or prompt.shape[1] != width:
        raise ModelError(
            "the adapter's virtual tokens are not embeddings of this base",
            got=tuple(prompt.shape),
            allowed=f"(virtual tokens, {width})",
            knob="model.adapter",
        )
    return prompt


def after(prompt: "Tensor", ids: list[int]) -> Any:
    """vLLM's input for a text after a virtual prompt: embeddings at the virtual positions, token ids at the others."""
    import torch
    from vllm.inputs.engine import embeds_input

    virtual = len(prompt)
    embeddings = torch.cat([prompt, prompt.new_zeros(len(ids), prompt.shape[1])])
    kinds = [False] * virtual + [True] * len(ids)
    return embeds_input(embeddings, prompt_token_ids=[0] * virtual + ids, is_token_ids=kinds)
