"""A small config of every method of `model.peft`."""

from pydantic import TypeAdapter

from itune_ray.config.adaptation import SUPPORT, PeftConfig

METHODS = {
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
    "llama_adapter": {"type": "llama_adapter", "tokens": 5, "layers": 2},
    "llama_excitor": {"type": "llama_excitor", "tokens": 5, "rank": 4, "layers": 2},
}
assert METHODS.keys() == SUPPORT.keys()


def config(method: str, **overrides):
    return TypeAdapter(PeftConfig).validate_python({**METHODS[method], **overrides})
