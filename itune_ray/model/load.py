"""Models through transformers' Auto classes: pretrained, fresh, or empty on the meta device."""

import contextlib
import importlib.util
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from itune_ray.config.shared import ModelRef
from itune_ray.config.train import InitConfig
from itune_ray.data.batches import Masking
from itune_ray.data.hub import local_model_folder
from itune_ray.errors import ModelError, first_line
from itune_ray.model.documents import BY_DOCUMENT

Attention = Literal["eager", "sdpa", "flash_attention_2"]


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id to pad with: any id will do, since padding is masked and never a target."""
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(int(i) for i in candidates if i is not None)  # type: ignore[arg-type]


def choose_attention(wanted: Literal["auto", "eager", "sdpa", "flash_attention_2"], device: torch.device) -> Attention:
    """`auto` is flash attention on GPU where it is installed, else sdpa."""
    if wanted != "auto":
        return wanted
    flash = device.type == "cuda" and importlib.util.find_spec("flash_attn") is not None
    return "flash_attention_2" if flash else "sdpa"


def masking_for(model: Any) -> Masking:
    """How packed documents are kept apart in this model (see `data.batches`)."""
    config = model.config.get_text_config()
    if config._attn_implementation in ("flash_attention_2", BY_DOCUMENT):
        return "varlen"
    layers = getattr(config, "layer_types", None) or ()
    windowed = getattr(config, "sliding_window", None) is not None or "sliding_attention" in layers
    if windowed or any(kind != "full_attention" for kind in layers):
        return "positions"
    return "mask_4d_if_packed" if config._attn_implementation == "sdpa" else "mask_4d"


def can_pack(model: Any) -> bool:
    """Whether every layer is attention: recurrent layers would carry state from one document into the next."""
    layers = getattr(model.config.get_text_config(), "layer_types", None) or ()
    return all(kind in ("full_attention", "sliding_attention", "chunked_attention") for kind in layers)


def load_model(
    folder: str,
    *,
    dtype: torch.dtype,
    attention: Attention,
    trust_remote_code: bool = False,
    scalar: bool = False,
    sees: bool = False,
) -> PreTrainedModel:
    """A pretrained causal language model on CPU, in eval mode.

    Args:
        scalar: With a scalar head instead, which holds anything where the folder has none (see `model.reward`).
        sees: An image-text model, its vision tower included.
    """
    auto, labels = _auto(scalar, sees)
    try:
        return auto.from_pretrained(
            folder, dtype=dtype, attn_implementation=attention, trust_remote_code=trust_remote_code, **labels
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(f"the model cannot be loaded: {first_line(error)}", got=folder, knob="model.path") from None


def model_from_config(
    folder: str,
    *,
    dtype: torch.dtype,
    attention: Attention,
    trust_remote_code: bool = False,
    scalar: bool = False,
    sees: bool = False,
) -> PreTrainedModel:
    """The architecture of a folder's config.json, its weights not loaded; see `parameters_on_meta`.

    Args:
        scalar, sees: See `load_model`.
    """
    auto, labels = _auto(scalar, sees)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, **labels)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"the model's config is unusable: {first_line(error)}", got=folder) from None
    return auto.from_config(config, dtype=dtype, attn_implementation=attention, trust_remote_code=trust_remote_code)


def new_model(
    init: InitConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    dtype: torch.dtype,
    attention: Attention,
    scalar: bool = False,
) -> PreTrainedModel:
    """A fresh model, equal on every rank: its weights are a function of (config, tokenizer, seed)."""
    arguments = {k: v for k, v in init.config.items() if k != "model_type"}
    auto, labels = _auto(scalar)
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    try:
        config = AutoConfig.for_model(
            str(init.config.get("model_type")), **{"vocab_size": len(tokenizer), **special, **arguments, **labels}
        )
    except (ValueError, TypeError) as error:
        raise ModelError(f"the config makes no model: {first_line(error)}", knob="model.init.config") from None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return auto.from_config(config, dtype=dtype, attn_implementation=attention)


def _auto(scalar: bool, sees: bool = False) -> tuple[Any, dict[str, int]]:
    """The Auto class of a model with either head, and what its config needs."""
    if sees:
        return AutoModelForImageTextToText, {}
    return (AutoModelForSequenceClassification, {"num_labels": 1}) if scalar else (AutoModelForCausalLM, {})


def count_parameters(ref: ModelRef) -> int:
    """Parameters of a model from its config.json alone, tied weights once."""
    folder = local_model_folder(ref).path
    with parameters_on_meta():
        model = model_from_config(
            folder, dtype=torch.float32, attention="eager", trust_remote_code=ref.trust_remote_code
        )
    return sum(parameter.numel() for parameter in model.parameters())


@contextlib.contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Put parameters, but not buffers, that are created inside on the meta device, where they take no memory.

    Buffers such as rotary frequencies are computed in constructors and saved nowhere, so they must stay real.
    Parameters that are on meta already pass as they are: tying two modules registers one parameter twice.
    """
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(module, name, param)
        if param is not None and not param.is_meta:
            meta = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)
            module._parameters[name] = meta

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
