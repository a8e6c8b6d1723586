"""Which parameters of an adapted model are the adapter's, and their names in a checkpoint or a saved adapter."""

from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

ADAPTER = "default"
_WRAPPED_SEGMENTS = (".base_layer", ".token_adapter", ".original_module")
TRAINING_ONLY = ("adalora_", "nf4_")
"""How buffers begin that training needs and a saved adapter does not."""
OWN_CONFIG = "adaptation_config"
"""The attribute of a model that says what it was adapted with, where the `peft` library does not know the method."""
_OWN = tuple(
    {
        *PEFT_TYPE_TO_PREFIX_MAPPING.values(),
        "vera_A",
        "vera_B",
        "ranknum",
        "trainable_tokens",
        "bottleneck_adapter",
        "adaption_",
        "excitor",
        "label_prefix",
        "label_prompt",
        "prompt_encoder",
        *TRAINING_ONLY,
    }
)
"""How a segment of the name of an adapter's own parameter or buffer begins."""


def base_name(name: str) -> str | None:
    """The name a parameter has in the plain checkpoint, or None for an adapter's own parameter."""
    if any(segment.startswith(_OWN) for segment in name.split(".")):
        return None
    name = name.removeprefix("module.").removeprefix("base_model.model.")
    for segment in _WRAPPED_SEGMENTS:
        name = name.replace(segment, "")
    return name


def saved_name(name: str) -> str:
    """The name an adapter's parameter has in a saved adapter, as PEFT writes it: the adapter's own name left out."""
    name = name.removeprefix("module.")
    if ".lora_magnitude_vector." in name:
        name = name.removesuffix(".weight")
    return name.replace(f".{ADAPTER}", "")
