"""Compiled layers are compiled before the first step."""

from itune_ray.data.batches import Batch
from itune_ray.errors import TrainError
from itune_ray.train.step import Stepper


def compile_ahead(stepper: Stepper, batch: Batch) -> None:
    """Pass a dummy as wide as batches get through the model, so that a run and its resumption compile for the same
    sizes, whichever row they meet first. Collective.

    Raises:
        TrainError: The layers cannot be compiled, or there is no compiler.
    """
    from torch._dynamo.exc import TorchDynamoException

    try:
        stepper.rehearse(batch)
    except TorchDynamoException as error:
        raise TrainError(
            f"the model's layers cannot be compiled: {' '.join(str(error).split())[:400]}",
            allowed="compile=false, or a C++ compiler (g++, or CXX) on every node",
            knob="compile",
        ) from error
