"""What an adapter folder holds, and a base with such a folder put back on it: PEFT's format, and ours for what PEFT
does not know.

Ours is the same two files; `peft_type` names our method, and parameters have their names in the model.
"""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel

from itune_ray.config.adaptation import BOTTLENECKS, LlamaExcitorConfig, LTuningConfig
from itune_ray.errors import ModelError
from itune_ray.model.peft.bottleneck import apply_bottlenecks
from itune_ray.model.peft.excitor import apply_excitor
from itune_ray.model.peft.l_tuning import apply_l_tuning
from itune_ray.model.peft.names import ADAPTER, OWN_CONFIG, TRAINING_ONLY, base_name
from itune_ray.model.peft.prompts import is_prompted, trained_prompt
from itune_ray.model.reward import reward_head
from itune_ray.model.sharding import whole
from itune_ray.model.tokenizer import load_tokenizer

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_OURS: dict[str, tuple[Any, Any]] = {
    str(config.model_fields["type"].default): (config, apply)
    for config, apply in (
        *((kind, apply_bottlenecks) for kind in BOTTLENECKS),
        (LlamaExcitorConfig, apply_excitor),
        (LTuningConfig, apply_l_tuning),
    )
}
"""Method -> its config and what puts it on a model."""


def has_adapter(model: nn.Module) -> bool:
    """Whether what is trained is apart from the base."""
    inner = getattr(model, "module", model)
    return hasattr(inner, "peft_config") or hasattr(inner, OWN_CONFIG)


def is_mergeable(model: nn.Module) -> bool:
    """Whether the change can be put into weights that the base has."""
    inner: Any = getattr(model, "module", model)
    settings = getattr(inner, "peft_config", {}).get(ADAPTER)
    own_softmax = settings is not None and settings.peft_type == "ADAPTION_PROMPT"
    return not (is_prompted(inner) or own_softmax or hasattr(inner, OWN_CONFIG))


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The trained tensors under the names they are saved by. Collective when sharded."""
    from peft.utils.save_and_load import get_peft_model_state_dict

    inner: Any = getattr(model, "module", model)
    if is_prompted(inner):
        return {"prompt_embeddings": trained_prompt(inner)}
    trained = {name: whole(p) for name, p in inner.named_parameters() if p.requires_grad}
    # Buffers such as VeRA's projections belong to some methods. Of the rest only names are PEFT's business; embeddings
    # that are not adapter weights stay with the base.
    for name, buffer in inner.named_buffers(remove_duplicate=False):
        if base_name(name) is None and not name.rpartition(".")[2].startswith(TRAINING_ONLY):
            trained[name] = whole(buffer)
    if hasattr(inner, OWN_CONFIG):
        return trained
    return get_peft_model_state_dict(inner, state_dict=trained, adapter_name=ADAPTER, save_embedding_layers=False)


def adapter_settings(model: nn.Module, base_path: str | None) -> dict[str, Any]:
    """The content of adapter_config.json."""
    inner: Any = getattr(model, "module", model)
    if hasattr(inner, OWN_CONFIG):
        own = getattr(inner, OWN_CONFIG)
        return {"peft_type": own.name.upper(), "base_model_name_or_path": base_path, **own.model_dump(mode="json")}
    config = inner.peft_config[ADAPTER]
    settings = {name: sorted(v) if isinstance(v, set) else v for name, v in config.to_dict().items()}
    settings["inference_mode"] = True
    if base_path is not None:
        settings["base_model_name_or_path"] = base_path
    return settings


def load_adapted(base: PreTrainedModel, folder: str) -> nn.Module:
    """A base model with a saved adapter of any method on it, in eval mode."""
    settings = json.loads((Path(folder) / CONFIG_FILE).read_text())
    if settings.get("type") not in _OURS:
        from peft import PeftModel

        return PeftModel.from_pretrained(base, folder, adapter_name=ADAPTER).eval()
    fields = {k: v for k, v in settings.items() if k not in ("peft_type", "base_model_name_or_path")}
    config, apply = _OURS[settings["type"]]
    own = config.model_validate(fields)
    needs = (load_tokenizer(folder),) if isinstance(own, LTuningConfig) else ()
    model: nn.Module = apply(base, own, *needs)
    tensors = load_file(Path(folder) / WEIGHTS_FILE)
    if (head := reward_head(base)) is not None:
        head.requires_grad_(True)
    wanted = {name for name, p in model.named_parameters() if p.requires_grad}
    wanted |= {name for name, _ in model.named_buffers() if base_name(name) is None}
    if wanted != set(tensors):
        raise ModelError("the adapter belongs to another model", got=folder, knob="model.adapter")
    model.load_state_dict(tensors, strict=False)
    return model.eval()
