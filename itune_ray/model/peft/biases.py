"""BitFit: biases alone are trained, and added where a family's config knows them but the model has none."""

import copy

import torch
from torch import nn
from transformers.modeling_utils import PreTrainedModel

from itune_ray.errors import ModelError
from itune_ray.model.load import parameters_on_meta

_FLAGS = ("attention_bias", "mlp_bias")
"""Config fields that give linear layers a bias."""


def apply_bitfit(model: PreTrainedModel) -> nn.Module:
    """Freeze all but biases, in place; added ones are zero, so nothing changes at the start."""
    _add_biases(model)
    model.requires_grad_(False)
    biases = [parameter for name, parameter in model.named_parameters() if name.endswith(".bias")]
    if not biases:
        raise ModelError(
            "this family has no biases, and its config none to add",
            got=model.config.model_type,
            allowed=f"a config with {' or '.join(_FLAGS)}, or biases of its own",
            knob="model.peft.type",
        )
    for bias in biases:
        bias.requires_grad_(True)
    return model


def _add_biases(model: PreTrainedModel) -> None:
    config = copy.deepcopy(model.config)
    added = [flag for flag in _FLAGS if getattr(config, flag, None) is False]
    for flag in added:
        setattr(config, flag, True)
    with parameters_on_meta():
        grown = type(model)(config)
    present = dict(model.named_parameters())
    for name, parameter in grown.named_parameters():
        if name in present:
            continue
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        weight = next(module.parameters())
        zeros = torch.zeros(parameter.shape, dtype=weight.dtype, device=weight.device)
        module.register_parameter(leaf, nn.Parameter(zeros))
    for flag in added:
        setattr(model.config, flag, True)
