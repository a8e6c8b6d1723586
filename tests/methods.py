"""A small config of every method of `model.peft`."""

from typing import Any

import tiny
from pydantic import TypeAdapter

from itune_ray.config.adaptation import SUPPORT, PeftConfig
from itune_ray.data.records import Record

LABELS = ["apple pie", "stone", "maple tiger"]
METHODS: dict[str, dict[str, Any]] = {
    "full": {"type": "full"},
    "lora": {"type": "lora", "rank": 4},
    "rslora": {"type": "lora", "rank": 4, "rslora": True},
    "dora": {"type": "lora", "rank": 4, "dora": True},
    "qlora": {"type": "qlora", "rank": 4},
    "adalora": {"type": "adalora", "rank": 4, "target_rank": 2},
    "ia3": {"type": "peft", "method": "IA3"},
    "ln_tuning": {"type": "peft", "method": "LN_TUNING"},
    "vera": {"type": "peft", "method": "VERA", "args": {"r": 8}},
    "oft": {"type": "peft", "method": "OFT", "args": {"oft_block_size": 8}},
    "loha": {"type": "peft", "method": "LOHA", "args": {"r": 4}},
    "lokr": {"type": "peft", "method": "LOKR", "args": {"r": 4}},
    "hra": {"type": "peft", "method": "HRA", "args": {"r": 4}},
    "miss": {"type": "peft", "method": "MISS", "args": {"r": 4}},
    "fourierft": {"type": "peft", "method": "FOURIERFT", "args": {"n_frequency": 50}},
    "bitfit": {"type": "bitfit"},
    "prompt_tuning": {"type": "prompt_tuning", "tokens": 5},
    "p_tuning": {"type": "p_tuning", "tokens": 5, "hidden": 16},
    "prefix_tuning": {"type": "prefix_tuning", "tokens": 5, "hidden": 16},
    "p_tuning_v2": {"type": "p_tuning_v2", "tokens": 5},
    "houlsby": {"type": "houlsby", "reduction": 8},
    "pfeiffer": {"type": "pfeiffer", "reduction": 8},
    "compacter": {"type": "compacter", "reduction": 8},
    "l_tuning": {"type": "l_tuning", "labels": LABELS, "tokens": 3, "hidden": 16},
    "l_tuning_prompt": {"type": "l_tuning", "form": "prompt", "labels": LABELS, "hidden": 16},
    "llama_adapter": {"type": "llama_adapter", "tokens": 5, "layers": 2},
    "llama_excitor": {"type": "llama_excitor", "tokens": 5, "rank": 4, "layers": 2},
}
assert METHODS.keys() == SUPPORT.keys()


OTHER_OBJECTIVE = {"l_tuning": {"type": "classify"}, "l_tuning_prompt": {"type": "classify"}}
"""Method -> what it is trained on where that is not sft."""


def settings(method: str) -> dict[str, Any]:
    """What a job needs to train a method."""
    other = {"objective": OTHER_OBJECTIVE[method], "max_length": 40} if method in OTHER_OBJECTIVE else {}
    return {"model.peft": METHODS[method], **other}  # a text once per label is never split, so that it is short


def rows(method: str, count: int) -> list[Record]:
    """Rows that the method is trained on."""
    return tiny.classes(count, METHODS[method]["labels"]) if method in OTHER_OBJECTIVE else tiny.chats(count)


def config(method: str, **overrides):
    return TypeAdapter(PeftConfig).validate_python({**METHODS[method], **overrides})
