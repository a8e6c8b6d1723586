"""Methods of the `peft` library by name: anything that changes layers in place and can be merged."""

import inspect
from typing import Any

import peft
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import nn
from transformers.modeling_utils import PreTrainedModel

from itune_ray.config.adaptation import PeftLibraryConfig
from itune_ray.errors import ModelError, did_you_mean, first_line
from itune_ray.model.peft.names import ADAPTER


def apply_library(model: PreTrainedModel, config: PeftLibraryConfig) -> nn.Module:
    """Wrap the model by the library's method.

    Raises:
        ModelError: An argument the method does not have, or one it cannot use on this model.
    """
    kind: Any = PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(config.method)]
    known = sorted(set(inspect.signature(kind).parameters) - {"peft_type", "task_type", "inference_mode"})
    for name in config.args:
        if name not in known:
            raise ModelError(
                f"{config.method} has no such argument{did_you_mean(name, known)}",
                got=name,
                allowed=", ".join(known),
                knob="model.peft.args",
            )
    arguments = {"task_type": peft.TaskType.CAUSAL_LM, **config.args}
    try:
        try:
            return peft.get_peft_model(model, kind(**arguments), adapter_name=ADAPTER)
        except ValueError as error:
            if "target_modules" in config.args or "target_modules" not in str(error):
                raise
            return peft.get_peft_model(model, kind(**arguments, target_modules="all-linear"), adapter_name=ADAPTER)
    except (ValueError, TypeError, AssertionError) as error:
        raise ModelError(
            f"{config.method} cannot be applied: {first_line(error)}", got=config.args, knob="model.peft.args"
        ) from None
