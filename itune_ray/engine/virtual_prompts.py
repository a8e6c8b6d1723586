"""Prompts that are no tokens (prompt tuning, P-tuning), which vLLM takes as embeddings before those of the text."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from itune_ray.data.hub import resolve
from itune_ray.engine.prompts import BadPromptError
from itune_ray.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor

PEFT_TYPES = ("PROMPT_TUNING", "P_TUNING")
"""Adapters of the `peft` library whose file holds nothing but the embeddings of virtual tokens."""


class Embeddings(NamedTuple):
    """The size of a model's embedding matrix."""

    words: int
    width: int


@dataclass(frozen=True)
class VirtualPrompt:
    """The virtual tokens of an adapter folder."""

    embeddings: "Tensor"
    """[virtual tokens, width]."""
    file: Path
    written_ns: int

    @property
    def is_current(self) -> bool:
        """Whether the folder still holds what was read."""
        return self.file.exists() and self.file.stat().st_mtime_ns == self.written_ns

    def before(self, ids: Sequence[int]) -> Any:
        """vLLM's input for a text after it: embeddings at the virtual positions, token ids at the others."""
        from vllm.inputs.engine import embeds_input

        virtual, width = self.embeddings.shape
        rows = self.embeddings.new_zeros(virtual + len(ids), width)
        rows[:virtual] = self.embeddings
        kinds = [False] * virtual + [True] * len(ids)
        return embeds_input(rows, prompt_token_ids=[0] * virtual + list(ids), is_token_ids=kinds)


class VirtualPrompts:
    """The virtual prompts that an engine is asked with, read on first use and when their folder was written anew.

    vLLM checks neither widths nor token ids beside embeddings, and dies of wrong ones: both are checked here.
    """

    def __init__(self, model: Embeddings):
        self._model = model
        self._read: dict[str, VirtualPrompt] = {}

    def of(self, adapter: str) -> VirtualPrompt:
        """The virtual tokens of an adapter folder or URI.

        Raises:
            ModelError: The folder holds another kind of adapter, no weights, or those of another base.
        """
        known = self._read.get(adapter)
        if known is None or not known.is_current:
            known = self._read[adapter] = self._opened(adapter, Path(resolve(adapter, kind="adapter").path))
        return known

    def check(self, ids: Sequence[int]) -> None:
        """Raise `BadPromptError` for token ids that the model has no embeddings of."""
        if not 0 <= min(ids) <= max(ids) < self._model.words:
            raise BadPromptError(f"invalid_request: a token id outside 0 to {self._model.words - 1}")

    def _opened(self, adapter: str, folder: Path) -> VirtualPrompt:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        file = folder / "adapter_model.safetensors"
        try:
            kind = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")).get("peft_type")
            found = load_file(file) if kind in PEFT_TYPES else {}
        except (OSError, ValueError, SafetensorError) as error:
            raise ModelError(f"the adapter cannot be read: {error}", got=adapter, knob="model.adapter") from error
        if "prompt_embeddings" not in found:
            raise ModelError(
                "an engine that takes prompts as embeddings takes no other adapter",
                got=f"{adapter} of type {kind}",
                allowed=f"{', '.join(PEFT_TYPES)}; for LoRA set prompt_embeds=false and max_adapters",
                knob="engine.prompt_embeds",
            )
        prompt = found["prompt_embeddings"]
        if prompt.dim() != 2 or prompt.shape[1] != self._model.width:
            raise ModelError(
                "the adapter's virtual tokens are not embeddings of this base",
                got=tuple(prompt.shape),
                allowed=f"(virtual tokens, {self._model.width})",
                knob="model.adapter",
            )
        return VirtualPrompt(prompt, file, file.stat().st_mtime_ns)
